"""XF: the checkpoints in output_dir, which X-Flux's scripts resume by default (--xflux)."""

from __future__ import annotations

import os
from collections.abc import Iterator

from xflux_doctor import xflux_bill
from xflux_doctor.check import Case, check
from xflux_doctor.checks.xflux import REPOSITORY
from xflux_doctor.finding import Change, Edit, Finding, error, warning
from xflux_doctor.xflux import Checkpoint, XFlux


@check("XF120", "what X-Flux would resume from can be resumed")
def resumes(case: Case) -> Iterator[Finding]:
    """`latest` is the shipped value: the script loads the highest checkpoint-N of output_dir, whole or not."""
    found = xflux_bill.of(case)
    unnumbered = [c.name for c in found.checkpoints if c.step is None]
    if unnumbered:
        yield error(
            f"{found.output} holds {', '.join(unnumbered[:3])}.",
            "The script sorts all names that begin with 'checkpoint' by int(name.split('-')[1]): IndexError or "
            "ValueError at the resume, or at the first save.",
            "Rename it so that it does not begin with 'checkpoint'.",
            commands=tuple(f"mv {found.output}/{name} {found.output}/kept-{name}" for name in unnumbered[:3]),
        )
    numbered = tuple(c for c in found.checkpoints if c.step is not None)
    asked = found.get("resume_from_checkpoint")
    if not asked:
        yield from _own_deleted(found, numbered)
    elif asked == "latest":
        if numbered and not unnumbered:
            yield from _judge(case, found, numbered[-1], numbered)
    else:
        yield from _named(case, found, str(asked), numbered)


def _named(case: Case, found: XFlux, asked: str, numbered: tuple[Checkpoint, ...]) -> Iterator[Finding]:
    name = os.path.basename(asked)  # noqa: PTH119 - what the script does: empty for a path that ends in a slash
    target = next((c for c in numbered if c.name == name), None)
    if target is not None:
        yield from _judge(case, found, target, numbered)
        return
    meant = os.path.basename(asked.rstrip("/"))  # noqa: PTH119
    edits: tuple[Change, ...] = ()
    if any(c.name == meant for c in numbered):
        edits = (Edit("train", ("resume_from_checkpoint",), meant, "a checkpoint of output_dir, by its name"),)
    names = ", ".join(c.name for c in numbered[-3:]) or "none"
    yield error(
        f"resume_from_checkpoint is {asked!r}; the script looks for {name!r} in {found.output}, which has: {names}.",
        "It takes the last part of the path only, and stops there: no such folder, or no number in its name.",
        "Name a checkpoint of output_dir without a slash at its end, write latest, or null to start afresh.",
        edits=edits,
    )


def _judge(case: Case, found: XFlux, target: Checkpoint, numbered: tuple[Checkpoint, ...]) -> Iterator[Finding]:
    fault = _fault(case, found, target)
    last = found.get("max_train_steps")
    if fault:
        whole = next((c for c in reversed(numbered) if not _fault(case, found, c)), None)
        hint, edits = "Choose another output_dir, or move this folder away and start afresh.", tuple[Change, ...]()
        if whole is not None:
            hint = f"Resume from {whole.name}, the newest that is whole."
            edits = (Edit("train", ("resume_from_checkpoint",), whole.name, "the newest that can be resumed"),)
        elif found.script.resumes_partition:
            hint += " To go on from its weights, save dit.bin's tensors without 'module.' as .safetensors and name "
            hint += "that file in FLUX_DEV."
        asked = found.get("resume_from_checkpoint")
        yield error(
            f"resume_from_checkpoint is {asked} and {found.output} holds {target.name}: {fault[0]}.",
            f"{fault[1]}, after the model was loaded.",
            hint,
            edits=edits,
            docs=f"{REPOSITORY}/blob/main/{found.script.path.name}",
        )
    elif isinstance(last, int) and (target.step or 0) >= last:
        yield warning(
            f"{target.name} in {found.output} has reached max_train_steps ({last}), and {found.script.path.name} would "
            "resume from it.",
            "There is nothing left to train.",
            "Raise max_train_steps, or choose another output_dir for a new run.",
        )


def _fault(case: Case, found: XFlux, target: Checkpoint) -> tuple[str, str] | None:
    """(what is wrong with the folder, how the script ends); None for one that can be resumed."""
    if found.script.resumes_partition:
        for name in ("dit.bin", "optimizer.bin"):
            if not target.files.get(name):
                return f"it has no {name}", "FileNotFoundError or EOFError"
        if case.job.deepspeed:
            return (
                "its optimizer.bin is rank 0's part of a ZeRO optimizer",
                "'ValueError: loaded state dict contains a parameter group that doesn't match the size of optimizer's "
                "group'",
            )
        return "its optimizer.bin is no ZeRO optimizer's", "\"KeyError: 'base_optimizer_state'\", or missing keys"
    if not case.job.deepspeed:
        if target.zero_ranks:
            return "it was saved under DeepSpeed, and the job launches without", "FileNotFoundError"
        weights = any(target.files.get(name) for name in ("model.safetensors", "pytorch_model.bin"))
        if not weights or not target.files.get("optimizer.bin"):
            return "it lacks the model or the optimizer", "FileNotFoundError"
        return None
    if not any(name.endswith("mp_rank_00_model_states.pt") and size for name, size in target.files.items()):
        return (
            "it has no pytorch_model/mp_rank_00_model_states.pt with bytes in it",
            "DeepSpeed stops in load_checkpoint",
        )
    if target.zero_ranks != case.job.num_processes:
        return (
            f"it was saved by {target.zero_ranks} ranks, and the job starts {case.job.num_processes}",
            f"'The checkpoint being loaded used a DP world size of {target.zero_ranks} but the current world size is "
            f"{case.job.num_processes}'",
        )
    return None


def _own_deleted(found: XFlux, numbered: tuple[Checkpoint, ...]) -> Iterator[Finding]:
    """A fresh start beside an older run's checkpoints: the lowest numbers go first, which are the new ones."""
    limit, every = found.get("checkpoints_total_limit"), found.get("checkpointing_steps")
    if not numbered or not isinstance(limit, int) or not isinstance(every, int) or len(numbered) < limit:
        return
    if (numbered[-1].step or 0) > every:
        yield warning(
            f"The run starts afresh in {found.output}, which holds {len(numbered)} checkpoints up to "
            f"{numbered[-1].name}; checkpoints_total_limit is {limit}.",
            "The script deletes the lowest numbers first: soon the new run's own, while the old run's stay.",
            "Choose another output_dir.",
        )
