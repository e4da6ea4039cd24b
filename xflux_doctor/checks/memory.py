"""ME: the memory that this job needs, against what the GPUs and the host have free."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_trainer import memory
from xflux_trainer.memory_terms import narrow

from xflux_doctor import planner
from xflux_doctor.batch import accumulation
from xflux_doctor.bill import forecast_of, fused, multiplies_fp8, need
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.words import devices
from xflux_doctor.facts import Gpu
from xflux_doctor.finding import Edit, Finding, Scalar, error, warning
from xflux_doctor.plans import at_peak
from xflux_doctor.verdict import LAUNCHER, fitting, held_by, host_room

GIB = 1 << 30
_DRIVERS = 1 << 30
"""Bytes that a driver holds of an idle card at the most: 0.4 to 0.6 GiB were seen on H100s and H200s."""
_SHARED_HINT = "End it if it is yours (the doctor never does), or choose another GPU by CUDA_VISIBLE_DEVICES."


@check("ME101", "every visible GPU has the memory that the job needs", needs=("train", "gpus"))
def gpu_memory(case: Case) -> Iterator[Finding]:
    """NVML's free and total memory of each visible GPU against the forecast, naming what holds the rest."""
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    bill = need(case)
    wanted = held_by(bill)
    small: dict[tuple[str, int], list[Gpu]] = {}
    for gpu in (devices(case) or ())[: case.job.local_processes]:
        total = min(_usable(gpu), case.job.gpu_limit or gpu.memory_total)
        free = min(gpu.memory_free, case.job.gpu_limit or gpu.memory_free)
        word = fitting(wanted, free)
        if word == "fits":
            continue
        if fitting(wanted, total) == "does not fit":
            small.setdefault((gpu.name, total), []).append(gpu)
        elif word == "does not fit":
            yield _held(case, gpu, wanted, free)
        else:
            changes, label = _plan(case)
            yield warning(
                f"GPU {gpu.index} has {free / GIB:.1f} GiB free; the job needs about "
                f"{wanted / GIB:.1f} GiB (±{bill.error_bar:.0%}).",
                "It is tight: it may run out of memory.",
                f"{f'The plan that fits: {label}' if changes else _less(case)}, or free the GPU.",
                offers=changes,
            )
    for (_, total), gpus in small.items():
        yield _does_not_fit(case, gpus, bill, total)


def _usable(gpu: Gpu) -> int:
    """Its memory, without what the driver itself holds of a card on which nobody computes."""
    own = gpu.memory_used if not gpu.processes and gpu.memory_used <= _DRIVERS else 0
    return gpu.memory_total - own


def _plan(case: Case) -> tuple[tuple[Edit, ...], str]:
    """What makes the job fit by the planner, and the plan in words; nothing where there is no plan, or where it is the
    job as it is."""
    found = planner.known(case)
    chosen = found.chosen if found else None
    if chosen is None or not chosen.changes:
        return (), ""
    return planner.plan_edits(case, chosen), chosen.label


def _with_less_there(case: Case) -> tuple[tuple[Edit, ...], str]:
    """The plan for which the host has room, where it has none for the job as it is."""
    found = planner.known(case)
    if found is None or not found.own.lacks or found.chosen is None or found.chosen.lacks:
        return (), ""
    return planner.plan_edits(case, found.chosen), found.chosen.label


def _does_not_fit(case: Case, gpus: list[Gpu], bill: memory.Bill, total: int) -> Finding:
    """Equal cards on which the job does not fit."""
    edits, label = _plan(case)
    hint = f"{_less(case)}, or use a larger card.{_crowded(case)}"
    if edits:
        words = ", ".join(f"{edit.key[-1]} to {_word(edit.value)}" for edit in edits)
        hint = f"Take the plan that fits ({label}): set {words}."
    terms = at_peak(bill.gpu, bill.peak_phase).items()
    largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in [*terms][:3])
    by_limit = case.job.gpu_limit is not None and case.job.gpu_limit <= total
    numbers = ", ".join(str(gpu.index) for gpu in gpus)
    who = f"GPU {numbers} ({gpus[0].name}) has" if len(gpus) == 1 else f"GPUs {numbers} ({gpus[0].name}) have"
    return error(
        f"The job needs about {held_by(bill) / GIB:.1f} GiB per GPU; {who} {total / GIB:.1f} GiB"
        f"{' by --gpu-limit' if by_limit else ''}.",
        f"It ends in 'CUDA out of memory'. The largest terms, in GiB: {largest}.",
        hint,
        edits=edits,
    )


def _crowded(case: Case) -> str:
    """A sentence where the host's memory is all that a plan lacks."""
    found = planner.known(case)
    rows = [row for row in found.rows if row.lacks and row.allowed] if found and found.chosen is None else []
    least = min((row.lacks for row in rows if row.verdict(planner.of_case(case)) != "does not fit"), default=0)
    return f" What fits the card lacks {_gib(least)} GiB of the host's memory." if least else ""


