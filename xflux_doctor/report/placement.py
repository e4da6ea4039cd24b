"""The launch plan: what will run where, in words and as values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xflux_doctor.check import Case
from xflux_doctor.facts import Gpu
from xflux_doctor.job import Job
from xflux_doctor.placement import Placement, Rank, place

GIB = 1 << 30
_SHOWN = 16
"""Ranks of one machine that are listed one by one."""
_STRATEGIES = {"single": "one process", "ddp": "DDP", "fsdp": "FSDP"}


def lines(case: Case) -> Iterator[str]:
    """Rank → machine → device, with its memory; then who decided what the files did not."""
    placed = place(case.job, case.facts)
    yield f"launch: {_headline(case.job, placed)}"
    if placed.refusal:
        yield f"  refused by the launcher: {placed.refusal}"
        return
    where = f"machine {placed.machine_rank} " if placed.machines > 1 else ""
    for rank in placed.ranks[:_SHOWN]:
        yield f"  rank {rank.rank:<3} {where}{_device(case, rank)}"
    if len(placed.ranks) > _SHOWN:
        yield f"  and {len(placed.ranks) - _SHOWN} more"
    others = placed.world_size - len(placed.ranks)
    if others > 0:
        yield f"  {others} more on {placed.machines - 1} other machine{'s' if placed.machines > 2 else ''}"
    if placed.idle:
        yield f"  without a rank: {', '.join(_card(gpu) for gpu in placed.idle)}"
    yield from (f"  {note}" for note in uneven(placed))
    for key, override in case.job.overrides.items():
        yield f"  {key} is {override.value} by {override.source}"


def values(case: Case) -> dict[str, Any]:
    """The same for programs."""
    placed = place(case.job, case.facts)
    return {
        "launcher": placed.launcher,
        "strategy": case.job.strategy,
        "world_size": placed.world_size,
        "machines": placed.machines,
        "machine_rank": placed.machine_rank,
        "address": placed.address,
        "visible_devices": placed.visible_devices,
        "ranks": [
            {"rank": r.rank, "local_rank": r.local_rank, "gpu": r.device.index if r.device else None,
             "uuid": r.device.uuid if r.device else None}
            for r in placed.ranks
        ],
        "idle": [gpu.index for gpu in placed.idle],
        "refusal": placed.refusal,
        "failure": placed.failure,
        "overrides": {key: {"value": o.value, "source": o.source} for key, o in case.job.overrides.items()},
    }  # fmt: skip


def uneven(placed: Placement) -> Iterator[str]:
    """Why the ranks' cards do not have the same room, which shows as uneven memory in nvidia-smi."""
    cards = [rank.device for rank in placed.ranks if rank.device is not None]
    if len({gpu.index for gpu in cards}) < 2:
        return
    least = min(cards, key=lambda gpu: gpu.memory_total)
    if len({gpu.memory_total >> 30 for gpu in cards}) > 1:
        yield f"the cards differ: the smallest, {_card(least)}, decides what every rank may use"
    for gpu in cards:
        more = gpu.memory_used - min(other.memory_used for other in cards)
        if more > GIB:
            held = ", ".join(f"{p.name or 'process'} {p.pid}" for p in gpu.processes) or "processes not visible here"
            yield f"GPU {gpu.index} shows {more / GIB:.1f} GiB more than the others, held by {held}"


def _headline(job: Job, placed: Placement) -> str:
    ranks = f"{placed.world_size} rank{'s' if placed.world_size > 1 else ''}"
    strategy = _STRATEGIES.get(job.strategy, f"DeepSpeed ZeRO-{job.zero_stage}")
    machines = f" on {placed.machines} machines" if placed.machines > 1 else ""
    meeting = f", meeting at {placed.address}" if placed.address else ""
    return f"{ranks}{machines}, {strategy}, started by {placed.launcher}{meeting}"


def _device(case: Case, rank: Rank) -> str:
    if case.job.use_cpu:
        return "→ CPU"
    if rank.device is None:
        return "→ no device" if case.facts.gpus is not None else "→ a GPU (unknown here)"
    gpu = rank.device
    return f"→ {_card(gpu)}, {gpu.memory_free / GIB:.1f} of {gpu.memory_total / GIB:.1f} GiB free"


def _card(gpu: Gpu) -> str:
    return f"GPU {gpu.index} {gpu.name}"
