"""`run --attach` to a run that another machine leads: real files that a real process goes on writing, or does not."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from death_kit import Run

from xflux_doctor import runstate
from xflux_doctor.attach import attach
from xflux_doctor.lifesigns import Signs
from xflux_doctor.watcher import Watcher

ELSEWHERE = "node-17"
# Writes to one file 20 times, then stops; leaves a date of last year or of the next one on it, as a wrong clock does.
WRITES = """
import os, sys, time
name, away = sys.argv[1], float(sys.argv[2])
for step in range(20):
    with open(name, "a") as file:
        file.write(f"step {step}/100  loss 1\\n")
    os.utime(name, (time.time() + away + step,) * 2)
    time.sleep(0.15)
"""
WRITTEN = 3.0
SILENCE = 1.2


def folder_of(place: Path, *, seen_as: Path | None = None, **changes: object) -> Path:
    """A run folder that ELSEWHERE leads; `seen_as`: under which path that machine has it."""
    (place / "logs").mkdir(parents=True)
    (place / "logs/run-1.log").write_text("loading\n")
    log = str((seen_as or place) / "logs/run-1.log")
    state = {"pid": 4711, "started": 1, "host": ELSEWHERE, "log": log, "exit_code": None, **changes}
    (place / "run.json").write_text(json.dumps(state))
    return place


@pytest.fixture
def writer() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(path: Path, away: float = 0.0) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", WRITES, str(path), str(away)]))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


@pytest.mark.parametrize(("name", "away"), [
    ("logs/run-1.log", 0.0), ("logs/run-1.log", -4e7), ("heartbeats/rank0.json", 4e7), ("metrics.jsonl", 0.0),
])  # fmt: skip
def test_it_follows_while_signs_come_and_says_since_when_none_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], writer: Callable[..., subprocess.Popen[bytes]], name: str,
    away: float,
) -> None:  # fmt: skip
    """A clock that is wrong by a year on either side changes nothing."""
    folder = folder_of(tmp_path / "run", seen_as=Path("/mnt/there/run"))
    (folder / name).parent.mkdir(exist_ok=True)
    started, child = time.monotonic(), writer(folder / name, away)
    assert attach(folder, raw=True, silence=SILENCE) == 1
    took = time.monotonic() - started
    assert child.poll() is not None and took > WRITTEN + SILENCE / 2
    said = capfd.readouterr().out
    assert f"led by process 4711 on {ELSEWHERE}" in said and "counts as gone when nothing" in said
    since = time.strptime(said.split("has changed since ")[1][:19], "%Y-%m-%d %H:%M:%S")
    assert 0 < time.time() - time.mktime(since) < SILENCE + 10
    assert "is gone" in said and "resume_from_checkpoint: latest" in said and "ps -fp 4711" in said
    assert ("step 19/100" in said) == name.startswith("logs")
    assert ("goes on writing its metrics" in said) == (name == "metrics.jsonl")


def test_a_run_that_is_long_dead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "run")
    for path in folder.rglob("*"):
        os.utime(path, (1.7e9, 1.7e9))
    assert attach(folder, silence=SILENCE) == 1
    said = capsys.readouterr().out
    assert "has changed for the 1 s that it was looked at" in said and "its newest file is of 2023-11-1" in said


def test_the_end_that_it_says_itself_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attach(folder_of(tmp_path / "one", exit_code=0), silence=SILENCE) == 0
    assert attach(folder_of(tmp_path / "two", exit_code=3), silence=SILENCE) == 3
    assert "counts as gone" not in capsys.readouterr().out


def test_the_time_that_nobody_looked_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks on was stopped for an hour."""
    folder = folder_of(tmp_path / "run")
    state = runstate.read(folder)
    assert state is not None
    signs = Signs(folder, 60.0)
    signs.look(state)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    signs.look(state)
    assert not signs.silent and signs.since is None


def test_a_doctor_that_watches_gives_signs(tmp_path: Path) -> None:
    """Without any beat of a rank; and it makes no file where there was none."""
    folder = folder_of(tmp_path / "run")
    os.utime(folder / "run.json", (1.7e9, 1.7e9))
    (tmp_path / "beating").mkdir()
    for place in (folder, tmp_path):
        watcher = Watcher(tmp_path / "beating", place, os.getpgid(0), lambda _: None, after=None)
        watcher._copy()
        watcher._recorder.close(10.0)
    assert (folder / "run.json").stat().st_mtime > 1.7e9 + 1 and not (tmp_path / "run.json").exists()


def _own_name() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-u", "hostname", ELSEWHERE], capture_output=True, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs a stack of the matrix")
@pytest.mark.skipif(not _own_name(), reason="`unshare -u` is not permitted here")
def test_a_run_of_another_machine_that_is_switched_off(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another host's name for a real run, all of whose processes are killed at once."""
    with Run(tmp_path, model, ranks=1) as run:
        run.before = ("unshare", "-u", "sh", "-c", f'hostname {ELSEWHERE}; exec "$@"', "sh")
        run.start()
        run.training()
        state = runstate.read(run.out)
        assert state is not None and state.host == ELSEWHERE != socket.gethostname()
        attached = subprocess.Popen(
            [sys.executable, "-c", "import sys; from pathlib import Path; from xflux_doctor.attach import attach; "
             "sys.exit(attach(Path(sys.argv[2]), silence=25.0))", "--attach", str(run.out)],
        )  # fmt: skip
        time.sleep(40)
        assert attached.poll() is None
        assert run.process is not None
        for pid in (state.pid, *run.pids()):
            os.kill(pid, signal.SIGKILL)
        assert attached.wait(60) == 1
    assert "has changed since" in capfd.readouterr().out
