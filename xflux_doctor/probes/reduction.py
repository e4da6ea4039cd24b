"""All ranks of the collective probe in one deadline, and the verdict: which rank is the cause, and how far it came."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from xflux_doctor.facts import AllReduce, Bandwidth
from xflux_doctor.probes.runner import Child, Outcome, has_room

STAGES = ("start", "import", "rendezvous", "versions", "init", "tiny", "values", "collectives", "sweep", "done")
PLACES = ("", "/dev/shm")  # noqa: S108 - a folder with a name of its own is made in it
"""Where the ranks' files may lie, in order; empty is the temporary folder of this environment."""
_GRACE = 2.0
"""Seconds that the others have to speak when one rank has failed."""
_GONE = 3.0
"""Seconds in which killed ranks must be gone, all together: one that hangs in the kernel never is."""
# What ranks say of others that do not come or are gone; the cause is with those.
_OF_OTHERS = re.compile(
    r"[Cc]onnection (?:closed|reset|was|timed)|closed by peer|[Bb]roken pipe|[Tt]imed? ?out|"
    r"did not come to|collective operation timeout|remote process exited|failed to recv|"
    r"[Ss]ocket (?:[Tt]imeout|closed)|NCCL communicator was aborted|RendezvousConnectionError"
)


class Ended(msgspec.Struct, frozen=True):
    """How one rank ended: what it said of itself last, and how its process went."""

    rank: int
    outcome: Outcome
    own: dict[str, Any]
    state: str
    """Its process's state before it was killed."""

    @property
    def stage(self) -> str:
        said = self.own.get("stage")
        return said if said in STAGES else "start"

    @property
    def passed(self) -> bool:
        return self.stage == "done" and self.outcome.code == 0

    @property
    def detail(self) -> str:
        """The rank's own sentence, or how its process ended."""
        said = str(self.own.get("detail") or "")
        if said and self.own.get("failed"):
            return said
        stopped = {"T": ", stopped (SIGSTOP) all the while", "t": ", held by a debugger",
                   "D": ", waiting in the kernel (state D)"}  # fmt: skip
        how = self.outcome.how
        if self.outcome.code == 0:
            return "exited with 0 before it had done everything"
        extra = stopped.get(self.state, "") if self.outcome.code is None else ""
        return how.replace("was killed", f"was killed{extra}", 1)

    @property
    def order(self) -> tuple[int, int, int]:
        """The least is the cause: a rank that died, that was stopped, that says what is wrong with itself, that fell
        silent; last those that complain of others. Then the one that got least far."""
        code, stages = self.outcome.code, int(self.own.get("steps") or 0)
        words = self.detail if self.own.get("failed") else self.outcome.stderr
        complains = bool(_OF_OTHERS.search(words))
        if code is not None and code < 0 and not (code == -6 and complains):  # NCCL's watchdog aborts with SIGABRT
            kind = 0
        elif code is None and self.state in ("T", "t"):
            kind = 1
        elif code is not None and not complains:
            kind = 2
        else:
            kind = 3 if code is None else 4
        return kind, stages, self.rank


def all_reduce(
    python: str, backend: str, ranks: int, environment: Mapping[str, str], seconds: float, *, deep: bool = False,
    store: str = "",
) -> AllReduce:  # fmt: skip
    """The stages over `ranks` children; `deep` adds the timed sweep. Ends within `seconds` and a moment."""
    started = time.monotonic()
    folder = _workspace()
    if folder is None:
        places = " nor ".join(place or "the temporary folder" for place in PLACES)
        detail = f"No space left on device: neither {places} has room for the ranks' files"
        return AllReduce(backend, ranks, False, "start", None, detail, time.monotonic() - started)
    with folder as name:
        ended = _run(python, backend, ranks, environment, seconds, Path(name), "deep" if deep else "values", store)
    return verdict(backend, ranks, ended, time.monotonic() - started)


