"""Signs of life of a run that another machine leads: what its folder, on a disk that both see, still does.

Only changes count, as they are seen from here, with this machine's clock that only goes forward. The times that files
carry are another clock's, which may be wrong by hours.
"""

from __future__ import annotations

import time
from pathlib import Path

from xflux_doctor import runstate
from xflux_doctor.runstate import RunState

SILENCE = 300.0
"""Seconds without a sign after which the doctor counts as gone: twenty of its own beats. They come every 15 s, but for
the minute and a half in which it ends a run that hangs; a network disk may show them a minute late."""
_EVERY = 1.0
"""Seconds between two looks: several files each, on a disk that others need too."""
_MISSED = 5.0
"""Seconds that count at most between two looks: whoever looks on may have been stopped, or its machine asleep."""
_Mark = tuple[int, int] | None
"""When a file was written, in ns of whoever's clock, and its size; None where there is none."""


class Signs:
    """The files of one run folder, looked at again and again."""

    def __init__(self, folder: Path, limit: float = SILENCE) -> None:
        self._folder, self.limit = folder, limit
        self._seen: dict[str, list[_Mark]] = {}
        self._still = {"doctor": 0.0, "training": 0.0}
        self._looked: float | None = None
        self.since: float | None = None
        """When the last change was seen, by this machine's clock; None: none was seen at all."""

    @property
    def silent(self) -> bool:
        """Nothing has changed for the limit."""
        return min(self._still.values()) >= self.limit

    @property
    def orphaned(self) -> bool:
        """The training goes on writing, and its doctor does not."""
        return self._still["doctor"] >= self.limit > self._still["training"]

    def look(self, state: RunState) -> None:
        """Look again, if it is time."""
        now = time.monotonic()
        if self._looked is not None and now - self._looked < min(_EVERY, self.limit / 4):
            return
        passed = 0.0 if self._looked is None else min(now - self._looked, _MISSED)
        self._looked = now
        for whose, marks in self._marks(state).items():
            if marks == self._seen.get(whose):
                self._still[whose] += passed
                continue
            if whose in self._seen:
                self.since = time.time()
            self._seen[whose], self._still[whose] = marks, 0.0

    def newest(self, state: RunState) -> float | None:
        """The newest time that one of these files carries: by the other machine's clock, or the disk's."""
        times = [mark[0] for marks in self._marks(state).values() for mark in marks if mark]
        return max(times) / 1e9 if times else None

    def _marks(self, state: RunState) -> dict[str, list[_Mark]]:
        """By who writes them: rank 0 writes its own, whether or not a doctor is there."""
        folder = self._folder
        doctor = [folder / runstate.NAME, state.log_in(folder), folder / "events.jsonl"]
        training = [folder / "metrics.jsonl", folder / "heldout.jsonl"]
        beats = sorted((folder / "heartbeats").glob("rank*.json"))
        return {"doctor": [_mark(path) for path in (*doctor, *beats)], "training": [_mark(path) for path in training]}


def _mark(path: Path) -> _Mark:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
