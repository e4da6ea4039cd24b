"""Start the launch, stream and keep its output, pass signals on, and say how it ended."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from xflux_doctor import guard
from xflux_doctor.gather import host
from xflux_doctor.guard import VARIABLE
from xflux_doctor.hang import Hang
from xflux_doctor.launch import Launch
from xflux_doctor.outlets import Merged, Outlets
from xflux_doctor.probes.runner import scratch
from xflux_doctor.watcher import Watcher

HUNG = 124
"""Exit code of a run that hung and was ended, as that of timeout(1)."""

OOM_KILLED = "xflux-doctor: the kernel's count of oom_kill events in this process's cgroup rose by {} during the run"
"""As `explain` reads it: what memory that ran out leaves in the ranks' own words may look like anything."""
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
    hang: Hang | None = None
    """Why the doctor ended it."""


@dataclass(frozen=True)
class Watching:
    """How a run is watched."""

    folder: Path
    """The run folder."""
    hang_after: float | None = None
    """Seconds that a rank may stand still in a step; None: by the run's own speed; 0: for ever."""
    cards: tuple[str, ...] = ()
    """UUIDs of the job's GPUs."""
    hang_up: Callable[[], None] = lambda: None
    """Called when the terminal is gone."""
    elsewhere: Callable[[], str] = lambda: ""
    """That the part of another machine has ended, in words; empty while none has."""
    begin: Callable[[], None] = lambda: None
    """Called when signals are passed on from now on and nothing is started yet; what it raises ends the run."""


def run(launch: Launch, log: Path, echo: Callable[[bytes], None], watching: Watching | None = None) -> End:
    """Run to the end. Output goes to `log` and to `echo`, whole lines at a time; SIGINT and SIGTERM are passed to the
    group. On SIGHUP the run goes on without a terminal, and its ranks are asked for a checkpoint."""
    started, before = time.monotonic(), host.oom_kills() or 0
    with log.open("wb") as file, _beating() as beating, _Forward(str(beating)) as signals:
        if watching is not None:
            watching.begin()
        read_end, write_end = os.pipe()
        own = log.with_suffix("") if watching else None
        merged = Merged(file, own, echo)
        outlets = Outlets(beating, merged)
        process = subprocess.Popen(
            [sys.executable, guard.__file__, str(read_end), *launch.argv],
            env={**launch.env, VARIABLE: str(beating)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(read_end,),
        )
        os.close(read_end)
        watcher = None
        if watching is not None:
            watcher = Watcher(beating, watching.folder, process.pid, merged.say, after=watching.hang_after,
                              cards=watching.cards, elsewhere=watching.elsewhere)  # fmt: skip
        reader = threading.Thread(target=_copy, args=(process.stdout, outlets, merged), daemon=True)
        try:
            reader.start()
            outlets.start()
            if watcher is not None:
                watcher.start()
            signals.reach(process, lambda: _hung_up(watching, watcher))
            code = process.wait()
        finally:
            signals.close()
            _end_group(process, str(beating))
            reader.join(_DRAIN)
            outlets.stop()
            if watcher is not None:
                watcher.stop()
                merged.flush()
                file.flush()
                kills = (host.oom_kills() or 0) - before
                if kills > 0 and _killed(process.returncode, log):
                    merged.say(OOM_KILLED.format(kills))
                if watcher.hang is not None:  # last, because a rank that was only stopped takes more steps
                    merged.say(watcher.hang.line)
            merged.close()
            os.close(write_end)
    return _end(code, log, signals.received, time.monotonic() - started, watcher.hang if watcher else None)


@contextlib.contextmanager
def _beating() -> Iterator[Path]:
    """The folder of this machine where the ranks tell what they do; gone afterwards (`guard.py` sees to it when the
    doctor is killed)."""
    folder = Path(tempfile.mkdtemp(prefix="xflux-watch-", dir=scratch()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy(source: IO[bytes] | None, outlets: Outlets, merged: Merged) -> None:
    """Keep the launcher's output and show it, as it comes, after what the ranks had said by then."""
    assert source
    for chunk in iter(lambda: source.read1(65536), b""):  # type: ignore[attr-defined]
        outlets.drain()
        merged.take(None, chunk)


def _hung_up(watching: Watching | None, watcher: Watcher | None) -> None:
    if watching is not None:
        watching.hang_up()
    if watcher is not None:
        # Not here: the signal may have come while this very thread holds what a line of the log needs.
        threading.Thread(target=_save, args=(watcher,), daemon=True).start()


def _save(watcher: Watcher) -> None:
    asked = watcher.save()
    does = "a checkpoint was asked for" if asked else "nothing is trained yet"
    watcher.warn("hangup", f"the terminal is gone (SIGHUP); {does}, and the run goes on")


class _Forward:
    """Pass each signal on to the group once. The third one kills it: a person who insists is right. What comes before
    there is a group is passed on then."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._hung_up: Callable[[], None] = lambda: None
        self._old: dict[int, object] = {}
        self._waiting: list[int] = []
        self.received: list[int] = []

    def __enter__(self) -> _Forward:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Signals are for others again."""
        while self._old:
            number, handler = self._old.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reach(self, process: subprocess.Popen[bytes], hung_up: Callable[[], None]) -> None:
        self._process, self._hung_up = process, hung_up
        for number in self._waiting:
            self._pass(number)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # nobody asks us to end: a connection was lost, or a terminal closed
            self._hung_up()
            return
        self.received.append(number)
        self._pass(number if len(self.received) < 3 else signal.SIGKILL)

    def _pass(self, number: int) -> None:
        if self._process is None:
            self._waiting.append(number)
            return
        if number == signal.SIGKILL:
            guard.kill(self._folder)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _end_group(process: subprocess.Popen[bytes], folder: str) -> None:
    """Whatever is left of the run, a rank whose launcher died say, ends with it."""
    guard.kill(folder)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _killed(code: int, log: Path) -> bool:
    """Whether SIGKILL ended the launch, or the rank that failed first: of a group's OOM kills others may have died."""
    return code in (-signal.SIGKILL, 128 + signal.SIGKILL) or trainer_code(log) == -signal.SIGKILL


def _end(code: int, log: Path, received: list[int], seconds: float, hang: Hang | None = None) -> End:
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
    if hang is not None and code != 0:
        exit_code = HUNG  # whatever the signals that ended it made of it
    return End(exit_code, named, number, bool(received), seconds, hang)


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
