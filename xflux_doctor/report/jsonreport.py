"""The report for programs. `report/check.schema.json` describes it, and a test holds them together."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

from xflux_doctor.finding import Change, Finding

if TYPE_CHECKING:
    from xflux_doctor.report.summary import Summary

SCHEMA = 1


def document(summary: Summary) -> dict[str, Any]:
    """The report as plain values."""
    results = [
        {
            "check": verdict.check,
            "title": verdict.title,
            "status": verdict.status,
            "seconds": round(verdict.seconds, 6),
            "reason": verdict.reason,
            "findings": [msgspec.to_builtins(finding) for finding in verdict.findings],
        }
        for verdict in summary.verdicts
    ]
    return {
        "schema": SCHEMA,
        "version": summary.version,
        # Who and when stand first: a report that was cut off still tells them (fleet/reading.py).
        "node": summary.facts.host.name if summary.facts.host else "",
        "created": summary.facts.created,
        "job": summary.job,
        "exit_code": summary.exit_code,
        "stack": summary.stack,
        "packages": [
            {"name": name, "installed": installed, "wanted": wanted, "verdict": word}
            for name, installed, wanted, word in summary.packages
        ],
        "launch": summary.placement,
        "summary": summary.counts,
        "results": results,
        "facts": msgspec.to_builtins(summary.facts),
    }


def with_fix(
    report: dict[str, Any],
    edits: tuple[Change, ...],
    files: dict[str, str],
    written: list[str],
    left: tuple[Finding, ...],
    code: int,
) -> dict[str, Any]:
    """The report of `fix`: the same, with the edits, the files that they touch, those written, and what is left."""
    extra = {
        "edits": [msgspec.to_builtins(edit) for edit in edits],
        "files": files,
        "written": written,
        "left": [msgspec.to_builtins(finding) for finding in left],
    }
    return {**report, "exit_code": code, **extra}


def encode(report: dict[str, Any]) -> str:
    try:
        data = msgspec.json.encode(report)
    except UnicodeEncodeError:  # a file's name may hold bytes that are no text
        return json.dumps(report, indent=2, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"
    return msgspec.json.format(data, indent=2).decode() + "\n"
