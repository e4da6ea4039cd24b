"""The search for the fastest settings that fit a card: what may be changed, what it needs, how long a step then takes.

Everything that only moves work and bytes about is free: which blocks recompute, which stream, how a batch is split,
whether steps are recorded. What changes the numbers that are computed (`LOSSY`) is shown, and chosen only where the
config's `allow` names it. Pure: from a case to rows.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
from xflux_trainer import memory, timing
from xflux_trainer.config import TrainConfig, altered
from xflux_trainer.memory_terms import narrow
from xflux_trainer.rules import between
from xflux_trainer.timing_cards import card_of

from xflux_doctor.batch import accumulation
from xflux_doctor.bill import forecast_of, fused, multiplies_fp8, sharing, spec_of
from xflux_doctor.check import Case
from xflux_doctor.facts import Gpu
from xflux_doctor.hostroom import host_bill, host_room_of, pinned
from xflux_doctor.plans import Card, Row, at_peak, describe, lossy_keys, recomputing
from xflux_doctor.refused import refusals
from xflux_doctor.steptime import timed
from xflux_doctor.verdict import FITS, RESERVED, TIGHT, held

STAND_IN = "NVIDIA H100 80GB HBM3"
"""Whose times put the plans of a card that was never timed in order."""
STREAMED = (0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 57)
"""Numbers of streamed blocks that are tried."""
COARSE = (0, 20, 36, 57)
"""The same for plans that may not be taken, and are shown only."""
SMALLER = (1024, 768, 512)
"""Sizes that are offered where nothing fits that may be taken at the job's own."""
SAME = 0.99
"""Share of a job's own time from which on another plan is not worth a change."""
_PACKAGES = {"int8": "optimum-quanto", "int4": "optimum-quanto", "fp8": "optimum-quanto", "nf4": "bitsandbytes"}


class Found(msgspec.Struct, frozen=True):
    """Plans, the quickest first, and which of them is taken."""

    rows: list[Row]
    chosen: Row | None
    """None where none fits that may be taken."""
    own: Row
    """The job as it is."""


class _Line(Sequence[TrainConfig]):
    """The same work with more and more blocks streamed; each member is made when it is asked for, and few are."""

    def __init__(self, config: TrainConfig, modulation: str, counts: Sequence[int]) -> None:
        self._config, self._modulation, self._counts = config, modulation, counts
        self._known: dict[int, TrainConfig] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        count = self._counts[place]
        if count not in self._known:
            self._known[count] = altered(self._config, modulation=self._modulation, stream_blocks=count)
        return self._known[count]


