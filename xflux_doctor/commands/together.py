"""`run` as one of several: who this process is, where it keeps its files, and the meeting before the launch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from xflux_doctor import effective
from xflux_doctor.check import Case
from xflux_doctor.checks.words import devices
from xflux_doctor.cluster import Task, task
from xflux_doctor.facts import Meeting
from xflux_doctor.placement import launcher_of
from xflux_doctor.probes.meeting import Gathering, Place

_PACKAGES = ("torch", "accelerate", "deepspeed", "xflux-doctor")

NO_RETRIES = (
    "The ranks of the others would wait for the one that starts again. Start all machines again with "
    "resume_from_checkpoint: latest; under Slurm a requeued job does so by itself."
)


@dataclass(frozen=True)
class Self:
    """This process among those of the job."""

    task: Task | None
    kind: str
    """`machine`, or `rank` where each process is one."""
    number: int
    count: int

    @property
    def rank_task(self) -> Task | None:
        """The place of a process that is a rank itself and launches none."""
        return self.task if self.task is not None and self.task.a_rank else None

    @property
    def quiet(self) -> bool:
        """One rank speaks for all; a machine speaks for itself."""
        return self.kind == "rank" and self.number > 0

    def folder(self, output: Path) -> Path:
        """Where this one keeps its log and its copies: number 0 in the run folder, the others below it."""
        return output if self.number == 0 else output / f"{self.kind}s" / f"{self.kind}{self.number}"


def who(case: Case) -> Self:
    """Of recorded facts too: they hold the variables."""
    found = task(case.facts.environment)
    if found is not None and found.a_rank:
        return Self(found, "rank", found.rank, found.count)
    return Self(found, "machine", case.job.machine_rank, case.job.num_machines)


def gathering(case: Case, me: Self, seconds: float) -> Gathering | None:
    """The meeting that this launch wants: none for one process, for torchrun's ranks, and where one machine's
    launcher starts the others' ranks by itself (DeepSpeed's pdsh)."""
    host = case.job.get("main_process_ip")
    if me.count < 2 or seconds <= 0 or not isinstance(host, str) or not host:
        return None
    if me.rank_task is not None:
        if me.rank_task.meets_by_itself:
            return None
    elif launcher_of(case.job, case.facts) == "deepspeed":
        return None
    found = devices(case)
    number = None if case.job.use_cpu or found is None else len(found)
    place = Place(me.kind, me.number, me.count, host.strip().strip("[]"), case.job.main_process_port, number)
    return Gathering(place, agreed(case), seconds, lambda text: click.echo(f"  {text}"))


def agreed(case: Case) -> dict[str, str]:
    """What must be the same everywhere: the launch, the training, and the packages that talk to each other."""
    values = effective.values(case.job)
    for name, package in (case.facts.packages or {}).items():
        if name in _PACKAGES or name.startswith("nvidia-nccl"):
            values[f"package {name}"] = f"{package.version}{'+' + package.build if package.build else ''}"
    return values


def with_meeting(case: Case, meeting: Meeting) -> Case:
    return dataclasses.replace(case, facts=msgspec.structs.replace(case.facts, meeting=meeting))


def shown(meeting: Meeting) -> str:
    """One line for a meeting that went well."""
    peers = ", ".join(f"{peer.rank} ({peer.host})" for peer in meeting.peers)
    kind = f"{meeting.kind}s"
    return f"all {meeting.count} {kind} are here and agree" + (f": {peers}" if peers else "")
