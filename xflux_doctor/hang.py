"""When a run hangs, and which rank is why. Pure.

A rank that waits in a collective call is no cause: it waits for another, which may have hours of work to do. A run
hangs when a rank stands still that waits for nobody, or when all of them wait for each other.
"""

from __future__ import annotations

import math
from statistics import median

import msgspec

from xflux_doctor.heartbeat import Beat

FLOOR, SLOW, REMOTE = 60.0, 600.0, 1800.0
"""Seconds: a step's own phases; those that may take long, and all until the first step is done; waiting for ranks of
other machines, whose beats are not seen here."""
STEPS = 20
"""Median steps that one may stand still at the least."""
_QUICK = frozenset({"train", "data", "forward", "step"})
_ENDLESS = frozenset({"download", "publish"})
"""Phases that take as long as the network does, and tell nothing meanwhile."""
LISTING = 3600.0
"""Millions of images on a file system of the network."""
ALONE = 15.0
"""Seconds that ranks have to notice by themselves that those of another machine are gone: they may say why."""
_SHARED = frozenset({"forward", "step"})
"""Phases with collectives of the gradients inside, which the host does not see."""


class Rank(msgspec.Struct, frozen=True):
    """A rank as the doctor sees it."""

    beat: Beat
    still: float
    """Seconds since its record changed, as far as the doctor was awake to see it."""
    state: str
    """The kernel's letter; empty when the process is gone."""


class Held(msgspec.Struct, frozen=True):
    """Who a rank waits for beside other ranks, in words; empty: nobody, or it cannot be told."""

    main: str = ""
    """The file system or driver that its main thread waits for without an answer."""
    others: tuple[str, ...] = ()
    """Those that its other threads and its children wait for."""
    locked: str = ""
    """The main thread waits for Python's lock: the thread that waits for a file meanwhile."""
    dead: bool = False
    """Of that one: for a file system that does not answer."""


class Limits(msgspec.Struct, frozen=True):
    """Seconds that a rank may stand still."""

    after: float | None = None
    """What the user set for the phases of a step; the slow ones get ten times that, where that is more."""
    step: float = 0.0
    """The run's median step."""

    def of(self, one: Rank) -> float:
        """A rank that waits for a disk gets more: file systems of the network come back after minutes."""
        beat, quick = one.beat, max(FLOOR, STEPS * self.step) if self.after is None else self.after
        if beat.phase in _ENDLESS and not _gone(one):
            return math.inf
        if beat.phase in _QUICK and beat.step > 0 and (one.state != "D" or self.after is not None):
            return quick
        if self.after is not None:
            return 10 * self.after
        return max(quick, LISTING if beat.phase == "list" else SLOW)


class Hang(msgspec.Struct, frozen=True):
    """Why the run stands still."""

    cause: str
    """Of the vocabulary of causes."""
    rank: int | None
    """The one that the others wait for, as far as that can be told; None: it is on another machine."""
    seconds: float
    words: str

    @property
    def line(self) -> str:
        """For the log, as `explain/rules_hang.py` reads it."""
        said = f"xflux-doctor: {self.cause}: {self.words}"
        return said if self.rank is None else f"[rank{self.rank}]: {said}"


def judge(ranks: list[Rank], limits: Limits) -> Hang | None:
    """The hang that these ranks are in; None while somebody may still do something."""
    ranks = [one for one in ranks if one.beat.phase != "done"]
    if not ranks:
        return None
    # Some of those that all of these may wait for are on other machines.
    least = REMOTE if all(map(_may_wait, ranks)) and ranks[0].beat.world > len(ranks) else 0.0
    late = [one for one in ranks if one.still > (limits.of(one) if _gone(one) else max(least, limits.of(one)))]
    if len(late) < len(ranks) and not any(_gone(one) or not _may_wait(one) for one in late):
        return None
    cause, one = _culprit(ranks)
    return Hang(cause, one.beat.rank, round(one.still, 1), _words(cause, one))


def waits(ranks: list[Rank]) -> bool:
    """Whether all that is left to these ranks is to wait for others, or they have not begun: none saves or uploads."""
    left = [one for one in ranks if one.beat.phase != "done"]
    return all(_gone(one) or _may_wait(one) for one in left) and (bool(left) or not ranks)


def _gone(one: Rank) -> bool:
    """Ended or stopped: it will not come by itself."""
    return one.state in ("", "Z", "X", "T", "t")


def _may_wait(one: Rank) -> bool:
    return one.beat.collective or one.beat.phase in _SHARED


