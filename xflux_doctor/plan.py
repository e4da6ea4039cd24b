"""From findings to a plan: the edits that mend the job, what blocks it still, and the memory bill.

The edits are laid over the job's values and everything is looked at again, because a repair can bring a fault
of its own; nothing is written here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from xflux_trainer.config import TrainConfig
from xflux_trainer.memory import Bill
from xflux_trainer.rules import between

from xflux_doctor.bill import need
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.finding import Change, Comment, Edit, Finding, Remove, Verdict
from xflux_doctor.job import Job
from xflux_doctor.meaning import Unchanged, after, difference, everywhere
from xflux_doctor.yamlnodes import CannotEdit

Examine = Callable[[Case], tuple[Verdict, ...]]
_ROUNDS = 4
"""A repair may need another; four rounds settle every chain that our checks can make."""


@dataclass(frozen=True)
class Plan:
    """What would be changed, what no edit can mend, and what the mended job needs."""

    edits: tuple[Change, ...]
    blockers: tuple[Finding, ...]
    job: Job
    """The job with the edits laid over it."""
    verdicts: tuple[Verdict, ...]
    """Of the mended job."""
    bill: Bill | None
    conflicts: tuple[Change, ...] = ()
    """Edits that the mended job asks for still, or again: another edit takes them back."""


def make(case: Case, examine: Examine) -> Plan:
    """Lay edits and look again until nothing asks for another."""
    edits: list[Change] = []
    verdicts = examine(case)
    for _ in range(_ROUNDS):
        job, new = _round(case.job, verdicts, edits)
        if not new:
            break
        edits += new
        case = msgspec.structs.replace(case, job=job)
        verdicts = examine(case)
    blockers = tuple(f for v in verdicts for f in v.findings if f.severity == "error")
    again = {edit.key: edit for edit in _edits(verdicts) if _asks(case.job, edit)}
    return Plan(tuple(_last_of_each(edits)), blockers, case.job, verdicts, _bill(case), tuple(again.values()))


def _round(job: Job, verdicts: tuple[Verdict, ...], before: list[Change]) -> tuple[Job, list[Change]]:
    """The job with the edits that are asked for now, and these; a finding's edits together or not at all."""
    new: list[Change] = []
    mine: list[Change]
    for finding in (finding for verdict in verdicts for finding in verdict.findings):
        if any(_same_place(edit, other) for edit in finding.edits for other in new):
            continue  # what they were made for may be gone: the next round says whether they are asked for still
        mended, mine = job, []
        for edit in finding.edits:
            laid = mended if edit in before or edit in new else lay(mended, [edit])
            if changed(mended, laid):  # what says nothing new, or is refused, is no part of the plan: its finding stays
                mended = laid
                mine.append(edit)
        if _unread(mended) <= _unread(job):  # no file is made one that the trainer refuses to read
            job = mended
            new += mine
    return job, new


def _asks(job: Job, edit: Change) -> bool:
    """Whether an edit would change the job still, and into one whose files can be read."""
    laid = lay(job, [edit])
    return changed(job, laid) and _unread(laid) <= _unread(job)


def _unread(job: Job) -> frozenset[str]:
    """The keys whose values the trainer refuses beside each other."""
    return frozenset(problem.key for problem in between(job.train)) if job.train is not None else frozenset()


def _bill(case: Case) -> Bill | None:
    """None without a training file, for a strategy that the forecast does not know, or where nothing can be read."""
    if case.job.train is None:
        return None
    try:
        return need(case)
    except (SkipCheck, OSError):
        return None


def _edits(verdicts: tuple[Verdict, ...]) -> list[Change]:
    return [edit for verdict in verdicts for finding in verdict.findings for edit in finding.edits]


def _same_place(one: Change, other: Change) -> bool:
    """Whether both set one key, and to different values."""
    both = isinstance(one, Edit) and isinstance(other, Edit) and (one.file, one.key) == (other.file, other.key)
    return both and one != other


def _last_of_each(edits: list[Change]) -> list[Change]:
    """Two rounds may set one key twice: the later value is the one to write."""
    kept: dict[tuple[type[Change], str, tuple[str, ...]], Change] = {}
    for edit in edits:
        kept.pop((type(edit), edit.file, edit.key), None)
        kept[(type(edit), edit.file, edit.key)] = edit
    return list(kept.values())


def lay(job: Job, edits: list[Change]) -> Job:
    """The job as it would read with the edits made. The files are not touched."""
    mapping, train, zero = job.accelerate, job.train, job.zero_file
    own = dict(job.xflux.config) if job.xflux and job.xflux.config is not None else None
    for edit in edits:
        if edit.file == "accelerate" and mapping is not None:
            mapping = _laid(mapping, edit)
        elif edit.file == "deepspeed" and zero is not None:
            zero = _laid(zero, edit)
        elif edit.file == "train" and train is not None:
            train = _trained(train, edit)
        elif edit.file == "train" and own is not None:
            for place in everywhere(own, edit, bundled=False):
                own = _laid(own, place)
    checkout = msgspec.structs.replace(job.xflux, config=own) if job.xflux else None
    return msgspec.structs.replace(job, accelerate=mapping, train=train, zero_file=zero, xflux=checkout)


def changed(before: Job, after_: Job) -> bool:
    """Whether the files of the one job say something else than those of the other; 1 is not true."""
    return difference(_values(before), _values(after_)) is not None


def _values(job: Job) -> dict[str, Any]:
    own = dict(job.xflux.config) if job.xflux and job.xflux.config is not None else None
    train = vars(job.train) if job.train is not None else None
    return {"accelerate": job.accelerate, "deepspeed": job.zero_file, "train": train, "xflux": own}


def _laid(mapping: dict[str, Any], edit: Change) -> dict[str, Any]:
    """As the text's own edit would be read; what the text will refuse changes nothing, so that its finding stays."""
    try:
        return dict(after(mapping, edit))
    except (Unchanged, CannotEdit):
        return mapping


def _trained(train: TrainConfig, edit: Change) -> TrainConfig:
    """The bundled trainer's config; a key that goes has its default value."""
    name = edit.key[-1]
    if isinstance(edit, Edit):
        return dataclasses.replace(train, **{name: edit.value})
    default = {field.name: field.default for field in dataclasses.fields(TrainConfig)}.get(name, dataclasses.MISSING)
    if isinstance(edit, Remove | Comment) and default is not dataclasses.MISSING:
        return dataclasses.replace(train, **{name: default})
    return train
