"""The C stack of a thread that waits, read from its memory meanwhile: no debugger is needed, and nobody is stopped.

The kernel tells where a waiting thread's stack ends (proc(5), syscall). Words on it that lie behind a call instruction
are where functions go back to, and the symbols of the libraries' dynamic tables name them (System V ABI, ELF-64). Words
that earlier calls left are among them: what a debugger shows has fewer lines, in the same order.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import mmap
import os
import shutil
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_DEEP, _MOST = 256 << 10, 64
"""Bytes of a stack that are read, and frames that are shown."""
_DEMANGLE = 2.0
_TRIES, _PAUSE = 50, 0.003
_SYMBOL = struct.Struct("<IBBHQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SYMTAB, _DYNSYM, _LOAD = 2, 11, 1
_FUNCTION = (2, 10)
_TAKERS = frozenset(
    "PyEval_RestoreThread PyEval_AcquireThread PyEval_AcquireLock PyGILState_Ensure _PyEval_EvalFrameDefault "
    "_Py_HandlePending".split()
)
"""Who takes the interpreter's lock."""


@dataclass(frozen=True)
class _Region:
    """A line of /proc/PID/maps."""

    start: int
    end: int
    offset: int
    path: str
    code: bool


def stack(pid: int, tid: int) -> str:
    """Frames of one thread, the innermost first; empty where it does not wait, or may not be looked at."""
    if os.uname().machine not in _CALLS:
        return ""
    regions = _regions(pid)
    with contextlib.suppress(OSError), Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for _ in range(_TRIES):  # one that waits for Python's lock wakes up every 5 ms
            words = _waits_at(pid, tid)
            if words:
                found = [words[1], *_returns(memory.fileno(), regions, words[0])]
                if _waits_at(pid, tid) == words:
                    return _shown(found[:_MOST], regions)
            time.sleep(_PAUSE)
    return ""


def _waits_at(pid: int, tid: int) -> tuple[int, int] | None:
    """Where its stack ends, and where it waits; None for one that runs."""
    words = _text(f"/proc/{pid}/task/{tid}/syscall").split()
    return (int(words[-2], 16), int(words[-1], 16)) if len(words) > 2 else None


def wants_interpreter(shown: str) -> bool:
    """Whether such a stack ends in CPython's wait for its lock (ceval_gil: take_gil calls pthread_cond_timedwait; its
    own name is in no dynamic table)."""
    lines = shown.splitlines()[:6]
    waits = next((number for number, line in enumerate(lines) if "pthread_cond_timedwait" in line), None)
    behind = [] if waits is None else [line.split()[2] for line in lines[waits + 1 : waits + 4]]
    return "take_gil" in behind or bool(behind[:1] == ["?"] and _TAKERS.intersection(behind[1:]))


def _returns(memory: int, regions: list[_Region], top: int) -> list[int]:
    """Addresses behind a call, from the top of the stack on."""
    own = _region(regions, top)
    if own is None:
        return []
    size = min(own.end - top, _DEEP) // 8 * 8
    words = struct.unpack(f"<{size // 8}Q", os.pread(memory, size, top))
    behind_a_call, found = _CALLS[os.uname().machine], []
    for word in words:
        region = _region(regions, word)
        if region is None or not region.code or word - 8 < region.start:
            continue
        if behind_a_call(os.pread(memory, 8, word - 8)):
            found.append(word)
    return found


def _x86_64(before: bytes) -> bool:
    """CALL rel32, or CALL through a register or memory (FF /2) in its lengths (Intel SDM, volume 2)."""
    return before[3] == 0xE8 or any(before[-n] == 0xFF and before[1 - n] >> 3 & 7 == 2 for n in (2, 3, 4, 6, 7))


def _aarch64(before: bytes) -> bool:
    """BL, or BLR (Arm ARM, C6.2)."""
    word = int.from_bytes(before[4:], "little")
    return word >> 26 == 0b100101 or word & 0xFFFFFC1F == 0xD63F0000


