"""Starts one command in this process's group and ends all that came of it when the doctor is gone.

    python guard.py PIPE_FD COMMAND …

The doctor holds the other end of the pipe. When it dies, however it dies, the pipe closes and the group gets
SIGTERM (the trainer saves), then SIGKILL. Launchers start their ranks in sessions of their own, which a signal to the
group does not reach and which outlive a launcher: whoever belongs to the run is known by a variable that all of them
inherit. Only the standard library: it may run in any interpreter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

VARIABLE = "XFLUX_WATCH"
"""Names a folder that is this run's alone."""
GRACE = 60.0
"""Seconds between SIGTERM and SIGKILL, enough to finish a step and save the adapters."""


def members(folder: str) -> list[int]:
    """The processes of the run with this folder, but for the caller and for those that have ended."""
    mark, found = f"{VARIABLE}={folder}".encode(), []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone by now, or somebody else's
            if mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def kill(folder: str) -> None:
    """End all of a run, those too that it starts meanwhile. One that waits in the kernel ends when that lets it."""
    for _ in range(20):
        left = members(folder)
        if not left:
            return
        send(left, signal.SIGKILL)
        time.sleep(0.02)


def watch(pipe: int, gone: threading.Event, folder: str) -> None:
    """Wait for the doctor's end of the pipe to close; then ask the group to end, and at last make it."""
    with contextlib.suppress(OSError):
        while os.read(pipe, 1):
            pass
    gone.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    finish(folder)


def finish(folder: str) -> None:
    """Leave nothing of a run whose doctor is gone, this process included."""
    kill(folder)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    pipe, folder = int(arguments[0]), os.environ[VARIABLE]
    os.set_inheritable(pipe, False)
    # Signals reach the group: the trainer decides what they mean, and the guard stays to report its end.
    gone = threading.Event()
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked.append(number))
    if asked:
        return 128 + asked[0]
    child = subprocess.Popen(arguments[1:])
    for early in [*asked]:  # it may have come before the command could hear it
        send([child.pid], early)
    threading.Thread(target=watch, args=(pipe, gone, folder), daemon=True).start()
    code = child.wait()
    if asked:
        outlive(folder)
    if gone.is_set():
        finish(folder)  # nobody is left to end the ranks of a launcher that went first
    kill(folder)
    return code if code >= 0 else 128 - code


def outlive(folder: str) -> None:
    """Wait for ranks that were asked to end and outlive their launcher: they save. accelerate's for one process dies of
    the SIGTERM at once."""
    until = time.monotonic() + GRACE
    while members(folder) and time.monotonic() < until:
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
