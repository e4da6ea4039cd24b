"""`run` takes the planner's plan: it says so, hands it to the trainer, and leaves what the file says alone."""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import GIB, XFLUX_ACCELERATE, gpus, machine, packages, record

from xflux_doctor.cli import main
from xflux_doctor.commands import lighter
from xflux_doctor.commands import run as command
from xflux_doctor.commands.fix import plan_of
from xflux_doctor.inputs import Inputs, build
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import Plan

ONE = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 1").replace("DEEPSPEED", "NO")
USUAL = ["--config", "train.yaml", "--accelerate-config", "accelerate.yaml", "--facts", "facts.json"]


def black(edge: int) -> bytes:
    """A whole PNG, by no imaging library: the doctor's tests run without the trainer's packages."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes((3 * edge + 1) * edge)))
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b"")


@pytest.fixture
def place(tmp_path: Path, matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The seed's job beside one H100."""
    found = packages(matrix, "cuda13", triton="3.6.0")
    record(tmp_path / "facts.json", machine(matrix, gpus=gpus("H100", 1, memory_free=79 * GIB), packages=found))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(black(1024))
    (tmp_path / "images" / "a.json").write_text('{"caption": "a"}')
    (tmp_path / "accelerate.yaml").write_text(ONE)
    monkeypatch.chdir(tmp_path)
    train(tmp_path)
    return tmp_path


def train(folder: Path, **values: Any) -> None:
    text = {
        "img_dir": str(folder / "images"),
        "img_size": 1024,
        "output_dir": "out",
        "disable_sampling": True,
        **values,
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(text))


def planned(matrix: Matrix, **more: Any) -> tuple[Plan, str]:
    case = build(Inputs(config="train.yaml", accelerate_config="accelerate.yaml", facts="facts.json", **more), matrix)
    return command._planned(case, plan_of(case))


