"""How many seconds an optimizer step will take on one rank, itemised, and how many hours the run. Torch-free.

A device's time is what its products and attention compute, what everything else moves through its memory, and a little
for each block (`timing_terms`). Where a step is not recorded the host has to launch every kernel, and the slower of the
two decides. The constants were fitted to steps of the full-size model on H200s and one H100, which the tests hold
against this: it explains them, and foretells what lies between them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from xflux_trainer.config import TrainConfig
from xflux_trainer.kept import kept_by
from xflux_trainer.memory_terms import narrow, width
from xflux_trainer.spec import FluxSpec
from xflux_trainer.timing_cards import card_of, measured
from xflux_trainer.timing_terms import NONE, WHY, Job, backward, forward, shapes, words, work
from xflux_trainer.trained import trained

LAUNCH = 0.045e-3
"""Seconds that a slow host takes to launch a kernel from Python."""
MEETING = 6
"""How sharply the slower of host and device decides: now one is behind and now the other, so a step takes longer than
either alone, by 12 % where both take as long."""
RANKS_ERROR = 0.13
"""What is added to the error where ranks share the work: five such runs were timed at full size, all on two H200s."""
AROUND = 1.3e-3
"""Seconds that FSDP2 adds to each pass through a block beside what it sends: it copies weights and gradients into and
out of buffers, and passes wait for it. Fitted to fine-tunes on two H200s (benchmarks/two_gpus.py: 1.22 to 1.38 s)."""
STEPPED = {"adamw": 28, "adamw8bit": 52, "adafactor": 12}
"""Bytes that the optimizer moves for a trained number. In 8 bits Adam moves 12: finding the codes of both moments takes
the time of the others (0.17 s for FLUX.1's transformer on an H200)."""
STEP_LAUNCHES = {"adamw": 2, "adamw8bit": 2, "adafactor": 4}
"""Launches that step one tensor of 16 bits alone, and what the host does between them."""
NORM_LAUNCHES = 5
"""The same for a gradient's norm, in a pass that only measures."""
MEASURING, LINK, HOST = "measuring", "waiting for the link", "waiting for the host"
NAMES = (*WHY, MEASURING, LINK, HOST)
"""The terms of a micro-step, in their order."""


class NoForecast(Exception):
    """No forecast can be made; the message says why, as a sentence."""


class Term(NamedTuple):
    """One part of a step's time: what it is, how long, and why that long."""

    name: str
    seconds: float
    why: str


class Forecast:
    """Seconds of one optimizer step, which are the sum of the terms; `error` is relative."""

    def __init__(self, seconds: float, error: float, itemised: Callable[[], tuple[Term, ...]]) -> None:
        self.seconds, self.error, self._itemised = seconds, error, itemised

    @functools.cached_property
    def terms(self) -> tuple[Term, ...]:
        """What it is made of, put into words when somebody asks: a plan's search asks for hundreds of seconds."""
        return self._itemised()


def seconds_per_step(
    config: TrainConfig, spec: FluxSpec, card: str, *, world_size: int, strategy: str, device: Literal["cuda", "cpu"],
    triton: bool = True, flash4: bool = False, rates: Mapping[str, float] | None = None,
) -> Forecast:  # fmt: skip
    """One optimizer step of one rank, images as large as they may be, the mean of the config's sizes.

    `card` is the GPU's name; `triton` and `flash4`: whether Triton and flash-attn-4 work there; `rates`: what was
    measured on this very card, see `timing_cards.measured`. Offloading by DeepSpeed or FSDP, evaluation, samples and
    checkpoints are not in it. Raises `NoForecast`.
    """
    if device != "cuda" or config.mixed_precision == "no":
        raise NoForecast("Steps are forecast for GPUs in bf16 or fp16 only.")
    known = card_of(card)
    if known is None:
        raise NoForecast(f"No forecast of time: what a {card or 'GPU without a name'} reaches is not known.")
    known = measured(known, rates or {})
    job = Job(config, spec, known, strategy, triton=triton, flash4=flash4)
    if config.quantization == "fp8-dynamic" and (known.fp8 is None or not job.fused):
        raise NoForecast("fp8-dynamic needs a card with fp8 products and the trainer's own blocks.")
    sizes = [_micro_step(job, size) for size in config.sizes]
    share = config.gradient_accumulation_steps / len(sizes)
    found = [each * share for each in (sizes[0] if len(sizes) == 1 else map(sum, zip(*sizes, strict=True)))]
    passes = 2 * job.blocks + job.again if strategy == "fsdp" else 0
    once = _once(config, spec, strategy, world_size, known.memory, known.bus, passes)
    error = known.error + (RANKS_ERROR if world_size > 1 or strategy not in ("single", "ddp") else 0)
    seconds = sum([each for each in (*found, *(term.seconds for term in once)) if each > 0])
    return Forecast(seconds, error, lambda: tuple(term for term in (*_told(job, found), *once) if term.seconds > 0))


def hours(config: TrainConfig, step: Forecast, *, world_size: int, images: int = 0) -> float | None:
    """Hours of training from the first step to the last, without encoding, evaluation, samples and checkpoints.

    `images`: those of one pass over the data, repeats counted, for a run whose length is in passes; None where they
    are not known then.
    """
    steps = config.max_train_steps
    if steps is None:
        if not images or not config.num_train_epochs:
            return None
        views = images * len(config.sizes) * config.num_train_epochs
        steps = math.ceil(views / (config.train_batch_size * config.gradient_accumulation_steps * world_size))
    return steps * step.seconds / 3600


def _micro_step(job: Job, side: int) -> tuple[float, ...]:
    """Seconds of one batch at one size, by `NAMES`: those of the device, then what is waited for beyond them."""
    asked = work(job, side)
    ahead, behind = forward(job, asked), backward(job, asked)
    busy = sum(ahead), sum(behind)
    first = busy[1] + _read(job) if _measures(job) else 0.0
    late = 0.0
    if (arrives := job.held.arriving) != NONE:
        link = job.card.link * 1e9
        late = max(0.0, arrives[0] / link - busy[0]) + max(0.0, arrives[1] / link - busy[1])
    host = 0.0
    if not job.recorded:
        launching = _launches(job) * LAUNCH
        time = sum(busy) + late + first
        host = (time**MEETING + launching**MEETING) ** (1 / MEETING) - time
    return (*map(operator.add, ahead, behind), first, late, host)


def _told(job: Job, found: Iterable[float]) -> list[Term]:
    """Each of them with why it takes what it takes."""
    reasons = _reasons(job)
    return [Term(name, seconds, reasons[name]) for name, seconds in zip(NAMES, found, strict=True) if seconds > 0]


def _reasons(job: Job) -> dict[str, str]:
    """The words for it, by name."""
    names, gigabytes = words(job), sum(job.held.arriving) / 1e9
    found = {name: why.format(**names) for name, why in WHY.items()}
    found[MEASURING] = "a backward pass before the one that steps: backward_clip is exact"
    found[LINK] = f"{gigabytes:.1f} GB come from the host at {job.card.link} GB/s, longer than the passes compute"
    if not job.recorded:
        count = _launches(job)
        found[HOST] = f"{count:,} kernels are launched one by one, which takes {count * LAUNCH:.2f} s"
    return found


def _measures(job: Job) -> bool:
    """Whether a backward pass goes before the one that steps, for the norm of all gradients alone."""
    config = job.config
    return config.step_in_backward and config.backward_clip == "exact" and config.max_grad_norm > 0


def _read(job: Job) -> float:
    """Seconds in which every gradient is read once."""
    return job.what.parameters * width(job.config) / (job.card.memory * 1e9)


def _launches(job: Job) -> int:
    """Kernels that the host launches in one pass, forward and backward."""
    count, twice = job.held.launches, 1 + _measures(job)
    for kind, blocks, recomputed in job.kinds:
        ahead, behind, again = kind.launches
        count += blocks * (ahead + twice * behind) + twice * recomputed * again
    if job.config.step_in_backward:
        tensors = 2 * len(job.shapes)  # weights of several dimensions and their biases
        count += (STEP_LAUNCHES[job.config.optimizer] + _measures(job) * NORM_LAUNCHES) * tensors
    return count


@kept_by("optimizer", "step_in_backward", "weight_update", "gradient_accumulation_steps")
def _once(
    config: TrainConfig, spec: FluxSpec, strategy: str, world_size: int, memory: float, bus: float, passes: int
) -> list[Term]:  # fmt: skip
    """The optimizer, and what ranks send each other; `memory` and `bus`: GB/s of the card, `passes`: those of one batch
    through blocks that FSDP2 gathers."""
    what = trained(config, spec)
    own = what.parameters
    cut = strategy.startswith("zero") or (strategy == "fsdp" and config.mode != "lora")
    share = own / world_size if cut else own
    moved = STEPPED[config.optimizer] + (12 if config.ema_decay else 0) + 4 * (config.weight_update == "kahan")
    # A norm reads every gradient once more.
    moved += 4 if config.max_grad_norm else 0
    seconds, why = share * moved / (memory * 1e9), f"{moved} bytes for each of {share:,.0f} trained numbers"
    each = strategy in ("single", "ddp") or (strategy == "fsdp" and narrow(config))
    alone = config.mode != "lora" and width(config) < 4 and each
    if alone and not config.step_in_backward:  # each tensor is stepped after the other, and nothing else is queued
        tensors = len(shapes(config, spec, what))
        launching = STEP_LAUNCHES[config.optimizer] * LAUNCH * 2 * tensors
        if launching > seconds:
            seconds, why = launching, f"the kernels for each of {2 * tensors} tensors are launched one by one"
    terms = [Term("optimizer", seconds, why)]
    if world_size > 1:
        wide = 4 if config.mode == "lora" and not strategy.startswith("zero") else width(config)
        sent = 2 * own * wide
        if strategy == "zero3" or (strategy == "fsdp" and config.mode == "finetune"):
            sent += 2 * spec.transformer_parameters * width(config) * config.gradient_accumulation_steps
        seconds = sent * (world_size - 1) / world_size / (bus * 1e9)
        why = f"{sent / 1e9:.1f} GB at {bus:.0f} GB/s within one host, as if nothing hid it"
        terms.append(Term("exchange between ranks", seconds, why))
        if strategy == "fsdp":
            why = f"what it does around a block beside that, in {passes} passes through one"
            terms.append(Term("FSDP2", passes * AROUND * config.gradient_accumulation_steps, why))
    return terms
