"""The planner's plan for a job that fits as it is: faster settings that compute the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import msgspec
from xflux_trainer import config as train_config

from xflux_doctor import planner
from xflux_doctor.bill import need
from xflux_doctor.check import Case
from xflux_doctor.finding import Change
from xflux_doctor.job import Job
from xflux_doctor.plan import Plan, lay

TAKE = "PLAN"
"""What `fix --take` calls it."""


@dataclass(frozen=True)
class Faster:
    """The edits that make the plan, and the plan in words."""

    edits: tuple[Change, ...]
    words: str


def faster(case: Case, plan: Plan) -> Faster | None:
    """The fastest settings that fit and change no number that is computed, where the training file does not say
    otherwise; None where the mended job cannot start, or is as fast as it can be."""
    mended = msgspec.structs.replace(case, job=plan.job)
    found = None if plan.blockers else planner.known(mended)
    row = planner.quicker(found, _written(plan.job)) if found is not None else None
    if found is None or row is None:
        return None
    quicker = f"{1 - row.order / found.own.order:.0%} less time a step by the times of an H100"
    if row.seconds is not None and found.own.seconds is not None:
        quicker = f"{row.seconds:.3f} s a step instead of {found.own.seconds:.3f}"
    words = f"{row.label}: {quicker}, and it computes the same"
    return Faster(planner.plan_edits(mended, row), words)


def laid(case: Case, plan: Plan, edits: tuple[Change, ...]) -> Plan:
    """The plan with more edits, and the bill of the job that they make."""
    job = lay(plan.job, list(edits))
    bill = need(msgspec.structs.replace(case, job=job))
    return dataclasses.replace(plan, edits=(*plan.edits, *edits), job=job, bill=bill)


def _written(job: Job) -> frozenset[str]:
    try:
        return train_config.written_keys(job.train_path) if job.train_path is not None else frozenset()
    except train_config.ConfigError:  # a file that could not be read has no config either
        return frozenset()
