"""List a training set: which images there are, what is said of them, and everything that is wrong.

X-Flux's layout: an image and, beside it, `NAME.json` holding {"caption": …} or `NAME.txt`. Files are judged
without an image library: a file that was cut short or is not an image at all shows in its first and last bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from xflux_trainer.imagefile import at_once, image_fault

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
OTHER_IMAGES = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jfif")
MAX_CAPTION = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One image and its caption."""

    image: Path
    caption_path: Path
    caption: str = ""


@dataclass(frozen=True)
class SampleProblem:
    """One file that cannot be used. `kind` is a fixed word, the rest is for people."""

    path: Path
    kind: str
    seen: str
    hint: str

    def __str__(self) -> str:
        return f"{self.path} {self.seen}. {self.hint}".strip()


@dataclass(frozen=True)
class SampleIndex:
    """The training set, ordered by path. `ignored` are images of formats that are not read."""

    samples: tuple[Sample, ...]
    problems: tuple[SampleProblem, ...]
    ignored: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Survey:
    """A quick look at a training set: every name, and the inside of an even spread of files.

    `count` are the images in which no fault was seen, `opened` those that were opened with their captions.
    """

    count: int
    opened: int
    problems: tuple[SampleProblem, ...]
    ignored: int = 0


class _File(NamedTuple):
    """One image: its path from the root, and whether its caption's name is in the same folder."""

    key: str
    image: str
    caption: str
    listed: bool


def find_samples(img_dir: str | Path, caption_type: str = "json") -> SampleIndex:
    """Every image below the folder, with its caption. Nothing is raised: problems are part of the answer."""
    images, problems, ignored = _list(Path(img_dir), caption_type)
    samples = []
    for file in images:
        sample, found = _open(file, caption_type)
        problems += found
        if not found:
            samples.append(sample)
    return SampleIndex(tuple(samples), tuple(problems), tuple(Path(path) for path in ignored))


def survey(img_dir: str | Path, caption_type: str = "json", most: int = 1000) -> Survey:
    """As `find_samples`, but at most `most` images are opened, evenly spread; of the others the names are looked at."""
    images, problems, ignored = _list(Path(img_dir), caption_type)
    total, before = len(images), len(problems)
    chosen = {number * total // most for number in range(most)} if total > most else set(range(total))
    faulty = 0
    for number, file in enumerate(images):
        found: list[SampleProblem] = []
        if number in chosen:
            found = _open(file, caption_type)[1]
        elif not file.listed and not _is_there(file.caption, len(problems) - before):
            found = [_no_caption(Path(file.image), Path(file.caption), caption_type)]
        problems += found
        faulty += bool(found)
    return Survey(total - faulty, len(chosen), tuple(problems), len(ignored))


def _is_there(path: str, seen: int) -> bool:
    """A file system that does not tell A from a finds a name that the listing has not; asked for the first ones."""
    return seen < 100 and os.path.exists(path)  # noqa: PTH110


def _open(file: _File, caption_type: str) -> tuple[Sample, list[SampleProblem]]:
    """The sample, and what is wrong with its two files."""
    image, caption_path = Path(file.image), Path(file.caption)
    fault = image_fault(image)
    caption, caption_problem = _caption(image, caption_path, caption_type)
    found = [problem for problem in (SampleProblem(image, *fault) if fault else None, caption_problem) if problem]
    return Sample(image, caption_path, caption), found


def _list(root: Path, caption_type: str) -> tuple[list[_File], list[SampleProblem], list[str]]:
    """The images by their path, those of other formats, and what is wrong with the names alone. Opens no file."""
    problems: list[SampleProblem] = []
    if not root.is_dir():
        seen = "is a file" if root.exists() else "does not exist"
        problem = SampleProblem(root, "no-folder", seen, "Set img_dir to the folder of training images.")
        return [], [problem], []
    images: list[_File] = []
    ignored: list[str] = []
    top = len(os.path.join(root, ""))  # noqa: PTH118 - plain strings: there may be many thousands
    for folder, names in _walk(root, problems):
        inside = set(names)
        base = os.path.join(folder, "")  # noqa: PTH118
        for name in names:
            stem, dot, suffix = name.rpartition(".")
            kind = f"{dot}{suffix}".lower()
            if kind in EXTENSIONS:
                caption = f"{stem}.{caption_type}"
                path = f"{base}{name}"
                images.append(_File(path[top:], path, f"{base}{caption}", caption in inside))
            elif kind in OTHER_IMAGES:
                ignored.append(f"{base}{name}")
    images.sort(key=lambda file: file.key)
    if not images and not problems:
        hint = f"Put {', '.join(EXTENSIONS)} files there, or correct img_dir."
        problems.append(SampleProblem(root, "no-samples", "holds no images", hint))
    owners: dict[str, str] = {}
    alone = []
    for file in images:
        owner = owners.setdefault(file.caption, file.image)
        if owner is file.image:
            alone.append(file)
        else:
            seen = f"shares its caption file with {os.path.basename(owner)}"  # noqa: PTH119
            problems.append(SampleProblem(Path(file.image), "shared-caption", seen, "Rename one of the two images."))
    return alone, problems, ignored


def _walk(root: Path, problems: list[SampleProblem]) -> Iterator[tuple[str, list[str]]]:
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


# Captions ------------------------------------------------------------------------------------------------


def _caption(image: Path, path: Path, caption_type: str) -> tuple[str, SampleProblem | None]:
    try:
        with open(path, "rb", opener=at_once) as file:
            raw = file.read(MAX_CAPTION + 1)
    except FileNotFoundError:
        return "", _no_caption(image, path, caption_type)
    except OSError as error:
        return "", SampleProblem(path, "unreadable", f"cannot be read: {error.strerror}", "Allow reading it.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", SampleProblem(path, "not-utf8", "is not UTF-8 text", "Save the caption as UTF-8.")
    if len(raw) > MAX_CAPTION:
        return "", SampleProblem(path, "bad-caption", "is larger than 1 MiB", "A caption is a sentence or a few.")
    if caption_type == "json":
        return _json_caption(path, text)
    if not text.strip():
        return "", SampleProblem(path, "empty-caption", "is empty", "Write what the image shows.")
    return text.strip(), None


def _no_caption(image: Path, path: Path, caption_type: str) -> SampleProblem:
    other = "txt" if caption_type == "json" else "json"
    hint = f"Write {path.name} beside the image."
    if image.with_suffix(f".{other}").exists():
        hint = f"There is a .{other} caption: set caption_type to {other}."
    return SampleProblem(image, "no-caption", f"has no caption file {path.name}", hint)


def _json_caption(path: Path, text: str) -> tuple[str, SampleProblem | None]:
    hint = 'Write {"caption": "what the image shows"}.'
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        seen = "is empty" if not text.strip() else f"is not JSON: {error}"
        return "", SampleProblem(path, "bad-json", seen, hint)
    if not isinstance(data, dict) or "caption" not in data:
        return "", SampleProblem(path, "no-caption-key", 'has no "caption"', hint)
    caption = data["caption"]
    if not isinstance(caption, str):
        seen = f'has a "caption" that is not a text but a {type(caption).__name__}'
        return "", SampleProblem(path, "bad-caption", seen, hint)
    if not caption.strip():
        return "", SampleProblem(path, "empty-caption", 'has an empty "caption"', hint)
    try:
        caption.encode()
    except UnicodeEncodeError:
        return "", SampleProblem(path, "bad-caption", "holds half of a character (a lone surrogate)", "Write it anew.")
    return caption.strip(), None
