"""Signs that a run that goes on does not go well: steps that became slow, cards that slow themselves down, memory that
creeps up. Each is a warning, once in a while, and never ends anything."""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from xflux_doctor.heartbeat import Beat

GIB = 1 << 30
WINDOW = 30
"""Steps whose median is compared."""
SLOWER = 1.3
"""Times the best window's median."""
AGAIN = 1800.0
"""Seconds until the same is said again."""
EVERY = 10.0
"""Seconds between two looks at cards and memory."""
SPELL = 90
"""Looks that a creep is judged over, a quarter of an hour."""
GROWTH, LEAST = 0.1, 1.0
"""A creep: the least of each third of a spell rises, by more than this share and this many GiB over all."""
# nvml.h: nvmlClocksEventReason…; the power cap (0x4) and idle clocks (0x1) are how cards work.
REASONS = {
    0x8: "a hardware slowdown", 0x20: "its temperature (software)", 0x40: "its temperature (hardware)",
    0x80: "the power brake of the machine",
}  # fmt: skip
_LOOKS = 3
"""In a row, before a card's own slowdown is told."""


class Rates:
    """Says of a thing that it may be told: at first, and again after a while."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def may(self, what: str, now: float) -> bool:
        if now - self._told.get(what, -AGAIN) < AGAIN:
            return False
        self._told[what] = now
        return True


class Speed:
    """The newest window of steps against the best one."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._best: float | None = None

    def take(self, seconds: float) -> str:
        """A step; a sentence where the window that it ends is much slower than the best."""
        self._window.append(seconds)
        if len(self._window) < WINDOW:
            return ""
        now = median(self._window)
        self._best = now if self._best is None else min(self._best, now)
        if now < SLOWER * self._best:
            return ""
        self._window.clear()  # the next verdict is about other steps
        return f"a step takes {now:.3g} s, {now / self._best:.1f} times what it took at its best ({self._best:.3g} s)"


class Creep:
    """One amount of memory, looked at every now and then."""

    def __init__(self, what: str, limit: int | None = None) -> None:
        self._what, self._limit = what, limit
        self._seen: deque[int] = deque(maxlen=SPELL)

    def take(self, amount: int) -> str:
        self._seen.append(amount)
        if len(self._seen) < SPELL:
            return ""
        third = SPELL // 3
        seen = list(self._seen)
        low, middle, high = (min(seen[k * third : (k + 1) * third]) for k in range(3))
        grown = high - low
        if not (low < middle < high and grown > GROWTH * low and grown > LEAST * GIB):
            return ""
        self._seen.clear()
        rate = grown / (2 * third * EVERY / 3600)
        text = f"{self._what} grows: {low / GIB:.1f} to {high / GIB:.1f} GiB, {rate / GIB:.1f} GiB an hour"
        if self._limit and self._limit > high:
            text += f"; at this rate it is full in {(self._limit - high) / rate:.1f} h"
        return text


def own_memory(pid: int) -> int:
    """RssAnon + RssShmem of a process, in bytes: pages of files do not count, the kernel can drop them."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


class Cards:
    """The job's cards, by NVML. Without NVML there are none. Every call may hang with the driver: for a thread of its
    own."""

    def __init__(self, uuids: tuple[str, ...]) -> None:
        self._nvml: Any = None
        self._cards: list[tuple[str, Any]] = []
        self._slow: dict[str, int] = {}
        self._creeps: dict[str, Creep] = {}
        if not uuids:
            return
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            self._cards = [(uuid, nvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids]
            self._nvml = nvml
        except Exception:  # noqa: BLE001 - whatever NVML raises: there is nothing to look at
            self._cards = []

    def look(self) -> Iterator[tuple[str, str]]:
        """What is to be said of the cards: (what tells it from other news, a sentence)."""
        for number, (uuid, handle) in enumerate(self._cards):
            try:
                reasons = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
                heat = self._nvml.nvmlDeviceGetTemperature(handle, self._nvml.NVML_TEMPERATURE_GPU)
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            except Exception:  # noqa: BLE001, S112 - a card that does not answer is another check's matter
                continue
            names = [text for bit, text in REASONS.items() if reasons & bit]
            self._slow[uuid] = self._slow.get(uuid, 0) + 1 if names else 0
            if self._slow[uuid] >= _LOOKS:
                yield f"slow {uuid}", f"GPU {number} ({uuid}) runs slower for {' and '.join(names)}, at {heat} °C"
            creep = self._creeps.setdefault(
                uuid, Creep(f"the memory in use of GPU {number} ({uuid})", int(memory.total))
            )
            if text := creep.take(int(memory.used)):
                yield f"memory {uuid}", text


class Vitals:
    """All of it, for the ranks of this machine."""

    def __init__(self, uuids: tuple[str, ...]) -> None:
        self._uuids = uuids
        self._cards: Cards | None = None
        self._rates, self._speed, self._host = Rates(), Speed(), Creep("the host memory of the ranks")
        self._looked = 0.0

    def step(self, seconds: float, now: float | None = None) -> str:
        """A step of the run; what is to be said of it, if anything."""
        text = self._speed.take(seconds)
        return text if text and self._rates.may("speed", time.monotonic() if now is None else now) else ""

    def look(self, beats: list[Beat]) -> Iterator[str]:
        """What is to be said of cards and memory, now and then."""
        now = time.monotonic()
        if now - self._looked < EVERY or not any(beat.step for beat in beats):
            return
        self._looked = now
        if self._cards is None:
            self._cards = Cards(self._uuids)
        news = list(self._cards.look())
        if text := self._host.take(sum(own_memory(beat.pid) for beat in beats)):
            news.append(("host", text))
        yield from (text for what, text in news if self._rates.may(what, now))
