"""DA: what a dataset that can be read still gets wrong. Warnings: the trainer trains on it all the same."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from xflux_trainer import lint, samples

from xflux_doctor import batch
from xflux_doctor.bill import dataset as survey_of
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.finding import Finding, error, warning

_TINY = 64
"""Pixels of a side below which an image holds next to nothing that FLUX could learn."""
_FAR = 2.0
"""Times that an image is enlarged from which on it is said: the trainer notes every one."""
_PASSES = 2
"""Passes over the images in one optimizer step above which it is said."""
_WASTE = 0.1
"""Share of a pass's places that are filled with repeats from which on it is said."""


@check("DA103", "the captions fit the text encoder", needs=("train", "trainer"))
def captions_fit(case: Case) -> Iterator[Finding]:
    """T5 takes max_text_tokens tokens and the rest is cut. Estimated here; the trainer counts when it encodes."""
    assert case.job.train is not None
    limit = case.job.train.max_text_tokens
    long = [look for look in _opened(case) if look.tokens > limit]
    if long:
        worst = max(long, key=lambda look: look.tokens)
        yield warning(
            f"{_share(case, len(long), 'caption')} longer than {limit} T5 tokens; that of "
            f"{samples.shown(worst.path)} has about {worst.tokens}.",
            "What lies behind the limit is cut and never seen.",
            "Shorten them, the most important things first" + (", or raise max_text_tokens." if limit < 512 else "."),
        )


@check("DA104", "the images have the pixels that they are trained at", needs=("train", "trainer"))
def pixels(case: Case) -> Iterator[Finding]:
    """An image smaller than its bucket is enlarged: the model learns the blur."""
    assert case.job.train is not None
    looks = _opened(case)
    tiny = [look for look in looks if look.size and min(look.size) < _TINY]
    far = [(lint.enlargement(look, case.job.train), look) for look in looks if look not in tiny]
    far = [(times, look) for times, look in far if times >= _FAR]
    if tiny:
        worst = min(tiny, key=lambda look: min(look.size or (0, 0)))
        yield warning(
            f"{_share(case, len(tiny), 'image')} under {_TINY} pixels wide or high; {_named(worst)}.",
            "They are thumbnails or broken exports more often than pictures.",
            "Replace them by the originals, or remove them.",
        )
    if far:
        times, worst = max(far, key=lambda pair: pair[0])
        yield warning(
            f"{_share(case, len(far), 'image')} enlarged {_FAR:g} times or more; {_named(worst)}, {times:.1f} times.",
            "Training on enlarged images teaches their blur.",
            "Lower img_size or resolutions, replace these images, or remove them.",
        )


@check("DA105", "no image is there twice", needs=("train", "trainer"))
def copies(case: Case) -> Iterator[Finding]:
    """Files of one length are compared byte for byte (2,000 at the most)."""
    twins = _copies(survey_of(case).paths)
    if twins:
        copy, first = twins[0]
        yield warning(
            f"{len(twins)} {_are(len(twins), 'image')} byte for byte another; {samples.shown(copy)} is "
            f"{samples.shown(first)}.",
            "They count twice, and with two captions they teach both.",
            "Remove the copies; to count images more often on purpose there is repeats.",
        )


