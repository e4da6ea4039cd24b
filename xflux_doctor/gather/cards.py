"""One GPU by NVML: what it is, who holds its memory, its condition, its MIG slices.

Only the basic calls may fail the card; every other call that an old driver or another card lacks leaves its own
field empty and costs nothing else. `nvml` is the module pynvml: its bindings have no types.
"""

from __future__ import annotations

import functools
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from xflux_doctor.facts import Gpu, GpuHealth, GpuProcess, MigSlice

T = TypeVar("T")
_COMPUTE_MODES = {0: "default", 1: "exclusive_thread", 2: "prohibited", 3: "exclusive_process"}
_FABRIC = {0: "not_supported", 1: "not_started", 2: "in_progress", 3: "completed"}
_RECOVERY_FIELD = 230
"""NVML_FI_DEV_GET_GPU_RECOVERY_ACTION."""
_RECOVERY = (
    "none",
    "gpu_reset",
    "node_reboot",
    "drain_p2p",
    "drain_and_reset",
    "recover_imex_domain",
    "bus_reset",
    "system_reboot",
)
_CLOCKS = {
    0x1: "idle",
    0x2: "application_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
    0x100: "display",
}
"""nvmlClocksEventReason…: why the clocks are not the highest."""
_MOST_LINKS = 36


def gpu_facts(nvml: Any, index: int, *, links: bool = True) -> Gpu:
    """Raises NVMLError when the card itself does not answer. `links`: whether to count the NVLinks, for 2 ms."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    mig = maybe(lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
    mode = maybe(lambda: nvml.nvmlDeviceGetComputeMode(handle))
    return Gpu(
        index=index,
        uuid=text(nvml.nvmlDeviceGetUUID(handle)),
        name=text(nvml.nvmlDeviceGetName(handle)),
        memory_total=int(memory.total),
        memory_free=int(memory.free),
        capability=_capability(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        pci=text(nvml.nvmlDeviceGetPciInfo(handle).busId),
        mig=None if mig is None else bool(mig),
        compute_mode=_COMPUTE_MODES.get(mode, "") if mode is not None else "",
        processes=tuple(process_facts(p.pid, p.usedGpuMemory) for p in _running(nvml, handle)),
        health=_health(nvml, handle),
        slices=tuple(_slices(nvml, handle)) if mig else (),
        nvlinks=_links(nvml, handle) if links else None,
    )


def _running(nvml: Any, handle: Any) -> list[Any]:
    """Drivers before 510 have only the second form of the call; then pynvml raises what is no NVMLError."""
    found = maybe(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    if found is None:
        found = maybe(lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle))
    return found or []


def process_facts(pid: int, used: int | None, root: Path = Path("/")) -> GpuProcess:
    """Name, owner and age of a process, as far as /proc shows it from inside this container."""
    folder = root / "proc" / str(pid)
    try:
        name = (folder / "comm").read_text().strip()
        status = folder.stat()
        ticks = float((folder / "stat").read_text().rpartition(")")[2].split()[19])
        uptime = float((root / "proc/uptime").read_text().split()[0])
    except (OSError, IndexError, ValueError):
        return GpuProcess(pid, used)
    try:
        user = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        user = str(status.st_uid)
    return GpuProcess(pid, used, name, user, max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK")))


def _health(nvml: Any, handle: Any) -> GpuHealth:
    ecc = maybe(lambda: nvml.nvmlDeviceGetEccMode(handle))
    rows = maybe(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    # 1, 0: uncorrected errors, counted since the driver was loaded.
    errors = maybe(lambda: int(nvml.nvmlDeviceGetTotalEccErrors(handle, 1, 0))) if ecc and ecc[0] else None
    retired = maybe(lambda: bool(nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle))) if rows is None else None
    return GpuHealth(
        ecc=bool(ecc[0]) if ecc else None,
        ecc_pending=bool(ecc[1]) if ecc else None,
        ecc_uncorrected=errors,
        remap_pending=bool(rows[2]) if rows else None,
        remap_failed=bool(rows[3]) if rows else None,
        retirement_pending=retired,
        recovery_action=_recovery(nvml, handle),
        throttle=throttle(nvml, handle),
        persistence=maybe(lambda: bool(nvml.nvmlDeviceGetPersistenceMode(handle))),
        fabric=_fabric(nvml, handle),
        pcie_width=maybe(lambda: int(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle))),
        pcie_width_max=maybe(lambda: int(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))),
        temperature=maybe(lambda: int(nvml.nvmlDeviceGetTemperature(handle, 0))),
    )


def _recovery(nvml: Any, handle: Any) -> str:
    """Drivers before 570 do not know the field and say so inside its value."""
    values = maybe(lambda: nvml.nvmlDeviceGetFieldValues(handle, [_RECOVERY_FIELD]))
    if not values or values[0].nvmlReturn != 0:
        return ""
    number = int(values[0].value.uiVal)
    return _RECOVERY[number] if number < len(_RECOVERY) else f"action {number}"


def throttle(nvml: Any, handle: Any) -> tuple[str, ...]:
    """Why the clocks are not the highest; empty: the driver does not tell."""
    mask = maybe(lambda: int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)))
    if mask is None:  # its name before driver 535
        mask = maybe(lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))
    if mask is None:
        return ()
    return tuple(name for bit, name in _CLOCKS.items() if mask & bit) or ("none",)


def _fabric(nvml: Any, handle: Any) -> str:
    """State of the NVSwitch fabric; `failed`: it was set up and that ended in an error."""

    def ask() -> Any:
        info = nvml.c_nvmlGpuFabricInfoV_t()
        nvml.nvmlDeviceGetGpuFabricInfoV(handle, nvml.byref(info))
        return info

    info = maybe(ask)
    if info is None:
        return ""
    state = _FABRIC.get(int(info.state), "")
    return "failed" if state == "completed" and int(info.status) != 0 else state


def _links(nvml: Any, handle: Any) -> int | None:
    """NVLinks that are up; the driver refuses the first link that the card does not have."""
    states: list[bool] = []
    while len(states) < _MOST_LINKS:
        link = len(states)
        state = maybe(functools.partial(nvml.nvmlDeviceGetNvLinkState, handle, link))
        if state is None:
            break
        states.append(bool(state))
    return sum(states) if states else None


def _slices(nvml: Any, handle: Any) -> list[MigSlice]:
    """The MIG devices of a card. Numbers may have gaps: a slice that is gone leaves its number free."""
    found = []
    for number in range(maybe(lambda: int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle))) or 0):

        def ask(number: int = number) -> MigSlice:
            mig = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            memory = nvml.nvmlDeviceGetMemoryInfo(mig)
            name = text(nvml.nvmlDeviceGetName(mig))
            return MigSlice(text(nvml.nvmlDeviceGetUUID(mig)), name, int(memory.total), int(memory.free))

        if (slice_ := maybe(ask)) is not None:
            found.append(slice_)
    return found


def maybe(ask: Callable[[], T]) -> T | None:
    """The answer, or None: an old driver lacks the call, an old pynvml its name, the card the feature."""
    try:
        return ask()
    except Exception:  # noqa: BLE001 - pynvml raises its own kinds, not all of them NVMLError
        return None


def _capability(pair: Any) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
