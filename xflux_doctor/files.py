"""Writing files so that a crash leaves the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import stat
from pathlib import Path

from xflux_doctor.errors import DoctorError

BACKUP = ".xflux-doctor.bak-"
"""Stands behind a file's name in the names of its backups (repair.py)."""


def has_backup(path: Path) -> bool:
    """Whether there may be something to undo: a look at the names, for every start of the doctor."""
    try:
        real = path.resolve()
        return any(entry.name.startswith(real.name + BACKUP) for entry in real.parent.iterdir())
    except (OSError, RuntimeError):  # a link in a circle, before Python 3.13
        return False


def write_atomic(path: Path, text: str) -> None:
    """Give a file a text, whole or not at all. Raises DoctorError in the user's words."""
    data = text.encode("utf-8", "backslashreplace")  # names of files may hold bytes that are no text
    try:
        path = path.resolve()  # a link stays, what it leads to is written
        if path.exists() and not path.is_file():
            path.write_bytes(data)  # a device or a pipe is written to, never replaced
        else:
            replace(path, data)
    except (OSError, RuntimeError) as error:
        raise DoctorError(
            f"{path} could not be written: {getattr(error, 'strerror', error)}.",
            "Choose a folder with room that you may write to.",
        ) from error


def replace(path: Path, data: bytes, like: os.stat_result | None = None) -> None:
    """Write a whole file or nothing, on the disk when this returns.

    Owner and mode are those of `like`; without it, the mode that this user's new files have.
    """
    folder = path.parent
    tempfile = importlib.import_module("tempfile")  # not for every start of the doctor
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            if like is not None:
                with contextlib.suppress(PermissionError):  # the owner can be kept by root only
                    os.fchown(file.fileno(), like.st_uid, like.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(like.st_mode))
            else:  # mkstemp makes 0600
                os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)  # noqa: PTH105
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)  # noqa: PTH108
        raise
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last. Some network file systems cannot, and have no need to."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
