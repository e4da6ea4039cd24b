"""GPUs, driver and who holds their memory, by NVML: no CUDA context is made.

A call that an old driver does not know leaves its own field empty and costs nothing else.
"""

from __future__ import annotations

import importlib
import os
import pwd
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from xflux_doctor.facts import Driver, Gpu, GpuProcess

T = TypeVar("T")
_COMPUTE_MODES = {0: "default", 1: "exclusive_thread", 2: "prohibited", 3: "exclusive_process"}


class NvmlReading:
    """What one visit to NVML brought. `error` is empty when `gpus` is complete."""

    def __init__(self) -> None:
        self.driver: Driver | None = None
        self.gpus: tuple[Gpu, ...] | None = None
        self.error = ""
        self.start_seconds = 0.0


def read(deadline: float = 10.0) -> NvmlReading:
    """Ask NVML in a thread: a GPU that fell off the bus can block a call for ever, and must not block us."""
    reading = NvmlReading()
    thread = threading.Thread(target=_read, args=(reading,), daemon=True)
    thread.start()
    thread.join(deadline)
    if thread.is_alive():
        late = NvmlReading()
        late.error = f"NVML did not answer within {deadline:.0f} s: a GPU or the driver hangs"
        return late
    return reading


def _read(reading: NvmlReading) -> None:
    # Loaded here: 40 ms that recorded facts do not need.
    pynvml: Any = importlib.import_module("pynvml")

    started = time.perf_counter()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        reading.error = _start_error(pynvml, error)
        return
    finally:
        reading.start_seconds = time.perf_counter() - started
    try:
        reading.driver = Driver(_text(pynvml.nvmlSystemGetDriverVersion()), _cuda(pynvml))
        reading.gpus = tuple(_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        reading.error = f"NVML failed while it read the GPUs: {error}"
    finally:
        pynvml.nvmlShutdown()


def _start_error(pynvml: Any, error: Exception) -> str:
    code = getattr(error, "value", None)
    if code == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "there is no NVIDIA driver library (libnvidia-ml.so.1) on this machine or in this container"
    if code == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return "the NVIDIA kernel module is not loaded"
    if code == getattr(pynvml, "NVML_ERROR_LIB_RM_VERSION_MISMATCH", -1):
        return "driver and library versions differ (the driver was upgraded without a reboot)"
    if code == pynvml.NVML_ERROR_NO_PERMISSION:
        return "no permission to talk to the NVIDIA driver"
    return f"NVML did not start: {error}"


def _gpu(pynvml: Any, index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    mig = _maybe(pynvml, lambda: pynvml.nvmlDeviceGetMigMode(handle)[0])
    mode = _maybe(pynvml, lambda: pynvml.nvmlDeviceGetComputeMode(handle))
    running = _maybe(pynvml, lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    return Gpu(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_total=int(memory.total),
        memory_free=int(memory.free),
        capability=_capability(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        pci=_text(pynvml.nvmlDeviceGetPciInfo(handle).busId),
        mig=None if mig is None else bool(mig),
        compute_mode=_COMPUTE_MODES.get(mode, "") if mode is not None else "",
        processes=tuple(process_facts(p.pid, p.usedGpuMemory) for p in running),
    )


def process_facts(pid: int, used: int | None) -> GpuProcess:
    """Name, owner and age of a process, as far as /proc shows it from inside this container."""
    folder = Path("/proc") / str(pid)
    try:
        name = (folder / "comm").read_text().strip()
        status = folder.stat()
        ticks = float((folder / "stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError, ValueError):
        return GpuProcess(pid, used)
    try:
        user = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        user = str(status.st_uid)
    return GpuProcess(pid, used, name, user, max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK")))


def _maybe(pynvml: Any, ask: Callable[[], T]) -> T | None:
    try:
        return ask()
    except pynvml.NVMLError:
        return None


def _cuda(pynvml: Any) -> str:
    number = _maybe(pynvml, pynvml.nvmlSystemGetCudaDriverVersion_v2)
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _capability(pair: Any) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
