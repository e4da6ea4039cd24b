"""Probe: one rank of the collectives that training stands on, with values that only a right result can have.

    python allreduce.py BACKEND RANK WORLD STORE SECONDS FOLDER LEVEL

STORE is a file that all ranks see, or tcp://HOST:PORT where rank 0 listens. LEVEL is `values`, or `deep` for a timed
sweep after them. What the rank reached is printed as JSON lines and kept in FOLDER/rankN.json, so that it is known
even of a rank whose output is lost. After each collective the ranks tell each other by the store, and not by another
collective, whether their values were right: a wrong one ends all of them, and those who saw it say whose it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import json
import os
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

STACK_AT, GIVE_UP_AT = 0.8, 0.9
"""Shares of the deadline: a stack is written, and torch's own limit ends, before the parent kills."""
LENGTHS = (("float32", (1 << 18) + 3, 1000), ("bfloat16", 4099, 4))
"""Type, length and largest number. 1 MiB and a tail that vector copies leave; the sums are exact in both types."""
SIZES = {"gloo": (1 << 10, 1 << 20, 1 << 24), "nccl": (1 << 20, 1 << 24, 1 << 26, 1 << 28)}
WARM, TIMED = 3, 10
SLOWEST = 2e-8
"""Seconds per byte: 50 MB/s."""


class Broken(Exception):
    """What this rank found wrong; `blame` is the rank whose fault it is, `absent` who did not come."""

    def __init__(self, sentence: str, blame: int | None = None, absent: tuple[int, ...] = ()) -> None:
        super().__init__(sentence)
        self.blame, self.absent = blame, absent


class Report:
    """What this rank has reached, in its output and in its file."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = folder / f"rank{rank}.json"
        self.state: dict[str, Any] = {"rank": rank, "pid": os.getpid(), "stage": "start", "doing": "", "steps": 0}

    def say(self, **values: Any) -> None:
        """Lay values over what was said; a stage that is reached ends what was being done."""
        if "stage" in values:
            self.state["doing"] = ""
        self.state.update(values, steps=self.state["steps"] + 1)
        text = json.dumps(self.state)
        with contextlib.suppress(OSError, ValueError):  # a library may have closed stdout
            print(f"\n{text}", flush=True)  # a line of its own, whatever was printed before it
        with contextlib.suppress(OSError):
            new = self.file.with_suffix(".new")
            new.write_text(text)
            new.replace(self.file)


class Rank:
    """One rank, its store and its limit."""

    def __init__(self, torch: Any, report: Report, backend: str, rank: int, world: int, until: float) -> None:
        self.torch, self.dist, self.report = torch, torch.distributed, report
        self.backend, self.rank, self.world, self.until = backend, rank, world, until
        self.device = torch.device("cpu")
        if backend == "nccl":
            self.device = torch.device("cuda", rank % max(1, torch.cuda.device_count()))  # as accelerate from 0.33 on
            torch.cuda.set_device(self.device)
        self.store: Any = None
        self.skipped: list[str] = []
        self.total = sum(map(self.weight, range(world)))

    def left(self) -> datetime.timedelta:
        """Time for a wait that begins now; never nothing, which some stores take for no limit."""
        return datetime.timedelta(seconds=max(0.2, self.until - time.monotonic()))

    def meet(self, at: str) -> None:
        """Reach the place where the ranks meet."""
        self.report.say(doing=f"reach {at}")
        if at.startswith("tcp://"):
            host, _, port = at.removeprefix("tcp://").rpartition(":")
            socket.getaddrinfo(host, int(port))  # TCPStore asks again and again without a word
            first = self.rank == 0
            self.store = self.dist.TCPStore(host, int(port), self.world, first, self.left(), wait_for_workers=False)
        else:
            self.store = self.dist.FileStore(at, self.world)
            self.store.set_timeout(self.left())

    def exchange(self, step: str, value: Any) -> list[Any]:
        """Every rank's value of a step, by the store."""
        self.report.say(doing=f"wait for all ranks' {step}")
        self.store.set(f"doctor/{step}/{self.rank}", json.dumps(value))
        keys = [f"doctor/{step}/{other}" for other in range(self.world)]
        try:
            self.store.wait(keys, self.left())
        except Exception as error:
            absent = self.absent(keys)
            if not absent:
                raise
            raise Broken(f"ranks {list(absent)} did not come to {step!r}", absent=absent) from error
        return [json.loads(self.store.get(key)) for key in keys]

    def absent(self, keys: list[str]) -> tuple[int, ...]:
        """The ranks that a store which still answers does not know."""
        try:
            return tuple(number for number, key in enumerate(keys) if not self.store.check([key]))
        except Exception:
            return ()

    def agree(self, step: str, wrong: str, suspects: tuple[int, ...] = ()) -> None:
        """Go on together, or raise everywhere, with the rank whose fault it seems to be."""
        said = self.exchange(step, [wrong, suspects])
        bad = [number for number, (words, _) in enumerate(said) if words]
        if not bad:
            return
        named = Counter(number for number in bad for number in said[number][1])
        blame: int | None = bad[0]  # alone: the others had the right values from the same ranks
        if len(bad) > 1:
            blame = named.most_common(1)[0][0] if named else self.giver(step)
        raise Broken(f"rank {bad[0]}: {said[bad[0]][0]}", blame=blame)

    def giver(self, step: str) -> int | None:
        """All have the same wrong sum: whose part of it is wrong, by a collective that keeps the parts apart."""
        with contextlib.suppress(Exception):
            found = self.exchange(f"parts of {step}", self.gather("float32", 4099, 1000)[1])
            named = Counter(number for suspects in found for number in suspects)
            return named.most_common(1)[0][0] if named else None
        return None

    def compare_versions(self) -> None:
        """Ranks of different libraries form no group, or one that hangs: they are named before."""
        own = {"torch": str(self.torch.__version__)}
        if self.backend == "nccl":
            own["nccl"] = ".".join(map(str, self.torch.cuda.nccl.version()))
        self.report.say(versions=own)
        said = self.exchange("versions", own)
        usual = json.loads(Counter(json.dumps(one) for one in said).most_common(1)[0][0])
        for number, other in enumerate(said):
            if other != usual:
                words = [" ".join(f"{name} {version}" for name, version in one.items()) for one in (other, usual)]
                raise Broken(f"version skew: rank {number} has {words[0]}, the others {words[1]}", blame=number)

    def pattern(self, kind: str, length: int, most: int) -> Any:
        return self.torch.arange(length, device=self.device).remainder(most).to(getattr(self.torch, kind))

    def weight(self, rank: int) -> int:
        """What a rank's numbers are multiplied by. bf16 is exact to 256, which 3 · n(n+1)/2 passes at 13 ranks."""
        return rank + 1 if self.world <= 12 else rank % 4 + 1

    def tiny(self) -> None:
        self.report.say(doing="the first all_reduce, of one element")
        one = self.torch.ones(1, device=self.device)
        self.dist.all_reduce(one)
        got = one.item()
        self.agree("all_reduce of 1", "" if got == self.world else f"the sum of {self.world} ones came out as {got}")

    def sum(self, kind: str, length: int, most: int) -> tuple[str, tuple[int, ...]]:
        """Rank r gives weight(r) · k at place k."""
        pattern = self.pattern(kind, length, most)
        values = pattern * self.weight(self.rank)
        self.dist.all_reduce(values)
        return unlike(values, pattern * self.total), ()

    def gather(self, kind: str, length: int, most: int) -> tuple[str, tuple[int, ...]]:
        pattern = self.pattern(kind, length, most)
        parts = [self.torch.empty_like(pattern) for _ in range(self.world)]
        self.dist.all_gather(parts, pattern * self.weight(self.rank))
        found = {other: unlike(part, pattern * self.weight(other)) for other, part in enumerate(parts)}
        bad = tuple(other for other, words in found.items() if words)
        return (f"the part of rank {bad[0]}: {found[bad[0]]}" if bad else ""), bad

    def scatter(self, kind: str, length: int, most: int) -> tuple[str, tuple[int, ...]]:
        pattern = self.pattern(kind, length, most)
        own = self.torch.empty_like(pattern)
        self.dist.reduce_scatter(own, [pattern * self.weight(self.rank) for _ in range(self.world)])
        return unlike(own, pattern * self.total), ()

    def broadcast(self, kind: str, length: int, most: int) -> tuple[str, tuple[int, ...]]:
        """From every rank in turn."""
        pattern = self.pattern(kind, length, most)
        for source in range(self.world):
            values = pattern * self.weight(self.rank)
            self.dist.broadcast(values, source)
            if wrong := unlike(values, pattern * self.weight(source)):
                # To its end, so that all have done the same; several that got it wrong name the one who gave it.
                for other in range(source + 1, self.world):
                    self.dist.broadcast(pattern.clone(), other)
                return f"what came from rank {source}: {wrong}", (source,)
        return "", ()

    def collective(self, name: str, body: Any) -> None:
        """One collective in both types; one that gloo does not have is said and left out."""
        for kind, length, most in LENGTHS:
            self.report.say(doing=f"{name} of {length} {kind}")
            try:
                wrong, suspects = body(kind, length, most)
            except RuntimeError as error:
                # gloo before torch 2.6 has no reduce_scatter. NCCL's "operation not supported" is a fault.
                if (self.backend, name) != ("gloo", "reduce_scatter") or "not support" not in str(error):
                    raise
                self.skipped.append(f"{name}: {str(error).splitlines()[0][:200]}")
                self.report.say(skipped=self.skipped)
                return
            self.agree(f"{name} of {length} {kind}", f"{name} of {kind}: {wrong}" if wrong else "", suspects)

    def sweep(self) -> None:
        """Bus bandwidth as nccl-tests defines it: bytes / seconds · 2(n-1)/n, by the slowest rank's clock."""
        found: list[tuple[int, float, float]] = []
        settle = self.torch.cuda.synchronize if self.backend == "nccl" else bool
        for size in SIZES[self.backend] if self.world > 1 else ():
            # By the two sizes before, or a very slow link's pace: the last one ends inside what is left.
            (b0, s0, _), (b1, s1, _) = ((0, 0.0, 0.0), (0, 0.0, 0.0), *found)[-2:]
            pace = (s1 - s0) / (b1 - b0) if b0 else SLOWEST
            needed = (s1 + max(0.0, pace) * (size - b1)) * (WARM + TIMED)
            if min(self.exchange(f"room for {size}", self.left().total_seconds())) < 2 * needed:
                self.skipped.append(f"sweep of {size} bytes and more: no time left")
                break
            self.report.say(doing=f"timed all_reduce of {size} bytes")
            values = self.torch.zeros(size // 4, device=self.device)
            for _ in range(WARM):
                self.dist.all_reduce(values)
            settle()
            started = time.perf_counter()
            for _ in range(TIMED):
                self.dist.all_reduce(values)
            settle()
            seconds = max(self.exchange(f"time of {size}", (time.perf_counter() - started) / TIMED))
            found.append((size, seconds, size / seconds * 2 * (self.world - 1) / self.world / 1e9))
        self.report.say(stage="sweep", bandwidth=found, skipped=self.skipped)

    def part(self) -> None:
        """Leave together: a rank that left early would break those who still read the store that it may hold."""
        self.exchange("end", "")
        self.store.set(f"doctor/left/{self.rank}", "")
        if self.rank == 0:
            self.store.wait([f"doctor/left/{other}" for other in range(self.world)], self.left())


def unlike(got: Any, expected: Any) -> str:
    """The first element that is not what it must be, as a sentence; or empty."""
    bad = (got.double() != expected.double()).nonzero()
    if not len(bad):
        return ""
    place = int(bad[0])
    return f"element {place} of {len(got)} is {got[place].item()}, must be {expected[place].item()}"


def take_part(report: Report, backend: str, number: int, world: int, at: str, until: float, deep: bool) -> None:
    """The stages, one after the other."""
    import torch
    import torch.distributed as dist

    report.say(stage="import")
    rank = Rank(torch, report, backend, number, world, until)
    rank.meet(at)
    report.say(stage="rendezvous")
    rank.compare_versions()
    report.say(stage="versions", doing="init_process_group")
    dist.init_process_group(backend, store=rank.store, rank=number, world_size=world, timeout=rank.left())
    report.say(stage="init")
    rank.tiny()
    report.say(stage="tiny")
    rank.collective("all_reduce", rank.sum)
    report.say(stage="values")
    rank.collective("all_gather", rank.gather)
    rank.collective("reduce_scatter", rank.scatter)
    rank.collective("broadcast", rank.broadcast)
    report.say(stage="collectives")
    if deep:
        rank.sweep()
    rank.part()
    report.say(stage="done")


def main(arguments: list[str]) -> int:
    """Take part, say how it ended, and leave without a teardown that may hang."""
    started, seconds = time.monotonic(), float(arguments[4])
    number, world = int(arguments[1]), int(arguments[2])
    report = Report(Path(arguments[5]), number)
    report.say()
    with contextlib.suppress(Exception):  # without a usable stderr there is no stack, and everything else goes on
        faulthandler.enable()
        faulthandler.dump_traceback_later(seconds * STACK_AT)
    code = 0
    try:
        until = started + seconds * GIVE_UP_AT
        take_part(report, arguments[0], number, world, arguments[3], until, arguments[6:] == ["deep"])
    except BaseException as error:
        code = 1
        said = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
        blame, absent = (error.blame, error.absent) if isinstance(error, Broken) else (None, ())
        report.say(failed=True, detail=said[:2000], blame=blame, absent=absent)
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).fflush(None)  # NCCL's warnings are in C's buffers, which leaving so does not write
    # Straight out: with a FileStore the teardown of torch 2.4's gloo was seen to hang, on most runs of 8 ranks.
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
