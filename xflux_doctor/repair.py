"""Show, write and take back a change of a file.

A reader of the file sees the old text or the new text, never a part of one: the new text is written beside it
under another name, flushed to the disk and then renamed over it. Before that, a copy of the old text (`.bak-…`)
and a small record of what is about to be written (`.bak-….json`) are on the disk in the same way, so that `undo`
knows what to put back, and whether somebody else has changed the file since. A file that is made where there was
none has such a record without a copy, and `undo` removes it.

A symbolic link stays one: what it leads to is written. Of a file with several names (hard links) only the name that
was given gets the new text, as with `sed -i` and git: the others, which are often somebody's copies (`cp -al`), keep
the old text, and `Backup.names` lets the command say so.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import glob
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

import msgspec

from xflux_doctor.files import BACKUP, replace

_TEMPORARY = re.compile(r"(\.xflux-doctor\.bak-[0-9TZ.-]*(\.json)?)?\.[a-z0-9_]{8}\.tmp")
_STALE = 3600.0
"""Seconds; no write of a few kilobytes takes longer."""


class RepairError(Exception):
    """A file that could not be read, written or restored. The file itself is as it was before."""

    def __init__(self, seen: str, hint: str) -> None:
        super().__init__(f"{seen}. {hint}")
        self.seen = seen
        self.hint = hint


class NoBackup(RepairError):
    """There is nothing that could be undone."""


class Backup(msgspec.Struct, frozen=True):
    """One write that can be taken back."""

    file: Path
    """The file that was written; symbolic links are followed."""
    copy: Path
    """Its old text."""
    old_sha256: str
    new_sha256: str
    """Of what was written: a file with another sum was changed by somebody else since."""
    created: bool = False
    """There was no file before: no copy either, and undo removes the file."""
    names: int = 1
    """How many names (hard links) the file had."""
    run: str = ""
    """What was written by one command has one mark, and is undone together."""
    together: dict[str, tuple[str, str]] = {}
    """{path: (old, new) SHA-256} of files that were to be changed as one (joint.py); empty: this file alone."""
    done: bool = False
    """Of files changed as one: the last of them was written too."""


def read(path: Path) -> str:
    """The text with its own line ends and byte order mark, as `yamltext.apply` wants it."""
    with _told(path):
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        seen = f"{path} is not UTF-8 text (byte {error.start})"
        raise RepairError(seen, "Save it as UTF-8 and try again.") from error


def diff(old: str, new: str, name: str) -> str:
    """The change as a unified diff that `patch` and `git apply` take; empty when there is none."""
    found = difflib.unified_diff(lines(old), lines(new), f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in found)


Together = Mapping[str, tuple[str, str]]


def write(
    path: Path, text: str, was: str | None = None, *, run: str = "", together: Together = MappingProxyType({})
) -> Backup | None:
    """Give an existing file another text and keep a backup; None when it says that already.

    `was` is the text that the change was made for: when the file says something else by now, it is left alone. `run`
    and `together` are for the record (see Backup).
    """
    with _told(path):
        real = path.resolve(strict=True)
        status = real.stat()
        if os.statvfs(real).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise RepairError(f"{path} is not a regular file", "Give the path of the config file itself.")
    if not os.access(real, os.W_OK):
        raise RepairError(f"{path} is write-protected", f"Allow writing with `chmod u+w {path}`, or copy it.")
    with _told(path):
        old = real.read_bytes()
        if was is not None and old != was.encode("utf-8"):
            seen = f"{path} was changed while the repair was being prepared"
            raise RepairError(seen, "Run the command again.")
        return _exchange(real, old, text.encode("utf-8"), status, run, together)


def create(path: Path, text: str, *, run: str = "", together: Together = MappingProxyType({})) -> Backup:
    """Make a file that is not there yet, in a way that `undo` can take back."""
    data = text.encode("utf-8")
    with _told(path):
        real = path.resolve()
        if os.path.lexists(real):
            raise RepairError(f"{path} was made while the repair was being prepared", "Run the command again.")
        for old in backups(real):
            if old.created:  # left behind by a kill, or its file was removed by hand
                _record(old.copy).unlink(missing_ok=True)
        backup = Backup(real, _free_name(real), "", sha256(data), created=True, run=run, together=dict(together))
        try:
            replace(_record(backup.copy), _to_json(backup))
            replace(real, data)
        except BaseException:
            with contextlib.suppress(OSError):
                _record(backup.copy).unlink()
            raise
    return backup


def finish(backup: Backup) -> None:
    """Note that all the files which were to be changed as one have their new text."""
    with _told(backup.file):
        replace(_record(backup.copy), _to_json(msgspec.structs.replace(backup, done=True)), backup.file.stat())


def undo(path: Path, force: bool = False) -> Backup:
    """Put back the text before the latest write, and forget that write; what came before can be undone next.

    With `force` also when somebody changed the file since: that text is then kept as a backup of its own.
    """
    with _told(path):
        real = path.resolve(strict=True)
        found = backups(real)
    if not found:
        raise NoBackup(f"{path} has no backup beside it", "Only a change made by this tool can be undone.")
    backup = found[-1]
    if backup.created:
        return _unmake(path, backup, force)
    with _told(path):
        now, old, status = real.read_bytes(), backup.copy.read_bytes(), real.stat()
    if sha256(old) != backup.old_sha256:
        hint = f"Look at {backup.copy} and copy it back by hand if it is what you want."
        raise RepairError(f"the backup {backup.copy} was changed", hint)
    changed = sha256(now) not in (backup.new_sha256, backup.old_sha256)
    if changed and not force:
        hint = f"Compare it with {backup.copy}; force the undo to put that back (today's text is kept too)."
        raise RepairError(f"{path} was changed after the repair", hint)
    with _told(path):
        if changed:
            _exchange(real, now, old, status)
        elif now != old:
            replace(real, old, status)
        _forget(backup)
    return backup


def _forget(backup: Backup) -> None:
    """The record first: a copy alone is nothing to undo, a record alone would be a lie."""
    _record(backup.copy).unlink()
    backup.copy.unlink(missing_ok=True)


def backups(path: Path) -> list[Backup]:
    """The writes of this file that can be taken back, oldest first."""
    real = path.resolve()
    found = []
    for record in real.parent.glob(glob.escape(real.name) + BACKUP + "*.json"):
        copy = record.with_suffix("")
        try:
            data = msgspec.json.decode(record.read_bytes(), type=_Record)
        except (OSError, msgspec.DecodeError):
            continue  # not one of ours: ours are complete or absent
        if data.created or copy.exists():
            found.append(Backup(real, copy, data.old_sha256, data.new_sha256, data.created, 1, data.run,
                                data.together, data.done))  # fmt: skip
    return sorted(found, key=lambda backup: backup.copy.name)


class _Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """A backup as it lies on the disk."""

    file: str
    old_sha256: str
    new_sha256: str
    created: bool = False
    run: str = ""
    together: dict[str, tuple[str, str]] = {}
    done: bool = False


def _unmake(path: Path, backup: Backup, force: bool) -> Backup:
    """Remove a file that this tool made, unless somebody wrote into it since."""
    with _told(path):
        if sha256(backup.file.read_bytes()) != backup.new_sha256 and not force:
            seen = f"{path} was changed after this tool made it"
            raise RepairError(seen, "Remove it by hand if you do not want it.")
        backup.file.unlink()
        _record(backup.copy).unlink()
    return backup


def _exchange(
    real: Path, old: bytes, new: bytes, status: os.stat_result, run: str = "",
    together: Together = MappingProxyType({}),
) -> Backup | None:  # fmt: skip
    if old == new:
        return None
    _tidy(real, old)
    backup = Backup(
        real, _free_name(real), sha256(old), sha256(new), names=status.st_nlink, run=run, together=dict(together)
    )
    try:
        replace(backup.copy, old, status)
        replace(_record(backup.copy), _to_json(backup), status)
        replace(real, new, status)
    except BaseException:
        for path in (_record(backup.copy), backup.copy):  # nothing was written, so there is nothing to undo
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    return backup


def _tidy(real: Path, text: bytes) -> None:
    """Remove what a kill in the middle of an earlier write left behind.

    These are backups that would put back what the file says anyway, with or without their record, and parts of texts
    under temporary names (of `files.replace`) that nobody has written to for an hour.
    """
    for backup in reversed(backups(real)):
        if backup.old_sha256 != sha256(text):
            break
        _forget(backup)
    for path in real.parent.glob(glob.escape(real.name) + BACKUP + "*"):
        with contextlib.suppress(OSError):
            if path.suffix != ".json" and not _record(path).exists() and path.read_bytes() == text:
                path.unlink()
    for path in real.parent.glob("." + glob.escape(real.name[:100]) + "*.tmp"):
        with contextlib.suppress(OSError):
            ours = _TEMPORARY.fullmatch(path.name[1 + len(real.name[:100]) :])
            if ours and time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def _free_name(real: Path) -> Path:
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
    name = real.with_name(real.name + BACKUP + stamp)
    for number in range(1, 1000):
        if not name.exists():
            return name
        name = real.with_name(f"{real.name}{BACKUP}{stamp}-{number:03}")
    raise FileExistsError(errno.EEXIST, "no free name for the backup", str(name))


def _record(copy: Path) -> Path:
    return copy.with_name(copy.name + ".json")


def _to_json(backup: Backup) -> bytes:
    record = _Record(backup.file.name, backup.old_sha256, backup.new_sha256, backup.created, backup.run,
                     backup.together, backup.done)  # fmt: skip
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lines(text: str) -> list[str]:
    """Lines as `patch` counts them: by \\n alone, which str.splitlines does not."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """System errors as one sentence and the next step."""
    try:
        yield
    except OSError as error:
        raise RepairError(*_explained(path, error)) from error
    except RuntimeError as error:  # pathlib before Python 3.13 says so of links in a circle
        raise RepairError(f"{path} cannot be followed: {error}", "Mend the symbolic link.") from error


def _explained(path: Path, error: OSError) -> tuple[str, str]:
    where = path.parent.resolve()
    if error.errno in (errno.EACCES, errno.EPERM):
        seen = f"no permission to read or write {path} and its folder {where}"
        return seen, "The folder must be writable too: the new file is made beside the old one."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk or quota of {where} is full", f"Free some space (`df -h {where}`) and try again."
    if error.errno == errno.EROFS:
        return f"{where} is on a read-only file system", "Copy the file to a writable place and repair it there."
    if error.errno == errno.ENOENT:
        return f"{path} is not there (any more)", "Check the path; nothing was written."
    if error.errno == errno.ELOOP:
        return f"{path} is a symbolic link in a circle", "Mend the symbolic link."
    return f"{path}: {error.strerror or error}", "Nothing was changed; mend this and try again."
