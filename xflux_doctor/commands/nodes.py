"""`xflux-doctor nodes`: one job on several machines: each machine's file and command; and whether files go together."""

from __future__ import annotations

from pathlib import Path

import click

from xflux_doctor import nodes, repair
from xflux_doctor.errors import DoctorError, UsageError
from xflux_doctor.job import ACCELERATE_NAMES, TRAIN_NAMES, read
from xflux_doctor.yamlnodes import CannotEdit


def run(
    *, config: str | None, accelerate_config: str | None, hosts: str, launcher: str, port: int, write: bool
) -> int:  # fmt: skip
    """Show, and with `write` make, the files of the hosts; say what to start on each."""
    job = read(config, accelerate_config, folder=Path())
    if job.accelerate is None or job.accelerate_path is None:
        problem = next((p for p in job.problems if p.file == "accelerate"), None)
        if problem:
            raise DoctorError(problem.seen, problem.hint)
        hint = "Give --accelerate-config FILE, or let `fix --write-config` make one."
        raise DoctorError(
            f"No accelerate file was given, and none lies here ({', '.join(ACCELERATE_NAMES)}).", hint, code=2
        )
    machines = nodes.hosts(hosts)
    try:
        texts = nodes.files(job.accelerate_path, repair.read(job.accelerate_path), job.accelerate, machines, port)
        if launcher == "accelerate":
            for path, text in texts.items():
                _put(path, text, write=write)
    except CannotEdit as error:
        raise DoctorError(
            f"{job.accelerate_path} cannot be edited safely: {error}", "Make the change by hand."
        ) from error
    except repair.RepairError as error:
        raise DoctorError(f"{error.seen}.", error.hint) from error
    ranks = job.local_processes * len(machines)
    train = job.train_path or Path(TRAIN_NAMES[0])
    where = job.main_process_port if job.get("main_process_port") else port
    for host, command in nodes.commands(launcher, machines, job.accelerate_path, train, ranks=ranks, port=where):
        click.echo(f"{host + ': ' if host else ''}{command}")
    return 0


def _put(path: Path, text: str, *, write: bool) -> None:
    """A file that says the same is left alone; one that says something else is kept as a backup."""
    old = repair.read(path) if path.exists() else None
    if old == text:
        click.echo(f"# {path} is right")
    elif not write:
        click.echo(repair.diff(old or "", text, str(path)), nl=False)
    elif old is None:
        repair.create(path, text)
        click.echo(f"# wrote {path}")
    else:
        repair.write(path, text, was=old)
        click.echo(f"# wrote {path}, and kept the old text beside it (`fix --undo --accelerate-config {path}`)")


def compare(files: tuple[str, ...]) -> int:
    """Exit 1 and a sentence each where the machines' files are not one job's."""
    values = []
    for name in files:
        job = read(None, name, folder=Path())
        if job.accelerate is None:
            problem = next(p for p in job.problems if p.file == "accelerate")
            raise DoctorError(problem.seen, problem.hint)
        values.append(job.accelerate)
    if len(values) < 2:
        raise UsageError("One file was given.", "Name the files of all machines.")
    faults = nodes.unlike(values[0], values[1:])
    for fault in faults:
        click.echo(f"✗ {fault}")
    if not faults:
        click.echo(f"The {len(values)} files are one job's.")
    return 1 if faults else 0
