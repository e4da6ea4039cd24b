"""Soaks and fuzzing; run by `make test-long`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, job, machine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xflux_doctor import job as job_files
from xflux_doctor.check import examine
from xflux_doctor.checks import ALL
from xflux_doctor.facts import to_json
from xflux_doctor.matrix import Matrix, load

pytestmark = pytest.mark.long


def test_fix_killed_at_any_moment_leaves_the_old_file_or_the_new(tmp_path: Path, matrix: Matrix) -> None:
    """200 kills, from the first byte code to after the end."""
    file = tmp_path / "accelerate.yaml"
    (tmp_path / "facts.json").write_text(to_json(machine(matrix, count=2)))
    command = [sys.executable, "-m", "xflux_doctor.cli", "fix", "--write-config", "--yes", "--accelerate-config",
               str(file), "--facts", str(tmp_path / "facts.json"), "--stack", "cuda13"]  # fmt: skip
    new = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2")
    new = new.replace("gradient_accumulation_steps: 2", "gradient_accumulation_steps: 8")  # a step's samples stay
    file.write_text(XFLUX_ACCELERATE)
    started = time.monotonic()
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - started
    assert file.read_text() == new
    chance, ends = random.Random(20261124), {"old": 0, "new": 0}
    for _ in range(200):
        file.write_text(XFLUX_ACCELERATE)
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # most of the work, and all of the writing, is in the last third
        time.sleep(chance.uniform(0.5 * whole, 1.1 * whole))
        process.kill()
        process.wait()
        text = file.read_text()
        assert text in (XFLUX_ACCELERATE, new)
        ends["new" if text == new else "old"] += 1
    print("fix killed 200 times:", ends)
    assert ends["old"] and ends["new"]  # the moments were not all before or all after


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.one_of(st.binary(max_size=400), st.text(max_size=400).map(lambda t: t.encode())))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("accelerate.yaml", "train.yaml"):
        (folder / name).write_bytes(content)
    read = job_files.read(str(folder / "train.yaml"), str(folder / "accelerate.yaml"), folder=folder)
    assert read.train is not None or any(p.file == "train" for p in read.problems)
    assert read.accelerate is not None or any(p.file == "accelerate" for p in read.problems)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-5, 99), st.floats(allow_nan=False), st.text(max_size=12),
                   st.lists(st.integers(), max_size=3),
                   st.dictionaries(st.text(max_size=5), st.integers(), max_size=3))  # fmt: skip
KEYS = sorted({line.partition(":")[0].strip() for line in XFLUX_ACCELERATE.splitlines()})


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=10)), VALUES, max_size=4),
       count=st.integers(0, 8))  # fmt: skip
def test_no_check_crashes_on_any_accelerate_values(changes: dict[str, object], count: int) -> None:
    matrix = load()
    work = job()
    work = msgspec.structs.replace(work, accelerate={**(work.accelerate or {}), **changes})
    facts = machine(matrix, card="H100" if count else None, count=count or 1)
    verdicts = examine(case(matrix, facts, work), ALL)
    assert [(v.check, v.reason) for v in verdicts if v.status == "crashed"] == []


def test_the_group_dies_with_the_doctor_each_time(tmp_path: Path) -> None:
    """The doctor is killed 20 times while a run with two ranks is up; nothing may stay."""
    rank = "import time; time.sleep(120)"
    launcher = (
        "import subprocess, sys, time\n"
        f"pids = [subprocess.Popen([sys.executable, '-c', {rank!r}]).pid for _ in range(2)]\n"
        "print(*pids, flush=True); time.sleep(120)\n"
    )
    doctor = (
        "import sys, os\nfrom pathlib import Path\n"
        "from xflux_doctor.launch import Launch\nfrom xflux_doctor.supervise import run\n"
        f"launch = Launch((sys.executable, '-c', {launcher!r}), dict(os.environ), {{}})\n"
        "run(launch, Path(sys.argv[1]), lambda _: None)\n"
    )
    for attempt in range(20):
        log = tmp_path / f"log{attempt}"
        process = subprocess.Popen([sys.executable, "-c", doctor, str(log)])
        deadline = time.monotonic() + 20
        while not log.exists() or not log.read_text().endswith("\n"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for pid in map(int, log.read_text().split()):
            deadline = time.monotonic() + 10
            while _lives(pid):
                assert time.monotonic() < deadline, f"{pid} stays"
                time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
