"""Whose part of a run has ended, told on the disk that its machines share.

A rank that waits for one of another machine learns nothing of its end for as long as its collectives are patient, an
hour say. So each doctor writes a line when its launch has ended, and a thread reads those of the others: that disk may
hang, and nobody shall wait for it. Which run a line belongs to is told by a word that the machines agreed on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import msgspec

from xflux_doctor.errors import DoctorError
from xflux_doctor.files import write_atomic

LOOK = 2.0
"""Seconds between two looks; with hundreds of machines more, so that the disk is not asked by all of them at once."""
_CROWD = 16
"""Machines for which LOOK is enough."""
_MOST = 4096
"""Bytes of a line."""


class Line(msgspec.Struct, frozen=True):
    """What a machine says of its part."""

    run: str
    attempt: int
    """0 is the first start."""
    exit_code: int
    parts: str = ""
    """Why it will not start again; empty: it will, if all do."""


class Roll:
    """The lines of one run, as one of its machines reads and writes them. Close it."""

    def __init__(self, folder: Path, run: str, number: int, count: int) -> None:
        self._folder, self._run, self._number, self._count = folder, run, number, count
        self._pause = LOOK * max(1.0, count / _CROWD)
        self._lines: dict[int, Line] = {}
        self._done, self._looks = threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, name="roll", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()

    def tell(self, attempt: int, exit_code: int, parts: str = "") -> None:
        """Without it the others wait as long as they must."""
        line = Line(self._run, attempt, exit_code, parts)
        with contextlib.suppress(OSError, DoctorError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._folder / f"{self._number}.json", msgspec.json.encode(line).decode() + "\n")

    def ended(self, attempt: int) -> dict[int, Line]:
        """The others whose part of this attempt has failed, or that will not start again."""
        lines = [*self._lines.items()]
        return {number: line for number, line in lines if line.exit_code and (line.attempt == attempt or line.parts)}

    def look(self) -> None:
        """Wait until a look has begun and ended, if the disk answers."""
        wanted, until = self._looks + 2, time.monotonic() + 3 * self._pause
        while self._looks < wanted and time.monotonic() < until:
            time.sleep(0.05)

    def parted(self) -> dict[int, str]:
        """The others that will not start again, and why."""
        return {number: line.parts for number, line in [*self._lines.items()] if line.parts}

    def _watch(self) -> None:
        while not self._done.wait(self._pause):
            self._lines = {**self._lines, **self._read()}
            self._looks += 1

    def _read(self) -> dict[int, Line]:
        found = {}
        with contextlib.suppress(OSError):  # there is no folder until somebody has written
            for path in self._folder.glob("*.json"):
                number = int(path.stem) if path.stem.isdecimal() else -1
                if not 0 <= number < self._count or number == self._number:
                    continue
                with contextlib.suppress(OSError, msgspec.DecodeError), path.open("rb") as file:
                    line = msgspec.json.decode(file.read(_MOST), type=Line)
                    if line.run == self._run:
                        found[number] = line
        return found
