"""`xflux-doctor plan`: the memory bill, and which settings fit which card."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from xflux_trainer import memory, timing
from xflux_trainer.config import TrainConfig

from xflux_doctor import matrix as matrices
from xflux_doctor import planner, plansearch, steptime, strategy, xflux_bill
from xflux_doctor.batch import accumulation
from xflux_doctor.bill import dataset, fused, need, spec_of
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.errors import DoctorError, UsageError
from xflux_doctor.facts import Gpu, Package
from xflux_doctor.files import write_atomic
from xflux_doctor.inputs import Inputs, build
from xflux_doctor.plans import Card, Row, capability_of
from xflux_doctor.report import planjson
from xflux_doctor.verdict import reserved
from xflux_doctor.visible import selected

if TYPE_CHECKING:
    from xflux_doctor.xflux import XFlux

GIB = 1 << 30
_WHILE = {"cache": "while encoding", "load": "while loading", "train": "while training", "sample": "while drawing"}
_NODE = re.compile(r"nvidia\d+|dxg")
"""The device node of a GPU, or of WSL's."""
_HOPPER = 9
"""The compute capability that it is fast on, its first number."""


def run(inputs: Inputs, *, gpu: str | None, form: str = "text", html: str | None = None) -> int:
    """Print the bill and the alternatives; exit 1 when none fits the card."""
    # By how many cards there are here some launchers say how many ranks they start.
    here = gpu is None or inputs.launch is not None
    case = build(inputs, matrices.load_with(inputs.matrix), to_run=False, cards=here)
    if case.job.xflux is not None:
        return _xflux(case, case.job.xflux, gpu, form, html)
    stack = ""
    if gpu is not None and not inputs.facts:
        case, stack = _elsewhere(case)
    config = case.job.train
    if config is None:
        problem = next((p for p in case.job.problems if p.file == "train"), None)
        if problem:
            raise DoctorError(problem.seen, problem.hint)
        raise DoctorError("No training file was given, and no train.yaml lies here.", "Give --config FILE.", code=2)
    if case.job.local_processes > planner.MOST_RANKS:
        seen = f"The job has {case.job.local_processes:,} ranks on this machine."
        raise DoctorError(seen, "Set num_processes to the number of devices.")
    cards = _cards(case, gpu)
    try:
        bill = need(case)
    except SkipCheck as skip:
        raise DoctorError(f"There is no bill: {skip}.", "Use DDP, FSDP2, or DeepSpeed ZeRO stage 1, 2 or 3.") from skip
    name = cards[0].name if cards else ""
    visible = (
        selected(case.facts.gpus or (), case.facts.environment, case.job.gpu_ids) if gpu is None else _named(cards)
    )
    found = planner.search(case, cards, visible)
    fitting = [row for row in found.rows if row.verdict(cards) != "does not fit"]
    fits = not cards or found.chosen is not None or any(not row.lacks for row in fitting)
    document = planjson.document(case, bill, cards, found.rows if bill.gpu else [], found.chosen)
    if html:
        _page(html, document, config.img_dir, cards, found.chosen, bill)
    if form == "json":
        click.echo(planjson.encode(document), nl=False)
        return 0 if fits else 1
    placement: Any = importlib.import_module("xflux_doctor.report.placement")  # no program reads it
    for line in placement.lines(case):
        click.echo(line)
    _print(bill)
    _strategies(case, cards)
    _duration(case, config, name)
    if not cards:
        click.echo("No GPU to hold it against: name one with --gpu NAME:GIB.")
        return 0
    _alternatives(found.rows if bill.gpu else [], cards, found.chosen)
    there = len(visible) if gpu is None else len(cards)  # a card that is named is there as often as it is wanted
    for line in _verdict(found, fitting, case.job.strategy, ranks=len(cards), seen=there):
        click.echo(line)
    if stack:
        click.echo(f"Planned with the packages of stack {stack}; --facts FILE has those of a machine.")
    if advice := faster_attention(case, visible):
        click.echo(f"{advice}.")
    return 0 if fits else 1


def _elsewhere(case: Case) -> tuple[Case, str]:
    """For a card that is not here: nothing is known of its host, and without GPUs here its packages are the newest
    stack's, which is named."""
    packages, name = case.facts.packages, ""
    stack = next((one for one in reversed(case.matrix.stacks) if not one.is_cpu), None)
    nodes = case.facts.host.device_nodes if case.facts.host else {}
    if not any(_NODE.fullmatch(node) and state == "ok" for node, state in nodes.items()) and stack is not None:
        packages = {key: Package(key, pin.version, pin.build) for key, pin in stack.packages.items()}
        name = stack.name
    return msgspec.structs.replace(case, facts=msgspec.structs.replace(case.facts, host=None, packages=packages)), name


