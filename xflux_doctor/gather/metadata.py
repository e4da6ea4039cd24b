"""One installed distribution's own records: what it requires, who installed it, whether its files are whole.

Only text is read; nothing is imported. A record that is absent or odd leaves its field empty. Places are text, and
files are read by the system's own calls: for a hundred small files pathlib and buffers took four times as long.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LARGEST = 16 << 20
"""A RECORD beyond this is not read: torch's has 1.3 MB."""
_BLOCK = 16 << 10
_ARCHS = rb"sm_\d+[a-z]?(?: (?:sm|compute)_\d+[a-z]?)+"
_LIBRARY = re.compile(r"\.so(\.\d+)*$")
_SO = re.compile(rb"\.so")
"""By `re`, whose search for a byte is twice as fast as bytes.find for three: torch's RECORD alone has 1.4 MB."""


def requires(info: str) -> tuple[str, ...]:
    """Requires-Dist lines without those of extras; `info` is a dist-info folder, an egg-info folder or file."""
    places = (f"{info}/METADATA", f"{info}/PKG-INFO", info)
    data = next((data for place in places if (data := _bytes(place, to_empty_line=True))), b"")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    header = data.partition(b"\n\n")[0].decode("utf-8", "replace")
    start = header.rfind("\n", 0, header.find("Requires-Dist:")) + 1  # most headers have a hundred other lines first
    lines = [line[14:].strip() for line in header[start:].splitlines() if line.startswith("Requires-Dist:")]
    if not lines:  # setuptools keeps an egg-info's in a file of its own, extras under [headings]
        lines = [line.strip() for line in _read(f"{info}/requires.txt").partition("\n[")[0].splitlines()]
    return tuple(line for line in lines if line and "extra ==" not in line and "extra in" not in line)


def installer(info: str) -> str:
    return _read(f"{info}/INSTALLER").strip()[:40]


def links(beside: frozenset[str]) -> tuple[str, ...]:
    """Of a folder's names those by which setuptools links source folders: few, and looked through for each package."""
    return tuple(name for name in beside if name.startswith("__editable__"))


def editable(info: str, name: str, beside: frozenset[str], linked: tuple[str, ...]) -> bool:
    """Whether the distribution is a link to somebody's source folder (PEP 610, or setuptools' older ways).

    `beside`: the names in its folder, listed once for all packages, and `linked` their `links`.
    """
    url = _read(f"{info}/direct_url.json")
    try:
        if url and json.loads(url).get("dir_info", {}).get("editable"):
            return True
    except (ValueError, AttributeError):
        pass
    stem = name.replace("-", "_")
    return f"{name}.egg-link" in beside or any(stem in link for link in linked)


def damaged(folder: str, info: str, module: str) -> tuple[str, ...]:
    """Libraries and the first module of the RECORD that are missing, empty or of another size, at most ten."""
    record = f"{info}/RECORD"
    if not 0 <= _size(record) <= _LARGEST:
        return ()
    wrong = []
    for line in _lines_of_interest(_bytes(record), module):
        path, _, size = line.rpartition(",")
        path = path.rpartition(",")[0].strip('"')
        if not size.isdigit() or not (_LIBRARY.search(path) or path.endswith("__init__.py")):
            continue
        if _size(os.path.join(folder, path)) != int(size):  # noqa: PTH118 - see above
            wrong.append(path)
    return tuple(wrong[:10])


def _lines_of_interest(record: bytes, module: str) -> Iterator[str]:
    """Lines that name a library, and the first module's; torch's 13,000 others are not even split."""
    end = 0
    while found := _SO.search(record, end):
        line, end = _line(record, found.start())
        yield line
    mark = f"\n{module}/__init__.py,".encode()
    at = 0 if record.startswith(mark[1:]) else record.find(mark) + 1
    if record.startswith(mark[1:], at):
        yield _line(record, at)[0]


def _line(record: bytes, at: int) -> tuple[str, int]:
    """The line that a place lies in, and where it ends."""
    end = record.find(b"\n", at) % (len(record) + 1)
    return record[record.rfind(b"\n", 0, at) + 1 : end].decode("utf-8", "replace").rstrip("\r"), end


def archs(torch: Path) -> tuple[str, ...]:
    """The GPU architectures that torch was compiled for, from the text inside libtorch_python.so.

    `torch.cuda.get_arch_list()` is the same list, and is empty on a machine without a GPU.
    """
    mmap: Any = importlib.import_module("mmap")  # only for a torch that the matrix does not know
    try:
        with (
            (torch / "lib" / "libtorch_python.so").open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            found = re.search(_ARCHS, content)
            names = found[0].decode().split() if found else []
    except (OSError, ValueError):
        return ()
    return tuple(name for name in names if name.startswith("sm_"))


def conda_versions(prefix: Path) -> dict[str, str]:
    """Versions by conda's own records of an environment: the file names are name-version-build.json."""
    found = {}
    try:
        for entry in (prefix / "conda-meta").iterdir():
            name, _, rest = entry.name.removesuffix(".json").rpartition("-")[0].rpartition("-")
            if name and rest:
                found["torch" if name == "pytorch" else name] = rest
    except OSError:
        return {}
    return found


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - see above
    except (OSError, ValueError):  # a torn RECORD may hold zeros, which no path may
        return -1


def _read(path: str) -> str:
    return _bytes(path).decode("utf-8", "replace")


def _bytes(path: str, *, to_empty_line: bool = False) -> bytes:
    """A file's content, or its blocks up to the one with the first empty line; nothing where it cannot be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        size = _BLOCK if to_empty_line else max(_BLOCK, os.fstat(handle).st_size + 1)
        data = b""
        while block := os.read(handle, size):
            data += block
            if to_empty_line and (b"\n\n" in data or b"\n\r\n" in data):
                break
    except OSError:
        return b""
    finally:
        os.close(handle)
    return data
