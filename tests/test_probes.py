"""Probes against real children: torches that crash, hang or raise, and real reductions where torch is here."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import XFLUX_ACCELERATE, job, machine

from xflux_doctor.checks import ALL
from xflux_doctor.errors import DoctorError
from xflux_doctor.facts import Facts, PythonFacts
from xflux_doctor.matrix import Matrix
from xflux_doctor.probes import level, reduction, runner
from xflux_doctor.probes.runner import Child, run

HAS_TORCH = importlib.util.find_spec("torch") is not None
STUBS = {
    "raises": "raise ImportError('libcudnn.so.9: cannot open shared object file')",
    "segfaults": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "time.sleep(600)"
    ),
}


def stub(tmp_path: Path, kind: str) -> dict[str, str]:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"open({str(tmp_path / 'pid')!r}, 'w').write('x')\n{STUBS[kind]}\n")
    path = os.pathsep.join((str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])))
    return {**os.environ, "PYTHONPATH": path, "STUB_MARK": str(tmp_path)}


def here(matrix: Matrix) -> Facts:
    """A machine without GPUs whose interpreter is this one."""
    return machine(matrix, card=None, stack="cpu", python_facts=PythonFacts(sys.executable, "3.11", sys.prefix))


def test_a_machine_without_room_for_temporary_files_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """/tmp and /dev/shm are both full, or both cannot be written."""
    assert Path(runner.scratch()).is_dir()
    monkeypatch.setattr(runner, "ROOM", 1 << 62)
    with pytest.raises(DoctorError, match="No temporary folder") as told:
        runner.scratch()
    assert "TMPDIR" in told.value.hint


def assert_gone(mark: str) -> None:
    """A process that was killed a moment ago may still be on its way out."""
    deadline = time.monotonic() + 5
    while left := alive(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def alive(mark: str) -> list[int]:
    """Processes that were started with our mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if f"STUB_MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize(("kind", "words"), [
    ("raises", "import torch raised ImportError: libcudnn.so.9"),
    ("segfaults", "import torch died by SIGSEGV"),
    ("hangs", "import torch did not end within"),
])  # fmt: skip
def test_broken_torch_is_a_fact(matrix: Matrix, tmp_path: Path, kind: str, words: str) -> None:
    environment = stub(tmp_path, kind)
    facts = here(matrix)
    started = time.monotonic()
    after = level.probe(facts, job(cpu=True), environment, seconds=3.0 if kind == "hangs" else 30.0)
    assert time.monotonic() - started < 20
    assert after.torch is None and words in after.unknown["torch"]
    assert after.unknown["allreduce"] == "torch could not be imported"
    assert_gone(str(tmp_path))


@pytest.mark.parametrize(("kind", "words"), [
    ("raises", "ImportError: libcudnn.so.9"), ("segfaults", "SIGSEGV"), ("hangs", "did not end within"),
])  # fmt: skip
def test_check_with_a_broken_torch_reports_everything_else(tmp_path: Path, kind: str, words: str) -> None:
    """Through the command line: SW106 names it, all other checks have their verdict, the deadline holds."""
    seconds = "5" if kind == "hangs" else "30"
    argv = [sys.executable, "-m", "xflux_doctor.cli", "check", "--cpu", "--timeout", seconds, "--format", "json"]
    started = time.monotonic()
    done = subprocess.run(argv, env=stub(tmp_path, kind), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - started < 5 + 15
    assert done.returncode == 1, done.stderr
    results = {item["check"]: item for item in json.loads(done.stdout)["results"]}
    assert set(results) == {item.code for item in ALL}
    assert words in results["SW106"]["findings"][0]["seen"]
    assert [code for code, item in results.items() if item["status"] == "crashed"] == []
    assert sum(item["status"] == "ok" for item in results.values()) > 10
    assert_gone(str(tmp_path))


def test_the_working_folder_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('the wrong torch')")
    monkeypatch.chdir(tmp_path)
    outcome = run(sys.executable, "torch_import", (), os.environ, 60)
    assert "the wrong torch" not in str(outcome.lines)


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """The doctor is killed while a probe hangs: the probe must not stay."""
    environment = stub(tmp_path, "hangs")
    code = (
        "import os, sys, time\n"
        "from xflux_doctor.probes.runner import Child\n"
        "Child(sys.executable, 'torch_import', (), os.environ)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "pid").exists()
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    time.sleep(0.5)
    # the probe itself is gone; what it started is in its group, which only a living doctor can end
    left = [pid for pid in alive(str(tmp_path)) if b"runpy" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in alive(str(tmp_path)):
        os.kill(pid, 9)
    assert left == []


def test_output_larger_than_a_pipe_does_not_block() -> None:
    child = Child(sys.executable, "torch_import", (), {**os.environ, "PYTHONVERBOSE": "2"})
    outcome = child.finish(time.monotonic() + 60)
    assert outcome.code is not None


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
class TestWithTorch:
    def test_import(self) -> None:
        outcome = run(sys.executable, "torch_import", (), {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, 120)
        assert outcome.code == 0 and outcome.lines[-1]["devices"] == []

    @pytest.mark.parametrize("ranks", [1, 2, 8])
    def test_right_values(self, ranks: int) -> None:
        result = reduction.all_reduce(sys.executable, "gloo", ranks, os.environ, 120)
        assert result.ok, result
        assert result.stage == "done" and result.ranks == ranks

    def test_a_wrong_value_is_found(self, tmp_path: Path) -> None:
        """Rank 1 adds one to everything it reduces, as a sick card would."""
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            "if sys.argv[3:4] == ['1']:\n"
            "    import torch.distributed as dist\n"
            "    true = dist.all_reduce\n"
            "    def sick(tensor, *a, **k):\n"
            "        if tensor.numel() > 1: tensor.add_(1)\n"
            "        return true(tensor, *a, **k)\n"
            "    dist.all_reduce = sick\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        result = reduction.all_reduce(sys.executable, "gloo", 2, environment, 120)
        assert not result.ok and result.stage == "tiny" and "must be" in result.detail

    def test_a_silent_rank_is_named(self, tmp_path: Path) -> None:
        """Rank 1 never comes to the rendezvous."""
        (tmp_path / "sitecustomize.py").write_text("import sys, time\nif sys.argv[3:4] == ['1']: time.sleep(600)\n")
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        started = time.monotonic()
        result = reduction.all_reduce(sys.executable, "gloo", 2, environment, 15)
        assert time.monotonic() - started < 25
        assert not result.ok and result.rank == 1 and result.stage == "start"

    def test_ranks_of_a_job(self, matrix: Matrix) -> None:
        work = job(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2"), cpu=True)
        after = level.probe(here(matrix), work, os.environ, 120)
        assert after.torch and after.allreduce and after.allreduce.ok and after.allreduce.ranks == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_check_says_so_and_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    environment = stub(tmp_path, "hangs")
    process = subprocess.Popen(
        [sys.executable, "-m", "xflux_doctor.cli", "check", "--cpu"], env=environment, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # a shell's background job, as tests may be, has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in output
    assert_gone(str(tmp_path))
