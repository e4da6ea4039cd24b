"""All GPUs and the driver by NVML, the driver's own library: no CUDA context is made.

A card that does not answer is a `LostGpu` and does not hide the others.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from pathlib import Path
from typing import Any

from xflux_doctor.facts import Driver, Gpu, LostGpu, Topology
from xflux_doctor.gather.cards import gpu_facts, maybe, text
from xflux_doctor.gather.driver import library_version, module_version, pci_addresses, same_place
from xflux_doctor.gather.topology import topology

DENIED = "denied to this user or container"
"""The reason of a card that is somebody else's, as under a batch system; such a card is not broken."""
_NO_LIBRARY = "there is no NVIDIA driver library (libnvidia-ml.so.1) on this machine or in this container"


class NvmlReading:
    """What one visit to NVML brought. `error` is empty when `gpus` is complete."""

    def __init__(self, error: str = "") -> None:
        self.driver: Driver | None = None
        self.gpus: tuple[Gpu, ...] | None = None
        self.lost: tuple[LostGpu, ...] = ()
        self.topology: Topology | None = None
        self.error = error
        self.start_seconds = 0.0
        self.seconds = 0.0


class Visit:
    """NVML is asked in a thread: a GPU that fell off the bus can block a call for ever, and must not block us.

    Every card costs the driver some 15 ms; what else is gathered meanwhile is gathered for nothing.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._reading = NvmlReading()
        self._thread = threading.Thread(target=_read, args=(self._reading, root), daemon=True)
        self._thread.start()

    def result(self, deadline: float = 10.0) -> NvmlReading:
        self._thread.join(deadline)
        if not self._thread.is_alive():
            return self._reading
        late = NvmlReading()
        late.error = f"NVML did not answer within {deadline:.0f} s: a GPU or the driver hangs"
        late.start_seconds, late.seconds = self._reading.start_seconds, deadline
        return late


_AHEAD: list[Visit] = []
"""A visit that was begun before its result was asked for."""


def ahead() -> None:
    """Begin a visit: while the command's modules load, the driver starts."""
    _AHEAD[:] = [Visit()]


def forget() -> None:
    """What was begun is not asked for: a later look must see what is there by then."""
    _AHEAD.clear()


def visit() -> Visit:
    """The one that was begun, else a new one."""
    return _AHEAD.pop() if _AHEAD else Visit()


def read(deadline: float = 10.0, root: Path = Path("/")) -> NvmlReading:
    return Visit(root).result(deadline)


def _read(reading: NvmlReading, root: Path) -> None:
    began = time.perf_counter()
    try:
        _ask(reading, root)
    finally:
        reading.seconds = time.perf_counter() - began


def _ask(reading: NvmlReading, root: Path) -> None:
    started = time.perf_counter()
    try:
        if not _has_library():
            reading.error = _NO_LIBRARY
            return
        # Loaded here: 40 ms that neither recorded facts nor a machine without a driver need.
        nvml: Any = importlib.import_module("pynvml")
        started = time.perf_counter()
        nvml.nvmlInit()
    except Exception as error:  # noqa: BLE001 - a foreign pynvml may raise anything
        reading.error = _start_error(error, root)
        return
    finally:
        reading.start_seconds = time.perf_counter() - started
    try:
        version = text(nvml.nvmlSystemGetDriverVersion())
        reading.driver = Driver(version, _cuda(nvml), module_version(root), library_version(root, os.environ))
        reading.gpus, reading.lost = _cards(nvml, nvml.nvmlDeviceGetCount(), root)
        reading.topology = topology(nvml, tuple(gpu.index for gpu in reading.gpus), root)
    except Exception as error:  # noqa: BLE001
        reading.error = f"NVML failed while it read the GPUs: {str(error).rstrip('.')}"
    finally:
        maybe(nvml.nvmlShutdown)


def _has_library() -> bool:
    """By the call that pynvml makes itself; what is loaded once costs it nothing."""
    ctypes: Any = importlib.import_module("ctypes")
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _cards(nvml: Any, count: int, root: Path) -> tuple[tuple[Gpu, ...], tuple[LostGpu, ...]]:
    found: list[Gpu] = []
    lost: list[LostGpu] = []
    for index in range(count):
        try:
            found.append(gpu_facts(nvml, index, links=count > 1))
        except nvml.NVMLError as error:
            lost.append(LostGpu(index, _reason(error), _address(nvml, index)))
    seen = {same_place(gpu.pci) for gpu in found} | {same_place(card.pci) for card in lost if card.pci}
    left = [address for address in pci_addresses(root) if same_place(address) not in seen]
    nameless = [card for card in lost if not card.pci]
    if len(left) == len(nameless):  # both are in PCI order
        places = {card.index: address for card, address in zip(nameless, left, strict=True)}
        lost = [LostGpu(card.index, card.reason, card.pci or places[card.index]) for card in lost]
    return tuple(found), tuple(lost)


def _address(nvml: Any, index: int) -> str:
    """A lost card often still tells its handle and its place."""
    handle = maybe(lambda: nvml.nvmlDeviceGetHandleByIndex(index))
    return "" if handle is None else maybe(lambda: text(nvml.nvmlDeviceGetPciInfo(handle).busId)) or ""


_CARD_REASONS = {
    4: DENIED,
    15: "it has fallen off the bus (GPU is lost)",
    16: "it wants a reset (GPU requires reset)",
    10: "it does not answer in time",
    999: "the driver says Unknown Error",
}
"""By NVML's return codes: NO_PERMISSION, GPU_IS_LOST, RESET_REQUIRED, TIMEOUT, UNKNOWN."""


def _reason(error: Exception) -> str:
    return _CARD_REASONS.get(getattr(error, "value", -1), str(error))


def _start_error(error: Exception, root: Path) -> str:
    """One sentence why NVML did not start, by its return code."""
    code = getattr(error, "value", None)
    if code == 12:  # LIBRARY_NOT_FOUND
        return _NO_LIBRARY
    if code == 9:  # DRIVER_NOT_LOADED
        return "the NVIDIA kernel module is not loaded"
    if code == 18:  # LIB_RM_VERSION_MISMATCH
        module, library = module_version(root), library_version(root, os.environ)
        versions = f": library {library}, kernel module {module}" if module and library else ""
        return f"driver and library versions differ (the driver was upgraded without a reboot{versions})"
    if code == 4:  # NO_PERMISSION
        return "no permission to talk to the NVIDIA driver"
    if code == 999:
        return "NVML did not start: Unknown Error"
    return f"NVML did not start: {str(error).rstrip('.')}"


def _cuda(nvml: Any) -> str:
    number = maybe(nvml.nvmlSystemGetCudaDriverVersion_v2)
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""
