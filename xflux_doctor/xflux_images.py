"""A training folder by X-Flux's own rules, which are not ours: what its loader lists, and what it cannot use.

Source: XLabs-AI/x-flux@4749542:image_datasets/dataset.py. A name counts that contains `.jpg` or `.png`, in the
folder itself; the caption's name is cut at the first dot; a size is rounded down to multiples of 32.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import BinaryIO

import msgspec

LISTED = (".jpg", ".png")
_OTHERS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif")
_MOST = 2000
"""Files of the folder that are opened: a quick check may not read a million captions."""
_LARGEST_CAPTION = 1 << 20


class Images(msgspec.Struct, frozen=True):
    """What X-Flux's loader would find in img_dir. Names are relative to it."""

    folder: Path
    exists: bool = False
    listed: int = 0
    """Items of its data set."""
    unseen: tuple[str, ...] = ()
    """Images that it does not list: another ending, capital letters."""
    folders: tuple[str, ...] = ()
    """Sub-folders that hold images."""
    uncaptioned: tuple[str, ...] = ()
    """Items whose caption file is not there."""
    unusable: tuple[tuple[str, str], ...] = ()
    """(item, why) for those that cannot be opened or whose caption is not what the loader reads."""
    sizes: frozenset[tuple[int, int]] = frozenset()
    """Widths and heights in pixels of the items that say so."""
    read: int = 0
    """How many items were opened; the first by name."""

    @property
    def failing(self) -> int:
        return len(self.uncaptioned) + len(self.unusable)


def list_images(folder: Path, caption_type: str) -> Images:
    """The folder as X-Flux sees it. Nothing is raised."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return Images(folder)
    names = {entry.name for entry in entries}
    listed = [entry.name for entry in entries if any(ending in entry.name for ending in LISTED)]
    unseen = [n for n in names - set(listed) if n.lower().endswith(_OTHERS) and not n.startswith(".")]
    folders = [entry.name for entry in entries if entry.is_dir() and _holds_images(entry.path)]
    uncaptioned, unusable, sizes = [], [], set()
    for name in listed[:_MOST]:
        caption = f"{name.split('.')[0]}.{caption_type}"
        size, why = _look(folder / name)
        if not why and caption not in names:
            uncaptioned.append(name)
            continue
        why = why or _caption_fault(folder / caption, caption_type)
        if why:
            unusable.append((name, why))
        elif size:
            sizes.add(size)
    return Images(
        folder, True, len(listed), tuple(sorted(unseen)), tuple(folders), tuple(uncaptioned), tuple(unusable),
        frozenset(sizes), min(len(listed), _MOST),
    )  # fmt: skip


def shape(size: tuple[int, int], img_size: int) -> tuple[int, int]:
    """Width and height that the loader makes of an image: the long side img_size, both cut to multiples of 32."""
    width, height = size
    if width >= height:
        new = img_size, int((img_size / width) * height)
    else:
        new = int((img_size / height) * width), img_size
    return new[0] // 32 * 32, new[1] // 32 * 32


def _holds_images(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(_OTHERS) for entry in entries)
    except OSError:
        return False


def _caption_fault(path: Path, caption_type: str) -> str:
    """Why the loader cannot take this caption; empty when it can."""
    try:
        if not path.is_file():
            return f"{path.name} is no file"
        if path.stat().st_size > _LARGEST_CAPTION:
            return ""  # odd, and not read here
        text = path.read_text(encoding="utf-8")
        if caption_type == "json" and "caption" not in json.loads(text):
            return f'{path.name} has no "caption"'
    except (ValueError, RecursionError):
        return f"{path.name} is not JSON in UTF-8" if caption_type == "json" else f"{path.name} is not UTF-8 text"
    except TypeError:
        return f"{path.name} holds no keys"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return ""


def _look(path: Path) -> tuple[tuple[int, int] | None, str]:
    """The image's width and height, or why it cannot be opened; neither where its format is not read here."""
    try:
        if not path.is_file():
            return None, "it is no file"
        with path.open("rb") as file:
            head = file.read(24)
            if not head:
                return None, "it is empty"
            if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) == 24:
                width, height = struct.unpack(">II", head[16:24])
                return (width, height), ""
            if head.startswith(b"\xff\xd8\xff"):
                return _jpeg_size(file), ""
    except (OSError, struct.error) as error:
        return None, getattr(error, "strerror", None) or "it is cut short"
    return None, "it is text, no image" if head.lstrip()[:1] in (b"{", b"<") else ""


def _jpeg_size(file: BinaryIO) -> tuple[int, int] | None:
    """Width and height from the frame header. X-Flux does not turn an image by its EXIF orientation."""
    position = 2
    for _ in range(200):
        file.seek(position)
        marker = file.read(9)
        if len(marker) < 9 or marker[0] != 0xFF:
            return None
        if marker[1] == 0xFF:  # padding
            position += 1
            continue
        if 0xC0 <= marker[1] <= 0xCF and marker[1] not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", marker[5:9])
            return width, height
        position += 2 + struct.unpack(">H", marker[2:4])[0]
    return None
