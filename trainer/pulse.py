"""What this rank is doing, told to whoever watches the run, at a few microseconds each time.

A supervisor names a folder of this machine in XFLUX_WATCH. There each rank keeps `rankN.json`, one line of JSON of
fixed length that is written over; `rankN.stack`, where the Python stacks of all threads go on SIGUSR2; and it prints
into `rankN.out`, a named pipe, once the supervisor reads it. Without that variable, or where the folder cannot be
written, nothing of this is done and nothing fails.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

VARIABLE = "XFLUX_WATCH"
RECORD = 384
"""Bytes of a record: one write, which a reader sees whole or not at all."""
_HANDSHAKE = 2.0
"""Seconds that the supervisor has to open the pipe; it looks ten times a second."""


class Pulse:
    """One rank's record. Before `begin` and after an error of the disk every call does nothing."""

    def __init__(self) -> None:
        self._file = -1
        self._who = ""
        self._phase, self._collective = "start", "false"
        self._step, self._total, self._seconds, self._count = 0, 0, 0.0, 0

    def begin(self, environ: Mapping[str, str]) -> None:
        """Take up the folder that the variable names: the pipe, the stacks on SIGUSR2 and the first record."""
        if not environ.get(VARIABLE):
            return
        try:
            rank, world = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        except ValueError:  # `Launch.read` says what is wrong with it
            return
        folder = Path(environ[VARIABLE])
        with suppress(OSError):  # a folder may take files and no pipes
            _print_into(folder / f"rank{rank}.out")
        with suppress(OSError):
            # Open for as long as the process lives: the handler writes at any moment, into whatever has this number.
            stacks = os.open(folder / f"rank{rank}.stack", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
            # Whoever finds the record may send the signals, so it comes last.
            self._file = os.open(folder / f"rank{rank}.json", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        host = json.dumps(socket.gethostname()[:64])
        self._who = f'"rank":{rank},"world":{world},"pid":{os.getpid()},"host":{host}'
        self.tick()

    def tick(self) -> None:
        """Still at the same, and alive."""
        if self._file < 0:
            return
        self._count += 1
        text = (
            f'{{{self._who},"phase":"{self._phase}","collective":{self._collective},"step":{self._step},'
            f'"total":{self._total},"seconds":{self._seconds:.6f},"beat":{self._count},'
            f'"monotonic":{time.monotonic():.3f},"time":{time.time():.3f}}}'
        )
        try:
            os.pwrite(self._file, text.ljust(RECORD - 1).encode() + b"\n", 0)
        except OSError:
            os.close(self._file)
            self._file = -1

    def at(self, phase: str) -> str:
        """From now on this is being done; what was before."""
        before, self._phase = self._phase, phase
        self.tick()
        return before

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before = self.at(phase)
        try:
            yield
        finally:
            self.at(before)

    def stepped(self, step: int, total: int, seconds: float) -> None:
        """So many steps of so many are done, the last one in so many seconds."""
        self._step, self._total, self._seconds = step, total, seconds
        self.tick()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank needs the others to go on."""
        self._collective = "true"
        self.tick()
        try:
            yield
        finally:
            self._collective = "false"
            self.tick()


PULSE = Pulse()
"""This process's own: it has one rank."""


def _print_into(pipe: Path) -> None:
    """Standard output and error go into the pipe once somebody reads it; they stay as they are if nobody does."""
    with suppress(FileExistsError):
        os.mkfifo(pipe, 0o600)
    until = time.monotonic() + _HANDSHAKE
    while True:
        try:
            probe = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > until:
                return
            time.sleep(0.02)
    # Open for reading too: a supervisor that dies must not make a print fail in the middle of the last checkpoint.
    end = os.open(pipe, os.O_RDWR)
    os.close(probe)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(end, number)
    os.close(end)
