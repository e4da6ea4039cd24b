"""`kill -9` at every system call of a write, an undo and the making of a file: the old or the new text, whole."""

from __future__ import annotations

import itertools
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kill_kit import kill_at

from xflux_doctor import repair

OLD, NEW = "num_processes: 8\n" + "# old\n" * 2000, "num_processes: 2\n" + "# new\n" * 4000
MODE = 0o640


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where that is possible: a kill is not a power cut, and `fsync` of a disk takes most of the time."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def put(folder: Path) -> Path:
    path = folder / "accelerate.yaml"
    path.write_text(OLD)
    path.chmod(MODE)
    return path


def whole(path: Path, where: str) -> str:
    text = path.read_text()
    assert text in (OLD, NEW), f"killed at {where}: {len(text)} characters are neither the old text nor the new"
    assert stat.S_IMODE(path.stat().st_mode) == MODE, f"killed at {where}: the mode is {path.stat().st_mode:o}"
    return text


def to_and_fro(path: Path, where: str) -> None:
    """Whatever was left behind: the file can be written and that be undone, to the byte."""
    if path.read_text() == OLD:
        assert repair.write(path, NEW, was=OLD) is not None, where
    assert whole(path, where) == NEW
    assert repair.backups(path), f"killed at {where}: the new text has no backup"
    repair.undo(path)
    assert whole(path, where) == OLD, f"killed at {where}: undo does not bring the old text back"


def loop(folder: Path, act: Callable[[Path], object], before: Callable[[Path], object] = lambda _: None) -> set[str]:
    """Kill at stop 1, 2, 3 … until it ends by itself; the texts that were met. A kill's leftovers stay for the next."""
    path, met = put(folder), set()
    for number in itertools.count(1):
        before(path)
        where = kill_at(lambda: act(path), number)
        met.add(whole(path, where))
        to_and_fro(path, where)
        for part in sorted(folder.glob(".*.tmp"))[1:]:
            part.unlink()  # one stays: a heap of them would make every next write longer than the count of its kills
        if not where:
            assert number > 40, "no system calls were seen"
            return met
    raise AssertionError


def tidy(folder: Path) -> None:
    """Leftovers go with the first write after an hour; one write and its undo leave the file alone."""
    left = [path for path in folder.iterdir() if path.name != "accelerate.yaml"]
    assert all(path.suffix == ".tmp" or ".bak-" in path.name for path in left)
    assert sum(".tmp" not in path.name for path in left) <= 2  # a backup of the last kill, no heap of them
    for path in left:
        os.utime(path, (time.time() - 7200,) * 2)
    path = folder / "accelerate.yaml"
    repair.write(path, NEW, was=OLD)
    repair.undo(path)
    assert [path.name for path in folder.iterdir()] == ["accelerate.yaml"]


def test_write(folder: Path) -> None:
    assert loop(folder, lambda path: repair.write(path, NEW, was=OLD)) == {OLD, NEW}
    tidy(folder)


def test_undo(folder: Path) -> None:
    def ready(path: Path) -> None:
        repair.write(path, NEW, was=OLD)

    assert loop(folder, repair.undo, ready) == {OLD, NEW}
    tidy(folder)


def test_an_undo_that_was_killed_is_finished_by_the_next(folder: Path) -> None:
    path = put(folder)
    for number in itertools.count(1):
        repair.write(path, NEW, was=OLD)
        where = kill_at(lambda: repair.undo(path), number)
        if not where:
            break
        try:
            repair.undo(path)
        except repair.NoBackup:  # it was through but for the copy's name
            assert path.read_text() == OLD, where
        assert whole(path, where) == OLD
        assert repair.backups(path) == []


def test_create(folder: Path) -> None:
    path, met = folder / "accelerate.yaml", set()
    for number in itertools.count(1):
        where = kill_at(lambda: repair.create(path, NEW), number)
        met.add(path.exists())
        if path.exists():
            assert path.read_text() == NEW, where
        else:
            repair.create(path, NEW)
        assert repair.undo(path).created
        assert not path.exists()
        if not where:
            break
    assert met == {True, False}
    repair.create(path, NEW)
    assert len(repair.backups(path)) == 1  # records of what a kill prevented are gone


def test_removing_a_made_file(folder: Path) -> None:
    path = folder / "accelerate.yaml"
    for number in itertools.count(1):
        repair.create(path, NEW)
        where = kill_at(lambda: repair.undo(path), number)
        if path.exists():
            assert path.read_text() == NEW, where
            repair.undo(path)
        assert not path.exists()
        if not where:
            return


def test_the_loop_finds_a_write_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: with a plain `open(path, "w").write(text)` there is a moment with nothing in the file."""
    rename = repair.replace

    def in_place(path: Path, data: bytes, like: os.stat_result | None = None) -> None:
        if path.name == "accelerate.yaml":
            path.write_bytes(data)
        else:
            rename(path, data, like)

    monkeypatch.setattr(repair, "replace", in_place)
    with pytest.raises(AssertionError, match="neither the old text nor the new"):
        loop(folder, lambda path: repair.write(path, NEW, was=OLD))


@pytest.mark.parametrize("late", ["accelerate.yaml.xflux-doctor.bak-", "accelerate.yaml"])
def test_the_loop_finds_a_backup_that_comes_too_late(folder: Path, monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    """Another: a copy or a mode that is given only after the new text stands there."""
    really = repair.replace

    def wrong(path: Path, data: bytes, like: os.stat_result | None = None) -> None:
        if late == "accelerate.yaml" and path.name == late:
            really(path, data)  # with the mode of a new file,
            assert like is not None
            os.chmod(path, stat.S_IMODE(like.st_mode))  # which is corrected a moment later
        elif late != "accelerate.yaml" and path.name.endswith(".json"):
            really(path.with_name("accelerate.yaml"), NEW.encode(), like)
            really(path, data, like)
        else:
            really(path, data, like)

    monkeypatch.setattr(repair, "replace", wrong)
    with pytest.raises((AssertionError, repair.NoBackup)):
        loop(folder, lambda path: repair.write(path, NEW, was=OLD))
