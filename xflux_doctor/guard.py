"""Starts one command in this process's group and ends the whole group when the doctor is gone.

    python guard.py PIPE_FD COMMAND …

The doctor holds the other end of the pipe. When it dies, however it dies, the pipe closes and the group gets
SIGTERM (the trainer saves), then SIGKILL. Only the standard library: it may run in any interpreter.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 60.0
"""Seconds between SIGTERM and SIGKILL, enough to finish a step and save the adapters."""


def watch(pipe: int, gone: threading.Event) -> None:
    """Wait for the doctor's end of the pipe to close; then ask the group to end, and at last make it."""
    with contextlib.suppress(OSError):
        while os.read(pipe, 1):
            pass
    gone.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    pipe = int(arguments[0])
    os.set_inheritable(pipe, False)
    # Signals reach the group: the trainer decides what they mean, and the guard stays to report its end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    gone = threading.Event()
    child = subprocess.Popen(arguments[1:])
    threading.Thread(target=watch, args=(pipe, gone), daemon=True).start()
    code = child.wait()
    if gone.is_set():
        os.killpg(0, signal.SIGKILL)  # nobody is left to end the ranks of a launcher that went first
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