def _workspace() -> tempfile.TemporaryDirectory[str] | None:
    for place in PLACES:
        with contextlib.suppress(OSError):
            if has_room(place or tempfile.gettempdir()):
                return tempfile.TemporaryDirectory(
                    prefix="xflux-doctor-", dir=place or None, ignore_cleanup_errors=True
                )
    return None


def _run(
    python: str, backend: str, ranks: int, environment: Mapping[str, str], seconds: float, folder: Path, level: str,
    store: str,
) -> list[Ended]:  # fmt: skip
    deadline = time.monotonic() + seconds
    children: list[Child] = []
    failed: dict[int, Outcome] = {}
    states: list[str] = []
    try:
        for rank in range(ranks):
            place = store or str(folder / "store")
            arguments = (backend, str(rank), str(ranks), place, f"{seconds:.1f}", str(folder), level)
            try:
                children.append(Child(python, "allreduce", arguments, environment))
            except OSError as error:  # no such interpreter, no more processes allowed, no memory to fork
                failed[rank] = Outcome(127, (), f"could not be started: {error}", 0.0)
                break
        if not failed:
            _wait(children, deadline)
        states = [child.state() for child in children]
        gone_by = time.monotonic() + _GONE
        outcomes = [child.finish(time.monotonic(), gone_by) for child in children]
    finally:
        for child in children:
            child.kill(time.monotonic())
    ended = [Ended(n, outcome, _own(folder, n, outcome), states[n]) for n, outcome in enumerate(outcomes)]
    return ended + [Ended(n, outcome, {}, "") for n, outcome in failed.items()]


def _own(folder: Path, rank: int, outcome: Outcome) -> dict[str, Any]:
    """What a rank said last: in its file, or where that could not be written, in its output."""
    said = [line for line in outcome.lines if line.get("rank") == rank and line.get("stage") in STAGES]
    with contextlib.suppress(OSError, ValueError):
        value = json.loads((folder / f"rank{rank}.json").read_bytes())
        if isinstance(value, dict):
            said.append(value)
    return max(said, key=lambda one: int(one.get("steps") or 0), default={})


def _wait(children: list[Child], deadline: float) -> None:
    """Until all have ended, one has failed (the others get a moment to speak), or the deadline."""
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if all(code is not None for code in codes):
            return
        if any(code not in (None, 0) for code in codes):
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.02)


def verdict(backend: str, ranks: int, ended: list[Ended], seconds: float) -> AllReduce:
    """The one answer of all ranks."""
    skipped = tuple(dict.fromkeys(str(words) for one in ended for words in one.own.get("skipped", ())))
    common: dict[str, Any] = {
        "stages": tuple(one.stage for one in ended),
        "versions": tuple(_versions(one.own.get("versions")) for one in ended),
        "skipped": skipped,
    }
    failed = [one for one in ended if not one.passed]
    if not failed:
        sweep = tuple(Bandwidth(*row) for row in ended[0].own.get("bandwidth", ()))
        return AllReduce(backend, ranks, True, "done", None, "", seconds, bandwidth=sweep, **common)
    cause = min(failed, key=lambda one: one.order)
    rank: int | None = cause.rank
    if isinstance(blame := cause.own.get("blame"), int):
        rank = blame
    elif cause.order[0] == 4 and cause.own.get("absent"):
        rank = int(cause.own["absent"][0])  # of another machine: ours all wait for it
    elif cause.own.get("failed") and "blame" in cause.own and _wrong(cause.detail):
        rank = None  # all have the same wrong values, and nothing tells whose they are
    silent = cause.outcome.code is None
    return AllReduce(
        backend, ranks, False, cause.stage, rank, cause.detail, seconds,
        doing=str(cause.own.get("doing") or ""),
        frame=cause.outcome.frame if silent else "",
        said="\n".join(words for words in (cause.outcome.said, cause.outcome.stderr) if words)[-2000:],
        **common,
    )  # fmt: skip


def _wrong(detail: str) -> bool:
    return ", must be " in detail or "came out as" in detail


def _versions(said: Any) -> str:
    return " ".join(f"{name} {value}" for name, value in said.items()) if isinstance(said, dict) else ""
