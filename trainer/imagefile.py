"""One image file, without an image library: whether it is whole, and how many pixels it has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from xflux_trainer.imageheader import READERS, Cut

EXTENSIONS = tuple(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .avif .avifs .j2c .j2k .jp2 .jpc .jpf .jpx "
    ".tga .icb .vda .vst .pbm .pgm .ppm .pnm .pfm .qoi .psd .dds .ico .icns .cur .pcx .dcx .sgi .rgb .rgba .bw .ras "
    ".blp .fit .fits .flc .fli .ftc .ftu .gbr .iim .im .msp .pcd .pxr .xbm .xpm".split()
)
"""Endings of the formats that Pillow decodes by itself, in small letters; of animations the first picture is taken.
AVIF wants Pillow 11.3."""
OTHER_IMAGES = tuple(
    # Pillow names these, but decodes them nowhere (stubs), on Windows only, or with Ghostscript; or they are videos.
    ".bufr .grib .h5 .hdf .emf .wmf .eps .ps .mpg .mpeg "
    # Pillow does not know these.
    ".heic .heif .jxl .svg .exr .hdr .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .mp4 .webm".split()
)
"""Endings of images that are not read here: they are counted and left out."""

_STARTS = (
    b"8BPS", b"qoif", b"DDS ", b"BLP1", b"BLP2", b"icns", b"\x01\xda", b"\x59\xa6\x6a\x95", b"SIMPLE  =", b"P1", b"P2",
    b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF", b"\x00\x00\x01\x00", b"\x00\x00\x02\x00", b"\xff\x4f\xff\x51",
    b"\x00\x00\x00\x0cjP  ", b"/* XPM", b"#define", b"DanM", b"LinS", b"\x0a",
)  # fmt: skip
"""First bytes of the formats that are recognised and not looked into."""
_NAMELESS = tuple(".dib .tga .vda .vst .pcx .dcx .pcd .im .iim .fli .flc .ftc .ftu .gbr .pxr .xbm .icb".split())
"""Formats without first bytes of their own, or with ones far inside: the ending is believed."""


class Look(NamedTuple):
    """What one image's file shows. `fault`: (a fixed word, what was seen, what to do), None when it is whole."""

    fault: tuple[str, str, str] | None
    bytes: int = 0
    size: tuple[int, int] | None = None
    """Width and height as the image is shown; None where the format is not looked into."""


def at_once(path: str, flags: int) -> int:
    """An opener that does not wait: a named pipe among the images would wait for its writer for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def shown(path: object) -> str:
    """A path as text that every terminal and file takes: of a name that is not UTF-8 the odd bytes as \\xNN."""
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")


def look(path: str | Path) -> Look:
    """Open the file once. Nothing is raised."""
    size = 0
    try:
        with open(path, "rb", opener=at_once) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return Look(("zero-byte", "is empty (0 bytes)", "Copy the image again, or remove it."))
            pixels = _pixels(file, size, os.path.splitext(path)[1].lower())  # noqa: PTH122 - may be many thousands
    except OSError as error:
        return Look(("unreadable", f"cannot be read: {error.strerror}", "Allow reading it."), size)
    except Cut:
        seen = f"is cut short: its {size:,} bytes end in the middle of the image"
        return Look(("truncated", seen, "Copy the image again, or remove it."), size)
    except Unknown as unknown:
        hint = "Save it as JPEG, PNG or WebP, or remove it."
        return Look(("not-an-image", f"is not an image but {unknown}", hint), size)
    return Look(None, size, pixels)


def image_fault(path: Path) -> tuple[str, str, str] | None:
    """What is wrong with the image, as a fixed word, in words, and what to do; None when it is whole."""
    return look(path).fault


class Unknown(Exception):
    """The file is of no format that is read; the message says what it seems to be."""


def _pixels(file: BinaryIO, size: int, ending: str) -> tuple[int, int] | None:
    head = file.read(32)
    for recognises, read in READERS:
        if recognises(head):
            return read(file, size)
    kind = _kind(head)
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"mif1") and ending in (".avif", ".avifs"):
        return None
    if not kind and (head.startswith(_STARTS) or (ending in _NAMELESS and len(head) >= 16)):
        return None
    raise Unknown(kind or "something else")


def _kind(head: bytes) -> str:
    """What a file without an image's first bytes probably is; empty where there is no telling."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, name in (
        (b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<?xml", "an XML file"),
        (b"<svg", "an SVG drawing"), (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
        (b"%pdf", "a PDF"), (b"pk\x03\x04", "a zip"), (b"{", "JSON"),
    ):  # fmt: skip
        if text.startswith(start):
            return name
    if head[4:8] == b"ftyp":
        return "a HEIC, AVIF or video file"
    return ""
