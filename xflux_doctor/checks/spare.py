"""What the checks of single cards share: which cards the job uses, and the plan without a bad one."""

from __future__ import annotations

from collections.abc import Collection

from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.checks.words import devices
from xflux_doctor.facts import Gpu
from xflux_doctor.finding import Change, Edit
from xflux_doctor.visible import cards, choice


def used(case: Case) -> tuple[Gpu, ...]:
    """The devices that ranks of this job get: rank i takes device i. Raises SkipCheck for a CPU job."""
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    return (devices(case) or ())[: case.job.local_processes]


def chosen(case: Case) -> str | None:
    """The value that chooses among the cards, from accelerate's file or the environment; None: none does."""
    return choice(case.facts.environment, case.job.gpu_ids)


def without(case: Case, bad: Collection[int], reason: str) -> tuple[tuple[Change, ...], tuple[str, ...], str]:
    """(edits, commands, sentence): the same job on the other cards; all empty where there is none.

    `bad` are indices of GPUs. One machine's accelerate file is edited; else the command chooses the cards.
    """
    # After a card was lost, CUDA's numbers need not be NVML's: names are safe. DeepSpeed reads only numbers (EN102).
    lost = bool(case.facts.lost_gpus)
    left = [gpu for gpu in cards(case.facts.gpus or (), chosen(case)) if gpu.index not in bad and not gpu.mig]
    kept = left[: case.job.local_processes]
    if not kept:
        return (), (), ""
    names = ",".join(gpu.uuid if lost else str(gpu.index) for gpu in kept)
    count = f"the other card{'s' if len(kept) > 1 else ''} ({', '.join(str(gpu.index) for gpu in kept)})"
    if case.job.accelerate is None or case.job.num_machines > 1:
        return (), (f"export CUDA_VISIBLE_DEVICES={names}",), f"Or train on {count} by CUDA_VISIBLE_DEVICES."
    edits: list[Change] = []
    if not (lost and case.job.deepspeed):
        edits.append(Edit("accelerate", ("gpu_ids",), names, reason))
    if len(kept) < case.job.local_processes:
        edits.append(Edit("accelerate", ("num_processes",), len(kept), "one rank per card that is left"))
        if len(kept) == 1 and case.job.distributed_type == "MULTI_GPU":
            edits.append(Edit("accelerate", ("distributed_type",), "NO", "one process needs no process group"))
    return tuple(edits), (), f"Or train on {count}."
