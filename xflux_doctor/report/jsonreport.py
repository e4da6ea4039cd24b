"""The report for programs. `report/check.schema.json` describes it, and a test holds them together."""

from __future__ import annotations

from typing import Any

import msgspec

from xflux_doctor.finding import Change
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
        "exit_code": summary.exit_code,
        "stack": summary.stack,
        "summary": summary.counts,
        "results": results,
        "facts": msgspec.to_builtins(summary.facts),
    }


def with_fix(
    report: dict[str, Any], edits: tuple[Change, ...], files: dict[str, str], written: list[str], code: int
) -> dict[str, Any]:
    """The report of `fix`: the same, with the edits, the files that they touch, and those written."""
    extra = {"edits": [msgspec.to_builtins(edit) for edit in edits], "files": files, "written": written}
    return {**report, "exit_code": code, **extra}


def encode(report: dict[str, Any]) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"
