"""The notice of a preemption: saved, ended with the code that requeues, gone on with at the same steps."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
from cli_kit import doctor
from conftest import TRAIN, XFLUX_ACCELERATE
from test_run import finish, result, start, two_ranks, wait_for_steps, write_job

from xflux_doctor.preempt import CODE, Requeue, goes_on

TORCH = all(importlib.util.find_spec(name) for name in ("torch", "accelerate", "diffusers", "deepspeed"))


@pytest.mark.parametrize(("given", "notice", "code", "wanted"), [
    (None, True, 143, CODE), (99, True, 143, 99), (None, True, 0, 0), (None, False, 143, 143), (99, False, 143, 99),
    (99, False, 1, 1), (None, True, 1, CODE), (99, False, 130, 130),
])  # fmt: skip
def test_exit_codes(given: int | None, notice: bool, code: int, wanted: int) -> None:
    seen: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with Requeue(given) as requeue:
        old = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))  # as the training does
        for _ in range(2 * notice):
            os.kill(os.getpid(), signal.SIGUSR2)
        signal.signal(signal.SIGTERM, old)
        assert requeue.exit_code(code) == wanted
    assert seen == [signal.SIGTERM] * notice and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("given", "number", "wanted"), [
    (None, signal.SIGUSR2, CODE), (99, signal.SIGTERM, 99), (None, signal.SIGTERM, 143),
])  # fmt: skip
def test_a_notice_outside_of_the_training(given: int | None, number: signal.Signals, wanted: int) -> None:
    """While probes run, or between two attempts."""
    with Requeue(given) as requeue:
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), number)
        assert ended.value.code == 143 and requeue.exit_code(143) == wanted


def test_a_requeued_job_goes_on(tmp_path: Path) -> None:
    assert not goes_on({"SLURM_RESTART_COUNT": "1"}, tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    assert not goes_on({"SLURM_RESTART_COUNT": "1"}, tmp_path)  # broken off
    (tmp_path / "checkpoint-2/manifest.json").write_text("{}")
    assert goes_on({"SLURM_RESTART_COUNT": "1"}, tmp_path)
    assert not any(goes_on({"SLURM_RESTART_COUNT": value}, tmp_path) for value in ("0", "", "x"))
    assert not goes_on({}, tmp_path)


def test_retries_of_those_who_do_not_meet_are_refused(tmp_path: Path) -> None:
    text = XFLUX_ACCELERATE.replace("num_machines: 1", "num_machines: 2\nmain_process_ip: 10.0.0.1")
    (tmp_path / "accelerate.yaml").write_text(text)
    (tmp_path / "train.yaml").write_text(TRAIN)
    command = ("run", "--cpu", "--quick", "--retries", "2", "--config", "train.yaml", "--accelerate-config",
               "accelerate.yaml")  # fmt: skip
    done = doctor(*command, "--wait-for-nodes", "0", cwd=tmp_path, code=2)
    assert "this job's 2 machines do not meet" in done.stderr
    rank = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "TORCHELASTIC_RUN_ID": "x"}
    done = doctor(*command, cwd=tmp_path, code=2, **rank)
    assert "this job's 4 ranks were started one by one, by torchrun" in done.stderr
    assert "resume_from_checkpoint" in done.stderr


@pytest.mark.skipif(not TORCH, reason="needs a stack of the matrix")
@pytest.mark.long
def test_a_run_that_is_preempted(tmp_path: Path, model: Path) -> None:
    write_job(tmp_path, model, accelerate=two_ranks(), max_train_steps=60, checkpointing_steps=1000, heldout_samples=0,
              disable_sampling=True)  # fmt: skip
    process = start(tmp_path)
    wait_for_steps(tmp_path, process)
    process.send_signal(signal.SIGUSR2)
    output = finish(process)
    assert process.returncode == CODE, output
    (saved,) = (tmp_path / "out").glob("checkpoint-*/manifest.json")
    assert result(tmp_path)["signal"] == signal.SIGTERM
    step = int(saved.parent.name.rpartition("-")[2])
    again = start(tmp_path, SLURM_RESTART_COUNT="1")
    output = finish(again)
    assert again.returncode == 0, output
    lines = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 61)) and f"{step}" in output
