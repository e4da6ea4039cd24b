"""Write files so that a crash, a full disk or a pulled plug leaves the old file or the new one, never half of one."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xflux_trainer.errors import WriteError
from xflux_trainer.pulse import PULSE

TEMPORARY = ".xflux-tmp-"
"""Start of the names of files and folders that are still being written."""


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path`: written beside it, flushed to the disk, then renamed."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends well, and vanishes when it does not.

    The block flushes what it writes to the disk.
    """
    with sentences(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not."""
    with sentences(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _sync_folder(temporary)
            if path.exists():  # the same step again, after a resume from an earlier one
                _exchange(temporary, path)
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(path.parent)


def _exchange(new: Path, old: Path) -> None:
    """Let two folders change names. At no moment is there none of the name `old`, where the system can do that."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "renameat2", None)  # glibc 2.28, Linux 3.15
    here, exchange = -100, 2
    if call is None or call(here, os.fsencode(new), here, os.fsencode(old), exchange) != 0:
        between = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=old.parent))
        old.replace(between)
        new.replace(old)
        between.replace(new)


def make_folder(path: Path, what: str = "") -> None:
    """Make the folder, and see that files can be written there before hours are spent on what goes into it; `what` it
    is stands before its path where it cannot be."""
    with sentences(path, what):
        path.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path)
        os.close(handle)
        Path(name).unlink(missing_ok=True)  # rank 0 may have removed it among the leftovers


def remove_leftovers(folder: Path) -> None:
    """Remove what a run that was killed was writing at that moment. Others may remove some of it meanwhile."""
    for path in list(folder.glob(f"{TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            PULSE.tick()  # of a large file on a slow disk: it goes on
    return digest.hexdigest()


def _umask() -> int:
    # The only way to read it is to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


@contextmanager
def sentences(path: Path, what: str = "") -> Iterator[None]:
    """Turn what the system says about writing into a sentence and a next step."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "Free some space, or set output_dir to another disk.",
            errno.EDQUOT: "Free some of your quota, or set output_dir to another disk.",
            errno.EACCES: "Allow writing there, or set output_dir to another folder.",
            errno.EPERM: "Allow writing there, or set output_dir to another folder.",
            errno.EROFS: "Set output_dir to a folder that can be written to.",
            errno.ENOTDIR: "A file stands where a folder is wanted: name another folder.",
            errno.EEXIST: "A file stands where a folder is wanted: name another folder.",
            errno.EISDIR: "A folder stands where a file is wanted: name a file.",
        }
        if error.errno not in hints:
            raise
        reason = (error.strerror or str(error)).lower()
        raise WriteError(f"Cannot write {what}{path}: {reason}.", hints[error.errno]) from error
