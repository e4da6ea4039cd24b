"""LA: how the ranks share the work, against what the bundled trainer does and what its settings allow."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_doctor import batch
from xflux_doctor.accelerate_keys import DISTRIBUTED_TYPES
from xflux_doctor.check import Case, check
from xflux_doctor.checks.words import installed
from xflux_doctor.finding import Change, Edit, Finding, error
from xflux_doctor.refused import BEFORE, FSDP2, FULLY_SHARD, refusals

_ALONE = ("dp_replicate_size", "tp_size", "cp_size", "sp_size")
"""Sizes of a parallelism_config that must be 1 here (trainer/ranks.py)."""


@check("LA111", "the trainer does the job's strategy", needs=("train", "trainer", "accelerate"))
def strategy_done(case: Case) -> Iterator[Finding]:
    """One process, DDP, DeepSpeed ZeRO 1, 2 and 3, and FSDP's second version are what the bundled trainer does."""
    job, kind = case.job, case.job.distributed_type
    if kind == "DEEPSPEED" and job.zero_stage not in (1, 2, 3):
        file, key = ("accelerate", ("deepspeed_config", "zero_stage"))
        if job.zero_file is not None:
            file, key = ("deepspeed", ("zero_optimization", "stage"))
        yield error(
            f"{'.'.join(key)} is {job.zero_stage}; the bundled trainer does ZeRO 1, 2 and 3.",
            f"{BEFORE} 2 is accelerate's own default; 3 costs time, for models that do not fit on one device.",
            f"Set {key[-1]} to 2.",
            edits=(Edit(file, key, 2, "the trainer does ZeRO 1, 2 and 3"),),
        )
    elif kind == "FSDP":
        yield from _fsdp(case)
    elif kind in DISTRIBUTED_TYPES and kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED"):
        yield error(
            f"distributed_type is {kind}; the bundled trainer does NO, MULTI_GPU, DEEPSPEED and FSDP.",
            BEFORE,
            f"Set distributed_type to {_plain(case)}.",
            offers=_to_plain(case, "DDP trains the same"),
        )


def _plain(case: Case) -> str:
    return "MULTI_GPU" if case.job.num_processes > 1 else "NO"


def _to_plain(case: Case, reason: str) -> tuple[Change, ...]:
    return (Edit("accelerate", ("distributed_type",), _plain(case), reason),)


def _fsdp(case: Case) -> Iterator[Finding]:
    """FSDP's first version, and sizes that only accelerate's own loop would honour (trainer/ranks.py, fsdp.py)."""
    accelerate, torch = installed(case, "accelerate"), installed(case, "torch")
    if torch is not None and torch < FULLY_SHARD:
        yield error(
            f"distributed_type is FSDP, and torch is {torch}.",
            f"The bundled trainer stops: 'torch {torch} has no FSDP2 that leaves adapters whole.'",
            f"Install a newer stack of the matrix, or set distributed_type to {_plain(case)} or DEEPSPEED.",
            offers=_to_plain(case, "this torch has no FSDP2"),
        )
        return
    key, version = next(((key, value) for flag, (key, value) in case.job.fsdp.items() if flag == "fsdp_version"),
                        ("fsdp_version", None))  # fmt: skip
    knows = accelerate is None or accelerate >= FSDP2
    if case.job.fsdp_version != 2 or not knows:
        seen = f"fsdp_config.{key} is {version!r}" if version is not None else "fsdp_config has no fsdp_version"
        seen += "" if knows else f", and accelerate {accelerate} knows only the first"
        other = Edit("accelerate", ("fsdp_config", key), 2, "the version that the trainer does")
        yield error(
            f"{seen}.",
            f"{BEFORE} 'The accelerate config asks for the first version of FSDP, which this trainer does not do.'",
            "Set fsdp_version: 2 in fsdp_config."
            if knows
            else f"Install accelerate 1.6 or newer, or set distributed_type to {_plain(case)}.",
            offers=(other,) if knows else _to_plain(case, f"accelerate {accelerate} has no FSDP2"),
        )
        return
    section = {str(key).removeprefix("parallelism_config_"): value
               for key, value in case.job.section("parallelism_config").items()}  # fmt: skip
    odd = [f"{name} {section[name]}" for name in _ALONE if str(section.get(name, 1)) not in ("1", "0", "", "None")]
    if odd:
        yield error(
            f"parallelism_config has {', '.join(odd)}.",
            f"{BEFORE} 'The accelerate config asks for a parallelism_config with {', '.join(odd)}, which this "
            "trainer does not do.'",
            "Take parallelism_config out.",
        )


@check("LA116", "the training file's settings go with how the ranks share the work", needs=("train", "trainer"))
def goes_together(case: Case) -> Iterator[Finding]:
    """What the trainer refuses under ZeRO and FSDP, and where each weight is stepped in the backward pass.

    Source: trainer/sharded.py, quantize.py and optim.py, whose sentences these are; a test compares the two by value.
    """
    assert case.job.train is not None
    steps = batch.accumulation(case.job)
    told = case.facts.environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if not case.job.deepspeed and told.isdigit() and int(told) > 0:  # the ranks read the variable, whoever set it
        steps = int(told)
    plain = _to_plain(case, "each device then holds the whole model") if case.job.accelerate is not None else ()
    yield from refusals(case.job.train, case.job.strategy, steps, plain)
