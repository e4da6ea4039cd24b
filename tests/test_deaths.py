"""The trainer dying in every way: the right cause, exit code and rank, a checkpoint if there was time, nobody left."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pty
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from death_kit import Run, free_port
from fuse_kit import Fuse
from group_kit import inside, limited

NEEDED = ("torch", "accelerate", "diffusers")
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED), reason="needs a stack of the matrix"
)
Start = Callable[..., Run]


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the runs share, which nobody hurts."""
    return tmp_path_factory.mktemp("entries")


@pytest.fixture
def run(tmp_path: Path, model: Path, entries: Path) -> Any:
    made: list[Run] = []

    def make(**changes: Any) -> Run:
        made.append(Run(tmp_path, model, **{"cache": entries, **changes}))
        return made[0]

    yield make
    for one in made:
        one.__exit__()


# Signals to a rank ---------------------------------------------------------------------------------------


def test_a_killed_rank(run: Start) -> None:
    job = run().start()
    pid = job.training()[1].pid
    os.kill(pid, signal.SIGKILL)
    assert job.end() == 137
    assert job.result["trainer_exit_code"] == -9 and job.cause == "host-oom-kill"
    own = next((job.out / "logs").glob("run-*/rank0.log")).read_text()
    assert "step 1/" in own and "step 1/" in job.log  # each rank's output in its own file, and all in one


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_segmentation_fault(run: Start, rank: int) -> None:
    job = run().start()
    os.kill(job.training()[rank].pid, signal.SIGSEGV)
    assert job.end() == 139
    assert job.result["signal"] == 11 and job.cause == "segfault"
    assert job.result["cause"]["rank"] in (rank, None)


@pytest.mark.long
def test_an_abort(run: Start) -> None:
    job = run(ranks=1).start()
    os.kill(job.training()[0].pid, signal.SIGABRT)
    assert job.end() == 134


@pytest.mark.long
def test_a_killed_launcher(run: Start) -> None:
    job = run().start()
    ranks = {beat.pid for beat in job.training().values()}
    launcher = next(pid for pid in job.pids() if _is_launcher(pid) and pid not in ranks)
    os.kill(launcher, signal.SIGKILL)
    assert job.end() == 137


def _is_launcher(pid: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"accelerate.commands.launch" in words and b"guard.py" not in words


# A rank that stands still --------------------------------------------------------------------------------


@pytest.mark.long
def test_a_rank_stopped_in_a_step_can_still_save(run: Start) -> None:
    job = run().start("--hang-after", "3")
    os.kill(job.training()[1].pid, signal.SIGSTOP)
    assert job.end() == 124
    assert job.cause == "rank-stopped" and job.result["cause"]["rank"] == 1
    (event,) = [event for event in job.events() if event["kind"] == "hang"]
    assert event["rank"] == 1 and event["seconds"] >= 3 and len(event["table"]) == 2
    stacks = {rank: (job.out / "stacks" / f"rank{rank}.txt").read_text() for rank in (0, 1)}
    assert "train.py" in stacks[0] and "the process is stopped" in stacks[1]
    assert all("== kernel, by thread\nthread " in text and "State:" in text for text in stacks.values())
    assert job.checkpoints(), job.log[-2000:]  # it was let go after the SIGTERM, and both ranks saved
    assert "the run hangs" in job.shown


@pytest.mark.long
def test_a_rank_stopped_while_it_loads(run: Start) -> None:
    job = run().start("--hang-after", "1.5")
    pid = job.until(lambda: job.beats().get(1)).pid
    os.kill(pid, signal.SIGSTOP)
    assert job.end() == 124
    assert job.cause == "rank-stopped" and job.result["cause"]["rank"] == 1


@pytest.mark.long
def test_a_rank_stopped_in_a_checkpoint(run: Start) -> None:
    job = run(checkpointing_steps=1, checkpoints_total_limit=2).start("--hang-after", "1.5")
    pid = job.training()[1].pid

    def stopped() -> bool:
        if job.beats()[1].phase != "checkpoint":
            return False
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)
        if job.beats()[1].phase == "checkpoint":
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    job.until(stopped)
    assert job.end() == 124
    assert job.cause == "rank-stopped" and job.result["cause"]["rank"] == 1
    (event,) = [event for event in job.events() if event["kind"] == "hang"]
    assert "checkpoint" in event["table"][1]
    assert job.checkpoints()


@pytest.mark.long
def test_a_stopped_run_of_one_process(run: Start) -> None:
    job = run(ranks=1).start("--hang-after", "3")
    os.kill(job.training()[0].pid, signal.SIGSTOP)
    assert job.end() == 124
    assert job.cause == "rank-stopped" and job.result["cause"]["rank"] == 0 and job.checkpoints()


