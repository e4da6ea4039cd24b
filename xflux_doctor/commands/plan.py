"""`xflux-doctor plan`: the memory bill, and which settings fit which card."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import click
from xflux_trainer import memory, timing
from xflux_trainer.config import TrainConfig

from xflux_doctor import matrix as matrices
from xflux_doctor import strategy, xflux_bill
from xflux_doctor.batch import accumulation
from xflux_doctor.bill import checkpointed_blocks, dataset, has_triton, multiplies_fp8, need, spec_of
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.checks.packages import FLASH_4, faster_attention
from xflux_doctor.checks.words import devices
from xflux_doctor.errors import DoctorError, UsageError
from xflux_doctor.inputs import Inputs, build
from xflux_doctor.refused import refusals
from xflux_doctor.report import placement
from xflux_doctor.xflux import XFlux

GIB = 1 << 30


def run(inputs: Inputs, *, gpu: str | None) -> int:
    """Print the bill and the alternatives; exit 1 when none fits the card."""
    case = build(inputs, matrices.load_with(inputs.matrix))
    if case.job.xflux is not None:
        return _xflux(case, case.job.xflux, gpu)
    config = case.job.train
    if config is None:
        problem = next((p for p in case.job.problems if p.file == "train"), None)
        if problem:
            raise DoctorError(problem.seen, problem.hint)
        raise DoctorError("No training file was given, and no train.yaml lies here.", "Give --config FILE.", code=2)
    name, size = _card(case, gpu)
    try:
        bill = need(case)
    except SkipCheck as skip:
        raise DoctorError(f"There is no bill: {skip}.", "Use DDP, FSDP2, or DeepSpeed ZeRO stage 1, 2 or 3.") from skip
    for line in placement.lines(case):
        click.echo(line)
    _print(bill)
    _strategies(case)
    _duration(case, config, name)
    if size is None:
        click.echo("No GPU to hold it against: name one with --gpu NAME:GIB.")
        return 0
    fp8 = multiplies_fp8(case, () if gpu is not None else devices(case) or ())
    verdict = _alternatives(case, config, name, size, fp8=fp8)
    if advice := faster_attention(case):
        click.echo(f"{advice}.")
    return verdict


def _xflux(case: Case, found: XFlux, gpu: str | None) -> int:
    """What X-Flux's own script needs, as it is and under DeepSpeed; there are no other settings to choose from."""
    if found.config is None:
        raise DoctorError(f"{found.problem or 'No config was given'}.", "Give --config FILE.", code=2)
    commit = f" at {found.commit[:7]}" if found.commit else ""
    click.echo(f"{found.script.path}{commit} ({found.script.because}):")
    try:
        terms = xflux_bill.gpu_terms(case, found)
    except SkipCheck as skip:
        raise DoctorError(f"There is no bill: {skip}.", "Plan the bundled trainer's job without --xflux.") from skip
    for term in terms:
        click.echo(f"  GPU {term.bytes / GIB:9.3f} GiB  {term.name}")
    ranks, wanted = case.job.local_processes, sum(term.bytes for term in terms)
    click.echo(f"  host{xflux_bill.host_bytes(found) * ranks / GIB:9.3f} GiB  while loading, {ranks} x one whole copy")
    click.echo(f"  disk{xflux_bill.checkpoint_bytes(case, found) / GIB:9.3f} GiB  each checkpoint")
    name, size = _card(case, gpu)
    rows = [("as it is", wanted)]
    if xflux_bill.fp32_base(case, found):
        rows.append(("under DeepSpeed in bf16", xflux_bill.gpu_bytes(case, found, deepspeed=True)))
    verdicts = [fitting(bytes_, xflux_bill.ERROR_BAR, size) if size else "" for _, bytes_ in rows]
    click.echo(f"\non a {name or 'GPU'} of {size / GIB:.0f} GiB:" if size else "\nper GPU:")
    for verdict, (label, bytes_) in zip(verdicts, rows, strict=True):
        click.echo(f"  {verdict:<13}{bytes_ / GIB:7.1f} GiB  {label}")
    return 1 if size and all(verdict == "does not fit" for verdict in verdicts) else 0


