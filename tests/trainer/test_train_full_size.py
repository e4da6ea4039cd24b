"""The benchmark of every way of training, small: a row in its own process, and what a row that cannot run says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_kit import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))

import full_size


def run(*arguments: object, script: str = "full_size") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment(), cwd=ROOT)


def test_a_row_through_the_trainer_s_own_steps(tmp_path: Path) -> None:
    size = ("--layers", "1,1", "--heads", 1, "--sizes", 32, "--steps", 1)
    done = run("--rows", "lora-stream-57", *size, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("full_size-*.json")
    (row,) = json.loads(file.read_text("utf-8"))["rows"]
    assert row["outcome"] == "measured", row
    assert row["seconds_per_step"] > 0 and row["pinned_gib"] > 0 and row["trained_parameters"] > 0
    assert 0 < row["loss_last"] < 10
    assert "| lora-stream-57 |" in done.stdout


def test_streaming_small(tmp_path: Path) -> None:
    """Every way of streaming gives the losses of the resident weights, and copies what was foreseen."""
    size = ("--layers", "1,1", "--heads", 1, "--size", 32, "--steps", 1, "--blocks", "0,2")
    done = run(*size, "--results", tmp_path, script="streaming")
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("streaming-*.json")
    rows = json.loads(file.read_text("utf-8"))["rows"]
    assert [(row["modulation"], row["stream_blocks"]) for row in rows] == [
        ("keep", 0), ("keep", 2), ("stream", 0), ("stream", 2),
    ]  # fmt: skip
    # On a GPU attention adds up its gradients in the order in which they come.
    near = 1e-3 if torch.cuda.is_available() else 0
    assert all(row["losses"] == pytest.approx(rows[0]["losses"], rel=near, abs=0) for row in rows)
    assert all(row["norms"] == pytest.approx(rows[0]["norms"], rel=near, abs=0) for row in rows)
    assert all(row["copied_per_step"] <= row["traffic_foreseen"] for row in rows)
    assert all((row["copied_per_step"] > 0) == (row["stream_blocks"] > 0) for row in rows)  # else the slots hold all
    assert not any(row["missed_per_step"] for row in rows)
    assert "when they were read: 0" in done.stdout
    assert torch.cuda.is_available() or done.stdout.count("| 0.0e+00 | 0.0e+00 |") == 4


def test_a_row_that_cannot_run_ends_alone() -> None:
    head = {"row": "lora-nf4", "about": "nf4", "pixels": 512}
    measured = {"seconds_per_step": 0.5, "allocated_gib": 9.4, "reserved_gib": 9.9, "load_gib": 8.0, "pinned_gib": 0.0}
    shown = full_size.table([{**head, "outcome": "out of memory"}, {**head, "outcome": "measured", **measured}])
    assert shown.splitlines()[2] == "| lora-nf4 | nf4 | 512 | out of memory | – | – | – | – |"
    assert shown.splitlines()[3] == "| lora-nf4 | nf4 | 512 | 0.500 | 9.4 | 9.9 | 8.0 | 0.0 |"


def test_every_row_is_a_config() -> None:
    """Names and values that the train config knows, and that may stand beside one another."""
    from xflux_trainer.rules import between
    from xflux_trainer.settings import TrainConfig

    names = [row.name for row in full_size.ROWS]
    assert len(names) == len(set(names))
    for row in full_size.ROWS:
        assert not between(TrainConfig("none", img_size=1024, **row.keys)), row.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
@pytest.mark.parametrize("script", ["pointwise_kernels", "lora_kernels"])
def test_kernels_are_not_measured_without_a_gpu(script: str) -> None:
    """A sentence, also where Triton, whose kernels are measured, is not installed."""
    done = run(script=script)
    assert (done.returncode, done.stdout, done.stderr) == (2, "No GPU is seen here: kernels are measured on one.\n", "")
