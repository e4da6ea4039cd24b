"""Start the launch, stream and keep its output, pass signals on, and say how it ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from xflux_doctor.launch import Launch

_DRAIN = 10.0
"""Seconds to read what the group wrote before its end."""
# torch.distributed.elastic: `failed (exitcode: -9) local_rank: 1 (pid: 4711)`, and a table of all failed ranks with
# `exitcode  : -9 (pid: 4711)`; accelerate's simple launcher: `returned non-zero exit status 3.` or
# `died with <Signals.SIGKILL: 9>.`
_ELASTIC = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
_ELASTIC_TABLE = re.compile(r"^\s*(?:\[[^]]*\]:\s*)?exitcode\s*: (-?\d+) \(pid: \d+\)")
_SIMPLE = re.compile(r"CalledProcessError: Command .* returned non-zero exit status (\d+)\.")
_SIMPLE_SIGNAL = re.compile(r"CalledProcessError: Command .* died with <Signals\.\w+: (\d+)>")
_FOLLOWING = frozenset((signal.SIGTERM, signal.SIGABRT))
"""Signals that come after another rank's end: from the launcher, and from the collectives' own watchdog."""


@dataclass(frozen=True)
class End:
    """How the run ended."""

    exit_code: int
    """What the doctor exits with: the trainer's own code, or 128 + N for signal N."""
    trainer_exit_code: int | None
    """The first failing rank's code where the launcher named it; negative for a signal."""
    signal: int | None
    interrupted: bool
    seconds: float


def run(launch: Launch, log: Path, echo: Callable[[bytes], None]) -> End:
    """Run to the end. Output goes to `log` and to `echo`; SIGINT, SIGTERM and SIGHUP are passed to the group."""
    started = time.monotonic()
    read_end, write_end = os.pipe()
    guard = Path(__file__).with_name("guard.py")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(guard), str(read_end), *launch.argv],
            env=launch.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(read_end,),
        )
        os.close(read_end)
        signals = _Forward(process)
        reader = threading.Thread(target=_copy, args=(process.stdout, file, echo), daemon=True)
        try:
            with signals:
                reader.start()
                code = process.wait()
        finally:
            _end_group(process)
            reader.join(_DRAIN)
            os.close(write_end)
    return _end(code, log, signals.received, time.monotonic() - started)


def _copy(source: IO[bytes] | None, file: IO[bytes], echo: Callable[[bytes], None]) -> None:
    """Keep the output and show it, as it comes. A full disk must not end the training: it is only shown then."""
    assert source
    keep = True
    for chunk in iter(lambda: source.read1(65536), b""):  # type: ignore[attr-defined]
        if keep:
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                keep = False
                echo(f"\nxflux-doctor: the log is no longer written: {error.strerror}.\n".encode())
        echo(chunk)


class _Forward:
    """Pass each signal on to the group once. The third one kills it: a person who insists is right."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._old: dict[int, object] = {}
        self.received: list[int] = []

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._old[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        # A closed terminal asks us to end; the trainer knows that wish as SIGTERM, and saves.
        wish = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
        passed = signal.SIGKILL if len(self.received) > 2 else wish
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, passed)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of the group, a rank whose launcher died say, ends with the run."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end(code: int, log: Path, received: list[int], seconds: float) -> End:
    named = trainer_code(log)
    number: int | None = None
    if named is not None and named < 0:
        number = -named
    elif code > 128 or code < 0:
        number = -code if code < 0 else code - 128
    elif named is not None and named > 128:
        number = named - 128
    exit_code = code
    if code != 0:
        exit_code = 128 + number if number is not None else (named or code)
    if received and exit_code != 0:
        number = received[0]
        exit_code = 128 + number
    if code == 0:
        named = 0
    return End(exit_code, named, number, bool(received), seconds)


def trainer_code(log: Path) -> int | None:
    """The exit code of the rank that failed first, as the launcher printed it; `None` when it named none.

    The launcher calls the first failure that it saw the root cause, and it sees a killed rank and the errors of
    the ranks that were talking to it in one look, in any order: the kill came first.
    """
    named: int | None = None
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            code: int | None = None
            if match := _ELASTIC.search(line) or _ELASTIC_TABLE.search(line) or _SIMPLE.search(line):
                code = int(match[1])
            elif match := _SIMPLE_SIGNAL.search(line):
                code = -int(match[1])
            if code is not None and code < 0 and -code not in _FOLLOWING:
                return code
            named = code if named is None else named
    return named
