"""What the encoders were measured to take, beside the bill of today."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from trainer_kit import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import encoders

from xflux_doctor.verdict import reserved

FILES = sorted((ROOT / "benchmarks" / "results").glob("encoders-*.json"))


def test_sizes_up_to_the_largest_were_measured() -> None:
    sizes = {size for file in FILES for size in json.loads(file.read_text("utf-8"))["measured"]}
    assert {"captions", "512", "1024", "1536", "2048"} <= sizes


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_bill_of_today(file: Path) -> None:
    found = encoders.rows(json.loads(file.read_text("utf-8"))["measured"])
    assert not [row["wrong"] for row in found if row["wrong"]]
    assert max(abs(row["error"]) for row in found) < 0.005
    for row in found:  # what it was seen to run in is what is foretold today
        assert row["held_to_bytes"] <= reserved(row["forecast_bytes"]) < row["held_to_bytes"] * 1.03


def test_what_is_off_and_what_is_too_little_is_said() -> None:
    measured = json.loads(FILES[-1].read_text("utf-8"))["measured"]
    larger = copy.deepcopy(measured)
    larger["2048"]["allocated_bytes"] *= 1.04
    wrong = {row["what"]: row["wrong"] for row in encoders.rows(larger)}
    assert wrong.pop("image of 2048 px").startswith("the bill is -3.") and wrong.pop("a job of 2048 px")
    assert not any(wrong.values())
    measured["512"]["within"] = False  # of a job of 512 px the captions are the larger part
    wrong = {row["what"]: row["wrong"] for row in encoders.rows(measured)}
    assert wrong.pop("image of 512 px").startswith("out of memory in ") and not any(wrong.values())


def test_another_s_weights_are_not_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"somebody's")
    assert encoders.write_model(tmp_path, "cpu") == 2
    assert "holds other weights, which are not overwritten" in capfd.readouterr().err
    assert file.read_bytes() == b"somebody's" and not (tmp_path / "text_encoder").exists()


def test_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "encoders.py", "--work", tmp_path],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Run it on a GPU" in done.stderr and not list(tmp_path.iterdir())
