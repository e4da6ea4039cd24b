"""One card's clocks, heat and power at this moment, by NVML. A driver that hangs is left behind."""

from __future__ import annotations

import importlib
from typing import Any

from xflux_doctor.facts import Reading
from xflux_doctor.gather.cards import maybe, throttle
from xflux_doctor.gather.deadline import within

SECONDS = 1.0
_SM = 1
"""NVML_CLOCK_SM."""


def reading(uuid: str) -> Reading | None:
    """Of the card or slice of that UUID, with or without NVML's prefix; None: it does not tell in time."""
    if not uuid:
        return None
    return within(SECONDS, {"card": lambda: _ask(uuid)}).get("card")


def _ask(uuid: str) -> Reading | None:
    nvml: Any = maybe(lambda: importlib.import_module("pynvml"))
    if nvml is None or maybe(lambda: nvml.nvmlInit() or True) is None:
        return None
    try:
        names = (uuid,) if uuid.startswith(("GPU-", "MIG-")) else (f"GPU-{uuid}", f"MIG-{uuid}")
        handle = next((found for name in names if (found := _handle(nvml, name)) is not None), None)
        return None if handle is None else _read(nvml, handle)
    finally:
        maybe(nvml.nvmlShutdown)


def _handle(nvml: Any, name: str) -> Any:
    """Of pynvml's releases some want the name as bytes."""
    found = maybe(lambda: nvml.nvmlDeviceGetHandleByUUID(name))
    return found if found is not None else maybe(lambda: nvml.nvmlDeviceGetHandleByUUID(name.encode()))


def _read(nvml: Any, handle: Any) -> Reading:
    return Reading(
        sm_clock=maybe(lambda: int(nvml.nvmlDeviceGetClockInfo(handle, _SM))),
        sm_clock_max=maybe(lambda: int(nvml.nvmlDeviceGetMaxClockInfo(handle, _SM))),
        temperature=maybe(lambda: int(nvml.nvmlDeviceGetTemperature(handle, 0))),
        power=maybe(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        power_limit=maybe(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
        throttle=throttle(nvml, handle),
    )
