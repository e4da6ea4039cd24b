"""From findings to a plan: the edits that mend the job, what blocks it still, and the memory bill.

The edits are laid over the job's values and everything is looked at again, because a repair can bring a fault
of its own; nothing is written here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from xflux_trainer.memory import Bill

from xflux_doctor.bill import need
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.finding import Change, Edit, Finding, Nest, Remove, Rename, Verdict
from xflux_doctor.job import Job

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


def make(case: Case, examine: Examine) -> Plan:
    """Lay edits and look again until nothing asks for another."""
    edits: list[Change] = []
    verdicts = examine(case)
    for _ in range(_ROUNDS):
        new = [edit for edit in _edits(verdicts) if edit not in edits]
        if not new:
            break
        edits += new
        case = dataclasses.replace(case, job=lay(case.job, new))
        verdicts = examine(case)
    blockers = tuple(f for v in verdicts for f in v.findings if f.severity == "error")
    return Plan(tuple(_last_of_each(edits)), blockers, case.job, verdicts, _bill(case))


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


def _last_of_each(edits: list[Change]) -> list[Change]:
    """Two rounds may set one key twice: the later value is the one to write."""
    kept: dict[tuple[str, tuple[str, ...]], Change] = {}
    for edit in edits:
        kept[(edit.file, edit.key)] = edit
    return list(kept.values())


def lay(job: Job, edits: list[Change]) -> Job:
    """The job as it would read with the edits made. The files are not touched."""
    mapping = copy.deepcopy(job.accelerate)
    train = job.train
    own = copy.deepcopy(dict(job.xflux.config)) if job.xflux and job.xflux.config is not None else None
    for edit in edits:
        if edit.file == "accelerate" and mapping is not None:
            _lay_mapping(mapping, edit)
        elif edit.file == "train" and train is not None and isinstance(edit, Edit):
            train = dataclasses.replace(train, **{edit.key[-1]: edit.value})
        elif edit.file == "train" and own is not None:
            _lay_mapping(own, edit)
    checkout = dataclasses.replace(job.xflux, config=own) if job.xflux else None
    return dataclasses.replace(job, accelerate=mapping, train=train, xflux=checkout)


def _lay_mapping(mapping: dict[str, object], edit: Change) -> None:
    if isinstance(edit, Nest):
        mapping[edit.key[0]] = {member: mapping.pop(member) for member in edit.members if member in mapping}
        return
    *parents, last = edit.key
    for name in parents:
        inner = mapping.setdefault(name, {})
        if not isinstance(inner, dict):
            return
        mapping = inner
    if isinstance(edit, Edit):
        mapping[last] = edit.value
    elif isinstance(edit, Remove):
        mapping.pop(last, None)
    elif isinstance(edit, Rename) and last in mapping:
        mapping[edit.new] = mapping.pop(last)
