"""Run a probe as a child: own session, deadline, the whole group killed, last words kept.

A probe is a file of this folder. It is run by path in the interpreter under test, which need not have the
doctor installed, with the working folder kept off sys.path. A child dies with the doctor (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from xflux_doctor.errors import DoctorError

# `-c` puts the working folder first on sys.path: a torch.py lying there must not be what we test.
_START = "import runpy, sys; sys.path.pop(0); del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
_PR_SET_PDEATHSIG = 1
_LAST_WORDS = 4000
ROOM = 16 << 20
"""Bytes that a temporary folder must have free to be of use."""
_STACK = re.compile(r'Timeout \(|(Current t|T)hread 0x|  File ".*, line \d+ in |Fatal Python error|Extension modules:')
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>\S+)')


class Outcome(msgspec.Struct, frozen=True):
    """How a child ended. `code` is None when its deadline passed and it was killed."""

    code: int | None
    lines: tuple[dict[str, Any], ...]
    """The JSON lines of its stdout."""
    stderr: str
    seconds: float
    said: str = ""
    """The end of its stdout that is no JSON: what libraries print there."""
    output: str = ""
    """All of its stdout, for who reads what is no probe."""

    @property
    def how(self) -> str:
        """The end in words: a signal by its name, an exit code, or the deadline; then the last line of stderr."""
        lines = [line for line in self.stderr.splitlines() if line.strip() and not _STACK.match(line)]
        last = lines[-1] if lines else ""
        if self.code is None:
            words = f"did not end within {self.seconds:.0f} s and was killed"
        elif self.code < 0:
            words = f"died by {_signal_name(-self.code)}"
        else:
            words = f"exited with {self.code}"
        return f"{words}: {last.strip()}" if last and self.code != 0 else words

    @property
    def frame(self) -> str:
        """Where the main thread stood when faulthandler wrote its stack, or empty; the main thread is written last."""
        lines = self.stderr.splitlines()
        starts = [n for n, line in enumerate(lines) if re.match("(Current t|T)hread 0x", line)]
        found = _FRAME.match(lines[starts[-1] + 1]) if starts and starts[-1] + 1 < len(lines) else None
        return f"{found['name']} ({Path(found['file']).name}:{found['line']})" if found else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Child:
    """A running probe whose output goes to files, so that a full pipe can never block it."""

    def __init__(self, python: str, name: str, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
        path = Path(__file__).with_name(f"{name}.py")
        self._start([python, "-c", _START, str(path), *arguments], environment)

    def _start(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self._out, self._err = _output(), _output()  # closed in finish()
        prctl = ctypes.CDLL(None).prctl  # found before the fork: nothing may be loaded after it
        self._started = time.monotonic()
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=self._out,
                stderr=self._err,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=functools.partial(prctl, _PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        except BaseException:
            self._out.close()
            self._err.close()
            raise

    def poll(self) -> int | None:
        return self._process.poll()

    def state(self) -> str:
        """The letter that /proc has for it: R, S, D (in the kernel), T (stopped), Z; empty when it is gone."""
        with contextlib.suppress(OSError, IndexError):
            return Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return ""

    def said(self) -> tuple[dict[str, Any], ...]:
        """The JSON lines that it has written so far. Read beside the file's own position, which the child shares."""
        file = self._out.fileno()
        return _json_lines(os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", errors="replace"))[0]

    def finish(self, deadline: float, gone_by: float | None = None) -> Outcome:
        """Wait until `deadline` (time.monotonic), then kill the group, and collect what was said."""
        code: int | None
        try:
            code = self._process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self.kill(gone_by)
        seconds = time.monotonic() - self._started
        output = _read(self._out)
        lines, said = _json_lines(output)
        outcome = Outcome(code, lines, _read(self._err)[-_LAST_WORDS:], seconds, said[-_LAST_WORDS:], output)
        self._out.close()
        self._err.close()
        return outcome

    def kill(self, gone_by: float | None = None) -> None:
        """End what is left of the child's group; nothing outlives its probe, but what hangs in the kernel.

        For such a one we wait five seconds, or until `gone_by`, which many children can share.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5 if gone_by is None else max(0.0, gone_by - time.monotonic()))


class Foreign(Child):
    """A running program that is none of ours, under the same rules."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self._start(argv, environment)


def run(python: str, name: str, arguments: tuple[str, ...], environment: Mapping[str, str], seconds: float) -> Outcome:
    """Run one probe to its end or its deadline."""
    child = Child(python, name, arguments, environment)
    return child.finish(time.monotonic() + seconds)


def run_program(argv: Sequence[str], environment: Mapping[str, str], seconds: float) -> Outcome:
    """Run a program that is no probe of ours to its end or its deadline. Raises OSError where it cannot be started."""
    return Foreign(argv, environment).finish(time.monotonic() + seconds)


def has_room(folder: str) -> bool:
    """Whether a file can be made in a folder, and something written to it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder).free >= ROOM
    except OSError:
        return False


def scratch() -> str:
    """A folder of this machine that takes files: the temporary one, or shared memory where that has no room.

    Raises DoctorError where neither does.
    """
    with contextlib.suppress(OSError):
        if has_room(folder := tempfile.gettempdir()):
            return folder
    if has_room("/dev/shm"):  # noqa: S108 (names are made by tempfile)
        return "/dev/shm"  # noqa: S108
    seen = "No temporary folder takes a file, and /dev/shm has no room either."
    raise DoctorError(seen, "Make room in /tmp, or set TMPDIR to a folder that has some.")


def _output() -> IO[bytes]:
    """A file for a child's words: on disk, or in memory where there is no temporary folder or no room in it."""
    with contextlib.suppress(OSError):
        if has_room(tempfile.gettempdir()):
            return tempfile.TemporaryFile()
    return os.fdopen(os.memfd_create("xflux-doctor"), "w+b")


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def _json_lines(text: str) -> tuple[tuple[dict[str, Any], ...], str]:
    """The objects among the lines, and the other lines."""
    found, others = [], []
    for line in text.splitlines():
        value = None
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
        if isinstance(value, dict):
            found.append(value)
        elif line.strip():
            others.append(line)
    return tuple(found), "\n".join(others)
