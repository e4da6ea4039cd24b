"""From the command line's inputs to a case: gather, read, choose the stack."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from xflux_doctor import cluster
from xflux_doctor import job as job_files
from xflux_doctor.check import Case
from xflux_doctor.errors import DoctorError, UsageError
from xflux_doctor.facts import SCHEMA, Facts, from_json
from xflux_doctor.files import has_backup
from xflux_doctor.gather.cluster import cluster_facts
from xflux_doctor.gather.environment import environment_facts
from xflux_doctor.gather.folders import with_folders
from xflux_doctor.gather.machine import gather
from xflux_doctor.gather.ports import listeners
from xflux_doctor.gather.shadows import shadows
from xflux_doctor.job import Job
from xflux_doctor.launched import under_command, xflux_script
from xflux_doctor.matrix import Matrix, Stack
from xflux_doctor.versions import version_of
from xflux_doctor.visible import choice, visible
from xflux_doctor.xflux_scripts import SCRIPTS

if TYPE_CHECKING:  # loaded where a job has them: every command starts through here
    from xflux_doctor.command import Command
    from xflux_doctor.joint import BrokenOff

GIB = 1 << 30
DEEP_SECONDS = 180.0
"""Deadline of the deep level, which may have to wait out a hang and try again."""


class Inputs(msgspec.Struct, frozen=True):
    """The options that check, fix, run and plan share."""

    config: str | None = None
    accelerate_config: str | None = None
    stack: str | None = None
    python: str | None = None
    quick: bool = False
    deep: bool = False
    facts: str | None = None
    gpu_limit: float | None = None
    cpu: bool = False
    offline: bool = False
    accept: tuple[str, ...] = ()
    take: tuple[str, ...] = ()
    """Codes whose offers are made as edits."""
    timeout: float = 60.0
    deep_timeout: float = DEEP_SECONDS
    matrix: str | None = None
    """A site's own matrix file, laid over ours."""
    xflux: str | None = None
    """An X-Flux checkout, or one of its scripts: the job is judged as that would run it."""
    launch: str | None = None
    """The command that the user would start the training by; its flags win over the files."""


def build(inputs: Inputs, matrix: Matrix, *, to_run: bool = True, cards: bool = True) -> Case:
    """The case before any probe: everything here is quick and starts no child.

    `to_run`: whether the job is to start here; else nobody asks who listens on its ports, which stack fits, nor what
    `gather` leaves out.
    `cards`: whether it is about this machine's; else they are not asked for.
    """
    command: Command | None = None
    if inputs.launch:
        command = importlib.import_module("xflux_doctor.command").parse(inputs.launch)
    if command is not None:
        inputs = _named_by(inputs, command)
    facts = (
        _recorded(inputs.facts)
        if inputs.facts
        else gather(inputs.python, tuple(sorted(matrix.names())), _torch_builds(matrix), to_run=to_run, cards=cards)
    )
    # accelerate reads no default file under its --cpu (commands/launch.py, `_validate_launch_command`)
    no_default = command is not None and (command.launcher != "accelerate" or "cpu" in command.flags)
    job = job_files.read(
        inputs.config,
        inputs.accelerate_config,
        folder=Path(),
        default_accelerate="" if inputs.facts or no_default else facts.default_accelerate_config,
        cpu=inputs.cpu,
        gpu_limit=int(inputs.gpu_limit * GIB) if inputs.gpu_limit else None,
        offline=inputs.offline,
        xflux=inputs.xflux,
        environment=None if inputs.facts else facts.environment,
        command=command,
    )
    job = _whole_repair(job)
    if command is not None:
        facts = msgspec.structs.replace(
            facts, environment={**facts.environment, **environment_facts(command.environment)}
        )
        seen = None if facts.gpus is None else len(visible(facts.gpus, choice(facts.environment, job.gpu_ids)))
        job = under_command(job, command, version_of(facts, "accelerate"), seen)
    else:
        job = cluster.under(job, facts.environment)
    if not inputs.facts:
        main = str(job.get("main_process_ip") or "") if job.num_machines > 1 else ""
        facts = msgspec.structs.replace(
            facts,
            listeners=listeners(_ports(job, facts)) if to_run else None,
            shadows=shadows(Path()),
            cluster=cluster_facts(main, ask=not (inputs.quick or inputs.offline)) if main else None,
        )
        facts = with_folders(facts, job.train, os.environ)
    chosen, because = _stack(inputs, matrix, facts, job.use_cpu, ask=to_run)
    if inputs.matrix and because:
        because += f"; {inputs.matrix} is laid over our matrix"
    return Case(facts, job, matrix, chosen, because, frozenset(inputs.accept), frozenset(inputs.take))


