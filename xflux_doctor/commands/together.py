"""`run` as one of several: who this process is, where it keeps its files, and the meeting before the launch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from xflux_doctor import effective
from xflux_doctor.check import Case
from xflux_doctor.checks.words import devices
from xflux_doctor.cluster import Task, task
from xflux_doctor.commands.rejoin import Fellows
from xflux_doctor.errors import UsageError
from xflux_doctor.facts import Meeting
from xflux_doctor.placement import launcher_of
from xflux_doctor.probes.meeting import Gathering, Place
from xflux_doctor.roll import Roll

_PACKAGES = ("torch", "accelerate", "deepspeed", "xflux-doctor")

_RESUME = "Else start all again with resume_from_checkpoint: latest; under Slurm a requeued job does so by itself."


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


def gathering(case: Case, me: Self, seconds: float, retries: int = 0) -> Gathering | None:
    """The meeting that this launch wants, if any."""
    place = place_of(case, me) if seconds > 0 else None
    return None if place is None else Gathering(place, agreed(case, retries), seconds, say)


def say(text: str) -> None:
    """A terminal that is gone ends no run."""
    with contextlib.suppress(OSError):
        click.echo(f"  {text}")


def place_of(case: Case, me: Self) -> Place | None:
    """Who this is among those who meet: nobody where there is one process, for torchrun's ranks, and where one
    machine's launcher starts the others' ranks by itself (DeepSpeed's pdsh)."""
    host = case.job.get("main_process_ip")
    if me.count < 2 or not isinstance(host, str) or not host:
        return None
    if me.rank_task is not None:
        if me.rank_task.meets_by_itself:
            return None
    elif launcher_of(case.job, case.facts) == "deepspeed":
        return None
    found = devices(case)
    number = None if case.job.use_cpu or found is None else len(found)
    return Place(me.kind, me.number, me.count, host.strip().strip("[]"), case.job.main_process_port, number)


def agreed(case: Case, retries: int = 0) -> dict[str, str]:
    """What must be the same everywhere: the launch, the training, how often it may start again, and the packages that
    talk to each other."""
    values = {**effective.values(case.job), "--retries": str(retries)}
    for name, package in (case.facts.packages or {}).items():
        if name in _PACKAGES or name.startswith("nvidia-nccl"):
            values[f"package {name}"] = f"{package.version}{'+' + package.build if package.build else ''}"
    return values


def check_retries(case: Case, me: Self, wait: float) -> None:
    """Raises UsageError where the job's parts could not start again together."""
    if me.count < 2:
        return
    alone = "--retries starts one launch again, and "
    if me.rank_task is not None:
        seen = f"{alone}this job's {me.count} ranks were started one by one, by {me.rank_task.source}."
        raise UsageError(seen, f"Start one doctor a machine, which launches its ranks, or all anew. {_RESUME}")
    if wait <= 0:
        seen = f"{alone}without --wait-for-nodes this job's {me.count} machines do not meet to agree on it."
        raise UsageError(seen, "Give --wait-for-nodes its seconds.")
    if place_of(case, me) is None:
        seen = f"{alone}this job has {me.count} machines whose doctors do not meet."
        hint = "They do where each launches its own ranks and main_process_ip names machine 0"
        raise UsageError(seen, f"{hint} (`xflux-doctor fix`). {_RESUME}")


def fellows(case: Case, me: Self, gathering: Gathering | None, wait: float, retries: int) -> Fellows | None:
    """The other machines, once they have agreed to start; None where this launch starts again alone or never."""
    place = place_of(case, me)
    if gathering is None or place is None or not retries or case.job.train is None:
        return None
    folder = Path(case.job.train.output_dir).absolute() / f"{me.kind}s" / "ended"
    return Fellows(place, gathering.run, Roll(folder, gathering.run, me.number, me.count), wait, say)


def with_meeting(case: Case, meeting: Meeting) -> Case:
    return msgspec.structs.replace(case, facts=msgspec.structs.replace(case.facts, meeting=meeting))


def shown(meeting: Meeting) -> str:
    """One line for a meeting that went well."""
    peers = ", ".join(f"{peer.rank} ({peer.host})" for peer in meeting.peers)
    kind = f"{meeting.kind}s"
    return f"all {meeting.count} {kind} are here and agree" + (f": {peers}" if peers else "")
