"""Looks once a second at the ranks of a run that goes on: says what does not go well, and ends a run that hangs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from xflux_doctor import guard, runstate, stacks
from xflux_doctor.hang import ALONE, Hang, Limits, Pace, Rank, judge, sharper, table, waits
from xflux_doctor.heartbeat import Beat, beats, state
from xflux_doctor.vitals import Vitals

LOOK = 1.0
_MISSED = 5.0
"""Seconds that count at most between two looks: the doctor itself may have been stopped, or the machine asleep."""
_RECORD = 15.0
"""Seconds between two copies of the beats in the run folder, and two signs there that the doctor goes on."""
_COLLECT = 45.0
GRACE = 45.0
"""Seconds from SIGTERM to SIGKILL for a run that hangs: a rank that was only stopped can still save, and
torch's launcher gives its ranks 30 s."""
_ABANDONED = 10.0
"""The same for ranks that wait for those of a machine that is gone: they cannot save."""


class Recorder:
    """Writes into the run folder, from a thread: its disk may be what hangs, and nobody shall wait for it."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def put(self, path: Path, text: str, *, more: bool = False) -> None:
        self._work.put(lambda: _write(path, text, "a" if more else "w"))

    def touch(self, folder: Path) -> None:
        self._work.put(lambda: runstate.touch(folder))

    def close(self, seconds: float) -> None:
        self._work.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            with contextlib.suppress(OSError):  # a full disk: the run is more than what is said of it
                work()


def _write(path: Path, text: str, mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf-8", errors="replace") as file:
        file.write(text)


class Watcher:
    """The ranks that beat in `beating`; what is found goes to `say` and into the run folder."""

    def __init__(
        self, beating: Path, folder: Path, group: int, say: Callable[[str], None], *, after: float | None,
        cards: tuple[str, ...] = (), elsewhere: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        """`elsewhere`: that the part of another machine has ended, in words; empty while none has."""
        self.hang: Hang | None = None
        self._beating, self._folder, self._group, self._say, self._after = beating, folder, group, say, after
        self._pace, self._vitals, self._recorder = Pace(), Vitals(cards), Recorder()
        self._elsewhere, self._alone = elsewhere, 0.0
        self._still: dict[int, tuple[int, float]] = {}
        self._beats: dict[int, Beat] = {}
        self._copied = self._looked = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        # NVML may hang with the driver, which is when hangs have to be seen.
        self._looker = threading.Thread(target=self._look_at_machine, name="vitals", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._looker.start()

    def stop(self) -> None:
        """At the end of the run."""
        self._done.set()
        self._thread.join(5 * LOOK)
        self._copy()
        self._recorder.close(5.0)

    def save(self) -> list[int]:
        """Ask the ranks for a checkpoint now. Those that were asked: none where none has told of itself yet."""
        own = set(guard.members(str(self._beating)))  # a record may outlive its process, and its number be another's
        found = [(rank, beat.pid) for rank, beat in sorted(beats(self._beating).items()) if beat.pid in own]
        guard.send([pid for _, pid in found], signal.SIGUSR1)
        return [rank for rank, _ in found]

    def warn(self, kind: str, text: str) -> None:
        """A line for whoever looks on, and one in events.jsonl."""
        self._say(f"xflux-doctor: {text}")
        line = json.dumps({"time": round(time.time(), 3), "kind": kind, "text": text}, ensure_ascii=False)
        self._recorder.put(self._folder / "events.jsonl", line + "\n", more=True)

    def _run(self) -> None:
        while not self._done.wait(LOOK):
            ranks = self._look()
            found = self._judge(ranks)
            if found is not None and self._end(found, ranks):
                return
            if self._abandoned(ranks):
                return

    def _judge(self, ranks: list[Rank]) -> Hang | None:
        return None if self._after == 0 else judge(ranks, Limits(self._after, self._pace.median()))

    def _abandoned(self, ranks: list[Rank]) -> bool:
        """End the group once the ranks can do no more than wait for those of a machine whose part has ended."""
        words = self._elsewhere()
        self._alone = self._alone + LOOK if words and waits(ranks) else 0.0
        if self._alone < ALONE:
            return False
        self.hang = Hang("peer-rank-died", None, round(self._alone, 1), words)
        self._say(f"xflux-doctor: {words}; the ranks here wait for its, and are ended")
        self._kill(_ABANDONED)
        return True

    def _look_at_machine(self) -> None:
        while not self._done.wait(LOOK):
            for text in self._vitals.look([*self._beats.values()]):
                self.warn("warning", text)

    def _look(self) -> list[Rank]:
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _MISSED), now
        fresh = beats(self._beating)
        self._beats = {**self._beats, **fresh}
        ranks = []
        for rank, beat in sorted(self._beats.items()):
            count, still = self._still.get(rank, (-1, 0.0))
            # A record that somebody removed tells nothing.
            still = still + passed if beat.beat == count and rank in fresh else 0.0
            self._still[rank] = beat.beat, still
            ranks.append(Rank(beat, still, state(beat.pid)))
        if ranks and self._pace.take(ranks[0].beat) and (text := self._vitals.step(ranks[0].beat.seconds)):
            self.warn("warning", text)
        if now - self._copied > _RECORD:
            self._copied = now
            self._copy()
        return ranks

    def _copy(self) -> None:
        self._recorder.touch(self._folder)
        for rank, beat in beats(self._beating).items():
            text = json.dumps({name: getattr(beat, name) for name in beat.__struct_fields__})
            self._recorder.put(self._folder / "heartbeats" / f"rank{rank}.json", text + "\n")

    def _end(self, found: Hang, ranks: list[Rank]) -> bool:
        """Say it, keep where everybody stands, then end the group: SIGTERM first. False: it went on meanwhile."""
        self._say(f"xflux-doctor: the run hangs: {found.words}")
        for line in table(ranks).splitlines():
            self._say(f"xflux-doctor: {line}")
        collected = stacks.within(_COLLECT, lambda: stacks.collect(ranks, self._beating)) or {}
        where = {}
        for rank, one in sorted(collected.items()):
            self._recorder.put(self._folder / "stacks" / f"rank{rank}.txt", one.text)
            where[str(rank)] = one.innermost
            if one.innermost:
                self._say(f"xflux-doctor: rank {rank} stands in {one.innermost}")
        if (sharp := sharper(found, ranks, {rank: one.held for rank, one in collected.items()})) != found:
            found = sharp
            self._say(f"xflux-doctor: {found.words}")
        event = {"time": round(time.time(), 3), "kind": "hang", "cause": found.cause, "rank": found.rank,
                 "seconds": found.seconds, "text": found.words, "table": table(ranks).splitlines(),
                 "innermost": where}  # fmt: skip
        self._recorder.put(self._folder / "events.jsonl", json.dumps(event, ensure_ascii=False) + "\n", more=True)
        kept = f"every rank's stacks: {self._folder / 'stacks'}" if collected else "the stacks could not be had"
        self._say(f"xflux-doctor: {kept}")
        if self._judge(self._look()) is None:
            self._say("xflux-doctor: it goes on again, and is left alone")
            return False
        self.hang = found
        for rank, text in (stacks.within(_COLLECT, lambda: stacks.debug(ranks)) or {}).items():
            self._recorder.put(self._folder / "stacks" / f"rank{rank}.txt", f"\n== C, by gdb\n{text}", more=True)
        self._say("xflux-doctor: the run is ended")
        self._kill(GRACE)
        return True

    def _kill(self, grace: float) -> None:
        self._signal(signal.SIGTERM)  # the launcher passes it on
        guard.send(guard.members(str(self._beating)), signal.SIGCONT)  # who was only stopped can save
        if not self._done.wait(grace):
            guard.kill(str(self._beating))
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._group, number)
