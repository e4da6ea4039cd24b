"""Reports out of files, folders, packed files and streams, one at a time.

A stream holds one report after the other, in one line each or in many, and several mixed where each line begins with
its sender's label (`srun --label`: "12: {", pdsh: "node017: {"). Our own reports begin and end with a brace in the
first column, by which a broken one is told from the next. What is no report is passed over; a report that cannot be
read is named, and the next is read.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

from xflux_doctor.errors import UsageError
from xflux_doctor.fleet.values import Broken, Report

LARGEST = 16 << 20
"""Bytes of one report; ours have some 50,000."""
ENDINGS = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_LABEL = re.compile(rb" *([A-Za-z0-9_.-]{1,253}): ?")
_NODE = re.compile(rb'"node": ?"([A-Za-z0-9_.-]{1,253})"')
_AGAIN = "Make it anew on that node: `xflux-doctor check --format json --output FILE`."
_MOST_LABELS = 65536


def read(sources: Sequence[str], stdin: BinaryIO) -> Iterator[Report | Broken]:
    """What the sources hold, in their order. Raises UsageError for a path that is not there."""
    for source in sources:
        if source == "-":
            yield from _or_none(_stream(stdin, "standard input"), "standard input")
            continue
        path = Path(source)
        if not path.exists():
            raise UsageError(f"There is no report or folder at {source}.", "Name files or folders of reports, or -.")
        if path.is_dir():
            yield from _or_none(_folder(path), source)
        else:
            yield from _or_none(_file(path), source)


def _or_none(found: Iterator[Report | Broken], source: str) -> Iterator[Report | Broken]:
    empty = True
    for item in found:
        empty = False
        yield item
    if empty:
        yield Broken(source, "it holds no report", "Give what `xflux-doctor check --format json` wrote on each node.")


def _folder(path: Path) -> Iterator[Report | Broken]:
    """Every file below it that is named like a report; what begins with a dot is being written."""
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        yield Broken(str(path), f"the folder cannot be read: {error.strerror}", "Give yourself read permission.")
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _folder(Path(entry.path))
        elif entry.name.endswith(ENDINGS):
            yield from _or_none(_file(Path(entry.path)), entry.path)


def _file(path: Path) -> Iterator[Report | Broken]:
    """A file with one report is decoded at once, any other line by line."""
    source = str(path)
    try:
        with _opened(path) as file:
            start = file.read(LARGEST)
        if len(start) < LARGEST and _whole(start):
            yield Report(source, start)
            return
    except (OSError, EOFError, zlib.error) as error:
        if not isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
            yield Broken(source, f"it cannot be read: {error.strerror or error}", "Give yourself read permission.")
            return
    with _opened(path) as file:
        yield from _stream(file, source)


def _opened(path: Path) -> BinaryIO:
    """The file's own bytes, unpacked where it begins as gzip does, however it is called."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    return cast("BinaryIO", gzip.open(path) if packed else path.open("rb"))


def _whole(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


class _Open:
    """A report that has begun and not ended."""

    def __init__(self, line: bytes) -> None:
        self.lines, self.size = [line], len(line)

    @property
    def owner(self) -> str:
        """Whose it is: a report tells that in its first lines."""
        return _owner(b"".join(self.lines[:40]))


def _stream(file: BinaryIO, source: str) -> Iterator[Report | Broken]:
    waiting: dict[str, _Open] = {}
    try:
        for line in iter(lambda: file.readline(LARGEST), b""):
            label, rest = _labelled(line)
            if rest.startswith(b"}{"):  # files without a last line end, one after the other
                yield from _take(waiting, label, b"}\n", source)
                rest = rest[1:]
            yield from _take(waiting, label, rest, source)
    except (OSError, EOFError, zlib.error):
        pass  # a packed stream that was cut off: what is open is told below
    for label, unfinished in waiting.items():
        yield _cut(unfinished, _place(source, label))


def _take(waiting: dict[str, _Open], label: str, line: bytes, source: str) -> Iterator[Report | Broken]:
    place, open_ = _place(source, label), waiting.get(label)
    if line.startswith(b"{"):
        if open_ is not None:
            yield _cut(open_, place)
        if line.rstrip().endswith(b"}"):
            waiting.pop(label, None)
            yield Report(place, line)
        elif len(line) >= LARGEST or len(waiting) >= _MOST_LABELS:
            waiting.pop(label, None)
            yield Broken(place, f"a report of more than {LARGEST >> 20} MiB", _AGAIN, _owner(line))
        else:
            waiting[label] = _Open(line)
    elif open_ is not None:
        open_.lines.append(line)
        open_.size += len(line)
        if line.rstrip() == b"}" and line.startswith(b"}"):
            del waiting[label]
            yield Report(place, b"".join(open_.lines))
        elif open_.size > LARGEST:
            del waiting[label]
            yield Broken(place, f"a report of more than {LARGEST >> 20} MiB", _AGAIN, open_.owner)


def _labelled(line: bytes) -> tuple[str, bytes]:
    """JSON's own lines begin with a brace, or a blank and a quote, and never look like a label."""
    found = None if line[:1] in b'{}"' else _LABEL.match(line)
    return (found[1].decode(), line[found.end() :]) if found else ("", line)


def _cut(unfinished: _Open, place: str) -> Broken:
    return Broken(place, f"it is cut off after {unfinished.size} bytes", _AGAIN, unfinished.owner)


def _owner(start: bytes) -> str:
    found = _NODE.search(start[:65536])
    return found[1].decode() if found else ""


def broken(report: Report, why: str) -> Broken:
    """A report whose text is whole and whose content is not ours."""
    return Broken(report.source, why, _AGAIN, _owner(report.data))


def _place(source: str, label: str) -> str:
    return f"{source}, {label}" if label else source