class Search:
    """Of one case, as its ranks share the work, and one set of cards. Raises SkipCheck where there is no bill."""

    def __init__(self, case: Case, cards: tuple[Card, ...], visible: tuple[Gpu, ...]) -> None:
        assert case.job.train is not None
        self.case, self.config, self.cards = case, case.job.train, cards
        self.model = spec_of(case)
        self.name = cards[0].name if cards else ""
        self.steps = accumulation(case.job)
        self.fp8 = multiplies_fp8(case, visible)
        self.strategy = case.job.strategy
        self.limit = min((card.limit for card in cards), default=0)
        ranks = len(cards) or case.job.local_processes
        self.host = None if case.job.use_cpu else host_room_of(case, self.config, self.model, ranks)
        self.timed_by = self.name if card_of(self.name) else STAND_IN
        self.shared, self.timed = sharing(case), timed(case, self.timed_by)
        self._needs: dict[TrainConfig, int] = {}
        self._orders: dict[TrainConfig, float] = {}
        self._recomputing: dict[tuple[TrainConfig, int], TrainConfig] = {}
        self._ours: dict[tuple[str, str], bool] = {}

    def run(self) -> Found:
        own = self.own()
        if not self.cards or not self._bill(self.config).gpu:
            return Found([own], None if self.cards else own, own)
        rows = {self.config: own}
        with _uncollected():
            for some in (self._plans, self._smaller):
                for config in some():
                    if config not in rows:
                        rows[config] = self._row(self._label(config), config)
                if any(row.fits and row.allowed for row in rows.values()):
                    break
        ranked = sorted(rows.values(), key=lambda row: (not row.fits, order_of(row)))
        return Found(ranked, self._chosen(ranked, own), own)

    def own(self) -> Row:
        return self._row("as it is", self.config)

    def _chosen(self, rows: list[Row], own: Row) -> Row | None:
        """The quickest that fits among those that may be taken; what lacks host memory last, and not at all in a
        container, whose limit kills."""
        allowed = [row for row in rows if row.allowed]
        found = self._of([row for row in allowed if not row.lacks], own)
        if found is None and not (self.host and self.host.hard):
            found = self._of(allowed, own)
        return found

    def _of(self, rows: list[Row], own: Row) -> Row | None:
        """The quickest that fits; the job as it is where none is quicker by much. The images' size changes only where
        nothing else fits, and as little as it can."""
        for word in ("fits", "tight"):
            there = [row for row in rows if row.verdict(self.cards) == word]
            for some in ([row for row in there if "img_size" not in row.changes], there):
                if not some:
                    continue
                best = min(some, key=lambda row: (-row.changes.get("img_size", 0), order_of(row)))
                return own if own in some and order_of(own) * SAME <= order_of(best) else best
        return None

    def _row(self, label: str, config: TrainConfig) -> Row:
        bill = self._bill(config)
        changes = self._changes(config)
        if config.train_batch_size != self.config.train_batch_size:
            changes["gradient_accumulation_steps"] = self._accumulation(config)
        seconds, order = self._seconds(config), self._order(config)
        terms = at_peak(bill.gpu, bill.peak_phase)
        whole = host_bill(self.case, config, self.model) if self.host else None
        row = Row(
            label, changes, terms, bill.gpu_context, seconds, order, holes=bill.gpu_holes,
            host=whole.host_per_rank if whole else None, lacks=self.host.lacks(whole) if self.host and whole else 0,
        )  # fmt: skip
        fits = bool(self.cards) and row.verdict(self.cards) == "fits" and not row.lacks
        return msgspec.structs.replace(row, allowed=lossy_keys(changes) <= set(self.config.allow), fits=fits)

    def _changes(self, config: TrainConfig) -> dict[str, Any]:
        """Settings that differ from the job's own."""
        mine, other = vars(self.config), vars(config)
        return {key: other[key] for key, value in mine.items() if other[key] != value}

    # What is tried --------------------------------------------------------------------------------------

    def _plans(self) -> Iterator[TrainConfig]:
        yield altered(self.config, gradient_checkpointing=False, checkpointed_blocks=None)
        yield altered(self.config, gradient_checkpointing=True, checkpointed_blocks=None)
        for base in self._bases(self.config):
            found = self._best(base)
            if found is not None:
                yield found

    def _smaller(self) -> Iterator[TrainConfig]:
        """On smaller images: the last thing to change."""
        for pixels in () if self.config.resolutions else SMALLER:  # several sizes are what is trained on
            if pixels < self.config.img_size:
                small = altered(self.config, img_size=pixels)
                found = self._best(small)
                if found is not None:
                    yield found

    def _bases(self, config: TrainConfig) -> Iterator[TrainConfig]:
        """The job as it is, then what holds it in fewer bytes at a loss."""
        yield config
        if config.mode == "finetune":
            yield from self._finetunes(config)
            return
        if config.quantization != "none":
            yield altered(config, modulation="quantize")
            return
        kinds = [("fp8-dynamic", "quantize"), ("fp8-dynamic", config.modulation)] if self.fp8 else []
        kinds += [("int8", config.modulation), ("int8", "quantize"), ("int4", "quantize"), ("nf4", "quantize")]
        for kind, modulation in kinds:
            if self._has(_PACKAGES.get(kind, "torch")):
                yield altered(config, quantization=kind, modulation=modulation)

    def _finetunes(self, config: TrainConfig) -> Iterator[TrainConfig]:
        if self.strategy == "fsdp":
            yield from self._cut_up(config)
            return
        inside = {"step_in_backward": True, "backward_clip": "exact"}
        yield altered(config, **inside)
        if config.max_grad_norm:
            yield altered(config, step_in_backward=True, backward_clip="previous")
        for optimizer, package in (("adamw8bit", "torchao"), ("adafactor", "transformers")):
            if optimizer != config.optimizer and self._has(package):
                other = altered(config, optimizer=optimizer)
                yield from (other, altered(other, **inside))
                yield altered(other, step_in_backward=True, backward_clip="previous")

    def _cut_up(self, config: TrainConfig) -> Iterator[TrainConfig]:
        """Of what steps parts of weights: AdamW with less to hold, and weights in the bits that are computed with."""
        kinds = [config]
        if config.optimizer != "adamw8bit" and self._has("torchao"):
            kinds.append(altered(config, optimizer="adamw8bit"))
            yield kinds[-1]
        for kind in kinds:
            rounded = altered(kind, weight_update="stochastic")
            if narrow(rounded) and not narrow(kind):
                yield rounded

    def _has(self, package: str) -> bool:
        """Whether it is installed, as far as that is known."""
        packages = self.case.facts.packages
        return packages is None or package in packages or "torch" not in packages

    def _best(self, base: TrainConfig) -> TrainConfig | None:
        """The quickest way to fit that base; where none fits, the one that is tight."""
        lossy = lossy_keys(self._changes(base))
        streamed = STREAMED if lossy <= set(self.config.allow) else COARSE
        lines = list(self._lines(base, streamed))
        # What the host has no room for is left out, and shown where nothing else fits.
        roomy = [some for line in lines if (some := self._with_room(line))]
        for some in (roomy, lines) if roomy != lines else (lines,):
            if found := self._quickest(some, TIGHT) or self._quickest(some, FITS):
                return found
        return None

    def _quickest(self, lines: list[Sequence[TrainConfig]], percent: int) -> TrainConfig | None:
        """The quickest that fits, of lines whose members take longer each than the one before, and have to recompute at
        the most one block more; the last one of a line has to recompute the fewest.

        Best first: the queue is of stretches of lines, ordered by the time that their first members take with as many
        blocks as all of them have to recompute at the least: one fewer than the last one. (Streamed blocks are spread
        evenly: with more of them the one where a step holds most may be resident, and then fp8 keeps more of it.) A
        stretch that is the quickest is halved, until a member stands alone.
        """
        best, bound = None, math.inf
        queue: list[tuple[float, int, int, int, int, bool]] = []
        """Seconds, line, first and last member, and so many blocks; whether that was asked of the last one itself."""
        lows: dict[tuple[int, int], int] = {}

        def low_of(number: int, place: int) -> int:
            if (number, place) not in lows:
                lows[number, place] = self._certainly(lines[number][place], percent)
            return lows[number, place]

        def ask(number: int, first: int, last: int, low: int, *, known: bool) -> None:
            if known:
                low = max(low, low_of(number, last) - (first < last))
            if low <= self._blocks:
                time = self._order(self._again(lines[number][first], low))
                if time < bound:
                    heapq.heappush(queue, (time, number, first, last, low, known))

        for number, line in enumerate(lines):
            if low_of(number, len(line) - 1) <= self._blocks:
                ask(number, 0, len(line) - 1, 0, known=True)
        while queue and queue[0][0] < bound:
            _, number, first, last, low, known = heapq.heappop(queue)
            member = lines[number][first]
            if not known:
                ask(number, first, last, low, known=True)
            elif first < last:
                middle = (first + last) // 2
                ask(number, first, middle, low, known=False)
                ask(number, middle + 1, last, low, known=True)
            elif not self._refused(member):
                found = self._least(member, percent, low, bound)
                if found is not None and (time := self._order(found)) < bound:
                    best, bound = found, time
        return best

    def _lines(self, base: TrainConfig, streamed: tuple[int, ...]) -> Iterator[Sequence[TrainConfig]]:
        """What changes no number: streaming, recording, the split of a batch."""
        for split in self._splits(base):
            yield [split]
            if split.cuda_graphs and split.mode == "lora":
                yield [altered(split, cuda_graphs=False)]
            if split.mode == "finetune":
                continue
            for modulation in dict.fromkeys((split.modulation, "stream", *["keep"] * (split.modulation == "stream"))):
                counts = [count for count in streamed if (modulation, count) != (split.modulation, split.stream_blocks)]
                if counts[0] == 0:  # none needs no room for what arrives
                    yield [altered(split, modulation=modulation, stream_blocks=0)]
                yield _Line(split, modulation, counts[counts[0] == 0 :])

    def _splits(self, base: TrainConfig) -> Iterator[TrainConfig]:
        yield base
        for size in range(base.train_batch_size - 1, 0, -1):
            if base.train_batch_size % size == 0 and not base.step_in_backward:
                steps = self.steps * (base.train_batch_size // size)
                yield altered(base, train_batch_size=size, gradient_accumulation_steps=steps)

    def _refused(self, config: TrainConfig) -> bool:
        return bool(between(config)) or any(refusals(config, self.strategy, self._accumulation(config)))

    def _certainly(self, config: TrainConfig, percent: int) -> int:
        """How many blocks have to be recomputed at the least; more than there are: it never fits.

        A peak falls by no more than what comes and goes with the passes.
        """
        if not self._partly(config):
            return 0 if self._fits(self._again(config, 0), percent) else self._blocks
        # A ControlNet's own blocks are recomputed with the first of the base's.
        some = 1 if config.mode == "controlnet" else 0
        over = 100 * self._held(self._again(config, some)) - percent * self.limit
        if over <= 0:
            return some if some and not self._fits(self._again(config, 0), percent) else 0
        passing: Callable[[int], int] = memory.passing(config, self.model, **self.shared)
        low, high = some, self._blocks - 1
        above, below = passing(low), passing(high)
        most = above - int(over / (100 * (1 + RESERVED))) + 2  # bytes, what is reserved for them not counted
        if below > most:
            return self._blocks + (passing(self._blocks) > most)
        while high - low > 1:  # blocks of one kind lower it evenly
            part = (above - most) / max(1, above - below)
            middle = min(high - 1, max(low + 1, low + math.ceil(part * (high - low))))
            bytes_there = passing(middle)
            if bytes_there <= most:
                high, below = middle, bytes_there
            else:
                low, above = middle, bytes_there
        return high

    def _can_fit(self, config: TrainConfig, percent: int) -> bool:
        """Whether it fits with some of the blocks recomputed, or all."""
        counts = (self._blocks - 1, self._blocks) if self._partly(config) else (self._blocks,)
        return any(self._fits(self._again(config, count), percent) for count in counts)

    def _least(self, config: TrainConfig, percent: int, low: int, bound: float) -> TrainConfig | None:
        """With as few recomputed blocks as it takes to fit, `low` at the least; None where it does not fit, or where a
        step takes `bound` seconds."""
        found = self._again(config, low)
        if self._fits(found, percent):
            return found
        if not self._can_fit(config, percent):
            return None
        high = self._blocks - 1
        if low >= high or not self._fits(self._again(config, high), percent):
            return self._again(config, self._blocks)
        while high - low > 1:
            if self._order(self._again(config, low + 1)) >= bound:
                return None
            # Each further block lowers the need, and blocks of one kind evenly.
            most, least = (self._held(self._again(config, count)) for count in (low, high))
            over = (100 * most - percent * self.limit) / (100 * max(1, most - least))
            middle = min(high - 1, max(low + 1, low + math.ceil(over * (high - low))))
            if self._fits(self._again(config, middle), percent):
                high = middle
            else:
                low = middle
        return self._again(config, high)

    @property
    def _blocks(self) -> int:
        found: int = self.model.double_blocks + self.model.single_blocks
        return found

    def _again(self, config: TrainConfig, count: int) -> TrainConfig:
        """Recomputing so many blocks: diffusers' own all, where it is not none."""
        found = self._recomputing.get((config, count))  # the same object, which is quickly found in what is kept of it
        if found is None:
            every = count and (count >= self._blocks or not self._partly(config))
            found = self._recomputing[config, count] = recomputing(config, None if every else count)
        return found

    def _partly(self, config: TrainConfig) -> bool:
        """Whether some blocks can be recomputed and others not, as this trainer's can."""
        key = config.kernels, config.mixed_precision
        if key not in self._ours:
            self._ours[key] = fused(
                msgspec.structs.replace(self.case, job=msgspec.structs.replace(self.case.job, train=config))
            )
        return self._ours[key]

    def _with_room(self, line: Sequence[TrainConfig]) -> Sequence[TrainConfig]:
        """Of a line, whose members stream more and more, the first so many that the host has room for."""
        host = self.host
        if host is None or host.holds(pinned(line[-1], self.model)):
            return line
        return [one for one in line if host.holds(pinned(one, self.model))]

    # What it needs and takes ------------------------------------------------------------------------------

    def _bill(self, config: TrainConfig) -> memory.Bill:
        return forecast_of(self.case, config, self.model, gpu_only=True)

    def _held(self, config: TrainConfig) -> int:
        found = self._needs.get(config)
        if found is None:
            peak = memory.peak(config, self.model, **self.shared)
            found = self._needs[config] = held(peak.allocated, peak.context, peak.holes)
        return found

    def _fits(self, config: TrainConfig, percent: int) -> bool:
        return 100 * self._held(config) <= percent * self.limit

    def _accumulation(self, config: TrainConfig) -> int:
        passes: int = self.config.train_batch_size // config.train_batch_size
        return self.steps * passes

    def _seconds(self, config: TrainConfig) -> float | None:
        """Of a step, where the card is known and the ranks do what was timed."""
        job = self.case.job
        if not self.name or job.use_cpu or job.offloads or job.num_machines > 1 or card_of(self.name) is None:
            return None
        return self._time(config)

    def _order(self, config: TrainConfig) -> float:
        """The same, by a stand-in's times where the card's own are not known."""
        found = self._orders.get(config)
        if found is None:
            found = self._orders[config] = self._time(config) or 0.0
        return found

    def _time(self, config: TrainConfig) -> float | None:
        steps = self._accumulation(config)
        same = steps == config.gradient_accumulation_steps  # an accelerate file may have another number
        asked = config if same else altered(config, gradient_accumulation_steps=steps)
        try:
            found = timing.seconds_per_step(asked, self.model, self.timed_by, **self.timed)
        except timing.NoForecast:
            return None
        seconds: float = found.seconds
        return seconds

    def _label(self, config: TrainConfig) -> str:
        return describe(config, self.config, self.model.double_blocks + self.model.single_blocks)


def order_of(row: Row) -> float:
    return row.order if row.seconds is None else row.seconds


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without looking for cycles: what a search makes lives to its end, and a twentieth of its time went into that."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
