"""List a training set: which images there are, what is said of them, and everything that is wrong.

X-Flux's layout: an image and, beside it, `NAME.json` holding {"caption": …} or `NAME.txt`. Files are judged
without an image library: a file that was cut short or is not an image at all shows in its first and last bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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


def find_samples(img_dir: str | Path, caption_type: str = "json") -> SampleIndex:
    """Every image below the folder, with its caption. Nothing is raised: problems are part of the answer."""
    root = Path(img_dir)
    problems: list[SampleProblem] = []
    if not root.is_dir():
        seen = "is a file" if root.exists() else "does not exist"
        problem = SampleProblem(root, "no-folder", seen, "Set img_dir to the folder of training images.")
        return SampleIndex((), (problem,))
    images: list[Path] = []
    ignored: list[Path] = []
    for path in _walk(root, problems):
        suffix = path.suffix.lower()
        if suffix in EXTENSIONS:
            images.append(path)
        elif suffix in OTHER_IMAGES:
            ignored.append(path)
    images.sort(key=lambda path: path.relative_to(root).as_posix())
    if not images and not problems:
        hint = f"Put {', '.join(EXTENSIONS)} files there, or correct img_dir."
        problems.append(SampleProblem(root, "no-samples", "holds no images", hint))
    owners: dict[Path, Path] = {}
    samples = []
    for image in images:
        caption_path = image.with_suffix(f".{caption_type}")
        if caption_path in owners:
            seen = f"shares its caption file with {owners[caption_path].name}"
            problems.append(SampleProblem(image, "shared-caption", seen, "Rename one of the two images."))
            continue
        owners[caption_path] = image
        image_problem = _image_problem(image)
        caption, caption_problem = _caption(image, caption_path, caption_type)
        found = [found for found in (image_problem, caption_problem) if found]
        problems += found
        if not found:
            samples.append(Sample(image, caption_path, caption))
    return SampleIndex(tuple(samples), tuple(problems), tuple(ignored))


def _walk(root: Path, problems: list[SampleProblem]) -> Iterator[Path]:
    """Every file below `root`, links followed, hidden ones (and macOS' `._` twins) left out."""

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
        for name in files:
            if not name.startswith("."):
                yield Path(folder) / name


def _at_once(path: str, flags: int) -> int:
    """Opened without waiting: a named pipe among the images would otherwise wait for its writer for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


# Captions ------------------------------------------------------------------------------------------------


def _caption(image: Path, path: Path, caption_type: str) -> tuple[str, SampleProblem | None]:
    try:
        with open(path, "rb", opener=_at_once) as file:
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


# Images --------------------------------------------------------------------------------------------------


def _image_problem(path: Path) -> SampleProblem | None:
    try:
        with open(path, "rb", opener=_at_once) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return SampleProblem(path, "zero-byte", "is empty (0 bytes)", "Copy the image again, or remove it.")
            head = file.read(32)
            whole = _whole(file, head, size)
    except OSError as error:
        return SampleProblem(path, "unreadable", f"cannot be read: {error.strerror}", "Allow reading it.")
    if whole is None:
        hint = "Save it as JPEG, PNG, WebP or BMP, or remove it."
        return SampleProblem(path, "not-an-image", f"is not an image but {_kind(head)}", hint)
    if not whole:
        seen = f"is cut short: its {size:,} bytes end in the middle of the image"
        return SampleProblem(path, "truncated", seen, "Copy the image again, or remove it.")
    return None


def _whole(file: BinaryIO, head: bytes, size: int) -> bool | None:
    """Whether the image is there to its end; None when it is not an image of a format that is read."""
    if head.startswith(b"\xff\xd8\xff"):
        return _whole_jpeg(file, size)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _whole_png(file, size)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return int(struct.unpack("<I", head[4:8])[0]) + 8 <= size
    if head[:2] == b"BM" and len(head) >= 26 and struct.unpack("<I", head[14:18])[0] in (12, 40, 52, 56, 64, 108, 124):
        return int(struct.unpack("<I", head[2:6])[0]) <= size
    return None


def _whole_jpeg(file: BinaryIO, size: int) -> bool:
    """Walk the segments up to the scan, then look for its end; a thumbnail's own end does not count."""
    position = 2
    while True:
        file.seek(position)
        marker = file.read(4)
        if len(marker) < 4 or marker[0] != 0xFF:
            return False
        if marker[1] == 0xDA:
            break
        if marker[1] == 0xFF:  # padding
            position += 1
            continue
        position += 2 + struct.unpack(">H", marker[2:])[0]
    # Cameras put megabytes behind the end marker; inside the scan its two bytes cannot occur.
    for start in (max(position, size - 4096), position):
        file.seek(start)
        if b"\xff\xd9" in file.read():
            return True
    return False


def _whole_png(file: BinaryIO, size: int) -> bool:
    position = 8
    while position + 12 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IEND":
            return True
        position += 12 + length
    return False


def _kind(head: bytes) -> str:
    """What a file without an image's first bytes probably is."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, name in (
        (b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<?xml", "an XML file"),
        (b"<svg", "an SVG drawing"), (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
        (b"gif8", "a GIF"), (b"ii*\0", "a TIFF"), (b"mm\0*", "a TIFF"), (b"%pdf", "a PDF"), (b"pk\x03\x04", "a zip"),
        (b"{", "JSON"),
    ):  # fmt: skip
        if text.startswith(start):
            return name
    if head[4:8] == b"ftyp":
        return "a HEIC, AVIF or video file"
    return "something else"