def _card(case: Case, gpu: str | None) -> tuple[str, int | None]:
    """The card's name and bytes: the one named, else the smallest visible one, within --gpu-limit."""
    if gpu is not None:
        match = re.fullmatch(r"(.+):(\d+(?:\.\d+)?)", gpu)
        if match is None:
            raise UsageError(f"--gpu is {gpu!r}.", "Write NAME:GIB, such as A100:80.")
        size = int(float(match[2]) * GIB)
        return match[1], min(size, case.job.gpu_limit or size)
    found = devices(case) or ()
    if case.job.use_cpu or not found:
        return "", None
    smallest = min(found, key=lambda card: card.memory_total)
    return smallest.name, min(smallest.memory_total, case.job.gpu_limit or smallest.memory_total)


def _print(bill: memory.Bill) -> None:
    for title, terms in (("GPU", bill.gpu), ("host", bill.host), ("disk", bill.disk)):
        if not terms:
            continue
        click.echo(f"{title}{' per rank' if title != 'disk' else ''}:")
        for term in sorted(terms, key=lambda t: (memory.PHASES.index(t.phase), -t.bytes)):
            click.echo(f"  {term.phase:<7}{term.bytes / GIB:9.3f} GiB  {term.name}: {term.why}")
    if bill.gpu:
        click.echo(
            f"peak: {bill.gpu_allocated / GIB:.1f} GiB allocated while {bill.peak_phase}, "
            f"{bill.gpu_total / GIB:.1f} GiB with the CUDA context (±{bill.error_bar:.0%})"
        )


def _duration(case: Case, config: TrainConfig, name: str) -> None:
    """A line on the time, where the card is known and the ranks do what was timed."""
    job = case.job
    if not name or job.use_cpu or job.offloads or job.num_machines > 1:
        return
    ranks = max(1, job.num_processes)
    asked = dataclasses.replace(config, gradient_accumulation_steps=accumulation(job))
    try:
        step = timing.seconds_per_step(
            asked, spec_of(case), name, world_size=ranks, strategy=job.strategy, device="cuda",
            triton=has_triton(case), flash4=FLASH_4 in (case.facts.packages or {}),
        )  # fmt: skip
    except timing.NoForecast:
        return
    images = 0 if config.repeats else dataset(case).count  # how many repeats there are only a walk by folders says
    total = timing.hours(asked, step, world_size=ranks, images=images)
    ending = "" if total is None else f", {total:.1f} hours in all"
    click.echo(f"about {step.seconds:.2f} s a step{ending} (± {step.error:.0%}) on {name}")


def _strategies(case: Case) -> None:
    """What sharding would change: for a LoRA next to nothing by ZeRO 1 and 2, which people learn after hours of it."""
    ranks = case.job.num_processes
    if ranks <= 1 or case.job.use_cpu:
        return
    click.echo(f"how {ranks} ranks share the work, while training, per GPU:")
    choice = strategy.best(case, ranks)
    for name in ("ddp", "zero1", "zero2", "fsdp", "zero3"):
        found = strategy.bill(case, name, ranks) if name == case.job.strategy or strategy.done(case, name) else None
        if found is not None:
            mine = ", as your file says" if name == case.job.strategy else ""
            why = f": {choice.because}" if name == choice.strategy else ""
            why = why.replace(": ", ": the fastest; ", 1) if choice.strategy == "ddp" else why
            click.echo(f"  {strategy.stepping(found) / GIB:7.2f} GiB  {strategy.NAMES[name]}{mine}{why}")
    config = case.job.train
    less = [] if config is None or config.gradient_checkpointing else ["gradient_checkpointing"]
    less += ["a smaller img_size"] + (["a smaller train_batch_size"] if config and config.train_batch_size > 1 else [])
    what = "transformer" if config and config.mode == "finetune" else "frozen transformer"
    click.echo(
        f"  by DDP, ZeRO-1 and ZeRO-2 every rank holds the {what} whole, so more ranks do not lower it; "
        f"{' or '.join(less)} does"
    )


