"""Several files changed as one: all have their new text, or all their old.

A rename changes one file. Where a kill comes between two, the records of the files that are written name the others
with their sums, so that the next command finds the job half repaired and takes it back. An error in the later file
puts the earlier ones back at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from xflux_doctor import repair
from xflux_doctor.repair import Backup, sha256


@dataclass(frozen=True)
class Change:
    """One file's part. `old` is None for a file that is to be made."""

    path: Path
    old: str | None
    new: str


@dataclass(frozen=True)
class BrokenOff:
    """A repair that a kill ended between two files."""

    written: tuple[Path, ...]
    """The files that have the new text."""
    waiting: tuple[Path, ...]
    """The files that have the old text still."""


def write(changes: Sequence[Change], run: str) -> list[Backup | None]:
    """Write all of them. Raises RepairError for the first that cannot be; then none of them is changed."""
    several = len(changes) > 1
    together = {
        str(change.path.resolve()): (_sum(change.old), sha256(change.new.encode("utf-8"))) for change in changes
    } if several else {}  # fmt: skip
    made: list[Backup | None] = []
    try:
        for change in changes:
            if change.old is None:
                made.append(repair.create(change.path, change.new, run=run, together=together))
            else:
                made.append(repair.write(change.path, change.new, change.old, run=run, together=together))
    except BaseException:
        for backup in filter(None, reversed(made)):
            with contextlib.suppress(repair.RepairError):  # then `broken_off` finds it
                repair.undo(backup.file)
        raise
    first = next(filter(None, made), None)
    if several and first is not None:
        repair.finish(first)
    return made


def broken_off(paths: Iterable[Path]) -> BrokenOff | None:
    """The repair of these files that was not finished, if there is one; files are called as they are here."""
    named: dict[Path, Path] = {}
    for path in paths:
        with contextlib.suppress(OSError, RuntimeError):  # a link in a circle, before Python 3.13
            named[path.resolve()] = path
    for path in named.values():
        latest = next(reversed(backups(path)), None)
        if latest is None or not latest.together:
            continue
        members = {Path(name): sums for name, sums in latest.together.items()}
        if any(b.done for member in members for b in backups(member) if b.together == latest.together):
            continue
        now = {member: _now(member) for member in members}
        written = tuple(member for member, (_, new) in members.items() if now[member] == new)
        waiting = tuple(member for member, (old, _) in members.items() if now[member] == old)
        if written and waiting and len(written) + len(waiting) == len(members):
            return BrokenOff(*(tuple(named.get(member, member) for member in part) for part in (written, waiting)))
    return None


def take_back(found: BrokenOff) -> None:
    """Give the files that are written their old text, as the others have it. Raises RepairError."""
    for path in found.written:
        repair.undo(path)


def backups(path: Path) -> list[Backup]:
    """Those of a file that may not be there, or cannot be followed: none then."""
    try:
        return repair.backups(path)
    except (OSError, RuntimeError):
        return []


def _now(path: Path) -> str:
    """The sum of the file's text; that of a missing one is empty, as its record has it."""
    try:
        return sha256(path.read_bytes())
    except OSError:
        return ""


def _sum(text: str | None) -> str:
    return "" if text is None else sha256(text.encode("utf-8"))
