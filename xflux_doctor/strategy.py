"""How the ranks should share the work: the fastest way that fits, with its reason in bytes.

For a LoRA, DDP sends one gradient of the adapters a step and shards nothing. ZeRO 1 and 2 shard the optimizer's states,
which for a LoRA are a few hundred MiB beside 22 GiB of frozen weights that every rank holds whole under either. Source:
NVIDIA NeMo AutoModel's Flux LoRA recipe (DDP), SimpleTuner's documentation/FSDP2.md (DDP 3 to 6 times as fast for small
batches). A fine-tune of the whole model is another matter: its AdamW takes 12 to 16 bytes for each of 11.9 billion
parameters, 140 GiB and more that DDP keeps on every GPU. FSDP2 and ZeRO-3 cut up the weights as well, for a gather of
every block in each pass: they are for what does not fit otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import msgspec
from xflux_trainer import memory
from xflux_trainer.rules import between

from xflux_doctor.batch import accumulation
from xflux_doctor.bill import need
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.finding import Edit
from xflux_doctor.job import Job
from xflux_doctor.refused import has_fsdp2, refusals

MIB, GIB = 1 << 20, 1 << 30
NAMES = {"single": "one process", "ddp": "DDP", "zero1": "DeepSpeed ZeRO-1", "zero2": "DeepSpeed ZeRO-2",
         "fsdp": "FSDP2", "zero3": "DeepSpeed ZeRO-3"}  # fmt: skip
_KINDS = {"single": "NO", "ddp": "MULTI_GPU", "fsdp": "FSDP"}
_FASTEST_FIRST = ("ddp", "zero2", "fsdp", "zero3")


class Choice(msgspec.Struct, frozen=True):
    """A strategy (job.Job.strategy) and why."""

    strategy: str
    because: str


def best(case: Case, ranks: int, room: int | None = None) -> Choice:
    """For so many ranks; without a training file for any LoRA. `room`: bytes of each card, else those of this machine's
    smallest."""
    if case.job.xflux is not None:
        return Choice("zero2", "without DeepSpeed X-Flux's script keeps the frozen model in fp32")
    if ranks <= 1:
        return Choice("single", "one process needs no process group")
    found = {name: known for name in _FASTEST_FIRST if (known := bill(case, name, ranks)) is not None}
    if "ddp" not in found:
        return Choice("ddp", "for a LoRA the ranks share nothing but the adapters' gradients")
    if room is None:
        room = min((gpu.memory_total for gpu in case.facts.gpus or ()), default=None)
    if room is not None and not _fits(found["ddp"], room):
        choice = _sharded(case, {name: known for name, known in found.items() if done(case, name)}, room)
        if choice is not None:
            return choice
    if "zero2" not in found:
        return Choice("ddp", "it exchanges what is trained and nothing else")
    saved = stepping(found["ddp"]) - stepping(found["zero2"])
    change = f"save {saved / MIB:.0f} MiB" if saved >= MIB else "save nothing"
    whole = f"{stepping(found['ddp']) / GIB:.1f} GiB a GPU"
    return Choice("ddp", f"ZeRO-2 would {change} of {whole}, and add its own collectives")


def _sharded(case: Case, found: dict[str, memory.Bill], room: int) -> Choice | None:
    """The fastest of those that fit; where none does, what needs least, unless that is of no use for a LoRA."""
    assert case.job.train is not None
    needs = {name: f"{NAMES[name]} needs {stepping(known) / GIB:.1f} GiB" for name, known in found.items()}
    of = f"of {room / GIB:.0f}"
    fitting = next((name for name in _FASTEST_FIRST if name in found and _fits(found[name], room)), None)
    if fitting is not None:
        slower = [needs[name] for name in _FASTEST_FIRST[: _FASTEST_FIRST.index(fitting)] if name in needs]
        return Choice(fitting, f"{' and '.join(slower)} {of}") if slower else None
    if case.job.train.mode == "lora" or not found:
        return None
    least = min(found, key=lambda name: stepping(found[name]))
    return Choice(least, f"nothing fits: even {needs[least]} {of} GiB")


def _fits(found: memory.Bill, room: int) -> bool:
    return stepping(found) <= room - int(found.gpu_context)


def done(case: Case, strategy: str) -> bool:
    """Whether the bundled trainer does this job so with the packages that are installed."""
    assert case.job.train is not None
    if strategy == "fsdp" and not has_fsdp2(case.facts):
        return False
    if strategy.startswith("zero") and case.facts.packages is not None and "deepspeed" not in case.facts.packages:
        return False
    return not any(refusals(case.job.train, strategy, 1))


def stepping(found: memory.Bill) -> int:
    """Bytes on a GPU while it trains: before and after, the strategies are alike."""
    return int(found.gpu_phases.get("train", 0))


def bill(case: Case, strategy: str, ranks: int) -> memory.Bill | None:
    """The bill of the same job under another strategy; None where nothing of it can be said."""
    if case.job.train is None:
        return None
    try:
        return need(msgspec.structs.replace(case, job=under(case.job, strategy, ranks)))
    except (SkipCheck, OSError):
        return None


def others(case: Case) -> Iterator[tuple[str, Case, tuple[Edit, ...]]]:
    """DDP and FSDP2, of one rank a process by itself, where the file has another strategy: its name, the case under it,
    and the edits that make it so.

    Only for a job whose launch is one file of accelerate's; the samples of a step and the clipping stay as they are.
    """
    job, ranks = case.job, case.job.num_processes
    if job.accelerate is None or job.command is not None or job.zero_file is not None:
        return
    for name in ("ddp", "fsdp") if ranks > 1 else ("single",):
        if name == job.strategy or not done(case, name):
            continue
        why = f"{NAMES[name]}: what {NAMES.get(job.strategy, job.strategy)} needs does not fit"
        edits = [Edit("accelerate", ("distributed_type",), _KINDS[name], why)]
        if name == "fsdp" and job.fsdp_version != 2:
            edits.append(Edit("accelerate", ("fsdp_config", "fsdp_version"), 2, "the version that the trainer does"))
        edits += [Edit("train", (key,), value, "as under DeepSpeed") for key, value in _of_deepspeed(job).items()]
        laid = under(job, name, ranks)
        train = {edit.key[0]: edit.value for edit in edits if edit.file == "train"}
        if train and laid.train is not None:
            laid = msgspec.structs.replace(laid, train=dataclasses.replace(laid.train, **train))
        if laid.train is None or not between(laid.train):
            yield name, msgspec.structs.replace(case, job=laid), tuple(edits)


def _of_deepspeed(job: Job) -> dict[str, int | float]:
    """What DeepSpeed's section says in place of the training file, where the two differ."""
    if not job.deepspeed or job.train is None:
        return {}
    said: dict[str, int | float] = {"gradient_accumulation_steps": accumulation(job)}
    clipping = job.section("deepspeed_config").get("gradient_clipping")
    if isinstance(clipping, int | float) and not isinstance(clipping, bool):
        said["max_grad_norm"] = float(clipping)
    return {key: value for key, value in said.items() if getattr(job.train, key) != value}


def under(job: Job, strategy: str, ranks: int) -> Job:
    """The job as another strategy's file would launch it."""
    kind = _KINDS.get(strategy, "DEEPSPEED")
    file = {**(job.accelerate or {}), "distributed_type": kind, "num_processes": ranks}
    if strategy.startswith("zero"):
        file["deepspeed_config"] = {**job.section("deepspeed_config"), "zero_stage": int(strategy[-1])}
    elif strategy == "fsdp":
        file["fsdp_config"] = {**job.section("fsdp_config"), "fsdp_version": 2}
    return msgspec.structs.replace(job, accelerate=file, overrides={}, zero_file=None)