def _named(cards: tuple[Card, ...]) -> tuple[Gpu, ...]:
    """What a card's name says of it."""
    return tuple(Gpu(n, "", one.name, one.limit, one.limit, capability_of(one.name)) for n, one in enumerate(cards[:1]))


def _verdict(found: plansearch.Found, fitting: list[Row], sharing: str, *, ranks: int, seen: int) -> Iterator[str]:
    """What the chosen plan takes of the host; or why none was chosen, and what would do. `fitting`: on the card.
    `sharing`: the job's strategy; `seen`: devices for its ranks."""
    if 0 < seen < ranks:
        yield f"{ranks - seen} of the {ranks} ranks have no device (LA105): `fix` starts {seen}, and plans for them."
    if found.chosen is not None:
        if found.chosen.host is not None and found.chosen is not found.own:
            whose = "the first rank" if ranks > 1 else "the rank"
            yield f"The plan takes {found.chosen.host / GIB:.1f} GiB of the host's memory for {whose}."
        return
    if not fitting:
        more = "more of them" if sharing in ("fsdp", "zero3") else "several under FSDP2 or ZeRO-3"
        yield f"Nothing fits this card: use a larger one, or {more}."
    if any(not row.lacks for row in fitting):
        yield "Nothing that fits may be taken: name what may be lost in the training file's allow."
    least = min((row.lacks for row in fitting if row.lacks and row.allowed), default=0)
    if least:
        fewer = ", start fewer ranks" if ranks > 1 else ""
        yield (
            f"What fits the card and may be taken lacks {least / GIB:.1f} GiB of the host's memory: give the container "
            f"more{fewer}, or use a larger card."
        )


def faster_attention(case: Case, cards: tuple[Gpu, ...]) -> str:
    """Advice where the step could be faster on these cards by a package that is not installed; empty where not."""
    train = case.job.train
    if train is None or not fused(case) or train.attention != "auto" or train.deterministic or case.job.use_cpu:
        return ""
    if case.facts.packages is None or steptime.FLASH_4 in case.facts.packages or not cards:
        return ""
    if any(gpu.capability[0] != _HOPPER for gpu in cards):
        return ""
    how = f"with it (pip install {steptime.FLASH_4}) a step takes 25 to 30 % less time"
    return f"{steptime.FLASH_4} is not installed: {how} on {cards[0].name}"


def _page(
    file: str,
    document: dict[str, Any],
    about: str,
    cards: tuple[Card, ...],
    chosen: Row | None,
    bill: memory.Bill | None,
) -> None:
    planhtml = importlib.import_module("xflux_doctor.report.planhtml")  # for those alone who want a page
    reasons = planhtml.reasons_of(bill) if bill is not None else None
    write_atomic(Path(file), planhtml.page(document, summary=about, cards=cards, chosen=chosen, reasons=reasons))


