"""A log as clean lines, whatever it is: huge, binary in places, colored, with progress bars, in UTF-16."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

MAX_LINE = 6000
"""Longer lines are cut: no known mark stands that far to the right."""
_CHUNK = 1 << 18
_LONGEST = 1 << 20
_ESCAPE = re.compile(r"\x1b(?:\[[0-9;:?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT[\d:.,]+(?:Z|[+-]\d\d:\d\d) (?:std(?:out|err) [FP] )?")
"""What `docker logs -t`, `kubectl logs --timestamps` and container runtimes put before each line."""
_HOST = re.compile(r"([^\s:|\]]{1,60}(?:: |\s*\| ))Traceback \(most recent call last\)")
"""What launchers for several machines put before each line of one."""
_RANK = re.compile(r"\[(?:rank|default|trainer|worker)(\d{1,6})\]:? ?|(\d{1,5}): (?=\[|Traceback|\s+File |[\w.]*Error)")


class Line(NamedTuple):
    number: int
    """Counted from 1 by line feeds, as editors do; the redraws of a progress bar share one number."""
    rank: int | None
    text: str
    """Without line end, colors and the mark of the rank."""


class Lines:
    """Makes lines of pieces of a log, one after the other."""

    def __init__(self) -> None:
        self.number = 1
        """Of the line that comes next."""
        self._hosts: list[str] = []

    def of(self, text: str) -> Iterator[Line]:
        """Lines of a text that begins and ends where lines do, the last one with or without its end."""
        start = 0
        while True:
            end = text.find("\n", start)
            yield from _line(self.number, text[start : end if end >= 0 else len(text)], self._hosts)
            self.number += 1
            start = end + 1
            if end < 0 or start == len(text):
                break

    def last(self, text: str) -> Iterator[Line]:
        """The same of lines that were counted already, under the number of the one that comes next."""
        for part in filter(None, text.split("\n")):
            yield from _line(self.number, part, self._hosts)


def lines(source: str | Iterable[str]) -> Iterator[Line]:
    """Lines of a text, or of lines as a file gives them, with or without their line ends."""
    made = Lines()
    for text in [source] if isinstance(source, str) else source:
        yield from made.of(text)


_PACKED: tuple[tuple[bytes, Callable[[BinaryIO], BinaryIO]], ...] = (
    (b"\x1f\x8b", lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file))),
    (b"BZh", lambda file: cast(BinaryIO, bz2.BZ2File(file))),
    (b"\xfd7zXZ\x00", lambda file: cast(BinaryIO, lzma.LZMAFile(file))),  # noqa: SIM115 - the file in it is closed
)
"""How rotated logs begin, by what they are packed with."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A log, unpacked where it is packed; what of a packed one is broken off or damaged is left out."""
    with path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        unpack = next((unpack for mark, unpack in _PACKED if start.startswith(mark)), None)
        yield file if unpack is None else cast(BinaryIO, _Whole(unpack(file)))


class _Whole:
    """Reads to where a packed file is whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except (EOFError, OSError, zlib.error, lzma.LZMAError):
            return b""


def pieces(file: BinaryIO) -> Iterator[bytes]:
    """A log in UTF-8, in pieces that end where lines do (the last one but for that) and are never longer than a few
    chunks, whatever it is. One in UTF-16 comes in UTF-8."""
    rest = b""
    for chunk in _chunks(file):
        whole = rest + chunk
        end = whole.rfind(b"\n") + 1
        if end:
            yield whole[:end]
        rest = whole[end:]
        if len(rest) > _LONGEST:  # a gigabyte without a line end is no log; keep its beginning and its end
            rest = rest[: 4 * MAX_LINE] + b"\r" + rest[-4 * MAX_LINE :]
    if rest:
        yield rest


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    start = file.read(4)
    utf_16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # PowerShell's `> train.log`
    decoder = codecs.getincrementaldecoder("utf-16")(errors="replace")
    chunk = start + file.read(_CHUNK)
    while chunk:
        yield decoder.decode(chunk).encode() if utf_16 else chunk
        chunk = file.read(_CHUNK)


def text_of(piece: bytes) -> str:
    """A piece as text."""
    return piece.decode("utf-8", errors="replace")


def _line(number: int, text: str, hosts: list[str]) -> Iterator[Line]:
    if "\x1b" in text:
        text = _ESCAPE.sub("", text)
    if "\x00" in text:
        text = text.replace("\x00", "")
    for part in text.split("\r") if "\r" in text else (text,):
        if part or part is text:
            yield _bare(number, part[:MAX_LINE], hosts)


def _bare(number: int, text: str, hosts: list[str]) -> Line:
    """The line without what was put before it on its way."""
    if text[:2] == "20" and (stamp := _STAMP.match(text)):
        text = text[stamp.end() :]
    if "Traceback (most" in text and (host := _HOST.match(text)) and len(hosts) < 64 and host[1] not in hosts:
        hosts.append(host[1])
    for name in hosts:
        if text.startswith(name):
            text = text[len(name) :]
            break
    if text[:1] and text[0] in "[0123456789" and (mark := _RANK.match(text)):
        return Line(number, int(mark[1] or mark[2]), text[mark.end() :])
    return Line(number, None, text)
