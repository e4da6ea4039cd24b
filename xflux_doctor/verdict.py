"""What a card must have free for a forecast of allocated tensors, and whether it has: fits, tight, does not fit."""

from __future__ import annotations

import math
from typing import Any

from xflux_trainer.memory import Bill

from xflux_doctor.facts import Host

RESERVED = 0.02
"""What PyTorch's allocator keeps beyond the peak of its tensors: rounding and holes. 0.3 to 2 % were measured in steps
of the bundled trainer on an H200; x-flux#12 leaves 2.5 %. It keeps more where nothing is short, and gives that back."""
TIGHT, FITS = 97, 100
"""Percent of the limit up to which a job fits with room for the forecast's own error, and up to which it fits at all:
between the two it is tight."""


LAUNCHER = 250 << 20
"""`accelerate launch`, which imports torch, and the doctor. Measured: 185 MiB by torch 2.13 and 310 by torch 2.4."""


def host_room(host: Host) -> tuple[int, int]:
    """Bytes that all processes of this container, or host, may hold, and what they hold already; 0: not known."""
    limit = min((size for size in (host.memory_limit, host.memory_total) if size), default=0)
    return limit, host.memory_held or 0 if limit == host.memory_limit else 0


def reserved(allocated: int, holes: int = 0) -> int:
    """Bytes that `torch.cuda.max_memory_reserved` will show where memory is short. `holes`: between weights."""
    return math.ceil(allocated * (1 + RESERVED)) + holes


def held(allocated: int, context: int, holes: int = 0) -> int:
    """Bytes that NVML will show of the process, where memory is short."""
    return reserved(allocated, holes) + context


def held_by(bill: Bill) -> int:
    """The same of the bundled trainer's bill."""
    return held(bill.gpu_allocated, bill.gpu_context, bill.gpu_holes)


def fitting(device_bytes: int, limit: int) -> str:
    """The verdict on what a process holds of a card, as NVML shows it, against what it may hold."""
    if 100 * device_bytes > FITS * limit:
        return "does not fit"
    return "tight" if 100 * device_bytes > TIGHT * limit else "fits"


def gpu_entry(terms: dict[str, int], context: int, limit: int | None, holes: int = 0) -> dict[str, Any]:
    """One GPU of a plan's JSON, in bytes; without a limit there is no verdict."""
    peak = sum(terms.values())
    device = held(peak, context, holes)
    return {
        "terms": terms,
        "peak_bytes": peak,
        "reserved_bytes": device - context,
        "context_bytes": context,
        "device_bytes": device,
        "limit_bytes": limit,
        "verdict": None if limit is None else fitting(device, limit),
    }