def test_a_run_is_as_fast_as_the_card_lets_it(place: Path, matrix: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    plan, words = planned(matrix)
    assert plan.job.train is not None and plan.bill is not None
    assert plan.job.train.gradient_checkpointing is False and "keeping every activation" in words
    assert plan.bill.gpu_allocated > 37 * GIB
    assert main(["run", "--dry-run", *USUAL]) == 0
    said = capsys.readouterr().out
    assert f"planned: {words}" in said and "GiB per GPU" in said and "repaired in memory" not in said


def test_fix_says_so_and_writes_it_when_it_is_asked_to(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place / "train.yaml").read_text()
    assert main(["fix", *USUAL]) == 0
    said = capsys.readouterr().out
    assert "? PLAN 1024 px, keeping every activation" in said and "The files need no repair" in said
    assert main(["fix", *USUAL, "--write-config", "--yes"]) == 0 and (place / "train.yaml").read_text() == before
    assert main(["fix", *USUAL, "--take", "PLAN", "--write-config", "--yes"]) == 0
    assert yaml.safe_load((place / "train.yaml").read_text())["gradient_checkpointing"] is False
    capsys.readouterr()
    # And then there is nothing left to be had.
    assert main(["fix", *USUAL]) == 0 and "PLAN" not in capsys.readouterr().out


def test_what_the_file_says_stays(place: Path, matrix: Matrix) -> None:
    train(place, gradient_checkpointing=True)
    plan, words = planned(matrix)
    assert plan.edits == () and words == ""


def test_the_limit_reaches_the_trainer(place: Path, matrix: Matrix) -> None:
    plan, words = planned(matrix, gpu_limit=24.0)
    assert plan.job.train is not None and plan.job.train.gpu_limit_gib == 24 and words == ""
    # The repair is the plan already: nothing that may be taken is faster.
    assert plan.job.train.stream_blocks > 0
    train(place, gpu_limit_gib=41.0)
    plan, words = planned(matrix)
    assert plan.job.gpu_limit == 41 * GIB and plan.job.train is not None and plan.job.train.gpu_limit_gib == 41
    assert plan.job.train.checkpointed_blocks or plan.job.train.gradient_checkpointing is False


OOM = (
    'Traceback (most recent call last):\n  File "/x/train.py", line 3, in <module>\n    loss.backward()\n'
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB "
    "of which 812.50 MiB is free. Including non-PyTorch memory, this process has 78.30 GiB memory in use.\n"
)


def test_after_a_run_that_was_out_of_memory_comes_a_lighter_plan(
    place: Path, matrix: Matrix, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what the run folder has of it: the facts, the effective files and the log."""
    train(place, gradient_checkpointing=False)
    run = place / "out"
    (run / "logs").mkdir(parents=True)
    for name in ("facts.json", "train.yaml", "accelerate.yaml"):
        (run / name).write_text((place / name).read_text())
    (run / "logs" / "run-1.log").write_text(OOM)
    for named in (run, run / "logs" / "run-1.log"):
        assert main(["explain", str(named), "--format", "json"]) == 1
        found = json.loads(capsys.readouterr().out)
        memory = found["remedy"]["memory"]
        assert found["cause"].startswith("cuda-oom") and "activations" in memory["terms"]
        assert memory["plan"]["device_bytes"] <= 0.93 * memory["foreseen_device_bytes"]
        assert memory["plan"]["changes"] and not {"quantization", "img_size"} & memory["plan"]["changes"].keys()
    assert main(["explain", str(run)]) == 1
    assert "The bill had foreseen 40." in capsys.readouterr().out
    # Of a log alone nothing is known but the log.
    (place / "alone.log").write_text(OOM)
    assert main(["explain", str(place / "alone.log"), "--format", "json"]) == 1
    assert "memory" not in json.loads(capsys.readouterr().out)["remedy"]


def test_a_run_with_a_checkpoint_keeps_its_optimizer(place: Path) -> None:
    """Another one would be refused when it goes on from there."""
    from xflux_doctor.commands import again

    train(place, mode="finetune", allow=["optimizer", "backward_clip"])
    run = place / "out"
    run.mkdir()
    for name in ("facts.json", "train.yaml", "accelerate.yaml"):
        (run / name).write_text((place / name).read_text())

    def changed() -> set[str]:
        attempt = again.following(run, "cuda-oom", set())
        return {edit.key[0] for edit in attempt.edits} if attempt else set()

    assert "optimizer" in changed()
    (run / "checkpoint-500").mkdir()
    assert "optimizer" not in changed()


def test_every_retry_after_an_out_of_memory_needs_less(place: Path) -> None:
    """The run folder's own files are edited; the samples of a step stay, and nothing that loses anything is taken."""
    from xflux_doctor.commands import again, rejoin
    from xflux_doctor.explain.diagnosis import diagnose

    def cause_of(text: str) -> str:
        found = diagnose(text)
        return "none" if found is None else found.cause

    train(place, gradient_checkpointing=False, train_batch_size=2)
    run = place / "out"
    run.mkdir()
    for name in ("facts.json", "train.yaml", "accelerate.yaml"):
        (run / name).write_text((place / name).read_text())
    files = {"train": run / "train.yaml", "accelerate": run / "accelerate.yaml"}
    tried: set[str] = set()
    held: list[int] = []
    words = {0: rejoin.Word(1, 1.0, "peer-rank-died", "consequence"), 1: rejoin.Word(1, 9.0, cause_of(OOM), "error")}
    of_all = rejoin.decide(words, lambda cause: again.following(run, cause, set()))
    alone = again.following(run, cause_of(OOM), set())
    assert alone is not None and (of_all.machine, of_all.edits, of_all.mark) == (1, alone.edits, alone.mark)
    while (attempt := again.following(run, cause_of(OOM), tried)) is not None and len(tried) < 20:
        tried.add(attempt.mark)
        assert {edit.key[-1] for edit in attempt.edits} <= rejoin.KEYS  # else the other machines would not take it
        again.write(attempt, files)
        made = yaml.safe_load(files["train"].read_text())
        assert made["resume_from_checkpoint"] == "latest" and made.get("quantization", "none") == "none"
        assert made["train_batch_size"] * made.get("gradient_accumulation_steps", 1) == 2
        found = lighter.after(run)
        assert found is not None
        held.append(found.failed.device)
    assert len(held) >= 3 and all(later < 0.95 * sooner for sooner, later in itertools.pairwise(held))
    # What cannot pass by itself is not tried again, and what may only once.
    assert again.following(run, cause_of("KeyError: 'caption'\nTraceback (most recent call last):\n"), set()) is None
    once = again.following(run, "segfault", set())
    assert once is not None and again.following(run, "segfault", {once.mark}) is None
    assert again.following(run, "none", set()) is None


def test_a_job_that_cannot_start_is_not_planned(place: Path, matrix: Matrix) -> None:
    plan, words = planned(matrix, gpu_limit=5.0)
    assert plan.blockers and words == ""