_CALLS = {"x86_64": _x86_64, "aarch64": _aarch64}


def _shown(found: list[int], regions: list[_Region]) -> str:
    """A line each, with the function's name where a table of symbols has it."""
    places: dict[str, list[tuple[int, int]]] = {}
    for number, address in enumerate(found):
        if (region := _region(regions, address)) is not None:
            # A return lies behind its call: one byte before it is still in the function that called.
            places.setdefault(region.path, []).append((number, address - region.start + region.offset - bool(number)))
    names: dict[int, str] = {}
    for path, wanted in places.items():
        with contextlib.suppress(OSError, struct.error, ValueError):
            if Path(path).is_file():  # no device, and nothing that the kernel made up
                names |= _names(path, wanted)
    plain = _demangled([names.get(number, "") for number in range(len(found))])
    lines = []
    for number, address in enumerate(found):
        region = _region(regions, address)
        where = Path(region.path).name if region else ""
        lines.append(f"#{number:<2} {address:#018x} {plain[number] or '?'} ({where})")
    return "\n".join(lines) + "\n"


def _names(path: str, wanted: list[tuple[int, int]]) -> dict[int, str]:
    """The functions at these offsets of a file, by the numbers that come with them."""
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            return {}
        segments, sections = _headers(data)
        tables = sorted((one for one in sections if one[1] in (_SYMTAB, _DYNSYM)), key=lambda one: one[1])
        if not tables:
            return {}
        _, _, _, _, start, size, link, *_ = tables[0]  # a symtab has the dynsym's too
        numbers: dict[int, list[int]] = {}
        for number, offset in wanted:
            base = next((one for one in segments if one[0] == _LOAD and one[2] <= offset < one[2] + one[5]), None)
            numbers.setdefault(offset - base[2] + base[3] if base else offset, []).append(number)
        addresses, strings = sorted(numbers), sections[link][4]
        found: dict[int, str] = {}
        # libtorch_cuda has some 100,000 of them: looked at once, and not kept.
        for name, info, _, _, value, length in _SYMBOL.iter_unpack(data[start : start + size]):
            place = bisect.bisect_left(addresses, value) if info & 0xF in _FUNCTION else len(addresses)
            while place < len(addresses) and addresses[place] < value + length:
                end = data.find(b"\0", strings + name)
                found |= dict.fromkeys(numbers[addresses[place]], data[strings + name : end].decode(errors="replace"))
                place += 1
        return found


def _headers(data: mmap.mmap) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The segments and the sections of an ELF-64 file."""
    segments_at, sections_at = struct.unpack_from("<QQ", data, 32)
    count, _, sections = struct.unpack_from("<HHH", data, 56)
    return ([_SEGMENT.unpack_from(data, segments_at + 56 * n) for n in range(count)],
            [_SECTION.unpack_from(data, sections_at + 64 * n) for n in range(sections)])  # fmt: skip


def _demangled(names: list[str]) -> list[str]:
    """C++ names as c++filt writes them, where it is installed."""
    tool = shutil.which("c++filt")
    if tool is None or not any(name.startswith("_Z") for name in names):
        return names
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([tool, "-p"], input="\n".join(names), capture_output=True, text=True, timeout=_DEMANGLE,
                              start_new_session=True, check=True)  # fmt: skip
        plain = done.stdout.split("\n")
        return list(itertools.islice(itertools.chain(plain, itertools.repeat("")), len(names)))
    return names


def _regions(pid: int) -> list[_Region]:
    found = []
    for line in _text(f"/proc/{pid}/maps").splitlines():
        parts = line.split(maxsplit=5)
        start, _, end = parts[0].partition("-")
        path = parts[5] if len(parts) > 5 else ""
        found.append(_Region(int(start, 16), int(end, 16), int(parts[2], 16), path, "x" in parts[1]))
    return found


def _region(regions: list[_Region], address: int) -> _Region | None:
    place = bisect.bisect_right(regions, address, key=lambda one: one.start) - 1
    return regions[place] if place >= 0 and address < regions[place].end else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
