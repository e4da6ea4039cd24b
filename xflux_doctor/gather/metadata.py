"""One installed distribution's own records: what it requires, who installed it, whether its files are whole.

Only text is read; nothing is imported. A record that is absent or odd leaves its field empty.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

_LARGEST = 16 << 20
"""A RECORD beyond this is not read: torch's has 1.3 MB."""
_ARCHS = re.compile(rb"sm_\d+[a-z]?(?: (?:sm|compute)_\d+[a-z]?)+")


def requires(info: Path) -> tuple[str, ...]:
    """Requires-Dist lines without those of extras; `info` is a dist-info folder, an egg-info folder or file."""
    text = _read(info / "METADATA") or _read(info / "PKG-INFO") or _read(info)
    header = text.replace("\r\n", "\n").partition("\n\n")[0]
    lines = [line[14:].strip() for line in header.splitlines() if line.startswith("Requires-Dist:")]
    if not lines:  # setuptools keeps an egg-info's in a file of its own, extras under [headings]
        lines = [line.strip() for line in _read(info / "requires.txt").partition("\n[")[0].splitlines()]
    return tuple(line for line in lines if line and "extra ==" not in line and "extra in" not in line)


def installer(info: Path) -> str:
    return _read(info / "INSTALLER").strip()[:40]


def editable(info: Path, name: str, beside: frozenset[str]) -> bool:
    """Whether the distribution is a link to somebody's source folder (PEP 610, or setuptools' older ways).

    `beside`: the names in its folder, listed once for all packages.
    """
    try:
        if json.loads(_read(info / "direct_url.json") or "{}").get("dir_info", {}).get("editable"):
            return True
    except (ValueError, AttributeError):
        pass
    stem = name.replace("-", "_")
    return f"{name}.egg-link" in beside or any(n.startswith("__editable__") and stem in n for n in beside)


def damaged(folder: Path, info: Path, module: str) -> tuple[str, ...]:
    """Libraries and the first module of the RECORD that are missing, empty or of another size, at most ten."""
    record = info / "RECORD"
    try:
        if record.stat().st_size > _LARGEST:
            return ()
    except OSError:
        return ()
    wrong = []
    for line in _lines_of_interest(_bytes(record), module):
        path, _, size = line.rpartition(",")
        path = path.rpartition(",")[0].strip('"')
        if not size.isdigit() or not (re.search(r"\.so(\.\d+)*$", path) or path.endswith("__init__.py")):
            continue
        if _size(folder / path) != int(size):
            wrong.append(path)
    return tuple(wrong[:10])


def _lines_of_interest(record: bytes, module: str) -> Iterator[str]:
    """Lines that name a library or the first module; torch's 13,000 others are not even split."""
    for mark in (b".so", f"{module}/__init__.py,".encode()):
        at = record.find(mark)
        while at >= 0:
            end = record.find(b"\n", at) % (len(record) + 1)
            line = record[record.rfind(b"\n", 0, at) + 1 : end]
            if mark == b".so" or line.startswith(mark):
                yield line.decode("utf-8", "replace").rstrip("\r")
            at = record.find(mark, end)


def archs(torch: Path) -> tuple[str, ...]:
    """The GPU architectures that torch was compiled for, from the text inside libtorch_python.so.

    `torch.cuda.get_arch_list()` is the same list, and is empty on a machine without a GPU.
    """
    try:
        with (
            (torch / "lib" / "libtorch_python.so").open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            found = _ARCHS.search(content)
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _read(path: Path) -> str:
    return _bytes(path).decode("utf-8", "replace")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
