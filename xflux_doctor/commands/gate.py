"""The probes of `run`: the default level once for each job, the deep level once for each machine, both remembered.

A variable is added to the launch only where the deep level proved that the ranks' reduction fails without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from xflux_doctor import remember
from xflux_doctor.check import Case, examine
from xflux_doctor.checks import ALL
from xflux_doctor.checks.network import proven
from xflux_doctor.commands.together import Self
from xflux_doctor.deep import ask_of
from xflux_doctor.facts import Facts
from xflux_doctor.inputs import Inputs
from xflux_doctor.probes.level import probe
from xflux_doctor.probes.retry import cost
from xflux_doctor.visible import selected

Say = Callable[[str], None]


def probed(case: Case, inputs: Inputs, me: Self, say: Say) -> Case:
    """The case with what the probes find, or found when they passed on exactly this machine and stack before."""
    if inputs.quick or inputs.facts:
        return case
    if me.rank_task is not None:  # N ranks would each start N children for the same answer
        why = f"not probed: this process is rank {me.number} of {me.count} ({me.rank_task.source})"
        return _with(case, msgspec.structs.replace(case.facts, unknown={"allreduce": why, **case.facts.unknown}))
    job, machine = remember.key(case), remember.machine_key(case)
    known = remember.recall(case.facts, job)
    looked = remember.recall(case.facts, machine) if _has_cards(case) else case.facts
    if known is not None and looked is not None:
        return _with(case, known)
    if looked is None and not _errors(case, case.facts):  # what stops the job anyhow need not be waited for
        say(
            f"first start on this machine: the deep check, up to {inputs.deep_timeout:.0f} s; remembered afterwards "
            "(--quick skips it)"
        )
        found = probe(case.facts, case.job, os.environ, inputs.deep_timeout, ask_of(case))
        _keep(case, found, job, machine)
        return _with_proven(case, found)
    found = probe(looked or case.facts, case.job, os.environ, inputs.timeout)
    _keep(case, found, job)
    if case.job.use_cpu and found.allreduce is not None and not found.allreduce.ok:
        say(f"the all-reduce failed: trying what may help, up to {inputs.deep_timeout:.0f} s")
        found = probe(case.facts, case.job, os.environ, inputs.deep_timeout, ask_of(case))
    return _with_proven(case, found)


def added(case: Case) -> dict[str, str]:
    """The variables that the launch is given because a probe proved them needed, each with its price."""
    result = case.facts.allreduce
    return {} if result is None else {name: cost(f"{name}={value}") for name, value in proven(result).items()}


def _has_cards(case: Case) -> bool:
    """Ranks on the CPU have nothing to prove that the default level does not show."""
    return not case.job.use_cpu and bool(selected(case.facts.gpus or (), case.facts.environment, case.job.gpu_ids))


def _with(case: Case, facts: Facts) -> Case:
    return msgspec.structs.replace(case, facts=facts)


def _with_proven(case: Case, found: Facts) -> Case:
    """The ranks will have the variables that helped: the facts are of the launch as it will be."""
    more = proven(found.allreduce) if found.allreduce is not None else {}
    return _with(case, msgspec.structs.replace(found, environment={**found.environment, **more}) if more else found)


def _keep(case: Case, found: Facts, *names: str) -> None:
    """Remember what passed: torch came up, its ranks reduced, and no check of what was probed finds an error."""
    if found.torch is None or found.allreduce is None or not found.allreduce.ok or _errors(case, found, new=True):
        return
    for name in names:
        remember.remember(case.facts, found, name)


def _errors(case: Case, facts: Facts, *, new: bool = False) -> bool:
    """Whether a check finds what stops the job; `new`: only of those that need what these facts have beyond the case's,
    whatever the user accepts."""
    if new:
        before, after = msgspec.structs.asdict(case.facts), msgspec.structs.asdict(facts)
        fields = {name for name in after if after[name] != before[name]}
        checks = [check for check in ALL if fields & {*check.needs}]
        case = msgspec.structs.replace(case, accepted=frozenset())
    else:
        checks = list(ALL)
    return any(verdict.status in ("error", "crashed") for verdict in examine(_with(case, facts), checks))
