"""`xflux-doctor explain`: the cause of a failed run, out of its log."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from xflux_doctor.commands.lighter import Lighter, after
from xflux_doctor.errors import DoctorError
from xflux_doctor.explain.diagnosis import Diagnosis, diagnose_file, diagnose_stream
from xflux_doctor.explain.folder import diagnose_folder, logs_in
from xflux_doctor.report import jsonreport


def run(log: str, *, form: str, bundle: str | None = None, hosts: bool = False) -> int:
    """Exit 1 when a cause was found, 0 when the log shows none. `bundle`: the file of a bug report to write."""
    if bundle is not None and log == "-":
        raise DoctorError("--bundle needs a log or a run folder.", "Name the file in place of -.", code=2)
    diagnosis = _diagnosed(log)
    lighter = next_plan(diagnosis, Path(log)) if log != "-" else None
    if form == "json":
        click.echo(jsonreport.encode({"schema": 1, **as_dict(diagnosis, lighter)}), nl=False)
    else:
        click.echo(words(diagnosis, lighter))
        if bundle is None and log != "-":
            click.echo(suggestion(diagnosis, Path(log)), nl=False)
    if bundle is not None:
        to: Any = importlib.import_module("xflux_doctor.commands.bundle")  # only a bug report needs it
        click.echo(to.write(Path(bundle), Path(log), as_dict(diagnosis, lighter), hosts=hosts), err=form == "json")
    return 1 if diagnosis else 0


def suggestion(diagnosis: Diagnosis | None, path: Path) -> str:
    """A line on how to report what no rule knows; nothing for a cause that is known."""
    if diagnosis is None or diagnosis.cause != "unknown":
        return ""
    command = shlex.join(["xflux-doctor", "explain", str(path), "--bundle", "xflux-doctor-bundle.tar.gz"])
    return f"    → For a bug report, without secrets:\n    $ {command}\n"


def next_plan(diagnosis: Diagnosis | None, path: Path) -> Lighter | None:
    """The plan after a run that was out of the card's memory, by its run folder, or by the log in that."""
    if diagnosis is None or not diagnosis.cause.startswith("cuda-oom"):
        return None
    return after(path if path.is_dir() else path.absolute().parent.parent)


def as_dict(diagnosis: Diagnosis | None, lighter: Lighter | None = None) -> dict[str, Any]:
    """The diagnosis as JSON has it. `cause` is the cause's id, `unknown`, or `none` for a healthy log."""
    if diagnosis is None:
        return {"cause": "none", "code": None, "confidence": "high", "title": "", "because": "", "evidence": [],
                "file": "", "rank": None, "remedy": {}, "others": []}  # fmt: skip
    return {
        "cause": diagnosis.cause,
        "code": diagnosis.code,
        "confidence": confidence(diagnosis),
        "title": diagnosis.title,
        "because": diagnosis.because,
        "evidence": msgspec.to_builtins(diagnosis.evidence),
        "file": diagnosis.file,
        "rank": diagnosis.rank,
        "remedy": {
            "hint": diagnosis.hint,
            "commands": list(diagnosis.commands),
            "docs": diagnosis.docs,
            **({"memory": lighter.document} if lighter else {}),
        },
        "others": list(diagnosis.others),
    }


def confidence(diagnosis: Diagnosis) -> str:
    """`high` where a program or the hardware says so itself and nothing else left such a mark, `low` where only what
    follows from a cause was seen, or nothing that is known."""
    if diagnosis.cause == "unknown" or diagnosis.level in ("consequence", "warning"):
        return "low"
    return "medium" if diagnosis.level == "killed" or diagnosis.others else "high"


def of_file(path: Path) -> Diagnosis | None:
    """The cause that one log shows."""
    return diagnose_file(path)


def log_of(folder: Path) -> Path | None:
    """The newest log of a run folder."""
    logs = sorted((folder / "logs").glob("run-*.log"), key=lambda path: path.stat().st_mtime)
    return logs[-1] if logs else None


def _diagnosed(log: str) -> Diagnosis | None:
    if log == "-":
        if sys.stdin is None:
            raise DoctorError("Standard input is closed.", "Name a log, or pipe one in.", code=2)
        return diagnose_stream(sys.stdin.buffer)
    path = Path(log)
    if path.is_dir():
        found = log_of(path)
        if found is None and not logs_in(path):
            raise DoctorError(
                f"{log} holds no logs.", "Name a run folder (output_dir), logs of ranks, or a log.", code=2
            )
        if found is None:
            return diagnose_folder(path)
        path = found
    if not path.is_file():
        raise DoctorError(f"There is no log at {log}.", "Name a log, a run folder, or - for standard input.", code=2)
    return diagnose_file(path)


def words(diagnosis: Diagnosis | None, lighter: Lighter | None = None) -> str:
    """The diagnosis for a person."""
    if diagnosis is None:
        return "No known cause of failure stands in this log."
    known = f"{diagnosis.cause}, {diagnosis.code}" if diagnosis.code else diagnosis.cause
    lines = [click.style(f"✗ {diagnosis.title} ({known}; confidence {confidence(diagnosis)})", fg="red", bold=True)]
    at = f"{diagnosis.file}, line" if diagnosis.file else "line"
    lines += [f"    {at} {evidence.line}: {evidence.text}" for evidence in diagnosis.evidence]
    lines += [f"    {diagnosis.because}", f"    → {diagnosis.hint}"]
    lines += [f"    → {lighter.words}"] if lighter else []
    lines += [f"    $ {command}" for command in diagnosis.commands]
    return "\n".join(lines)
