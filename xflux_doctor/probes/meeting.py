"""The machines of a job meet before the launch: they compare what they are about to run, and go together or not at all.

Number 0 listens on the main port and the others connect; JSON lines of limited size, nothing secret, no code. Twice
they wait for each other: when they come (`open`), and when each has done its own checks (`agree`). Between the two the
connections stay open, so that one who dies is missed at once. The port is free again before the launch. torch's own
meeting has a deadline of ten minutes or more and names nobody; this one ends in `seconds`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xflux_doctor.facts import Meeting, Peer
from xflux_doctor.probes.wire import PROOF, Line, clean, listen, why

_TOLD = 8
"""Members, and keys of each, whose differences are sent: of 60 letters each they stay below the size of a line."""
_CROWD = 4096
"""Connections at one time."""
_TICK = 0.2
_QUIET = 1.0
"""Seconds before it is said who is awaited."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Who this is, and where number 0 is."""

    kind: str
    rank: int
    count: int
    host: str
    port: int
    devices: int | None = None

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Gathering:
    """One meeting, as one of its members sees it. Use `open`, then `agree`; `close` in any case."""

    _patient = False
    """Whether the port may still be another's for a while: the ranks' own, which end."""
    _thinks = 0.0
    """Seconds that number 0 may need to answer when all are here."""

    def __init__(self, place: Place, config: Mapping[str, str], seconds: float, say: Say) -> None:
        self._place, self._config, self._seconds, self._say = place, dict(config), seconds, say
        self.run = secrets.token_hex(8)
        """A word for what was agreed on, number 0's; once `agree` went well everybody has it."""
        self._started = time.monotonic()
        self._server: socket.socket | None = None
        self._lines: list[Line] = []
        self._mine: Line | None = None

    def open(self, tolerant: bool = False) -> Meeting:
        """Come together and compare. `tolerant`: differences stop nobody."""
        return self._host(tolerant) if self._place.rank == 0 else self._join()

    def agree(self, ready: bool, seconds: float) -> Meeting:
        """Wait until everybody is ready, at most `seconds`; then the port is free again."""
        try:
            return self._conclude(ready, seconds) if self._place.rank == 0 else self._report(ready, seconds)
        finally:
            self.close()

    def close(self) -> None:
        for line in (*self._lines, *([self._mine] if self._mine else [])):
            line.socket.close()
        if self._server is not None:
            self._server.close()
        self._lines, self._mine, self._server = [], None, None

    def _brings(self) -> dict[str, object]:
        """What else number 0 is told."""
        return {}

    def _answers(self, found: Meeting) -> dict[str, object]:
        """What else number 0 tells the others."""
        return {}

    def _learns(self, answer: Mapping[str, Any]) -> None:
        """What number 0 told besides."""

    def _absent(self) -> frozenset[int]:
        """Who is known not to come."""
        return frozenset()

    # --- number 0 ------------------------------------------------------------------------------------------

    def _listen(self, until: float) -> Meeting | None:
        """Take the port; what hinders."""
        while True:
            try:
                self._server = listen(self._place.host, self._place.port)
                return None
            except (OSError, OverflowError, UnicodeError) as error:
                busy = getattr(error, "errno", None) == errno.EADDRINUSE and not isinstance(error, socket.gaierror)
                if not busy:
                    return self._meeting(*why(error, "no port"))
            if not self._patient or time.monotonic() >= until:
                return self._meeting("busy", os.strerror(errno.EADDRINUSE))
            time.sleep(_TICK)

    def _host(self, tolerant: bool) -> Meeting:
        until = self._started + self._seconds
        trouble = self._listen(until)
        if trouble is not None:
            return trouble
        spoken: tuple[int, ...] = ()
        while True:
            self._listen_once()
            missing = self._missing()
            if not missing or time.monotonic() >= until or self._absent():
                break
            if missing != spoken and time.monotonic() > self._started + _QUIET:
                self._say(self._awaited(missing, until))
                spoken = missing
        found = self._judged(missing)
        good = found.together or (tolerant and not (missing or found.twice))
        more = self._answers(found)
        for line in self._lines:
            line.send(go=good, **_told(found, line), **more)
        if not good:
            self._part()
        return found

    def _listen_once(self) -> None:
        """Whatever comes within one tick: new connections, hellos, readiness, ends."""
        assert self._server is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ, None)
            for line in self._lines:
                selector.register(line.socket, selectors.EVENT_READ, line)
            for key, _ in selector.select(_TICK):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(key.data)
        now = time.monotonic()
        for line in self._lines:
            line.gone = line.gone or (line.said is None and now - line.since > PROOF)
        for line in [line for line in self._lines if line.gone]:
            line.socket.close()
            self._lines.remove(line)

    def _accept(self) -> None:
        assert self._server is not None
        with contextlib.suppress(OSError):
            client, _ = self._server.accept()
            client.setblocking(False)
            if len(self._lines) < _CROWD:
                self._lines.append(Line(client))
            else:
                client.close()

    def _hear(self, line: Line) -> None:
        line.socket.setblocking(False)
        line.receive()
        while line.inbox:
            message = line.inbox.pop(0)
            if line.said is None and type(message.get("rank")) is int:
                line.said = message
                line.send(hello=True)
            elif isinstance(message.get("ready"), bool):
                line.ready = message["ready"]

    def _here(self) -> dict[int, list[Line]]:
        found: dict[int, list[Line]] = {}
        for line in self._lines:
            if line.said is not None and not line.gone:
                found.setdefault(line.said["rank"], []).append(line)
        return found

    def _missing(self) -> tuple[int, ...]:
        here = self._here()
        return tuple(rank for rank in range(1, self._place.count) if rank not in here)

    def _judged(self, missing: tuple[int, ...]) -> Meeting:
        here = self._here()
        twice = tuple(sorted(rank for rank, lines in here.items() if len(lines) > 1))
        unlike: dict[str, dict[str, tuple[str, str]]] = {}
        peers = []
        for rank, lines in sorted(here.items()):
            said = lines[0].said or {}
            peers.append(_peer(rank, said))
            config = said.get("config")
            theirs = {str(k): clean(v) for k, v in config.items()} if isinstance(config, dict) else {}
            if said.get("count") != self._place.count:
                theirs[f"number of {self._place.kind}s"] = clean(said.get("count"))
            different = {
                key: (self._own(key), theirs.get(key, "not set"))
                for key in sorted({*self._config, *theirs})
                if self._own(key) != theirs.get(key, "not set")
            }
            if not 0 < rank < self._place.count:
                different[f"{self._place.kind} rank"] = (f"1 to {self._place.count - 1}", str(rank))
            if different:
                unlike[str(rank)] = different
        return self._meeting(missing=missing, twice=twice, unlike=unlike, peers=tuple(peers))

    def _own(self, key: str) -> str:
        return str(self._place.count) if key == f"number of {self._place.kind}s" else self._config.get(key, "not set")

    def _conclude(self, ready: bool, seconds: float) -> Meeting:
        until, started = time.monotonic() + seconds, time.monotonic()
        wanted = {rank: lines[0] for rank, lines in self._here().items()}
        spoken: tuple[int, ...] = ()
        waiting: tuple[int, ...] = ()
        while ready and self._server is not None:
            waiting = tuple(rank for rank, line in wanted.items() if line.ready is None and not line.gone)
            bad = any(line.gone or line.ready is False for line in wanted.values())
            if not waiting or bad or time.monotonic() >= until:
                break
            if waiting != spoken and time.monotonic() > started + _QUIET:
                self._say(self._awaited(waiting, until, "to finish its checks"))
                spoken = waiting
            self._listen_once()
        late = waiting if time.monotonic() >= until else ()
        refusing = [rank for rank, line in wanted.items() if line.ready is False]
        found = self._meeting(
            missing=late,
            left=tuple(sorted(rank for rank, line in wanted.items() if line.gone)),
            stopped=tuple(sorted([*refusing, *([] if ready else [0])])),
            peers=tuple(_peer(rank, line.said or {}) for rank, line in sorted(wanted.items())),
        )
        for line in wanted.values():
            line.send(go=found.together, run=self.run, **_told(found, line))
        self._part()
        return found

    def _part(self) -> None:
        """Let the others close first: whoever does keeps the port for a minute (TIME_WAIT of TCP)."""
        until = time.monotonic() + 1.0
        for line in self._lines:
            with contextlib.suppress(OSError):
                line.socket.settimeout(max(0.01, until - time.monotonic()))
                while line.socket.recv(4096):
                    pass

    def _awaited(self, ranks: tuple[int, ...], until: float, what: str = "") -> str:
        left = max(0, round(until - time.monotonic()))
        kind = self._place.kind + ("s" if len(ranks) > 1 else "")
        return f"waiting for {kind} {_listed(ranks)} of {self._place.count}{' ' + what if what else ''}, {left} s"

    # --- the others ----------------------------------------------------------------------------------------

    def _join(self) -> Meeting:
        until, spoken = self._started + self._seconds, False
        trouble, detail = "timeout", "no answer"
        while time.monotonic() < until and not self._absent():
            try:
                client = socket.create_connection(
                    (self._place.host, self._place.port), timeout=max(0.1, min(3.0, until - time.monotonic()))
                )
            except (OSError, OverflowError, UnicodeError) as error:
                trouble, detail = why(error)
                if trouble in ("unknown name", "no port"):
                    break
                if not spoken and time.monotonic() > self._started + _QUIET:
                    left = max(0, round(until - time.monotonic()))
                    self._say(f"waiting for {self._place.kind} 0 at {self._place.address} ({detail}), {left} s")
                    spoken = True
                time.sleep(_TICK)
                continue
            found = self._talk(Line(client))
            if not self._patient or found.trouble != "other service":
                return found
            trouble, detail = found.trouble, found.detail
            client.close()
            time.sleep(_QUIET)
        return self._meeting(trouble, detail)

    def _talk(self, line: Line) -> Meeting:
        self._mine = line
        place = self._place
        line.send(rank=place.rank, count=place.count, host=socket.gethostname(), devices=place.devices,
                  config=self._config, **self._brings())  # fmt: skip
        hello = self._next(line, time.monotonic() + PROOF)
        if hello is None or hello.get("hello") is not True:
            why = "it closed the connection" if line.gone and not line.rest else "it answers in another way"
            return self._meeting("other service", why if line.gone or line.rest else "it does not answer")
        until = time.monotonic() + self._seconds + self._thinks + PROOF
        answer = self._next(line, until, f"the other {place.kind}s")
        if answer is None:
            return self._meeting("gone", "it closed the connection")
        self._learns(answer)
        return self._learned(answer)

    def _report(self, ready: bool, seconds: float) -> Meeting:
        if self._mine is None:
            return self._meeting("gone", "there is no connection")
        self._mine.send(ready=ready)
        answer = self._next(self._mine, time.monotonic() + seconds + PROOF, "the others to finish their checks")
        if not ready:
            return self._meeting(stopped=(self._place.rank,))
        if answer is None:
            return self._meeting("gone", "it closed the connection")
        self.run = clean(answer.get("run"))
        return self._learned(answer)

    def _next(self, line: Line, until: float, what: str = "") -> dict[str, Any] | None:
        """The next message, or None when the other is gone or late."""
        started, spoken = time.monotonic(), not what
        while not line.inbox and not line.gone and (left := until - time.monotonic()) > 0:
            line.socket.settimeout(min(_TICK, left))
            line.receive()
            if not spoken and time.monotonic() > started + _QUIET:
                self._say(f"waiting for {what}, {round(left)} s")
                spoken = True
        return line.inbox.pop(0) if line.inbox else None

    def _learned(self, answer: dict[str, Any]) -> Meeting:
        """What number 0 found, in its own words no further than our own sentences carry them."""
        unlike = answer.get("unlike")
        found = {
            str(rank)[:12]: {clean(k): (clean(v[0]), clean(v[1])) for k, v in keys.items() if _pair(v)}
            for rank, keys in (unlike.items() if isinstance(unlike, dict) else ())
            if isinstance(keys, dict)
        }
        if answer.get("go") is True:
            return self._meeting()
        meeting = self._meeting(
            missing=_ranks(answer.get("missing")),
            left=_ranks(answer.get("left")),
            stopped=_ranks(answer.get("stopped")),
            twice=_ranks(answer.get("twice")),
            unlike=found,
        )
        return self._meeting("gone", "it stopped") if meeting.together else meeting

    def _meeting(self, trouble: str = "", detail: str = "", **more: Any) -> Meeting:
        place = self._place
        seconds = time.monotonic() - self._started
        return Meeting(place.kind, place.rank, place.count, place.address, trouble, detail, **more, seconds=seconds)


def _told(found: Meeting, line: Line) -> dict[str, object]:
    """What `line` is told: its own differences first, and no more of the others' than one line may hold."""
    own = str((line.said or {}).get("rank"))
    unlike = sorted(found.unlike.items(), key=lambda item: item[0] != own)[:_TOLD]
    return {"missing": found.missing, "left": found.left, "stopped": found.stopped, "twice": found.twice,
            "unlike": {rank: dict(list(keys.items())[:_TOLD]) for rank, keys in unlike}}  # fmt: skip


def _peer(rank: int, said: Mapping[str, Any]) -> Peer:
    devices = said.get("devices")
    return Peer(rank, clean(said.get("host", "")), devices if type(devices) is int else None)


def _pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _ranks(value: object) -> tuple[int, ...]:
    return tuple(item for item in value if type(item) is int) if isinstance(value, list) else ()


def _listed(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown
