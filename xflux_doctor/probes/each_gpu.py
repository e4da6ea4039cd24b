"""The stages of `gpu.py` on every visible GPU, side by side, within one deadline.

A child that dies or hangs costs the stage that it was in: another one goes on behind that stage. What the card's clocks
and heat are is asked of NVML by the caller's `look`, before, while products are timed, and after.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from xflux_doctor.facts import AttentionTrial, BlockTrial, GpuProbe, Product, Reading
from xflux_doctor.probes.runner import Child, Outcome, scratch

LIMITS = {"context": 40.0, "memory": 15.0, "products": 20.0, "bandwidth": 10.0, "link": 15.0, "attention": 12.0,
          "attention trainer flash-attn-4": 40.0, "blocks": 30.0}  # fmt: skip
"""Seconds that a stage may take, by its first word or by its name; the context has the import of torch in it, and is
waited for longer where the caller has the patience; flash-attn-4 is compiled at its first call."""
LEAST = 6.0
"""Seconds that another child needs to come to its stage: less is no try."""
STARTS = 6
"""Children of one GPU: so many deaths are enough to know."""
_GIB = 1 << 30
Look = Callable[[str], Reading | None]
"""A card's UUID, or empty, to what NVML says of it."""


def limit_of(stage: str) -> float:
    return LIMITS.get(stage) or LIMITS[stage.partition(" ")[0]]


@dataclass(frozen=True)
class Ask:
    """What one GPU is asked for; sizes are bytes, shapes as their names say."""

    stages: tuple[str, ...]
    forecast: int = 0
    """What the trainer will allocate at its peak; 0: there is no forecast."""
    weights: int = 0
    """How much of it stays from beginning to end."""
    pieces: dict[str, list[int]] = field(default_factory=dict)
    products: tuple[str, ...] = ("bfloat16",)
    shapes: tuple[tuple[int, int, int], ...] = ()
    """(M, N, K) of the products that are timed."""
    checked: tuple[int, int, int] = (4096, 4096, 1024)
    rounds: int = 3
    shape: tuple[int, int, int, int] = (1, 4608, 24, 128)
    """(batch, tokens, heads, channels) of attention."""
    text: int = 512
    image: tuple[int, int] = (64, 64)
    """Rows and columns of image tokens."""
    dtype: str = "bfloat16"
    attention: str = "auto"
    """The train config's."""
    timed: float = 0.6
    """Seconds that a rate is measured for."""
    copied: int = 2 * _GIB
    linked: int = _GIB // 4
    expand: bool = True
    """Whether torch is asked for expandable segments, as the trainer does."""


def context_bytes(line: dict[str, Any], before: int | None) -> int | None:
    """What the context took of what NVML called free before it; None where that is not known, or others came."""
    free = line.get("free")
    if before is None or not isinstance(free, int):
        return None
    taken = before - free - int(line.get("reserved") or 0)
    return taken if taken > 0 else None


class _Card:
    """One GPU's children, one after the other, and what they found."""

    def __init__(
        self, python: str, device: str, ask: Ask, environment: Mapping[str, str], until: float, lock: str, look: Look,
        before: Mapping[str, int], patience: float,
    ) -> None:  # fmt: skip
        self.python, self.device, self.ask, self.environment, self.until = python, device, ask, environment, until
        self.patient = until + patience
        self.lock, self.look, self.before = lock, look, before
        self.todo = list(ask.stages)
        self.found: dict[str, Any] = {"device": int(device.partition(":")[2] or 0)}
        self.done: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.lists: dict[str, list[Any]] = {"products": [], "attention": [], "blocks": []}
        self.started = time.monotonic()
        self.child: Child | None = None
        self.births, self.read = 0, 0
        self.stage, self.since = "", 0.0

    def start(self) -> None:
        ask = {**asdict(self.ask), "device": self.device, "lock": self.lock, "waits": 10.0}
        ask["stages"] = ["context", *(name for name in self.todo if name != "context")]
        ask["limits"] = {name: limit_of(name) for name in ask["stages"]}
        self.births += 1
        self.read, self.stage, self.since = 0, "context", time.monotonic()
        try:
            self.child = Child(self.python, "gpu", (json.dumps(ask),), self.environment)
        except OSError as error:  # no such interpreter, no more processes allowed, no memory to fork
            self.failed["context"] = f"could not be started: {error}"
            self.leave_out("no process could be started")

    def step(self) -> bool:
        """Look at the child once; whether there is more to come."""
        if self.child is None:
            return False
        code = self.child.poll()  # before its words: what it said last is then among them
        self.take(self.child.said())
        now = time.monotonic()
        if code is None and not self.late(now):
            return True
        outcome = self.child.finish(now)
        self.take(outcome.lines)
        self.child = None
        self.ended(outcome)
        return self.child is not None

    def late(self, now: float) -> bool:
        """Whether the child's time is over. The first context is waited for beyond its own limit: one that comes late
        says something else of the card than one that never comes."""
        if self.stage == "context" and self.patient > self.until and "context" not in self.done:
            return now > self.patient
        return now > self.until or (bool(self.stage) and now > self.since + limit_of(self.stage))

    def take(self, lines: tuple[dict[str, Any], ...]) -> None:
        """What the child has said since the last look."""
        for line in lines[self.read :]:
            name = line.get("stage")
            if isinstance(name, str) and name in ("context", *self.ask.stages):
                self.hear(name, line)
        self.read = len(lines)

    def hear(self, name: str, line: dict[str, Any]) -> None:
        if "begun" in line:
            self.stage, self.since = name, time.monotonic()
        elif "loaded" in line:
            self.found["loaded"] = self.look(str(self.found.get("uuid") or "")) or self.found.get("loaded")
        elif "left_out" in line:
            self.settle(name, self.skipped, str(line["left_out"]))
        elif "skipped" in line:
            self.settle(name, self.skipped, str(line["skipped"]))
        elif "failed" in line:
            self.settle(name, self.failed, str(line["failed"]))
        elif isinstance(line.get("done"), float):
            self.keep(name, line)

    def settle(self, name: str, where: dict[str, str], words: str) -> None:
        where.setdefault(name, words)
        self.stage = ""
        if name in self.todo:
            self.todo.remove(name)

    def keep(self, name: str, line: dict[str, Any]) -> None:
        """The values of a stage that ended well."""
        first = name not in self.done
        self.done.setdefault(name, line["done"])
        self.stage = ""
        if name in self.todo:
            self.todo.remove(name)
        if name == "context" and first:
            self.found["before"] = self.look(str(line.get("uuid") or ""))
            self.found["context_bytes"] = context_bytes(line, self.before.get(str(line.get("uuid") or "")))
        values = {key: value for key, value in line.items() if key not in ("stage", "done", "free", "said")}
        if name == "memory":
            self.found["free"] = line.get("free")
        self.lists["products"] += values.pop("products", ())
        self.lists["attention"] += [values.pop("attention")] if "attention" in values else []
        self.lists["blocks"] += [values.pop("blocks")] if "blocks" in values else []
        if name != "context" or first:
            self.found |= values

    def ended(self, outcome: Outcome) -> None:
        """The child is gone: whose fault that was, and whether another one goes on."""
        if name := self.stage:
            took = time.monotonic() - self.since
            frame = f", in {outcome.frame}" if outcome.frame else ""
            if outcome.code is None and took < limit_of(name):
                self.settle(name, self.skipped, f"no time was left: it had taken {took:.0f} s{frame}")
            elif outcome.code is None:
                self.settle(name, self.failed, f"did not end within {took:.0f} s and was killed{frame}")
            else:
                self.settle(name, self.failed, f"{outcome.how}{frame}")
        if "context" in self.failed:
            self.leave_out("the context could not be made")
        if "context" in self.skipped:
            self.leave_out("no time was left")
        if not self.todo:
            return
        if self.births >= STARTS:
            self.leave_out(f"{self.births} processes have died here")
        elif self.until - time.monotonic() < LEAST:
            self.leave_out("no time was left")
        else:
            self.start()

    def leave_out(self, why: str) -> None:
        for name in self.todo:
            if name not in self.failed:
                self.skipped.setdefault(name, why)
        self.todo = []

    def result(self) -> GpuProbe:
        if self.child is not None:
            self.child.finish(time.monotonic())
            self.leave_out("no time was left")
        self.found["after"] = self.look(str(self.found.get("uuid") or ""))
        products = [one for one in self.lists["products"] if "absent" not in one]
        names = {field.name for field in msgspec.structs.fields(GpuProbe)}
        return msgspec.convert(
            {
                **{key: value for key, value in self.found.items() if key in names},
                "done": {name: round(seconds, 3) for name, seconds in self.done.items()},
                "failed": self.failed,
                "skipped": self.skipped,
                "products": [msgspec.convert(one, Product) for one in products],
                "attention": [msgspec.convert(one, AttentionTrial) for one in self.lists["attention"]],
                "blocks": [msgspec.convert(one, BlockTrial) for one in self.lists["blocks"]],
                "shapes": "batch {}, {} tokens, {} heads of {}".format(*self.ask.shape),
                "seconds": time.monotonic() - self.started,
            },
            GpuProbe,
        )  # fmt: skip


def no_look(_: str) -> Reading | None:
    """Where no driver can be asked."""
    return None


def each_gpu(
    python: str, devices: tuple[str, ...], ask: Ask, environment: Mapping[str, str], seconds: float,
    look: Look = no_look, before: Mapping[str, int] | None = None, patience: float = 0.0,
) -> tuple[GpuProbe, ...]:  # fmt: skip
    """One answer a device (`cuda:0` …, or `cpu`). Ends within `seconds` and a moment, or `patience` later where a
    context has not come by then; what there is no time for after it is left out.

    `before`: the bytes that NVML called free, by the cards' UUIDs without a prefix.
    """
    until = time.monotonic() + seconds
    with tempfile.NamedTemporaryFile(prefix="xflux-doctor-", dir=scratch()) as lock:
        cards = [_Card(python, device, ask, environment, until, lock.name, look, before or {}, patience)
                 for device in devices]  # fmt: skip
        try:
            for card in cards:
                card.start()
            while sum(card.step() for card in cards):  # every one is looked at
                time.sleep(0.02)
            return tuple(card.result() for card in cards)
        finally:
            for card in cards:
                if card.child is not None:
                    card.child.kill(time.monotonic())
