"""A cgroup of version 1 with a memory limit, really made and removed again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup/memory")


def own_group() -> Path:
    """The folder of this process's own group. Skips where a group cannot be made inside it."""
    if not (ROOT / "memory.limit_in_bytes").exists():
        pytest.skip("no memory controller of cgroup version 1 here")
    lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    path = next((line.split(":", 2)[2] for line in lines if "memory" in line.split(":")[1].split(",")), "/")
    folder = ROOT / path.lstrip("/")
    if not os.access(folder, os.W_OK):
        pytest.skip(f"no group can be made in {folder}")
    return folder


@contextmanager
def limited(limit: int) -> Iterator[Path]:
    """A group whose processes together get `limit` bytes; it is gone afterwards."""
    folder = own_group() / f"xflux-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no group can be made here: {error}")
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit), encoding="ascii")
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    for _ in range(100):  # a process that has just ended may still be in it
        with suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.05)
    folder.rmdir()


def inside(folder: Path, *argv: str) -> list[str]:
    """A command line that enters the group before it becomes `argv`."""
    return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs"), *argv]
