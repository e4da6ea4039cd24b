"""From a log to the cause of the failure.

Of all the marks that the reader found, the nearest to the root is chosen: the launcher's own words about a failed
child are never the cause, what the others say about a lost rank is one only when nothing better is there, and an
error after which the training went on is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from xflux_doctor.explain import log
from xflux_doctor.explain.codes import CODES
from xflux_doctor.explain.reader import Mark, Reader
from xflux_doctor.explain.rule import LEVELS, Level, Rule
from xflux_doctor.explain.rules import RULES
from xflux_doctor.explain.skimmer import Skimmer
from xflux_doctor.redact import Redactor

_BUFFER = 8192
"""What a process may have printed and not yet written when it dies."""


class Evidence(msgspec.Struct, frozen=True):
    line: int
    text: str
    rank: int | None = None


class Diagnosis(msgspec.Struct, frozen=True):
    """Why the job failed, as far as its log tells."""

    cause: str
    """The id of the rule, or `unknown`."""
    title: str
    because: str
    hint: str
    evidence: tuple[Evidence, ...]
    rank: int | None = None
    """The rank that failed first, where the log says which."""
    commands: tuple[str, ...] = ()
    docs: str = ""
    others: tuple[str, ...] = ()
    """Other causes that left marks, most of them consequences of this one."""
    level: Level = "error"
    """How near to the root its mark stands."""
    file: str = ""
    """Where it stands, of several logs."""
    code: str | None = None
    """The check that foresees it; None where no look at a machine could."""


def diagnose(source: str | Iterable[str], rules: tuple[Rule, ...] = RULES) -> Diagnosis | None:
    """The cause of the failure that the log shows; None for a log of a job that did not fail."""
    reader = Reader(rules)
    for line in log.lines(source):
        reader.take(line)
    return _verdict(reader)


def diagnose_file(path: Path, rules: tuple[Rule, ...] = RULES) -> Diagnosis | None:
    """The same of a file, however large."""
    with log.opened(path) as file:
        return diagnose_stream(file, rules)


def diagnose_stream(file: BinaryIO, rules: tuple[Rule, ...] = RULES) -> Diagnosis | None:
    """The same of what is open already, such as `sys.stdin.buffer`."""
    reader, made = Reader(rules), log.Lines()
    skimmer = Skimmer(reader, made)
    for piece in log.pieces(file):
        if not skimmer.skim(piece):
            for line in made.of(log.text_of(piece)):
                reader.take(line)
    return _verdict(reader)


def _verdict(seen: Reader) -> Diagnosis | None:
    gave_up = seen.gave_up is not None and not _survived(seen, seen.gave_up)
    raised = [mark for mark in (*seen.raised, *seen.last_raised) if not _survived(seen, mark)]
    marks = [mark for first, last in seen.marks.values() for mark in (*first, *last)]
    marks = [mark for mark in marks if not _survived(seen, mark)]
    if not (gave_up or raised):
        marks = [mark for mark in marks if mark.level != "warning"]
    for level in LEVELS:
        there = [mark for mark in marks if mark.level == level]
        if level == "error" and seen.nan is not None:
            number = seen.nan.line.number
            there = [mark for mark in there if mark.line.number < number] or [seen.nan]
        if there:
            return _told(seen, _choose(there, level), marks)
    if raised or gave_up:
        return _unknown(seen, raised)
    return None


def _survived(seen: Reader, mark: Mark) -> bool:
    """Did the training go on after this?

    Errors go to the log at once, but what was printed before them may come after them, when a buffer is emptied
    at the end of the process: only more than that, or what does not wait in a buffer, is a sign.
    """
    then, now = mark.clock, seen.clock
    if now.done > then.done or now.steady - then.steady >= 3:
        return True
    patience = _BUFFER if mark.in_traceback or seen.gave_up is not None else 0
    return now.printed - then.printed > patience


def _choose(marks: list[Mark], level: Level) -> Mark:
    """The earliest and, in its place, the weightiest. Levels without an order in time go by weight alone."""
    if level not in ("error", "machine"):
        marks = [mark for mark in marks if mark.weight == max(other.weight for other in marks)]
    first = min(marks, key=lambda mark: (mark.line.number, -mark.weight))
    same = [mark for mark in marks if mark.line is first.line or (mark.in_traceback and mark.block == first.block)]
    # The line that names the exception says more than the source line that raised it.
    return min(same, key=lambda mark: (-mark.weight, mark.line.text.lstrip().startswith("raise "), mark.line.number))


def _told(seen: Reader, mark: Mark, marks: list[Mark]) -> Diagnosis:
    rule = mark.rule
    assert rule is not None
    others = [other.rule.id for other in sorted(marks, key=lambda m: m.line.number) if other.rule]
    return Diagnosis(
        cause=rule.id,
        title=rule.title,
        because=rule.because,
        hint=rule.hint,
        evidence=_evidence(mark),
        rank=_rank(seen, mark),
        commands=rule.commands,
        docs=rule.docs,
        others=tuple(name for name in dict.fromkeys(others) if name != rule.id),
        level=mark.level,
        code=mark.code or CODES.get(rule.id),
    )


def _unknown(seen: Reader, raised: list[Mark]) -> Diagnosis:
    mark = raised[0] if raised else seen.gave_up
    assert mark is not None
    return Diagnosis(
        cause="unknown",
        title="the job failed in a way that no rule knows",
        because="The lines shown are the earliest error in the log.",
        hint="Read on from there; if this is the log of one rank, look into those of the others too.",
        evidence=_evidence(mark),
        rank=_rank(seen, mark),
    )


def _rank(seen: Reader, mark: Mark) -> int | None:
    """From the line itself, or from the launcher's summary if that names one rank only, or one as the first."""
    if mark.line.rank is not None:
        return mark.line.rank
    named = seen.failed_ranks if len(seen.failed_ranks) == 1 else seen.first_ranks
    return next(iter(named)) if len(named) == 1 else None


def _evidence(mark: Mark) -> tuple[Evidence, ...]:
    lines = (mark.line,) if mark.frame is None or mark.frame is mark.line else (mark.frame, mark.line)
    return tuple(Evidence(line.number, Redactor().text(line.text.strip())[:400], line.rank) for line in lines)
