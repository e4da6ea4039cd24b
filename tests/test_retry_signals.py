"""A signal that comes when a training has died and its next attempt has not begun: nothing more is started."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from death_kit import Run

NEEDED = ("torch", "accelerate", "diffusers")
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED), reason="needs a stack of the matrix"
)
INT, TERM, NOTICE = signal.SIGINT, signal.SIGTERM, signal.SIGUSR2


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the runs share."""
    return tmp_path_factory.mktemp("entries")


@pytest.fixture
def job(tmp_path: Path, model: Path, entries: Path) -> Iterator[Run]:
    """A run of one rank that may start again twice."""
    with Run(tmp_path, model, ranks=1, cache=entries, checkpointing_steps=50) as job:
        yield job


def logs(job: Run) -> list[Path]:
    return sorted((job.out / "logs").glob("run-*.log"))


def ends(job: Run, code: int) -> None:
    """By that code, with nobody left, and the run folder says so."""
    assert job.end() == code, job.shown
    assert job.result["exit_code"] == code and job.result["cause"] is None
    assert json.loads((job.out / "run.json").read_text())["exit_code"] == code
    assert json.loads((job.out / "history.jsonl").read_text().splitlines()[-1])["exit_code"] == code


@pytest.mark.parametrize(("number", "code"), [
    (TERM, 143), pytest.param(INT, 130, marks=pytest.mark.long), pytest.param(NOTICE, 75, marks=pytest.mark.long),
])  # fmt: skip
def test_while_the_log_is_read(job: Run, number: signal.Signals, code: int) -> None:
    """The log is made one that takes for ever: a pipe that nobody writes to."""
    job.start("--retries", "2")
    pid = job.training()[0].pid
    (log,) = logs(job)
    log.unlink()
    os.mkfifo(log)
    os.kill(pid, signal.SIGKILL)
    with log.open("wb") as pipe:  # the exit code is looked for first
        pipe.write(b"failed (exitcode: -9) local_rank: 0 (pid: 1) of binary: python\n")
    job.signal(number)
    if code == 75:  # the folder has the signal's own code: what requeues is between the doctor and the scheduler
        assert job.end() == code and job.result["exit_code"] == 143
    else:
        ends(job, code)
    assert job.result["trainer_exit_code"] == -9 and job.result["signal"] in (number, TERM)
    assert logs(job) == [log] and stat.S_ISFIFO(log.stat().st_mode) and "retry 1" not in job.shown


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143)])
def test_when_the_next_attempt_is_said(job: Run, number: signal.Signals, code: int) -> None:
    """It is not to be lost between the doctor's own handlers and those that pass it on."""
    job.start("--retries", "2")
    os.kill(job.training()[0].pid, signal.SIGKILL)
    job.until(lambda: "retry 1 of 2" in job.shown)
    job.signal(number)
    ends(job, code)
    assert len(logs(job)) == 2


@pytest.mark.long
def test_a_hangup_between_two_attempts_ends_nothing(job: Run) -> None:
    job.start("--retries", "2")
    os.kill(job.training()[0].pid, signal.SIGKILL)
    job.until(lambda: len(logs(job)) == 2)
    job.signal(signal.SIGHUP)
    job.training()
    job.signal(INT)
    ends(job, 130)
    assert "retry 1 of 2" in job.shown
