"""How the ranks should share the work: the fastest way that fits, with its reason in bytes.

DDP sends one gradient of the adapters a step and shards nothing. ZeRO shards the optimizer's states, which for a LoRA
are a few hundred MiB beside 22 GiB of frozen weights that every rank holds whole under either. Source: NVIDIA NeMo
AutoModel's Flux LoRA recipe (DDP), SimpleTuner's documentation/FSDP2.md (DDP 3 to 6 times as fast for small batches).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from xflux_trainer import memory

from xflux_doctor.bill import need
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.job import Job

MIB, GIB = 1 << 20, 1 << 30
NAMES = {"single": "one process", "ddp": "DDP", "zero1": "DeepSpeed ZeRO-1", "zero2": "DeepSpeed ZeRO-2"}


@dataclass(frozen=True)
class Choice:
    """A strategy (job.Job.strategy) and why."""

    strategy: str
    because: str


def best(case: Case, ranks: int) -> Choice:
    """For so many ranks; without a training file for any LoRA."""
    if case.job.xflux is not None:
        return Choice("zero2", "without DeepSpeed X-Flux's script keeps the frozen model in fp32")
    if ranks <= 1:
        return Choice("single", "one process needs no process group")
    ddp, zero = bill(case, "ddp", ranks), bill(case, "zero2", ranks)
    if ddp is None or zero is None:
        return Choice("ddp", "for a LoRA the ranks share nothing but the adapters' gradients")
    room = min((gpu.memory_total for gpu in case.facts.gpus or ()), default=None)
    if room is not None and stepping(zero) <= room - zero.gpu_context < stepping(ddp):
        return Choice("zero2", f"DDP needs {stepping(ddp) / GIB:.1f} GiB of {room / GIB:.0f}")
    saved = stepping(ddp) - stepping(zero)
    change = f"save {saved / MIB:.0f} MiB" if saved >= MIB else "save nothing"
    return Choice("ddp", f"ZeRO-2 would {change} of {stepping(ddp) / GIB:.1f} GiB a GPU, and add its own collectives")


def stepping(found: memory.Bill) -> int:
    """Bytes on a GPU while it trains: before and after, the strategies are alike."""
    return int(found.gpu_phases.get("train", 0))


def bill(case: Case, strategy: str, ranks: int) -> memory.Bill | None:
    """The bill of the same job under another strategy; None where nothing of it can be said."""
    if case.job.train is None:
        return None
    try:
        return need(dataclasses.replace(case, job=under(case.job, strategy, ranks)))
    except (SkipCheck, OSError):
        return None


def under(job: Job, strategy: str, ranks: int) -> Job:
    """The job as another strategy's file would launch it."""
    kinds = {"single": "NO", "ddp": "MULTI_GPU"}
    file = {**(job.accelerate or {}), "distributed_type": kinds.get(strategy, "DEEPSPEED"), "num_processes": ranks}
    if strategy.startswith("zero"):
        file["deepspeed_config"] = {**job.section("deepspeed_config"), "zero_stage": int(strategy[-1])}
    return dataclasses.replace(job, accelerate=file, overrides={})
