"""What a check says: findings, the edits that mend them, and the verdict on one check.

All values are frozen. `Finding` carries what was seen, what it means, and the next step, in that order; an
`Edit` is a next step that the tool can carry out itself.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["error", "warning"]
Status = Literal["ok", "warning", "error", "skipped", "crashed"]
Scalar = str | int | float | bool | None
"""A value that a YAML key can be given."""


class Edit(msgspec.Struct, frozen=True, tag="set"):
    """One key of one of the job's files gets one value."""

    file: str
    """Which of the job's files: `accelerate`, `train`, or `deepspeed` (the file that deepspeed_config_file names)."""
    key: tuple[str, ...]
    """The path of keys, for example `("deepspeed_config", "zero_stage")`."""
    value: Scalar
    reason: str = ""


class Rename(msgspec.Struct, frozen=True, tag="rename"):
    """One key of one of the job's files gets another name; its value stays."""

    file: str
    key: tuple[str, ...]
    new: str
    reason: str = ""


class Remove(msgspec.Struct, frozen=True, tag="remove"):
    """One key of one of the job's files goes, with its value."""

    file: str
    key: tuple[str, ...]
    reason: str = ""


class Nest(msgspec.Struct, frozen=True, tag="nest"):
    """Keys that follow a section's empty key move into it: indentation that was lost comes back."""

    file: str
    key: tuple[str, ...]
    """The section, at the top of the file."""
    members: tuple[str, ...]
    """Its keys, in the order of the file."""
    reason: str = ""


class Comment(msgspec.Struct, frozen=True, tag="comment"):
    """One key of one of the job's files is commented out, with its value, and the reason is written above it."""

    file: str
    key: tuple[str, ...]
    reason: str = ""


Change = Edit | Rename | Remove | Nest | Comment


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong, or will be when the job starts."""

    code: str
    severity: Severity
    seen: str
    """What was seen, with its numbers: a fact, not a judgement."""
    because: str = ""
    """What it means for this job."""
    hint: str = ""
    """What to do next."""
    edits: tuple[Change, ...] = ()
    offers: tuple[Change, ...] = ()
    """Edits that change the training itself: made only when the user asks for them by `--take CODE`."""
    commands: tuple[str, ...] = ()
    """Shell lines for a person to run; the tool never runs them by itself, except pip after a yes."""
    docs: str = ""


_LONGEST = 1200


def _short(sentence: str) -> str:
    """A value of a hundred thousand characters is known by its beginning."""
    return sentence if len(sentence) <= _LONGEST else f"{sentence[:_LONGEST]} …"


def error(
    seen: str,
    because: str = "",
    hint: str = "",
    *,
    edits: tuple[Change, ...] = (),
    offers: tuple[Change, ...] = (),
    commands: tuple[str, ...] = (),
    docs: str = "",
) -> Finding:
    """A finding that stops the job. The frame gives it its check's code."""
    return Finding("", "error", _short(seen), _short(because), _short(hint), edits, offers, commands, docs)


def warning(
    seen: str,
    because: str = "",
    hint: str = "",
    *,
    edits: tuple[Change, ...] = (),
    offers: tuple[Change, ...] = (),
    commands: tuple[str, ...] = (),
    docs: str = "",
) -> Finding:
    """A finding that costs time, memory or quality but stops nothing."""
    return Finding("", "warning", _short(seen), _short(because), _short(hint), edits, offers, commands, docs)


class Verdict(msgspec.Struct, frozen=True):
    """The outcome of one check. A skip carries its reason and is never a pass."""

    check: str
    title: str
    status: Status
    findings: tuple[Finding, ...] = ()
    reason: str = ""
    seconds: float = 0.0