@pytest.mark.long
def test_a_stopped_rank_with_retries_goes_on(run: Start) -> None:
    job = run(checkpointing_steps=20).start("--hang-after", "3", "--retries", "1")
    os.kill(job.training(25)[1].pid, signal.SIGSTOP)
    job.until(lambda: "retry 1 of 1" in job.shown)
    job.until(lambda: "resumed from" in job.log)
    before = max(job.checkpoints())
    job.training(before + 2)
    job.signal(signal.SIGINT)
    assert job.end() == 130 and max(job.checkpoints()) > before


@pytest.mark.long
def test_a_loader_that_waits_for_a_pipe(run: Start, tmp_path: Path) -> None:
    """An entry of the cache becomes a pipe that nobody writes to: the read never returns."""
    job = run(cache=tmp_path / "own").start("--hang-after", "6")
    job.training()
    for entry in (tmp_path / "own").rglob("*.safetensors"):
        entry.unlink()
        os.mkfifo(entry)
    assert job.end() == 124
    assert job.cause == "loader-stuck", job.log[-3000:]
    rank = job.result["cause"]["rank"]
    assert "entries.py" in (job.out / "stacks" / f"rank{rank}.txt").read_text()


@pytest.mark.long
def test_a_loader_whose_disk_is_away(run: Start, tmp_path: Path) -> None:
    """A file system that does not answer lies over the cache from some step on."""
    job = run(cache=tmp_path / "own").start("--hang-after", "6")
    job.training()
    try:
        fuse = Fuse(tmp_path / "own")
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")
    try:
        job.until(lambda: "the run is ended" in job.log)
        assert job.end() == 124
    finally:
        fuse.close()
    assert job.cause == "storage-stuck", job.log[-3000:]
    (event,) = [event for event in job.events() if event["kind"] == "hang"]
    assert f"waits in the kernel for the file system at {tmp_path / 'own'} (fuse.dead)" in event["text"]
    assert event["text"].partition("waits in the kernel")[0] in job.result["cause"]["evidence"][0]["text"]


@pytest.mark.long
def test_nothing_is_ended_with_zero(run: Start) -> None:
    job = run().start("--hang-after", "0")
    pid = job.training()[1].pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(pid, signal.SIGCONT)
    step = job.training()[1].step
    job.training(step + 5)
    job.signal(signal.SIGINT)
    assert job.end() == 130


# Errors of its own ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_loss_that_is_no_number(tmp_path: Path, model: Path, entries: Path) -> None:
    """A weight of the base is none."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (weights,) = (broken / "transformer").glob("*.safetensors")
    held = load_file(weights)
    held["proj_out.bias"][0] = float("nan")
    save_file(held, weights)
    with Run(tmp_path, broken, cache=entries) as job:
        job.start()
        assert job.end() == 1
        assert job.cause == "nan-loss", job.log[-2000:]


@pytest.mark.long
def test_a_disk_that_is_full(run: Start, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        job = run(output_dir=str(disk / "out"), checkpointing_steps=30)
        job.out = disk / "out"
        job.start("--accept", "DA102")
        job.training()
        with (disk / "fill").open("wb") as file, pytest.raises(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))
        assert job.end() == 1
        assert "No space left" in job.shown or "no space left" in job.shown
        os.unlink(disk / "fill")
        job.until(lambda: job.pids() == [], alive=False)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.long
def test_memory_that_cannot_be_had(run: Start) -> None:
    """The stand-in for a card that is full: the address space of a rank ends where it is."""
    job = run(ranks=1, checkpointing_steps=50).start()
    pid = job.training()[0].pid
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size - (64 << 20), size))
    code = job.end()
    assert code not in (0, 124)
    assert job.cause == "host-oom-kill", job.log[-3000:]


@pytest.mark.long
def test_the_kernel_s_oom_killer(run: Start) -> None:
    """A real limit of a cgroup: the kernel kills the largest process of the group, a rank."""
    job = run()
    with limited(700 << 20) as group:
        job.before = tuple(inside(group))
        job.start("--accept", "ME102")
        assert job.end() == 137
    assert job.cause == "host-oom-kill" and job.result["signal"] == 9
    # The kernel's own count says it, whatever the ranks could still say: imports fail oddly while memory runs out.
    assert job.result["cause"]["confidence"] == "high" and "oom_kill event" in job.log


@pytest.mark.long
def test_a_port_that_is_taken(run: Start) -> None:
    """Newer launchers of accelerate take another port; of the others the gate says so, and when it is overruled the
    death has the same code."""
    job = run(max_train_steps=2)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("0.0.0.0", job.port))
        other.listen()
        if job.start("--accept", "LA112").end():
            assert job.cause == "port-in-use" and job.result["cause"]["code"] == "LA112"
            job.level = ()  # the quick one opens no socket
            assert job.start().end() == 1 and "LA112" in job.shown
        else:
            assert "already in use" in job.log and job.checkpoints() == [2]


@pytest.mark.long
def test_an_entry_that_is_cut_short(run: Start, tmp_path: Path) -> None:
    job = run(cache=tmp_path / "own").start()
    job.training()
    for entry in (tmp_path / "own").rglob("*.safetensors"):
        os.truncate(entry, 10)
    assert job.end() not in (0, 124)
    assert job.cause == "corrupt-checkpoint", job.log[-3000:]


# Signals to the doctor -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_end_that_is_asked_for(run: Start, ranks: int, number: signal.Signals, code: int) -> None:
    job = run(ranks=ranks).start()
    job.training()
    job.signal(number)
    assert job.end() == code
    assert job.checkpoints() and job.result["signal"] == number and job.cause == "None"


@pytest.mark.long
def test_ctrl_c_twice(run: Start) -> None:
    """The second changes nothing for a trainer that saves already."""
    job = run().start()
    job.training()
    job.signal(signal.SIGINT)
    time.sleep(0.1)
    job.signal(signal.SIGINT)
    assert job.end() == 130


@pytest.mark.long
def test_ctrl_c_three_times(run: Start) -> None:
    """A rank that does not answer cannot hold up whoever insists."""
    job = run().start("--hang-after", "0")
    os.kill(job.training()[1].pid, signal.SIGSTOP)
    started = time.monotonic()
    for _ in range(3):
        job.signal(signal.SIGINT)
        time.sleep(0.3)
    assert job.end() == 130 and time.monotonic() - started < 20


def test_a_hangup_saves_and_the_run_goes_on(run: Start) -> None:
    job = run().start()
    job.training()
    job.signal(signal.SIGHUP)
    (step,) = job.until(job.checkpoints)
    job.training(step + 3)
    job.signal(signal.SIGINT)
    assert job.end() == 130 and max(job.checkpoints()) > step
    assert [event["kind"] for event in job.events()] == ["hangup"]


@pytest.mark.long
def test_a_killed_doctor_leaves_nobody_and_a_checkpoint(run: Start) -> None:
    job = run().start()
    job.training()
    assert job.process is not None
    job.process.kill()
    job.process.wait()
    job.until(lambda: job.pids() == [], alive=False)
    assert job.checkpoints()


def in_a_terminal(job: Run, *extra: str) -> int:
    """Start the run as a login shell would, on a terminal of its own; the master's end."""
    master, slave = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    job.start(*extra, stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal)
    os.close(slave)
    return master


