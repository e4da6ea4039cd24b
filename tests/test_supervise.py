"""Real children: output kept, signals passed on, exit codes told, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from xflux_doctor import guard
from xflux_doctor.between import Between, Stopped
from xflux_doctor.launch import Launch
from xflux_doctor.supervise import Watching, run, trainer_code


def launch(code: str) -> Launch:
    return Launch((sys.executable, "-c", code), dict(os.environ), {})


def test_output_is_kept_and_shown(tmp_path: Path) -> None:
    shown: list[bytes] = []
    end = run(launch("import sys; print('out'); print('err', file=sys.stderr)"), tmp_path / "log", shown.append)
    assert (end.exit_code, end.trainer_exit_code, end.signal, end.interrupted) == (0, 0, None, False)
    assert set((tmp_path / "log").read_text().split()) == {"out", "err"}
    assert b"".join(shown) == (tmp_path / "log").read_bytes()


@pytest.mark.parametrize(("code", "exit_code", "number"), [
    ("raise SystemExit(3)", 3, None),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, 9),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 139, 11),
    # torch.distributed.elastic ends with 1 and names the rank's own code
    ("print('E failed (exitcode: -9) local_rank: 1 (pid: 5) of binary: python'); raise SystemExit(1)", 137, 9),
    ("print('E failed (exitcode: 7) local_rank: 0 (pid: 5) of binary: python'); raise SystemExit(1)", 7, None),
    ("print(\"subprocess.CalledProcessError: Command '[x]' returned non-zero exit status 4.\"); raise SystemExit(1)",
     4, None),
    ("print(\"subprocess.CalledProcessError: Command '[x]' died with <Signals.SIGKILL: 9>.\"); raise SystemExit(1)",
     137, 9),
])  # fmt: skip
def test_exit_codes(tmp_path: Path, code: str, exit_code: int, number: int | None) -> None:
    end = run(launch(code), tmp_path / "log", lambda _: None)
    assert (end.exit_code, end.signal) == (exit_code, number)


def test_a_log_without_a_code(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("all is well\n")
    assert trainer_code(tmp_path / "log") is None


TOGETHER = """\
E1124 api.py:833] failed (exitcode: {root}) local_rank: 0 (pid: 4871) of binary: python
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
xflux_trainer FAILED
------------------------------------------------------------
Failures:
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : {other} (pid: 4872)
  traceback : Signal 9 (SIGKILL) received by PID 4872
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : {root} (pid: 4871)
============================================================
"""


@pytest.mark.parametrize(("root", "other", "code"), [
    (1, -9, -9),  # rank 0's collective broke because rank 1 was killed; the agent saw both at once
    (-11, 1, -11),
    (1, -15, 1),  # SIGTERM is how the agent ends the others
    (-15, -15, -15),
    (7, 1, 7),
])  # fmt: skip
def test_a_killed_rank_is_the_cause_of_the_others_errors(tmp_path: Path, root: int, other: int, code: int) -> None:
    (tmp_path / "log").write_text(TOGETHER.format(root=root, other=other))
    assert trainer_code(tmp_path / "log") == code


SAVES = (
    "import signal, sys, time\n"
    "def save(number, frame):\n"
    "    print('saved on', number, flush=True); sys.exit(128 + number)\n"
    "signal.signal(signal.SIGINT, save); signal.signal(signal.SIGTERM, save)\n"
    "print('ready', flush=True); time.sleep(60)\n"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_trainer(tmp_path: Path, number: signal.Signals) -> None:
    ready = threading.Event()

    def press() -> None:
        assert ready.wait(20)
        os.kill(os.getpid(), number)

    threading.Thread(target=press).start()
    end = run(launch(SAVES), tmp_path / "log", lambda chunk: ready.set() if b"ready" in chunk else None)
    assert end.interrupted and end.exit_code == 128 + number
    assert f"saved on {int(number)}" in (tmp_path / "log").read_text()


def test_an_orphaned_rank_is_ended(tmp_path: Path) -> None:
    """The launcher dies and leaves a rank that holds our pipe: the run ends all the same."""
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'])\n"
        "print(child.pid, flush=True); raise SystemExit(5)\n"
    )
    started = time.monotonic()
    end = run(launch(code), tmp_path / "log", lambda _: None)
    assert end.exit_code == 5 and time.monotonic() - started < 10
    assert_gone(int((tmp_path / "log").read_text()))


def test_the_group_dies_with_the_doctor(tmp_path: Path) -> None:
    """kill -9 of the doctor: launcher and ranks end too."""
    rank = "import time; time.sleep(120)"
    launcher = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {rank!r}])\n"
        "print(child.pid, flush=True); time.sleep(120)\n"
    )
    doctor = (
        "import sys, os\nfrom pathlib import Path\n"
        "from xflux_doctor.launch import Launch\nfrom xflux_doctor.supervise import run\n"
        f"run(Launch((sys.executable, '-c', {launcher!r}), dict(os.environ), {{}}), Path({str(tmp_path / 'log')!r}), "
        "lambda _: None)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", doctor])
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert_gone(int((tmp_path / "log").read_text()))


def assert_gone(pid: int) -> None:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def test_a_signal_while_the_command_is_being_started(tmp_path: Path) -> None:
    """At whatever moment it comes, the guard does not wait for a command that has never heard it."""
    for step in range(12):
        read_end, write_end = os.pipe()
        process = subprocess.Popen(
            [sys.executable, guard.__file__, str(read_end), "sleep", "60"], pass_fds=(read_end,),
            env={**os.environ, guard.VARIABLE: str(tmp_path / "watch")}, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        os.close(read_end)
        time.sleep(0.02 * step)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(20) in (143, -signal.SIGTERM)
        os.close(write_end)


def test_a_signal_before_anything_is_started(tmp_path: Path) -> None:
    """Noted while signals were not passed on yet: nothing is started, and nobody waits for its end."""
    started = tmp_path / "started"
    with Between() as between:
        os.kill(os.getpid(), signal.SIGINT)
        watching = Watching(tmp_path, begin=between.check)
        with pytest.raises(Stopped):
            run(launch(f"open({str(started)!r}, 'w')"), tmp_path / "log", lambda _: None, watching)
    assert not started.exists()
