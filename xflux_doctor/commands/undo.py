"""`xflux-doctor fix --undo`: the job's files as they were before the latest repair."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from xflux_doctor import matrix as matrices
from xflux_doctor import repair
from xflux_doctor.commands.fix import files_of
from xflux_doctor.errors import DoctorError
from xflux_doctor.inputs import Inputs, build
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
    """Put the latest backup of each of the job's files back; exit 1 when one is refused or none has a backup."""
    case = build(inputs, matrices.load_with(inputs.matrix))
    paths = list(files_of(case.job).values())
    if not paths:
        raise DoctorError(
            "No accelerate or training file was found.", "Name them with --accelerate-config or --config."
        )
    outcome = _Outcome()
    for path in paths:
        try:
            outcome.done.append(repair.undo(path))
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
