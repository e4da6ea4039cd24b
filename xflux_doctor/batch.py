"""The effective batch: how many samples one optimizer step sees, and what keeps it when the ranks change. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from xflux_trainer.config import RANGES

from xflux_doctor.finding import Change, Edit
from xflux_doctor.job import Job

_ACCUMULATION = "gradient_accumulation_steps"
SECTION = ("deepspeed_config", _ACCUMULATION)


class Kept(msgspec.Struct, frozen=True):
    """Edits that go with another number of ranks."""

    edits: tuple[Change, ...] = ()
    offers: tuple[Change, ...] = ()
    words: str = ""


def accumulation(job: Job) -> int:
    """Passes per step as they will happen: under DeepSpeed accelerate's value (or the JSON's) wins over the training
    file's (accelerate 0.30.1 and 1.15.0, utils/launch.py: ACCELERATE_GRADIENT_ACCUMULATION_STEPS)."""
    places = [job.training(_ACCUMULATION)]
    if job.deepspeed:
        places = [(job.zero_file or {}).get(_ACCUMULATION), job.section(SECTION[0]).get(_ACCUMULATION), *places]
    return next((value for value in places if _count(value)), 1)


def keep(job: Job, ranks: int) -> Kept:
    """What keeps the samples of one step when the job runs on `ranks` ranks instead of its num_processes."""
    before, steps = job.num_processes, accumulation(job)
    if ranks == before or ranks < 1:
        return Kept()
    size = job.training("train_batch_size")
    size = size if _count(size) else 1
    low, high = RANGES[_ACCUMULATION]
    wanted = before * steps / ranks
    new = int(min(max(round(wanted), low), high))
    places = accumulation_places(job)
    old_total, total = before * steps * size, ranks * new * size
    if new == steps:
        same = total == old_total
        return Kept(words="" if same else f"A step then sees {total} samples instead of {old_total}.")
    if not places:
        return Kept(words=f"To keep {old_total} samples a step, set {_ACCUMULATION} to {new}.")
    reason = f"{before} x {size} x {steps} samples a step become {ranks} x {size} x {new}"
    edits = tuple(Edit(file, key, new, reason) for file, key in places)
    if total == old_total:
        return Kept(edits, (), f"With {_ACCUMULATION} {new} a step still sees {total} samples.")
    return Kept(edits, _rate(job, total / old_total), f"{old_total} samples a step do not divide by {ranks}: the "
                f"nearest is {total}, with {_ACCUMULATION} {new}.")  # fmt: skip


def _rate(job: Job, ratio: float) -> tuple[Change, ...]:
    """The learning rate in the proportion of the batch (Goyal et al. 2017, arXiv:1706.02677, linear scaling rule)."""
    rate = job.training("learning_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate:
        return ()
    reason = f"in proportion to the samples a step ({ratio:.3f})"
    return (Edit("train", ("learning_rate",), float(f"{rate * ratio:.4g}"), reason),)


def accumulation_places(job: Job) -> list[tuple[str, tuple[str, ...]]]:
    """Every file and key that holds the number, or where it belongs."""
    found: list[tuple[str, tuple[str, ...]]] = []
    if job.deepspeed:
        if job.zero_file is not None:
            if _count(job.zero_file.get(_ACCUMULATION)):
                found.append(("deepspeed", (_ACCUMULATION,)))
        elif isinstance(job.get(SECTION[0]), dict) and job.section(SECTION[0]).get(_ACCUMULATION) != "auto":
            found.append(("accelerate", SECTION))
    if job.train is not None or (job.xflux is not None and job.xflux.config is not None):
        found.append(("train", (_ACCUMULATION,)))
    return found


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
