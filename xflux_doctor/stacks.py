"""Where the processes of a hanging run stand: Python's stacks, C's, and what the kernel says of every thread.

Python's come from the ranks themselves (SIGUSR2 to faulthandler, which needs no interpreter lock), the kernel's from
`waits`, of their children too. C's come from eu-stack or py-spy where one is installed and may look: both stop a
process for less than a second. Without them the main thread's is read from its memory (`cstack`). gdb stops a process
while it reads the symbols of torch, which takes seconds: it is asked only of a run that is to be ended. What could not
be had is said, and nothing here takes longer than its deadline.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from xflux_doctor import cstack, guard, waits
from xflux_doctor.hang import Held, Rank, place
from xflux_doctor.heartbeat import state
from xflux_doctor.probes.runner import Foreign
from xflux_doctor.waits import Thread

_T = TypeVar("_T")
_PYTHON, _NATIVE, _DEBUGGER = 3.0, 10.0, 30.0
"""Seconds for a rank to write its stacks, for its C stacks, and for gdb to read the symbols of torch."""
_STOPPED = 1.0
"""Seconds that a process which may yet go on is kept from running at the most."""
_BETWEEN, _KERNEL = 1.0, 5.0
"""Seconds between two looks at a thread, and for one look at all of a rank's."""
_PROCESSES = 32
"""Of a rank and its children, so many are looked at."""
_NOT = "not available:"
_NONE = "neither eu-stack (elfutils) nor py-spy is installed, which show every thread\n"
_READ = "the main thread's, read from its memory; lines that earlier calls left may be among them:\n"


class Standing(msgspec.Struct, frozen=True):
    """Where a rank stands."""

    text: str
    """All of it."""
    innermost: str = ""
    """The main thread's innermost Python frame."""
    held: Held = Held()


def collect(ranks: list[Rank], folder: Path) -> dict[int, Standing]:
    """By rank. `folder` is where their `rankN.stack` grow."""
    marks = {one.beat.rank: _size(folder / f"rank{one.beat.rank}.stack") for one in ranks}
    own = set(guard.members(str(folder)))  # a rank's number may be another's by now
    guard.send([one.beat.pid for one in ranks if one.beat.pid in own], signal.SIGUSR2)
    time.sleep(0.3)
    until = time.monotonic() + _PYTHON
    awake = [one for one in ranks if one.state not in ("T", "t", "", "Z")]
    while time.monotonic() < until and not all(
        _size(folder / f"rank{one.beat.rank}.stack") > marks[one.beat.rank] for one in awake
    ):
        time.sleep(0.1)
    before = _looks(ranks)
    time.sleep(_BETWEEN)  # no signal and no debugger in between, which would let threads run
    after = _looks(ranks)
    mains = _each(ranks, _main)
    held = {one.beat.rank: _held_up(one.beat.pid, before[one.beat.rank], after[one.beat.rank], mains[one.beat.rank])
            for one in ranks}  # fmt: skip
    native = _each(ranks, lambda one: _native(one, held[one.beat.rank], mains[one.beat.rank]))
    found = {}
    for one in ranks:
        rank = one.beat.rank
        python = _python(one, folder / f"rank{rank}.stack", marks[rank])
        text = "\n".join([
            f"rank {rank}, process {one.beat.pid} on {one.beat.host}, state {one.state or 'gone'}",
            f"{place(one.beat)}, after step {one.beat.step}, still for {one.still:.0f} s",
            *filter(None, (held[rank].main, *held[rank].others, held[rank].locked)), "",
            "== Python", python, "== C", native[rank],
            "== kernel, by thread", _kernel(one, before[rank], after[rank]),
        ])  # fmt: skip
        found[rank] = Standing(text, innermost(python), held[rank])
    return found


def within(seconds: float, call: Callable[[], _T]) -> _T | None:
    """What it gives; None where it takes longer: looking at a process that hangs can hang."""
    found: list[_T] = []
    caller = threading.Thread(target=lambda: found.append(call()), daemon=True)
    caller.start()
    caller.join(seconds)
    return found[0] if found else None


def debug(ranks: list[Rank]) -> dict[int, str]:
    """The C stacks of ranks that are to be ended, by gdb, where `collect` could not have them."""
    if shutil.which("gdb") is None or any(map(shutil.which, ("py-spy", "eu-stack"))):
        return {}
    return {rank: text for rank, text in _each(ranks, _by_gdb).items() if text}