def _xflux(case: Case, found: XFlux, gpu: str | None, form: str, html: str | None) -> int:
    """What X-Flux's own script needs, as it is and under DeepSpeed; there are no other settings to choose from."""
    if found.config is None:
        raise DoctorError(f"{found.problem or 'No config was given'}.", "Give --config FILE.", code=2)
    cards = _cards(case, gpu)
    launches = {"as it is": None, "under DeepSpeed in bf16": True}
    if not xflux_bill.fp32_base(case, found):
        del launches["under DeepSpeed in bf16"]
    rows = []
    for label, engine in launches.items():
        try:
            terms = xflux_bill.gpu_terms(case, found, deepspeed=engine)
        except SkipCheck as skip:
            raise DoctorError(f"There is no bill: {skip}.", "Plan the bundled trainer's job without --xflux.") from skip
        changes: dict[str, Any] = {} if engine is None else {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16"}
        rows.append(Row(label, changes, {term.name: term.bytes for term in terms}, xflux_bill.CONTEXT))
    fits = not cards or any(row.verdict(cards) != "does not fit" for row in rows)
    chosen = planjson.first(rows, cards)
    document = planjson.xflux_document(case, found, cards, rows)
    if html:
        _page(html, document, str(found.script.path), cards, chosen, None)
    if form == "json":
        click.echo(planjson.encode(document), nl=False)
        return 0 if fits else 1
    commit = f" at {found.commit[:7]}" if found.commit else ""
    click.echo(f"{found.script.path}{commit} ({found.script.because}):")
    for name, size in rows[0].terms.items():
        click.echo(f"  GPU {size / GIB:9.3f} GiB  {name}")
    peak = rows[0].allocated
    click.echo(f"  GPU {(reserved(peak) - peak) / GIB:9.3f} GiB  kept in reserve by PyTorch's allocator")
    click.echo(f"  GPU {xflux_bill.CONTEXT / GIB:9.3f} GiB  CUDA context")
    ranks = case.job.local_processes
    click.echo(f"  host{xflux_bill.host_bytes(found) * ranks / GIB:9.3f} GiB  while loading, {ranks} x one whole copy")
    click.echo(f"  disk{xflux_bill.checkpoint_bytes(case, found) / GIB:9.3f} GiB  each checkpoint")
    _alternatives(rows, cards, chosen)
    return 0 if fits else 1


def _cards(case: Case, gpu: str | None) -> tuple[Card, ...]:
    """The card of each rank of this machine, within --gpu-limit: the one named, else the visible ones."""
    if case.job.use_cpu:
        return ()
    limit, ranks = case.job.gpu_limit, case.job.local_processes
    if gpu is not None:
        match = re.fullmatch(r"(.+):(\d+(?:\.\d+)?)", gpu)
        size = int(float(match[2]) * GIB) if match else 0
        if match is None or not size:
            raise UsageError(f"--gpu is {gpu!r}.", "Write NAME:GIB, such as A100:80.")
        return (Card(match[1], size, min(size, limit or size)),) * ranks
    return planner.of_case(case)


def _print(bill: memory.Bill) -> None:
    for title, terms in (("GPU", bill.gpu), ("host", bill.host), ("disk", bill.disk)):
        if not terms:
            continue
        whose = {"GPU": " per rank", "host": " of the first rank" if bill.world_size > 1 else " per rank"}
        click.echo(f"{title}{whose.get(title, '')}:")
        for term in sorted(terms, key=lambda t: (memory.PHASES.index(t.phase), -t.bytes)):
            click.echo(f"  {term.phase:<7}{term.bytes / GIB:9.3f} GiB  {term.name}: {term.why}")
    if bill.gpu:
        held = reserved(bill.gpu_allocated, bill.gpu_holes)
        click.echo(
            f"peak: {bill.gpu_allocated / GIB:.1f} GiB allocated {_WHILE[bill.peak_phase]}, {held / GIB:.1f} GiB "
            f"reserved, {(held + bill.gpu_context) / GIB:.1f} GiB with the CUDA context (±{bill.error_bar:.0%})"
        )


def _duration(case: Case, config: TrainConfig, name: str) -> None:
    """A line on the time, where it is known."""
    job = case.job
    if not name or job.use_cpu or job.offloads or job.num_machines > 1:
        return
    asked = dataclasses.replace(config, gradient_accumulation_steps=accumulation(job))
    step = steptime.step_time(case, asked, spec_of(case), name)
    if step is None:
        return
    images = 0 if config.repeats else dataset(case).count  # how many repeats there are only a walk by folders says
    total = timing.hours(asked, step, world_size=max(1, case.job.num_processes), images=images)
    ending = "" if total is None else f", {total:.1f} hours in all"
    click.echo(f"about {step.seconds:.2f} s a step{ending} (± {step.error:.0%}) on {name}")


def _strategies(case: Case, cards: tuple[Card, ...]) -> None:
    """What sharding would change: for a LoRA next to nothing by ZeRO 1 and 2, which people learn after hours of it."""
    ranks = case.job.num_processes
    if ranks <= 1 or case.job.use_cpu:
        return
    click.echo(f"how {ranks} ranks share the work, while training, per GPU:")
    choice = strategy.best(case, ranks, min((card.limit for card in cards), default=None))
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


def _alternatives(rows: list[Row], cards: tuple[Card, ...], chosen: Row | None) -> None:
    bars: Any = importlib.import_module("xflux_doctor.report.bars")
    click.echo()
    width = importlib.import_module("shutil").get_terminal_size().columns
    for line in bars.lines(rows, cards, chosen, width=width, encoding=sys.stdout.encoding):
        click.echo(line)
