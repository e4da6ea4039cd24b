"""DA: the images, their captions, and the folder that the run writes to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from xflux_doctor.bill import dataset as samples_of
from xflux_doctor.bill import need
from xflux_doctor.check import Case, check
from xflux_doctor.finding import Finding, error, warning

GIB = 1 << 30
_SHOWN = 5


@check("DA101", "the dataset can be read", needs=("train",))
def dataset(case: Case) -> Iterator[Finding]:
    """The folder exists and holds images; each has a caption and is whole. Found without decoding."""
    assert case.job.train is not None
    index = samples_of(case.job.train.img_dir, case.job.train.caption_type)
    for problem in index.problems[:_SHOWN]:
        seen = f"{problem.path}: {problem.seen}"
        yield error(f"{seen.rstrip('.')}.", "The trainer stops at this file.", problem.hint)
    if len(index.problems) > _SHOWN:
        more = len(index.problems) - _SHOWN
        yield error(f"{more} more files of the dataset have a fault.", "The trainer stops at them.", "Repair them.")
    batch = case.job.train.train_batch_size * max(1, case.job.num_processes)
    if index.samples and len(index.samples) < batch:
        yield warning(
            f"{len(index.samples)} images; one step over all ranks takes {batch}.",
            "Images repeat inside a step.",
            "Lower train_batch_size, start fewer ranks, or add images.",
        )


@check("DA102", "the output folder can be written", needs=("train",))
def output_writable(case: Case) -> Iterator[Finding]:
    """The nearest existing parent of output_dir lets this user write and has the room that the run needs."""
    assert case.job.train is not None
    target = Path(case.job.train.output_dir).absolute()
    parent = next(p for p in (target, *target.parents) if p.exists())
    if not parent.is_dir():
        yield error(f"{parent} is a file.", "output_dir cannot be made there.", "Choose another output_dir.")
        return
    if not os.access(parent, os.W_OK | os.X_OK):
        yield error(
            f"{parent} cannot be written by this user.",
            "No checkpoint could be saved.",
            "Choose another output_dir, or give yourself the right to write.",
        )
        return
    stat = os.statvfs(parent)
    free = stat.f_bavail * stat.f_frsize
    wanted = need(case).disk_total
    if wanted > free:
        yield error(
            f"The run writes about {wanted / GIB:.1f} GiB; {parent} has {free / GIB:.1f} GiB free.",
            "It ends in 'No space left on device' while a checkpoint is saved.",
            "Free some room, choose another output_dir, or keep fewer checkpoints (checkpoints_total_limit).",
        )
