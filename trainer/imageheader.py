"""Width and height from an image's own header, format by format, and whether its bytes go on to its end.

Each reader gets the open file and its length and returns (width, height) as the image is shown, or raises `Cut`.
Sources: ITU T.81 and Exif 2.32 (JPEG), RFC 2083 (PNG), RFC 9649 (WebP), GIF89a, TIFF 6.0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import BinaryIO

Size = tuple[int, int]


class Cut(Exception):
    """The file ends before the image does."""


def _unpack(form: str, data: bytes) -> tuple[int, ...]:
    try:
        return struct.unpack(form, data)
    except struct.error as error:
        raise Cut from error


def _at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    data = file.read(count)
    if len(data) < count:
        raise Cut
    return data


# JPEG ----------------------------------------------------------------------------------------------------

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of a frame header, which holds the size."""


def _jpeg(file: BinaryIO, size: int) -> Size:
    """Walk the segments up to the scan, then look for its end; a thumbnail's own end does not count."""
    position, found, turned = 2, None, False
    while True:
        marker = _at(file, position, 4)
        if marker[0] != 0xFF:
            raise Cut
        if marker[1] == 0xDA:
            break
        if marker[1] == 0xFF:  # padding
            position += 1
            continue
        length = struct.unpack(">H", marker[2:])[0]
        if marker[1] in _FRAMES:
            high, wide = struct.unpack(">HH", _at(file, position + 5, 4))
            found = wide, high
        elif marker[1] == 0xE1:
            turned = turned or _turned(file.read(min(length, 65536)))
        position += 2 + length
    if found is None:
        raise Cut
    # Cameras put megabytes behind the end marker; inside the scan its two bytes cannot occur.
    for start in (max(position, size - 4096), position):
        file.seek(start)
        if b"\xff\xd9" in file.read():
            return found[::-1] if turned else found  # type: ignore[return-value]
    raise Cut


def _turned(segment: bytes) -> bool:
    """Whether Exif says that the image is shown on its side (orientations 5 to 8)."""
    if not segment.startswith(b"Exif\0\0"):
        return False
    tiff = segment[6:]
    order = ">" if tiff[:2] == b"MM" else "<"
    try:
        start = struct.unpack_from(f"{order}I", tiff, 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", tiff, start)[0]):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
            if tag == 0x0112:
                return bool(5 <= value <= 8)
    except struct.error:
        pass
    return False


# PNG, WebP, BMP, GIF, TIFF -------------------------------------------------------------------------------


def _png(file: BinaryIO, size: int) -> Size:
    position, found = 8, None
    while position + 12 <= size:
        length, kind = struct.unpack(">I4s", _at(file, position, 8))
        if kind == b"IHDR":
            found = _unpack(">II", file.read(8))
        if kind == b"IEND" and found:
            return found[0], found[1]
        position += 12 + length
    raise Cut


def _webp(file: BinaryIO, size: int) -> Size | None:
    head = _at(file, 0, 20)
    if struct.unpack("<I", head[4:8])[0] + 8 > size:
        raise Cut
    file.seek(20)
    kind, body = head[12:16], file.read(10)
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    wide, high = struct.unpack("<HH", body[6:10])
    return wide & 0x3FFF, high & 0x3FFF


def _is_bmp(head: bytes) -> bool:
    kinds = (12, 40, 52, 56, 64, 108, 124)
    return head[:2] == b"BM" and len(head) >= 26 and struct.unpack("<I", head[14:18])[0] in kinds


def _bmp(file: BinaryIO, size: int) -> Size:
    head = _at(file, 0, 26)
    if struct.unpack("<I", head[2:6])[0] > size:
        raise Cut
    if struct.unpack("<I", head[14:18])[0] == 12:
        wide, high = struct.unpack("<HH", head[18:22])
    else:
        wide, high = struct.unpack("<ii", head[18:26])
    return abs(wide), abs(high)


def _gif(file: BinaryIO, size: int) -> Size:
    """Walk the blocks up to the end of the first picture."""
    head = _at(file, 0, 13)
    position = 13 + (3 << (head[10] & 7) + 1 if head[10] & 0x80 else 0)
    while True:
        kind = _at(file, position, 1)
        if kind == b"!":
            position = _after_blocks(file, position + 2)
        elif kind == b",":
            flags = _at(file, position + 9, 1)[0]
            _after_blocks(file, position + 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
            wide, high = struct.unpack("<HH", head[6:10])
            return wide, high
        else:
            raise Cut


def _after_blocks(file: BinaryIO, position: int) -> int:
    while length := _at(file, position, 1)[0]:
        position += 1 + length
    return position + 1


def _tiff(file: BinaryIO, size: int) -> Size | None:
    """The first directory; that it lies inside the file is all that is asked of the file's end."""
    head = _at(file, 0, 8)
    order = "<" if head[:2] == b"II" else ">"
    if struct.unpack(f"{order}H", head[2:4])[0] != 42:
        return None  # BigTIFF
    start = struct.unpack(f"{order}I", head[4:8])[0]
    count = struct.unpack(f"{order}H", _at(file, start, 2))[0]
    entries = _at(file, start + 2, 12 * count)
    tags = {}
    for place in range(0, 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", entries, place)
        tags[tag] = struct.unpack_from(f"{order}H" if kind == 3 else f"{order}I", entries, place + 8)[0]
    if 256 not in tags or 257 not in tags:
        return None
    size_read = tags[256], tags[257]
    return size_read[::-1] if 5 <= tags.get(0x0112, 1) <= 8 else size_read


READERS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO, int], Size | None]], ...] = (
    (lambda head: head.startswith(b"\xff\xd8\xff"), _jpeg),
    (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), _png),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", _webp),
    (_is_bmp, _bmp),
    (lambda head: head[:6] in (b"GIF87a", b"GIF89a"), _gif),
    (lambda head: head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _tiff),
)
"""(whether these are a format's first bytes, its reader)."""
