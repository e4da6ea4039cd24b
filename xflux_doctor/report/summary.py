"""One check run as a value: what every report format is made from, and the exit code."""

from __future__ import annotations

from typing import Any

import msgspec

from xflux_doctor import __version__
from xflux_doctor.facts import Facts
from xflux_doctor.finding import Verdict
from xflux_doctor.pins import Word


class Summary(msgspec.Struct, frozen=True):
    """The verdicts on one case."""

    verdicts: tuple[Verdict, ...]
    facts: Facts
    stack: str | None
    because: str = ""
    strict: bool = False
    version: str = __version__
    packages: tuple[tuple[str, str, str, Word], ...] = ()
    """Rows (name, installed, wanted, word) of the stack's packages."""
    launch: tuple[str, ...] = ()
    """What would run where, in words; empty where nothing says how the job is launched."""
    placement: dict[str, Any] | None = None
    """The same as values."""
    job: dict[str, Any] | None = None
    """What the job's other nodes must run alike (effective.document); None where no file describes the job."""

    @property
    def counts(self) -> dict[str, int]:
        """How many checks ended in each status; a crashed check counts as an error."""
        counts = {"error": 0, "warning": 0, "ok": 0, "skipped": 0}
        for verdict in self.verdicts:
            counts["error" if verdict.status == "crashed" else verdict.status] += 1
        return counts

    @property
    def crashed(self) -> int:
        return sum(verdict.status == "crashed" for verdict in self.verdicts)

    @property
    def repairable(self) -> bool:
        return any(finding.edits for verdict in self.verdicts for finding in verdict.findings)

    @property
    def exit_code(self) -> int:
        """0 nothing wrong, 1 blocking findings (with strict also warnings), 3 a check of ours crashed."""
        if any(verdict.status == "error" for verdict in self.verdicts):
            return 1
        if self.crashed:
            return 3
        return 1 if self.strict and self.counts["warning"] else 0
