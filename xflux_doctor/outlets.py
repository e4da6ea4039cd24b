"""The output of a run: each rank's in a file of its own, and all of it, line by line, in one log and on the terminal.

A rank prints into a named pipe in the watched folder. What it printed stays in the pipe when it dies, so its last words
are read; and a pipe has no disk that could be full. Ranks that have no pipe print into the launcher's.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)")
_PATIENCE = 0.5
"""Seconds after which a line without an end is shown: a question, or the last words."""
_LOOK = 0.1


class Merged:
    """One log out of several sources, whole lines at a time. Those of ranks above 0 carry `[rankN]: `."""

    def __init__(self, log: IO[bytes], folder: Path | None, show: Callable[[bytes], None]) -> None:
        self._log: IO[bytes] | None = log
        self._folder, self._show = folder, show
        self._own: dict[int, IO[bytes] | None] = {}
        self._rest: dict[int | None, tuple[bytes, float]] = {}
        self._lock = threading.RLock()

    def take(self, rank: int | None, chunk: bytes) -> None:
        """What a rank, or the launcher (None), has printed."""
        with self._lock:
            if rank is not None:
                self._keep(rank, chunk)
            whole = self._rest.pop(rank, (b"", 0.0))[0] + chunk
            end = 0
            out = bytearray()
            for line in _LINE.finditer(whole):
                if line[0].endswith(b"\r") and line.end() == len(whole):
                    break  # its line feed may come with the next piece
                out += self._marked(rank, line[0])
                end = line.end()
            if rest := whole[end:]:
                self._rest[rank] = (rest, time.monotonic())
            if out:
                self._write(bytes(out))

    def flush(self, patience: float = 0.0) -> None:
        """Write lines that have had no end for so long."""
        with self._lock:
            now = time.monotonic()
            for rank, (rest, since) in list(self._rest.items()):
                if now - since >= patience:
                    del self._rest[rank]
                    self._write(self._marked(rank, rest))

    def say(self, line: str) -> None:
        """A line of the doctor's own."""
        with self._lock:
            self.flush()
            self._write(f"{line}\n".encode())

    def close(self) -> None:
        """The last words of all."""
        with self._lock:
            self.flush()
            for file in self._own.values():
                if file is not None:
                    with contextlib.suppress(OSError):
                        file.close()

    def _marked(self, rank: int | None, line: bytes) -> bytes:
        if not rank or not line.strip() or line.startswith(b"[rank"):
            return line
        return b"[rank%d]: %s" % (rank, line)

    def _write(self, data: bytes) -> None:
        """A full disk must not end the training: it is only shown then."""
        if self._log is not None:
            try:
                self._log.write(data)
                self._log.flush()
            except OSError as error:
                self._log = None
                self._show(f"\nxflux-doctor: the log is no longer written: {error.strerror}.\n".encode())
        self._show(data)

    def _keep(self, rank: int, chunk: bytes) -> None:
        if self._folder is None:
            return
        try:
            if rank not in self._own:
                self._folder.mkdir(exist_ok=True)
                self._own[rank] = (self._folder / f"rank{rank}.log").open("ab", buffering=0)
            if (file := self._own[rank]) is not None:
                file.write(chunk)
        except OSError:
            self._own[rank] = None


class Outlets:
    """The pipes of the ranks in one folder, read by a thread of their own."""

    def __init__(self, folder: Path, merged: Merged) -> None:
        self._folder, self._merged = folder, merged
        self._pipes: dict[int, int] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outlets", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> bool:
        """Read what is there; whether there was anything."""
        found = False
        with self._lock:
            for rank, pipe in self._pipes.items():
                with contextlib.suppress(BlockingIOError):
                    while chunk := os.read(pipe, 65536):
                        found = True
                        self._merged.take(rank, chunk)
        return found

    def stop(self) -> None:
        """After the end of the group: nobody prints any more."""
        self._done.set()
        self._thread.join(_LOOK * 20)
        self._open()
        self.drain()
        with self._lock:
            for pipe in self._pipes.values():
                os.close(pipe)
            self._pipes.clear()

    def _open(self) -> None:
        for path in self._folder.glob("rank*.out"):
            rank = int(path.stem[4:])
            if rank not in self._pipes:
                with contextlib.suppress(OSError), self._lock:
                    # For writing too: a pipe whose rank has died is not at its end, the next attempt may use it.
                    self._pipes[rank] = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def _run(self) -> None:
        while not self._done.wait(_LOOK):
            self._open()
            # Many lines in a moment are read at once, and not ten pipes full a second.
            while self.drain() and not self._done.is_set():
                time.sleep(0.005)
            self._merged.flush(_PATIENCE)
