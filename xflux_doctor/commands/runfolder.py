"""What `run` leaves in its folder beyond the trainer's own: the plan, the diagnosis, and what happened when.

history.jsonl has one line for each start and end, retries.jsonl one for each start after a death. Nothing here ends a
training: what cannot be written is missing from the report, and that is all.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import Any

import msgspec

from xflux_doctor import planner, remember
from xflux_doctor.bill import need
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.commands.again import Attempt
from xflux_doctor.errors import DoctorError
from xflux_doctor.files import write_atomic
from xflux_doctor.report import jsonreport, planjson

HISTORY, RETRIES, DIAGNOSIS, PLAN = "history.jsonl", "retries.jsonl", "diagnosis.json", "plan.json"


def plan(folder: Path, case: Case) -> None:
    """plan.json: what `plan --format json` says of the job as it is launched. Nothing where there is no forecast."""
    try:
        bill = need(case)
    except SkipCheck:
        return
    cards = planner.of_case(case)
    rows = [planner.own(case, cards)] if cards and case.job.bundled else []
    write_atomic(folder / PLAN, planjson.encode(planjson.document(case, bill, cards, rows, None)))


def identity(case: Case) -> str:
    """The hash of config, versions, driver, GPUs and environment under which a start like this is known."""
    return remember.key(case)


def started(folder: Path, log: Path, command: str) -> None:
    _append(folder / HISTORY, {"event": "start", "log": log.name, "command": command})


def ended(folder: Path, log: Path, code: int, seconds: float, diagnosis: dict[str, Any]) -> None:
    """The end of all starts of one `run`, and why."""
    told = {"event": "end", "log": log.name, "exit_code": code, "seconds": round(seconds, 1)}
    _append(folder / HISTORY, {**told, "cause": diagnosis.get("cause")})
    with contextlib.suppress(OSError, DoctorError):
        write_atomic(folder / DIAGNOSIS, jsonreport.encode({"schema": 1, "log": log.name, **diagnosis}))


def retried(
    folder: Path, number: int, attempt: Attempt, diagnosis: dict[str, Any], code: int, seconds: float, log: Path, *,
    machine: int | None = None,
) -> None:  # fmt: skip
    """One death and what is tried after it; `log`: of the start that died. `machine`: where the cause was, of several
    machines; `code` is this one's."""
    where = {} if machine is None else {"machine": machine}
    _append(folder / RETRIES, {
        "retry": number, "cause": diagnosis.get("cause"), "code": diagnosis.get("code"), "words": attempt.words,
        "edits": [msgspec.to_builtins(edit) for edit in attempt.edits], "exit_code": code, "seconds": round(seconds, 1),
        "log": log.name, **where,
    })  # fmt: skip


def stayed(folder: Path, why: str) -> None:
    """A death after which the machines did not start again together."""
    _append(folder / HISTORY, {"event": "no retry", "why": why})


def _append(path: Path, line: dict[str, Any]) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now, **line}, default=str) + "\n")
