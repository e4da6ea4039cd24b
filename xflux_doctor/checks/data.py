"""DA: the images, their captions, and the folder that the run writes to."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_trainer import samples

from xflux_doctor.bill import dataset as survey_of
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.room import GIB, of_output
from xflux_doctor.finding import Finding, error, warning

_SHOWN = 5


@check("DA101", "the dataset can be read (of more than 1,000 images, 1,000 are opened)", needs=("train",))
def dataset(case: Case) -> Iterator[Finding]:
    """Images are there, each with a caption and whole. All names are looked at; the trainer opens every file."""
    assert case.job.train is not None
    survey = survey_of(case)
    for problem in survey.problems[:_SHOWN]:
        seen = f"{samples.shown(problem.path)}: {problem.seen}"
        yield error(f"{seen.rstrip('.')}.", "The trainer stops at this file.", problem.hint)
    if len(survey.problems) > _SHOWN:
        more = len(survey.problems) - _SHOWN
        yield error(f"{more} more files of the dataset have a fault.", "The trainer stops at them.", "Repair them.")
    total = survey.count + len(survey.problems)
    if survey.problems and survey.opened < total:
        yield warning(
            f"{survey.opened:,} of {total:,} images were opened, evenly spread.",
            "The others may have faults of the same kind.",
            "Repair all that were made the same way.",
        )
    batch = case.job.train.train_batch_size * max(1, case.job.num_processes)
    if survey.count and survey.count < batch:
        yield warning(
            f"{survey.count} images; one step over all ranks takes {batch}.",
            "Images repeat inside a step.",
            "Lower train_batch_size, start fewer ranks, or add images.",
        )


@check("DA102", "the output folder can be written", needs=("train", "folders"))
def output_writable(case: Case) -> Iterator[Finding]:
    """The nearest existing parent of output_dir lets this user write and has the room that the run needs."""
    folder = (case.facts.folders or {}).get("output")
    if folder is None or folder.error:
        raise SkipCheck("the output folder did not answer (see ST101)" if folder else "output_dir was not looked at")
    parent = folder.existing
    if folder.is_file:
        yield error(f"{parent} is a file.", "output_dir cannot be made there.", "Choose another output_dir.")
        return
    if folder.read_only or not folder.writable:
        who = f": {folder.mount} is mounted read-only" if folder.read_only else " by this user"
        right = "" if folder.read_only else ", or give yourself the right to write"
        yield error(
            f"{parent} cannot be written{who}.", "No checkpoint could be saved.", f"Choose another output_dir{right}."
        )
        return
    wanted = of_output(case)
    if not folder.total:
        raise SkipCheck(f"{folder.mount or parent} does not say how much room it has")
    if wanted > folder.free:
        yield error(
            f"The run writes about {wanted / GIB:.1f} GiB; {parent} has {folder.free / GIB:.1f} GiB free.",
            "It ends in 'No space left on device' while a checkpoint is saved.",
            "Free some room, choose another output_dir, or keep fewer checkpoints (checkpoints_total_limit).",
        )