@pytest.mark.long
def test_a_lost_connection_and_a_way_back(run: Start, tmp_path: Path) -> None:
    """The terminal goes: the run saves and goes on. `--attach` shows it, is detached by Ctrl-C, shows it again, and
    ends with it."""
    job = run()
    master = in_a_terminal(job)
    os.set_blocking(master, False)
    seen = b""

    def read() -> bytes:
        nonlocal seen
        with contextlib.suppress(BlockingIOError):
            seen += os.read(master, 65536)
        return seen

    job.until(lambda: b"\r\x1b[Kstep 5" in read())
    os.close(master)  # sshd is gone
    (step,) = job.until(job.checkpoints)
    attach = [sys.executable, "-m", "xflux_doctor.cli", "run", "--attach"]
    one = subprocess.Popen([*attach, str(job.out)], stdout=subprocess.PIPE, text=True, env=job.environment())
    time.sleep(3)
    one.send_signal(signal.SIGINT)
    said, _ = one.communicate(timeout=30)
    assert one.returncode == 0 and "Detached; the run goes on" in said and f"kill -INT {job.process.pid}" in said  # type: ignore[union-attr]
    assert "step " in said
    job.training(job.training(step)[0].step + 3)
    two = subprocess.Popen([*attach, "--config", str(tmp_path / "train.yaml")], stdout=subprocess.PIPE, text=True,
                           env=job.environment())  # fmt: skip
    time.sleep(2)
    job.signal(signal.SIGINT)
    assert job.end() == 130
    said, _ = two.communicate(timeout=30)
    assert two.returncode == 130 and "The run ended with 130" in said
    assert job.result["exit_code"] == 130


@pytest.mark.long
def test_a_terminal_that_takes_nothing_holds_nobody_up(run: Start) -> None:
    """Ctrl-S: nobody reads the terminal, and the steps go on."""
    job = run()
    master = in_a_terminal(job, "--verbose")
    try:
        beat = job.training()[0]
        job.training(beat.step + 300)
        job.signal(signal.SIGINT)
        assert job.end() == 130
    finally:
        os.close(master)


def test_attach_to_no_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xflux_doctor.cli", "run", "--attach", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "holds no run" in done.stderr
    state = {"pid": 1 << 22, "started": 1, "host": socket.gethostname(), "log": str(tmp_path / "log")}
    (tmp_path / "run.json").write_text(json.dumps(state))
    (tmp_path / "log").write_text("step 1/2  loss 1\nstep 2/2  loss 0\n")
    done = subprocess.run(
        [sys.executable, "-m", "xflux_doctor.cli", "run", "--attach", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1 and "step 2/2" in done.stdout and "was killed" in done.stdout
    assert free_port()
