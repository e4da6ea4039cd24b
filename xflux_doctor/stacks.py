"""Where the processes of a hanging run stand: Python's stacks, C's, and what the kernel says of every thread.

Python's come from the ranks themselves (SIGUSR2 to faulthandler, which needs no interpreter lock); C's from py-spy or
gdb where one is installed and may look. What could not be had is said, and nothing here takes longer than its deadline.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xflux_doctor import guard
from xflux_doctor.hang import Rank, place

_PYTHON, _NATIVE = 3.0, 30.0
"""Seconds for a rank to write its stacks, and for a debugger to read the symbols of torch."""
_THREADS = 200


def collect(ranks: list[Rank], folder: Path) -> dict[int, str]:
    """A text for each rank. `folder` is where their `rankN.stack` grow."""
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
    with ThreadPoolExecutor(max(1, min(16, len(ranks)))) as threads:
        native = list(threads.map(_native, ranks))
    return {
        one.beat.rank: "\n".join([
            f"rank {one.beat.rank}, process {one.beat.pid} on {one.beat.host}, state {one.state or 'gone'}",
            f"{place(one.beat)}, after step {one.beat.step}, still for {one.still:.0f} s",
            "", "== Python", _python(one, folder / f"rank{one.beat.rank}.stack", marks[one.beat.rank]),
            "== C", c, "== kernel, by thread", _kernel(one.beat.pid),
        ])
        for one, c in zip(ranks, native, strict=True)
    }  # fmt: skip


def innermost(text: str) -> str:
    """The main thread's innermost Python frame of such a text; empty where there is none. faulthandler writes the
    main thread last, and each thread's innermost frame first."""
    python = text.partition("== Python")[2].partition("== C")[0]
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


def _native(one: Rank) -> str:
    if not one.state:
        return "not available: the process is gone\n"
    if one.state == "D":
        return "not available: a debugger would wait for the process, which waits in the kernel\n"
    pid = str(one.beat.pid)
    if tool := shutil.which("py-spy"):
        argv = [tool, "dump", "--native", "--nonblocking", "--pid", pid]
    elif tool := shutil.which("gdb"):
        argv = [
            tool,
            "-nx",
            "-batch",
            "-p",
            pid,
            "-ex",
            "set print frame-arguments none",
            "-ex",
            "thread apply all bt 40",
        ]
    else:
        return "not available: neither py-spy nor gdb is installed\n"
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=_NATIVE, stdin=subprocess.DEVNULL,
            start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not available: {tool} took longer than {_NATIVE:.0f} s\n"
    except OSError as error:
        return f"not available: {tool}: {error.strerror}\n"
    if "#0" not in done.stdout and "Thread" not in done.stdout:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return f"not available: {tool} says: {said[-1] if said else 'nothing'}\n"
    return done.stdout


def _kernel(pid: int) -> str:
    tasks = Path(f"/proc/{pid}/task")
    try:
        numbers = sorted(int(task.name) for task in tasks.iterdir())
    except OSError:
        return "not available: the process is gone\n"
    parts = []
    for number in numbers[:_THREADS]:
        task = tasks / str(number)
        parts.append(f"thread {number} {_read(task / 'comm')}: wchan {_read(task / 'wchan')}, "
                     f"syscall {_read(task / 'syscall')}")  # fmt: skip
        stack = _read(task / "stack")
        parts += [f"    {line}" for line in stack.splitlines()] if not stack.startswith("(") else [f"    stack {stack}"]
    status = _read(Path(f"/proc/{pid}/status"))
    return "\n".join([*parts, "", "== status", status]) + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        return f"(not available: {error.strerror})"