def _alternatives(case: Case, config: TrainConfig, name: str, size: int, *, fp8: bool) -> int:
    """The same job with the settings that trade time or size for memory, each with its verdict."""
    click.echo(f"\non a {name or 'GPU'} of {size / GIB:.0f} GiB:")
    fits = False
    for label, changed in variants(config, checkpointed_blocks(case, size), fp8=fp8):
        if any(refusals(changed, case.job.strategy, 1)):
            continue
        mended = dataclasses.replace(case, job=dataclasses.replace(case.job, train=changed))
        bill = need(mended)
        verdict = verdict_of(bill, size)
        fits = fits or verdict != "does not fit"
        click.echo(f"  {verdict:<13}{bill.gpu_total / GIB:7.1f} GiB  {label}")
    if not fits:
        click.echo("Nothing fits this card: use a larger one, or several under FSDP2 or ZeRO-3.")
    return 0 if fits else 1


def variants(config: TrainConfig, some: int | None = None, *, fp8: bool = False) -> list[tuple[str, TrainConfig]]:
    """The job as it is, and its neighbors, fastest first. `some`: checkpointed blocks that are enough to fit; `fp8`:
    products can be computed in it."""
    found = [("as it is", config)]
    every = dataclasses.replace(config, gradient_checkpointing=True, checkpointed_blocks=None)
    if some is not None:
        changed = dataclasses.replace(every, checkpointed_blocks=some)
        if changed != config:
            found.append((f"{config.img_size} px, recomputing the first {some} blocks (checkpointed_blocks)", changed))
    for checkpointing in (False, True):
        for px in sorted({config.img_size, 1024, 768, 512}, reverse=True):
            if px > config.img_size:
                continue
            changed = dataclasses.replace(every, gradient_checkpointing=checkpointing, img_size=px)
            if changed != config:
                mode = "recomputing every block" if checkpointing else "keeping every activation"
                found.append((f"{px} px, {mode}", changed))
    return [*found, *_smaller(config, fp8=fp8)]


def _smaller(config: TrainConfig, *, fp8: bool) -> list[tuple[str, TrainConfig]]:
    """The job's own size with less of the model on the device."""
    checkpointed = dataclasses.replace(config, gradient_checkpointing=True, checkpointed_blocks=None)
    if config.mode == "finetune":
        own = {"optimizer": "adafactor", "step_in_backward": True, "weight_update": "stochastic"}
        rows: dict[str, dict[str, Any]] = {"adafactor, stepped in the backward pass": own}
    elif config.quantization == "none":
        dynamic = {"quantization": "fp8-dynamic", "modulation": "quantize"}
        rows = {
            "base and products in fp8, keeping every activation": {**dynamic, "gradient_checkpointing": False},
            "base and products in fp8": dynamic,
        }
        rows = (rows if fp8 else {}) | {
            "base in int8": {"quantization": "int8"},
            "base in nf4": {"quantization": "nf4"},
            "base in nf4, its modulation streamed": {"quantization": "nf4", "modulation": "stream"},
        }
    else:
        rows = {"its modulation streamed": {"modulation": "stream"}}
    made = [(label, dataclasses.replace(checkpointed, **keys)) for label, keys in rows.items()]
    return [(f"{config.img_size} px, {label}", changed) for label, changed in made if changed != config]


def verdict_of(bill: memory.Bill, size: int) -> str:
    return fitting(bill.gpu_total, bill.error_bar, size)


def fitting(wanted: int, error_bar: float, size: int) -> str:
    if wanted * (1 + error_bar) <= size:
        return "fits"
    return "tight" if wanted * (1 - error_bar) <= size else "does not fit"
