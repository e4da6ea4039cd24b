"""`xflux-doctor fix --undo`: the job's files as they were before the latest repair."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from xflux_doctor import joint, repair
from xflux_doctor import matrix as matrices
from xflux_doctor.errors import DoctorError
from xflux_doctor.inputs import Inputs, build, files_of
from xflux_doctor.report import jsonreport


@dataclass
class _Outcome:
    """What became of each file."""

    done: list[repair.Backup] = field(default_factory=list)
    refused: list[tuple[Path, repair.RepairError]] = field(default_factory=list)
    without: list[tuple[Path, repair.RepairError]] = field(default_factory=list)
    """Files that this tool did not change."""

    @property
    def exit_code(self) -> int:
        return 1 if self.refused or not self.done else 0


def run(inputs: Inputs, *, form: str) -> int:
    """Take back what the latest `fix` wrote, of all the job's files; exit 1 when one is refused or none has a backup.

    A file that only an earlier `fix` changed stays: its text goes with what the others said then.
    """
    case = build(inputs, matrices.load_with(inputs.matrix))
    paths = list(files_of(case.job).values())
    if not paths:
        raise DoctorError(
            "No accelerate or training file was found.", "Name them with --accelerate-config or --config."
        )
    outcome = _Outcome()
    latest = max((mine[-1] for path in paths if (mine := joint.backups(path))), key=_when, default=None)
    for path in paths:
        try:
            outcome.done += _of_one_run(path, latest)
        except repair.NoBackup as error:
            outcome.without.append((path, error))
        except repair.RepairError as error:
            outcome.refused.append((path, error))
    if form == "json":
        click.echo(jsonreport.encode(_document(outcome)), nl=False)
        return outcome.exit_code
    for backup in outcome.done:
        if backup.created:
            click.echo(f"Removed {backup.file}, which this tool had made.")
        else:
            click.echo(f"Restored {backup.file} from {backup.copy}.")
    wrong = outcome.refused or ([] if outcome.done else outcome.without)
    if wrong:
        more = "".join(f" {error.seen}." for _, error in wrong[1:])
        raise DoctorError(f"{wrong[0][1].seen}.{more}", wrong[0][1].hint)
    return outcome.exit_code


def _of_one_run(path: Path, latest: repair.Backup | None) -> list[repair.Backup]:
    """Undo every write of this file by the command that wrote last."""
    found = joint.backups(path)
    if latest is None or not found:
        return [repair.undo(path)]  # which says why it cannot
    if found[-1].run != latest.run:
        raise repair.NoBackup(f"{path} was not changed by the latest repair", "Run `fix --undo` once more for it.")
    done = [repair.undo(path)]
    while latest.run and (left := joint.backups(path)) and left[-1].run == latest.run:
        done.append(repair.undo(path))
    return done


def _when(backup: repair.Backup) -> str:
    """The time in the backup's name."""
    return backup.copy.name.rpartition(".bak-")[2]


def _document(outcome: _Outcome) -> dict[str, Any]:
    """`report/undo.schema.json` describes it."""
    left = [(path, error) for path, error in outcome.refused] + outcome.without
    return {
        "schema": jsonreport.SCHEMA,
        "exit_code": outcome.exit_code,
        "restored": [str(backup.file) for backup in outcome.done if not backup.created],
        "removed": [str(backup.file) for backup in outcome.done if backup.created],
        "left": [{"file": str(path), "seen": error.seen, "hint": error.hint} for path, error in left],
    }