def _culprit(ranks: list[Rank]) -> tuple[str, Rank]:
    """The surest sign first; of several ranks with the same the one that stood still first."""
    ranks = sorted(ranks, key=lambda one: (-one.still, one.beat.rank))
    free = [one for one in ranks if not one.beat.collective]
    signs = (
        ("rank-stopped", [one for one in ranks if one.state in ("T", "t")]),
        ("rank-lost", [one for one in ranks if one.state in ("", "Z", "X")]),
        ("loader-stuck", [one for one in free if one.beat.phase in ("data", "list", "cache")]),
        ("storage-stuck", [one for one in free if one.state == "D"]),
        ("rank-stuck", [one for one in free if one.beat.phase not in _SHARED]),
        ("rank-stuck", free if len(ranks) == 1 or 0 < len(free) < len(ranks) else []),
    )
    for cause, found in signs:
        if found:
            return cause, found[0]
    # Everybody waits for everybody: the one that is behind, if one is.
    return "collective-stuck", min(ranks, key=lambda one: (one.beat.step, one.beat.collective, -one.still))


def sharper(found: Hang, ranks: list[Rank], held: dict[int, Held]) -> Hang:
    """With the file system, driver or file that the culprit waits for, as far as that was seen, by rank."""
    if found.cause not in ("loader-stuck", "rank-stuck", "storage-stuck", "collective-stuck"):
        return found
    for one in sorted(ranks, key=lambda one: (one.beat.rank != found.rank, -one.still)):
        waits = held.get(one.beat.rank, Held())
        if waits.locked:  # a library may open a file without giving the lock away: then all of Python waits with it
            reads = one.beat.phase in _QUICK | {"list", "cache"}
            cause = "storage-stuck" if waits.dead else "loader-stuck" if reads else "rank-stuck"
            words = f"{_since(one)}: its main thread waits for Python's lock, and its {waits.locked}"
            return Hang(cause, one.beat.rank, round(one.still, 1), words)
    for one in ranks:
        waits = held.get(one.beat.rank, Held())
        # In the midst of a pass what other threads do is no reason to stand still.
        words = waits.main or next(iter(waits.others if one.beat.phase not in _SHARED else ()), "")
        if one.beat.rank == found.rank and words and found.cause != "collective-stuck":
            return msgspec.structs.replace(found, cause="storage-stuck", words=f"{_since(one)}: its {words}")
    return found


def _words(cause: str, one: Rank) -> str:
    what = {
        "rank-stopped": "it is stopped by a signal (SIGSTOP, Ctrl-Z, a debugger)",
        "rank-lost": "its process is gone, and nobody noticed",
        "loader-stuck": "it waits for data that does not come",
        "storage-stuck": "it waits for a disk or a driver that does not answer (state D)",
        "rank-stuck": "it does not go on",
        "collective-stuck": "all ranks wait for each other",
    }[cause]
    return f"{_since(one)}: {what}"


def _since(one: Rank) -> str:
    still = f"rank {one.beat.rank} has stood still for {one.still:.0f} s after step {one.beat.step}"
    return f"{still} in {place(one.beat)}"


def place(beat: Beat) -> str:
    """What a rank does, in words."""
    said = {
        "start": "the imports", "join": "the meeting of the ranks", "list": "listing the images",
        "cache": "the encoding of the images and captions", "load": "loading the model", "train": "a step",
        "data": "waiting for a batch", "forward": "the forward and backward pass", "step": "the optimizer's step",
        "checkpoint": "saving a checkpoint", "heldout": "the held-out loss", "sample": "drawing samples",
        "publish": "the upload", "download": "the download of the model", "end": "leaving the other ranks",
    }.get(beat.phase, beat.phase)  # fmt: skip
    return f"{said}, in a collective call" if beat.collective else said


def table(ranks: list[Rank]) -> str:
    """Which rank stands where, a line each."""
    lines = [
        f"rank {one.beat.rank} (process {one.beat.pid} on {one.beat.host}, state {one.state or 'gone'}): "
        f"{place(one.beat)}, after step {one.beat.step}, still for {one.still:.0f} s"
        for one in sorted(ranks, key=lambda one: one.beat.rank)
    ]
    return "\n".join(lines) + "\n"


class Pace:
    """The run's step times, as far as its beats show them."""

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}

    def take(self, beat: Beat) -> bool:
        """Whether the record shows a step that was not seen before."""
        if beat.step <= 0 or beat.step in self._seen:
            return False
        self._seen[beat.step] = beat.seconds
        if len(self._seen) > 1000:
            del self._seen[next(iter(self._seen))]
        return True

    def median(self) -> float:
        return median(self._seen.values()) if self._seen else 0.0
