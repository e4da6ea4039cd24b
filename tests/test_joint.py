"""Two files repaired as one: an error, a kill at any system call and an undo leave both old or both new."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import XFLUX_ACCELERATE, machine, record
from kill_kit import kill_at

from xflux_doctor import joint, repair
from xflux_doctor.cli import main
from xflux_doctor.joint import Change
from xflux_doctor.matrix import Matrix

DDP = XFLUX_ACCELERATE.replace("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU")
TRAIN = "model_name: flux-dev\ngradient_accumulation_steps: 2\ndata_config:\n  img_dir: .\n"


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where that is possible: `fsync` of a disk takes most of the time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


def two(folder: Path) -> list[Change]:
    changes = [Change(folder / name, f"{name} old\n", f"{name} new\n") for name in ("a.yaml", "b.yaml")]
    for change in changes:
        change.path.write_text(change.old or "")
    return changes


def texts(changes: list[Change]) -> list[str]:
    return [change.path.read_text().split()[1] for change in changes]


def test_a_kill_between_two_files_is_found_and_taken_back(folder: Path) -> None:
    changes, met = two(folder), set()
    paths = [change.path for change in changes]
    for number in itertools.count(1):
        where = kill_at(lambda: joint.write(changes, "mark"), number)
        now = texts(changes)
        met.add(tuple(now))
        for order in (paths, paths[::-1]):
            found = joint.broken_off(order)
            assert (found is not None) == (now == ["new", "old"]), where
        if found is not None:
            assert (found.written, found.waiting) == ((paths[0],), (paths[1],))
            joint.take_back(found)
            assert texts(changes) == ["old", "old"], where
            assert joint.broken_off(paths) is None, where
        for path in paths:
            while path.read_text().endswith("new\n"):
                repair.undo(path)
        for part in sorted(folder.glob(".*.tmp"))[1:]:
            part.unlink()
        if not where:
            break
    assert met == {("old", "old"), ("new", "old"), ("new", "new")}


def test_an_error_in_the_second_file_puts_the_first_back(folder: Path) -> None:
    changes = two(folder)
    changes[1].path.write_text("somebody else's\n")
    with pytest.raises(repair.RepairError, match="was changed while the repair"):
        joint.write(changes, "mark")
    assert changes[0].path.read_text() == "a.yaml old\n" and repair.backups(changes[0].path) == []
    assert changes[1].path.read_text() == "somebody else's\n"


def test_a_made_file_goes_too_when_the_other_cannot_be_written(folder: Path) -> None:
    made = Change(folder / "made.yaml", None, "new\n")
    other = Change(folder / "b.yaml", "not what it says\n", "new\n")
    other.path.write_text("old\n")
    with pytest.raises(repair.RepairError):
        joint.write([made, other], "mark")
    assert not made.path.exists() and other.path.read_text() == "old\n"


def test_what_the_user_does_afterwards_is_not_a_repair_broken_off(folder: Path) -> None:
    changes = two(folder)
    paths = [change.path for change in changes]
    joint.write(changes, "mark")
    assert joint.broken_off(paths) is None
    paths[1].write_text("b.yaml old\n")  # git checkout b.yaml
    assert joint.broken_off(paths) is None
    paths[1].write_text("b.yaml mine\n")
    assert joint.broken_off(paths) is None
    paths[1].unlink()
    assert joint.broken_off([paths[0], folder / "none.yaml"]) is None


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: Matrix) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("accelerate.yaml").write_text(DDP)
    Path("train.yaml").write_text(TRAIN)
    record(Path("facts.json"), machine(matrix, count=2))
    return ["--facts", "facts.json", "--config", "train.yaml", "--accelerate-config", "accelerate.yaml"]


def half() -> None:
    """As after a kill: accelerate's file is written, the training file is not."""
    new = DDP.replace("num_processes: 8", "num_processes: 2")
    train = TRAIN.replace("steps: 2", "steps: 8")
    together = {str(Path(name).resolve()): (repair.sha256(old.encode()), repair.sha256(text.encode()))
                for name, old, text in (("accelerate.yaml", DDP, new), ("train.yaml", TRAIN, train))}  # fmt: skip
    repair.write(Path("accelerate.yaml"), new, DDP, run="mark", together=together)


def test_no_command_goes_on_with_half_a_repair(job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks with the old accumulation would train on a quarter of the samples a step, without a word."""
    half()
    assert main(["check", *job]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "The last repair was broken off: accelerate.yaml was written and train.yaml was not" in said
    assert main(["run", "--dry-run", *job]) == 1
    assert main(["fix", *job]) == 1
    assert "num_processes: 2" in Path("accelerate.yaml").read_text()
    capsys.readouterr()
    main(["fix", "--write-config", "--yes", *job])
    assert "has its old text again" in capsys.readouterr().out
    assert "num_processes: 2\n" in Path("accelerate.yaml").read_text()
    assert "gradient_accumulation_steps: 8" in Path("train.yaml").read_text()


def test_undo_takes_half_a_repair_back(job: list[str]) -> None:
    half()
    assert main(["fix", "--undo", *job]) == 0
    assert (Path("accelerate.yaml").read_text(), Path("train.yaml").read_text()) == (DDP, TRAIN)


def test_undo_takes_back_what_one_command_wrote_and_no_more(job: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["fix", "--write-config", "--yes", *job])
    first = (Path("accelerate.yaml").read_text(), Path("train.yaml").read_text())
    assert "steps: 8" in first[1]
    Path("accelerate.yaml").write_text(first[0].replace("bf16", "bfloat16"))
    main(["fix", "--write-config", "--yes", *job])
    assert (Path("accelerate.yaml").read_text(), Path("train.yaml").read_text()) == first
    capsys.readouterr()
    assert main(["fix", "--undo", *job]) == 0  # the second alone: the training file stays
    assert "bfloat16" in Path("accelerate.yaml").read_text() and Path("train.yaml").read_text() == first[1]
    Path("accelerate.yaml").write_text(first[0])
    assert main(["fix", "--undo", *job]) == 0
    assert (Path("accelerate.yaml").read_text(), Path("train.yaml").read_text()) == (DDP, TRAIN)
