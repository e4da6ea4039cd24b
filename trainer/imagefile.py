"""Whether a file is a whole image, by its first and last bytes, without an image library."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO


def at_once(path: str, flags: int) -> int:
    """An opener that does not wait: a named pipe among the images would wait for its writer for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def image_fault(path: Path) -> tuple[str, str, str] | None:
    """What is wrong with the image, as a fixed word, in words, and what to do; None when it is whole."""
    try:
        with open(path, "rb", opener=at_once) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return ("zero-byte", "is empty (0 bytes)", "Copy the image again, or remove it.")
            head = file.read(32)
            whole = _whole(file, head, size)
    except OSError as error:
        return ("unreadable", f"cannot be read: {error.strerror}", "Allow reading it.")
    if whole is None:
        hint = "Save it as JPEG, PNG, WebP or BMP, or remove it."
        return ("not-an-image", f"is not an image but {_kind(head)}", hint)
    if not whole:
        seen = f"is cut short: its {size:,} bytes end in the middle of the image"
        return ("truncated", seen, "Copy the image again, or remove it.")
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