def innermost(python: str) -> str:
    """The main thread's innermost frame of faulthandler's text; empty where there is none. It writes the main thread
    last, and each thread's innermost frame first."""
    last = python.rpartition("hread 0x")[2]
    return next((line.strip() for line in last.splitlines() if line.lstrip().startswith("File ")), "")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _python(one: Rank, path: Path, since: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(since)
            text = file.read().decode(errors="replace")
    except OSError as error:
        text = f"not available: {error.strerror}\n"
    if text:
        return text
    if one.state in ("T", "t"):
        return "not available: the process is stopped, and writes them when it goes on\n"
    return "not available: the process did not answer SIGUSR2\n"


def _looks(ranks: list[Rank]) -> dict[int, dict[int, list[Thread]]]:
    """The threads of each rank's process and of its children, by rank and process."""
    below = waits.descendants([one.beat.pid for one in ranks if one.state])
    found: dict[int, dict[int, list[Thread]]] = {one.beat.rank: {} for one in ranks}

    def look(one: Rank) -> None:
        for pid in [one.beat.pid, *below.get(one.beat.pid, ())][:_PROCESSES]:
            found[one.beat.rank][pid] = waits.threads(pid)

    # The memory of a process may be locked by a thread of it that waits for a disk: then so does who looks at it.
    lookers = [threading.Thread(target=look, args=(one,), daemon=True) for one in ranks if one.state]
    until = time.monotonic() + _KERNEL
    for looker in lookers:
        looker.start()
    for looker in lookers:
        looker.join(max(0.0, until - time.monotonic()))
    return {rank: dict(processes) for rank, processes in found.items()}


def _held_up(pid: int, before: dict[int, list[Thread]], after: dict[int, list[Thread]], own: str) -> Held:
    """What a rank's main thread waits for, and what the others do. `own`: the main thread's C stack."""
    later = {thread.tid: thread for found in after.values() for thread in found}
    main, others, locked, dead = "", list[str](), "", False
    wants = cstack.wants_interpreter(own)
    for thread in (thread for found in before.values() for thread in found):
        words = waits.who_holds_up(thread, later.get(thread.tid))
        if thread.tid == pid:
            main = words
            continue
        others += [words] if words else []
        if wants and thread.pid == pid and not dead and (words or _in_a_file(thread, later.get(thread.tid))):
            locked, dead = words or f"thread {thread.tid} ({thread.name}) waits in {thread.doing}", bool(words)
    return Held(main, tuple(others), locked, dead)


def _in_a_file(thread: Thread, later: Thread | None) -> bool:
    """Whether it has been in one call for a file all the while."""
    return thread.file.startswith("/") and later is not None and later.switches == thread.switches >= 0


def _kernel(one: Rank, before: dict[int, list[Thread]], after: dict[int, list[Thread]]) -> str:
    parts = []
    for pid, found in before.items():
        head = "" if pid == one.beat.pid else f"child process {pid}:\n"
        parts.append(head + waits.shown(found, after.get(pid, [])) if found else "")
    text = "".join(parts)
    if not text:
        return "not available: the process is gone\n" if not one.state else "not available: it could not be looked at\n"
    try:
        status = Path(f"/proc/{one.beat.pid}/status").read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        status = f"not available: {error.strerror}"
    return f"{text}\n== status\n{status}\n"


def _each(ranks: list[Rank], call: Callable[[Rank], str]) -> dict[int, str]:
    with ThreadPoolExecutor(max(1, min(16, len(ranks)))) as pool:
        return dict(zip((one.beat.rank for one in ranks), pool.map(call, ranks), strict=True))


def _native(one: Rank, held: Held, own: str) -> str:
    """Of all threads where a debugger can be asked, else the main thread's `own`. `held`: who waits in the kernel, and
    can do nothing before it has an answer."""
    if not one.state:
        return f"{_NOT} the process is gone\n"
    own = f"{_READ}{own}" if own else f"{_NOT} the main thread runs, or its memory may not be read\n"
    if held.main or held.others or waits.sleeps(one.beat.pid):
        return f"{_NOT} a debugger would wait for a thread that waits in the kernel\n{own}"
    pid, said = str(one.beat.pid), ""
    for argv in (["eu-stack", "-n", "64", "-p", pid], ["py-spy", "dump", "--native", "--pid", pid]):
        if shutil.which(argv[0]):
            found = _run(argv, one, _NATIVE, _STOPPED)
            if not found.startswith(_NOT):
                return found
            said += found
    return (said or _NONE) + own


def _main(one: Rank) -> str:
    """The main thread's C stack, without a debugger."""
    pid = one.beat.pid
    found = within(_KERNEL, lambda: cstack.stack(pid, pid)) if one.state else None
    return found or ""  # None as well: a library may lie on the disk that is away


def _by_gdb(one: Rank) -> str:
    argv = ["gdb", "-nx", "-batch", "-p", str(one.beat.pid), "-ex", "set print frame-arguments none",
            "-ex", "thread apply all bt 40"]  # fmt: skip
    return "" if waits.sleeps(one.beat.pid) else _run(argv, one, _DEBUGGER, _DEBUGGER)


def _run(argv: list[str], one: Rank, seconds: float, stopped: float) -> str:
    """What a debugger says, which may take so many seconds and keep the process from running for so many of them."""
    tool, pid = argv[0], one.beat.pid
    began = last = time.monotonic()
    held = 0.0
    try:
        child = Foreign(argv, os.environ)
    except OSError as error:
        return f"not available: {tool}: {error.strerror}\n"
    while child.poll() is None and held <= stopped and last - began <= seconds:
        time.sleep(0.01)
        now = time.monotonic()
        held, last = held + (now - last if state(pid) in ("T", "t") else 0.0), now
    done = child.finish(last)
    if done.code is None:
        if one.state not in ("T", "t"):  # the signal that a debugger stops with may outlive it
            guard.send([pid], signal.SIGCONT)
        held_up = f"kept the process from running for {held:.1f} s"
        return f"not available: {tool} {held_up if held > stopped else f'took {seconds:.0f} s'}, and was ended\n"
    if "#0" not in done.output and "Thread" not in done.output:
        said = (done.stderr.strip() or done.output.strip()).splitlines()
        return f"not available: {tool} says: {said[-1] if said else 'nothing'}\n"
    return done.output