@check("DA106", "the batches of one pass fill up", needs=("train", "trainer"))
def batches(case: Case) -> Iterator[Finding]:
    """Images of one shape share a batch, and an incomplete batch is filled with images that had their turn."""
    assert case.job.train is not None
    train = case.job.train
    filled = lint.fill(survey_of(case), train)
    if filled is None:
        raise SkipCheck("not every image's size is known here: a table, a rare format, or more than 1,000 images")
    if not filled.places:
        return
    size, small = train.train_batch_size, [n for n in filled.buckets.values() if n < train.train_batch_size]
    if small or filled.repeated > _WASTE * filled.places:
        yield warning(
            f"{filled.places} images fall into {len(filled.buckets)} shapes, {len(small)} of them with fewer than "
            f"train_batch_size {size}: {filled.repeated} places of every pass are filled with repeats.",
            "Rare shapes are trained on more often than others, the same image several times in one batch.",
            "Lower train_batch_size and raise gradient_accumulation_steps, or set bucket_by: area, which has fewer "
            "shapes.",
        )
    ranks, steps = max(1, case.job.num_processes), batch.accumulation(case.job)
    if steps > 1 and ranks * steps > _PASSES * filled.batches:
        yield warning(
            f"One optimizer step takes {ranks} x {steps} batches of {size}; a pass over the images has "
            f"{filled.batches}.",
            f"Every step sees every image {_PASSES} times or more: it could do so with less work.",
            "Lower gradient_accumulation_steps, or add images.",
        )


@check("DA107", "what reads the dataset is installed", needs=("train", "trainer", "packages"))
def readers(case: Case) -> Iterator[Finding]:
    """Tables are read with pyarrow, Canny edges are drawn by OpenCV; neither is needed for folders of images."""
    assert case.job.train is not None
    installed = case.facts.packages or {}
    tables = survey_of(case).tables
    if tables and "pyarrow" not in installed:
        yield error(
            f"{samples.shown(tables[0].path)} is a table, and pyarrow is not installed.",
            "The trainer stops before it encodes anything.",
            "Install it.",
            commands=("pip install pyarrow",),
        )
    train = case.job.train
    draws = train.mode == "controlnet" and train.control_type == "canny"
    if draws and not any(name.startswith("opencv-") for name in installed):
        yield error(
            "Canny edges are asked for, and OpenCV is not installed.",
            "The trainer stops when it draws the first.",
            "Install it, or set control_type to files.",
            commands=("pip install opencv-python-headless",),
        )


@check("DA108", "the folders that the config names belong to the images", needs=("train", "trainer"))
def named_folders(case: Case) -> Iterator[Finding]:
    """A folder of `repeats` holds images; below control_dir every image has a file of its name."""
    assert case.job.train is not None
    train, survey = case.job.train, survey_of(case)
    if not survey.count:
        return
    if unnamed := lint.unnamed_folders(survey, train):
        yield error(
            f"repeats names {', '.join(unnamed)}; no image of {train.img_dir} lies there.",
            "The trainer stops at it.",
            "Folders are named from img_dir on, for example faces/close; `.` is img_dir itself.",
        )
    if train.mode != "controlnet" or train.control_type != "files":
        return
    missing = lint.without_condition(survey, train)
    if missing is None:
        yield error(
            f"control_dir {train.control_dir} is not a folder.",
            "The trainer stops at it.",
            "Name the folder of condition images.",
        )
    elif missing:
        yield error(
            f"{len(missing)} images have no condition below {train.control_dir}, the first is "
            f"{samples.shown(missing[0])}.",
            "The trainer stops at them.",
            "Put a file of the same relative name there (any ending), or remove the image.",
        )


def _opened(case: Case) -> tuple[samples.Opened, ...]:
    survey = survey_of(case)
    if not survey.looks and survey.tables:
        raise SkipCheck("the dataset is tables, whose images are not opened here")
    looks: tuple[samples.Opened, ...] = survey.looks
    return looks


def _share(case: Case, count: int, noun: str) -> str:
    survey = survey_of(case)
    if survey.opened < len(survey.paths):
        return f"{count} of the {survey.opened:,} {noun}s that were opened are"
    return f"{count} {_are(count, noun)}"


def _are(count: int, noun: str) -> str:
    return f"{noun} is" if count == 1 else f"{noun}s are"


def _named(look: samples.Opened) -> str:
    wide, high = look.size or (0, 0)
    return f"{samples.shown(Path(look.path))} is {wide} x {high}"


@functools.lru_cache(maxsize=2)
def _copies(paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """Looked for once per process: a plan looks at the same case several times."""
    found: list[tuple[str, str]] = lint.copies(paths)
    return found
