"""List a training set: which images there are, what is said of them, and everything that is wrong.

X-Flux's layout: an image and, beside it, `NAME.json` holding {"caption": …} or `NAME.txt`; or tables of images and
captions. Files are judged without an image library: one that was cut short or is not an image at all shows in its
first and last bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from xflux_trainer import tables
from xflux_trainer.captions import SampleProblem, estimate_tokens, no_caption, read_caption
from xflux_trainer.errors import DataError
from xflux_trainer.imagefile import EXTENSIONS, OTHER_IMAGES, look, shown
from xflux_trainer.tables import Table

__all__ = [
    "COLUMNS", "EXTENSIONS", "OTHER_IMAGES", "Opened", "Sample", "SampleIndex", "SampleProblem", "Survey",
    "find_samples", "shown", "survey", "walk",
]  # fmt: skip

COLUMNS = ("image", "text")
"""Columns of a table's images and captions, unless the config names others."""


class Sample(NamedTuple):
    """One image and its caption. In a table both lie in `row` of one file."""

    image: Path
    caption_path: Path
    caption: str = ""
    row: int | None = None

    @property
    def name(self) -> Path:
        """Who the image is: its path, for a table's with `#row` behind it."""
        return self.image if self.row is None else Path(f"{self.image}#{self.row}")


class SampleIndex(NamedTuple):
    """The training set, ordered by path. `ignored` are images of formats that are not read."""

    samples: tuple[Sample, ...]
    problems: tuple[SampleProblem, ...]
    ignored: tuple[Path, ...] = ()


class Opened(NamedTuple):
    """What a survey saw of one image: pixels as it is shown (None where its header is not read), and its caption's
    length in T5 tokens, estimated."""

    path: str
    size: tuple[int, int] | None
    tokens: int


class Survey(NamedTuple):
    """A quick look at a training set: every name, and the inside of an even spread of files.

    `count` are the images in which no fault was seen, `opened` those that were opened with their captions.
    """

    count: int
    opened: int
    problems: tuple[SampleProblem, ...]
    ignored: int = 0
    looks: tuple[Opened, ...] = ()
    tables: tuple[Table, ...] = ()
    """Tables among the files; their rows are in `count` where they could be counted."""
    folders: tuple[str, ...] = ()
    """Folders below the root that hold images, relative to it with `/`; the root itself is `.`."""
    paths: tuple[str, ...] = ()
    """Every image's path, for `copies`."""


class _File(NamedTuple):
    """One image: its path from the root, and whether its caption's name is in the same folder."""

    key: str
    image: str
    caption: str
    listed: bool


class _Listing(NamedTuple):
    images: list[_File]
    tables: list[Table]
    problems: list[SampleProblem]
    ignored: list[str]


def find_samples(
    img_dir: str | Path, caption_type: str = "json", columns: tuple[str, str] = COLUMNS
) -> SampleIndex:  # fmt: skip
    """Every image below the folder, with its caption. Nothing is raised: problems are part of the answer."""
    listing = _list(Path(img_dir), caption_type)
    samples, problems = [], listing.problems
    for file in listing.images:
        sample, found = _open(file, caption_type)[:2]
        problems += found
        if not found:
            samples.append(sample)
    for table in listing.tables:
        rows, found = _rows(table, columns)
        problems += found
        samples += rows
    if listing.tables:
        samples.sort(key=lambda sample: (str(sample.image), sample.row or 0))
    return SampleIndex(tuple(samples), tuple(problems), tuple(Path(path) for path in listing.ignored))