def _whole_repair(job: Job) -> Job:
    """A repair that was killed between two files leaves a job that neither file means."""
    files = files_of(job).values()
    if not any(has_backup(path) for path in files):
        return job
    found: BrokenOff | None = importlib.import_module("xflux_doctor.joint").broken_off(files)
    if found is None:
        return job
    written, waiting = (", ".join(str(path) for path in paths) for paths in (found.written, found.waiting))
    seen = f"The last repair was broken off: {written} was written and {waiting} was not"
    hint = "`xflux-doctor fix --write-config` takes it back and repairs anew; `fix --undo` only takes it back."
    return msgspec.structs.replace(job, problems=(*job.problems, job_files.Problem("accelerate", seen, hint)))


def files_of(job: Job) -> dict[str, Path]:
    """The job's files by the names that edits have for them."""
    files = {"accelerate": job.accelerate_path, "train": job.train_path, "deepspeed": job.deepspeed_path}
    return {name: path for name, path in files.items() if path is not None}


def _ports(job: Job, facts: Facts) -> range:
    """Where this process will listen: number 0 does, and not where torchrun does already."""
    task = None if job.command else cluster.task(facts.environment)
    here = job.machine_rank == 0 if task is None or not task.a_rank else task.rank == 0 and not task.meets_by_itself
    return range(job.main_process_port, job.main_process_port + 16) if here else range(0)


def _named_by(inputs: Inputs, command: Command) -> Inputs:
    """The files that the command names, where no option names others."""
    script = xflux_script(command, tuple(SCRIPTS.values()))
    return msgspec.structs.replace(
        inputs,
        config=inputs.config or command.training_file,
        accelerate_config=inputs.accelerate_config or command.config_file,
        xflux=inputs.xflux or (script if script and Path(script).exists() else None),
    )


def _torch_builds(matrix: Matrix) -> frozenset[tuple[str, str]]:
    """The torch wheels whose GPU architectures the matrix knows."""
    pins = [stack.packages["torch"] for stack in matrix.stacks if stack.gpu_archs and "torch" in stack.packages]
    return frozenset((pin.version, pin.build) for pin in pins)


def _stack(inputs: Inputs, matrix: Matrix, facts: Facts, cpu: bool, *, ask: bool) -> tuple[Stack | None, str]:
    """The stack that was named; else the fitting one that is installed already; else the best fit. None where nobody
    asks for what was not named."""
    if inputs.stack:
        return matrix.stack(inputs.stack), "named by --stack"
    if not ask:
        return None, ""
    choose: Any = importlib.import_module("xflux_doctor.choose")  # and specifiers: a plan has none
    choice = choose.choose(matrix, facts, cpu=cpu)
    if choice.stack is None:
        return None, choice.because
    torch = (facts.packages or {}).get("torch")
    if torch is not None:
        for stack in matrix.stacks:
            pin = stack.packages.get("torch")
            same = pin is not None and pin.version == torch.version.partition("+")[0]
            if same and not choose.why_not(stack, facts, cpu=cpu):
                return stack, f"its torch {torch.version} is installed"
    return matrix.stack(choice.stack), choice.because


def _recorded(path: str) -> Facts:
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"There is no facts file at {path}.", "Write one with `xflux-doctor facts`.")
    try:
        raw = file.read_bytes()
        if "schema" not in msgspec.json.decode(raw, type=dict[str, msgspec.Raw]):
            raise msgspec.DecodeError("it names no schema")
        facts = from_json(raw)
    except (msgspec.DecodeError, OSError) as error:
        raise DoctorError(f"{path} does not hold facts: {error}.", "Write it with `xflux-doctor facts`.") from error
    if facts.schema != SCHEMA:
        raise DoctorError(f"{path} has schema {facts.schema}; this doctor reads {SCHEMA}.", "Record it anew.")
    return facts