def _word(value: Scalar) -> str:
    """As YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _less(case: Case) -> str:
    """What makes this job smaller, the cheapest first, as the beginning of a sentence."""
    train = case.job.train
    assert train is not None
    ways = [] if train.gradient_checkpointing else ["turn gradient_checkpointing on"]
    if train.gradient_checkpointing and train.checkpointed_blocks is not None and fused(case):
        ways.append("raise checkpointed_blocks")
    if train.mode != "finetune" and train.quantization == "none" and case.job.strategy not in ("zero3", "fsdp"):
        dynamic = "fp8-dynamic, " if multiplies_fp8(case, devices(case) or ()) else ""
        ways.append(f"set quantization to {dynamic}int8 or nf4")
    elif train.mode == "finetune" and case.job.strategy == "fsdp":
        ways += ["set weight_update to stochastic"] if train.mixed_precision == "bf16" and not narrow(train) else []
        ways += ["set optimizer to adamw8bit"] if train.optimizer == "adamw" else []
    elif train.mode == "finetune" and train.optimizer == "adamw" and case.job.num_processes == 1:
        alone = case.job.strategy in ("single", "ddp") and accumulation(case.job) == 1
        ways.append(f"set optimizer to adafactor{' and step_in_backward to true' if alone else ''}")
        ways[-1] += "" if case.job.strategy in ("single", "ddp") else " and distributed_type to NO"
    elif train.mode == "finetune" and case.job.strategy != "zero3" and case.job.num_processes > 1:
        ways.append("launch by FSDP2 or ZeRO-3, which cut up the weights too")
    text = ", ".join([*ways, "lower img_size or train_batch_size"])
    return text[0].upper() + text[1:]


def _held(case: Case, gpu: Gpu, wanted: int, free: int) -> Finding:
    used = gpu.memory_used
    named = "; ".join(
        f"process {p.pid} {p.name} of {p.user or 'another user'}"
        + (f" holds {p.used / GIB:.1f} GiB" if p.used else "")
        + (f", {p.seconds / 3600:.1f} h old" if p.seconds else "")
        for p in gpu.processes
    )
    who = named or "no process that can be seen from here: held outside this container"
    changes, label = _plan(case)
    beside = f" Or take the plan that fits beside it: {label}." if changes else ""
    return error(
        f"GPU {gpu.index} has {free / GIB:.1f} of {gpu.memory_total / GIB:.1f} GiB free; the job needs about "
        f"{wanted / GIB:.1f} GiB. {used / GIB:.1f} GiB are in use by {who}.",
        "It would end in 'CUDA out of memory' although the card is large enough.",
        f"{_SHARED_HINT}{beside}",
        offers=changes,
        commands=("nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv",),
    )


@check("ME102", "the host has the memory that the ranks need", needs=("train", "host"))
def host_memory(case: Case) -> Iterator[Finding]:
    """Host memory of all ranks while loading and running, against the container's limit and what is free."""
    assert case.facts.host
    host = case.facts.host
    bill, ranks = need(case), case.job.local_processes
    # As if nothing was encoded: what the cache holds may be of other images.
    bills = (bill, forecast_of(case, case.job.train, encoded=False))
    wanted = max(one.host_together(ranks) for one in bills) + LAUNCHER
    words = f"{ranks} ranks and their launcher need" if ranks > 1 else "1 rank and its launcher need"
    words = f"{words} about {_gib(wanted)} GiB of host memory"
    limit, used = host_room(host)
    by_container = limit == host.memory_limit
    what = f"{'the container' if by_container else 'the host'}'s {'limit' if by_container else 'memory'} is"
    there = f"{what} {_gib(limit)} GiB" + (f", of which {_gib(used)} are in use" if used > LAUNCHER else "")
    if limit and wanted * (1 - bill.host_error_bar) > limit - used:
        make = error if by_container else warning  # MemTotal alone may be small now and grow
        edits, label = _with_less_there(case)
        ways = [f"take the plan that holds less there ({label})"] if edits else []
        ways += ["start fewer ranks"] if ranks > 1 else []
        ways.append(f"give the {'container' if by_container else 'machine'} more memory")
        hint = (", ".join(ways[:-1]) + ", or " if ways[:-1] else "") + f"{ways[-1]}."
        yield make(
            f"{words}; {there}.",
            "The kernel kills ranks without a word: exit code -9.",
            hint[0].upper() + hint[1:],
            edits=edits if by_container else (),
            offers=() if by_container else edits,
        )
    elif by_container and limit and wanted > limit - used:
        yield warning(
            f"{words} (±{bill.host_error_bar:.0%}); {there}.",
            "It is tight: the kernel may kill ranks without a word, exit code -9.",
            "Give the container some more memory.",
        )
    elif host.memory_available and wanted > host.memory_available:
        yield warning(
            f"{words}; {_gib(host.memory_available)} GiB are available now.",
            "Other processes hold the rest.",
            "End what you do not need before the start.",
        )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}".removesuffix(".0")
