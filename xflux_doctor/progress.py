"""What a run shows: one line of progress, redrawn in place on a terminal, and everything else in full.

Whoever prints must not wait for the terminal (Ctrl-S, a dead connection): it is written by a thread of its own, and
what it does not take in time is left out of it. The log has every line.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import threading
import time

_STEP = re.compile(rb"step (\d+)/(\d+)  ")
EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""
_ROOM = 2000
"""Pieces that may wait for the terminal."""
_END = 3.0
"""Seconds that the terminal has for the last of them."""
_FIRST = ("step", "loss", "eta")
"""What stays of a line of progress that is too long."""


class Display:
    """Takes the merged output, whole lines but for last words."""

    def __init__(self, *, raw: bool = False, number: int = 1) -> None:
        self._raw, self._number = raw, number
        self._tty = os.isatty(number)
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_ROOM)
        self._left_out = 0
        self._drawn = False
        self._open = False
        self._last = -EVERY
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)
        self._thread.start()

    def __call__(self, chunk: bytes) -> None:
        """Show it, soon."""
        try:
            self._waiting.put_nowait(chunk)
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Show what is left, for as long as the terminal takes it."""
        try:
            self._waiting.put(None, timeout=_END)
            self._thread.join(_END)
        except queue.Full:
            pass

    def hang_up(self) -> None:
        """The terminal is gone. A file or a pipe that stands in its place stays."""
        if self._tty:
            lose(self._number)

    def _run(self) -> None:
        while (chunk := self._waiting.get()) is not None:
            if self._left_out:
                self._out(f"\nxflux-doctor: {self._left_out} pieces of output are only in the log.\n".encode())
                self._left_out = 0
            if self._raw:
                self._out(chunk)
                continue
            for line in chunk.splitlines(keepends=True):
                self._line(line)
        if self._drawn or (self._open and self._tty):
            self._out(b"\n")

    def _line(self, line: bytes) -> None:
        step = _STEP.match(line)
        if step is None:
            self._out(b"\r\x1b[K" + line if self._drawn else line)
            self._drawn, self._open = False, not line.endswith(b"\n")
            return
        now, ends = time.monotonic(), step[1] in (b"1", step[2])
        if self._tty:
            width = shutil.get_terminal_size().columns - 1
            self._out(b"\r\x1b[K" + fitted(line.decode(errors="replace").rstrip(), width).encode())
            self._drawn = True
        elif ends or now - self._last >= EVERY:
            self._last = now
            self._out(line)

    def _out(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._number, view) :]
        except OSError:
            lose(self._number)


def fitted(line: str, width: int) -> str:
    """A line of progress in so many columns: parts go from the right, but for the step, the loss and the time to go."""
    parts = line.split("  ")
    while len("  ".join(parts)) > width:
        least = next((k for k in range(len(parts) - 1, -1, -1) if not parts[k].startswith(_FIRST)), None)
        if least is None:
            break
        del parts[least]
    return "  ".join(parts)[:width]


def lose(number: int) -> None:
    """Nobody reads this output any more: from now on it goes nowhere, and what shares it does too."""
    try:
        gone = os.fstat(number)
    except OSError:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for other in {number, 1, 2}:
        try:
            there = os.fstat(other)
        except OSError:
            continue
        if (there.st_dev, there.st_ino) == (gone.st_dev, gone.st_ino):
            os.dup2(nowhere, other)
    os.close(nowhere)