def survey(
    img_dir: str | Path, caption_type: str = "json", most: int = 1000, columns: tuple[str, str] = COLUMNS
) -> Survey:
    """As `find_samples`, but at most `most` images are opened, evenly spread; of the others the names are looked at.

    Of tables the footers are read, and no library is needed.
    """
    listing = _list(Path(img_dir), caption_type)
    images, problems = listing.images, listing.problems
    total, before = len(images), len(problems)
    chosen = {number * total // most for number in range(most)} if total > most else set(range(total))
    faulty, looks = 0, []
    for number, file in enumerate(images):
        found: list[SampleProblem] = []
        if number in chosen:
            sample, found, size = _open(file, caption_type)
            if not found:
                looks.append(Opened(file.image, size, estimate_tokens(sample.caption)))
        elif not file.listed and not _is_there(file.caption, len(problems) - before):
            found = [no_caption(Path(file.image), Path(file.caption), caption_type)]
        problems += found
        faulty += bool(found)
    sound = [(table, tables.lacking(table, columns)) for table in listing.tables]
    problems += [problem for _, problem in sound if problem]
    rows = sum(table.rows or 0 for table, problem in sound if not problem)
    folders = {os.path.dirname(file.key) for file in images} | {_folder(table, img_dir) for table in listing.tables}  # noqa: PTH120
    return Survey(
        total - faulty + rows, len(chosen), tuple(problems), len(listing.ignored), tuple(looks),
        tuple(listing.tables), tuple(sorted(folder or "." for folder in folders)), tuple(file.image for file in images),
    )  # fmt: skip


def _folder(table: Table, root: str | Path) -> str:
    folder = table.path.parent.relative_to(root).as_posix()
    return "" if folder == "." else folder


def _is_there(path: str, seen: int) -> bool:
    """A file system that does not tell A from a finds a name that the listing has not; asked for the first ones."""
    return seen < 100 and os.path.exists(path)  # noqa: PTH110


def _open(file: _File, caption_type: str) -> tuple[Sample, list[SampleProblem], tuple[int, int] | None]:
    """The sample, what is wrong with its two files, and its pixels."""
    image, caption_path = Path(file.image), Path(file.caption)
    seen = look(file.image)
    caption, caption_problem = read_caption(image, caption_path, caption_type)
    found = [SampleProblem(image, *seen.fault)] if seen.fault else []
    found += [caption_problem] if caption_problem else []
    return Sample(image, caption_path, caption), found, seen.size


def _rows(table: Table, columns: tuple[str, str]) -> tuple[list[Sample], list[SampleProblem]]:
    from xflux_trainer import parquet  # needs pyarrow, which only tables need

    try:
        captions, problems = parquet.read_captions(table.path, columns)
    except DataError as error:
        return [], [SampleProblem(table.path, "bad-table", error.seen.rstrip("."), error.hint)]
    path = table.path
    return [Sample(path, path, caption, row) for row, caption in enumerate(captions) if caption], problems


def _list(root: Path, caption_type: str) -> _Listing:
    """The images by their path, the tables, those of other formats, and what is wrong with the names alone. Opens no
    image."""
    listing = _Listing([], [], [], [])
    if not root.is_dir():
        seen = "is a file" if root.exists() else "does not exist"
        problem = SampleProblem(root, "no-folder", seen, "Set img_dir to the folder of training images.")
        return listing._replace(problems=[problem])
    images: list[_File] = []
    problems = listing.problems
    top = len(os.path.join(root, ""))  # noqa: PTH118 - plain strings: there may be many thousands
    for folder, names in walk(root, problems):
        inside = set(names)
        base = os.path.join(folder, "")  # noqa: PTH118
        holds_tables = False
        for name in names:
            stem, dot, suffix = name.rpartition(".")
            kind = f"{dot}{suffix}".lower()
            if kind in _KINDS:
                caption = f"{stem}.{caption_type}"
                path = f"{base}{name}"
                images.append(_File(path[top:], path, f"{base}{caption}", caption in inside))
            elif kind in _OTHERS:
                listing.ignored.append(f"{base}{name}")
            elif kind in tables.ENDINGS or name == "dataset_dict.json":
                holds_tables = True
        if holds_tables:
            _add_tables(folder, names, listing)
    images.sort(key=lambda file: file.key)
    if not images and not problems and not listing.tables:
        hint = "Put .jpg, .png or .webp files there, or tables (.parquet), or correct img_dir."
        problems.append(SampleProblem(root, "no-samples", "holds no images", hint))
    return listing._replace(images=_alone(images, problems))


_KINDS, _OTHERS = frozenset(EXTENSIONS), frozenset(OTHER_IMAGES)


def _add_tables(folder: str, names: list[str], listing: _Listing) -> None:
    files, problem = tables.saved_files(folder, names)
    if problem:
        listing.problems.append(problem)
    for name in files:
        table, problem = tables.measure(Path(folder, name))
        if problem:
            listing.problems.append(problem)
        else:
            listing.tables.append(table)


def _alone(images: list[_File], problems: list[SampleProblem]) -> list[_File]:
    """The images without those that share their caption's file with an earlier one."""
    owners: dict[str, str] = {}
    alone = []
    for file in images:
        owner = owners.setdefault(file.caption, file.image)
        if owner is file.image:
            alone.append(file)
        else:
            seen = f"shares its caption file with {shown(os.path.basename(owner))}"  # noqa: PTH119
            problems.append(SampleProblem(Path(file.image), "shared-caption", seen, "Rename one of the two images."))
    return alone


def walk(root: Path, problems: list[SampleProblem]) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `root` with its files; links followed, hidden ones (and macOS' `._` twins) left out."""

    def unreadable(error: OSError) -> None:
        seen = f"cannot be read: {error.strerror}"
        problems.append(SampleProblem(Path(error.filename or root), "unreadable", seen, "Allow reading it."))

    visited: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        try:
            stat = Path(folder).stat()
        except OSError:
            folders.clear()
            continue
        if (stat.st_dev, stat.st_ino) in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield folder, [name for name in files if not name.startswith(".")]
