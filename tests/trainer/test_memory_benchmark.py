"""The grid of configurations whose memory is measured: small, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from trainer_kit import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))

import memory_report
import memory_rows
from xflux_trainer.rules import between
from xflux_trainer.spec import FLUX_DEV, image_tokens

GIB = 1 << 30


def test_the_list_covers_what_it_should() -> None:
    configs = [row.config() for row in memory_rows.ROWS]
    names = [row.name for row in memory_rows.ROWS]
    assert len(names) == len(set(names)) >= 60
    assert not any(between(config) for config in configs)
    adapters = [config for config in configs if config.mode == "lora"]
    assert {4, 16, 64, 128} <= {config.rank for config in adapters}
    assert {"xflux", "attn", "diffusers", "all-linear"} <= {config.lora_targets for config in adapters}
    assert {10, 28, 45, None} <= {config.checkpointed_blocks for config in configs}
    assert {256, 512, 1024, 1536} <= {config.img_size for config in configs}
    assert {1, 2, 3, 4, 8} <= {config.train_batch_size for config in configs}
    assert {"fp8-dynamic", "fp8", "int8", "int4", "nf4"} <= {config.quantization for config in configs}
    for row in memory_rows.ROWS:
        if row.shape:  # the forecast is of the square: none is larger, and none so much smaller that it would not fit
            ratio = image_tokens(*row.shape) / image_tokens(row.config().img_size, row.config().img_size)
            assert 0.95 < ratio <= 1, row.name


def test_draws_follow_the_seed_and_the_rules() -> None:
    drawn = memory_rows.drawn(12, 1, FLUX_DEV)
    assert drawn == memory_rows.drawn(12, 1, FLUX_DEV) != memory_rows.drawn(12, 2, FLUX_DEV)
    assert len({row.base for row in drawn}) > 6
    for row in drawn:
        assert not between(row.config()), row


def test_the_summary() -> None:
    def row(name: str, predicted: float, allocated: float, **more: object) -> dict[str, object]:
        head = {"row": name, "shape": [512, 512], "batch": 1, "outcome": "measured", "called": "fits"}
        sizes = {"predicted_bytes": predicted * GIB, "allocated_bytes": allocated * GIB}
        return {**head, **sizes, "error": predicted / allocated - 1, **more}

    lost = {**row("d", 90, 1), "outcome": "out of memory", "error": None, "wrong": "it was called fits"}
    found = memory_report.summary([row("a", 10, 10), row("b", 20.2, 20), row("c", 9.5, 10), lost])
    assert found["median"] == pytest.approx(0.01) and found["worst"] == pytest.approx(-0.05)
    assert found["worst_row"] == "c" and found["beyond_3_percent"] == 1 and found["wrong_verdicts"] == ["d"]
    assert "worst -5.00% (c)" in memory_report.said(found) and memory_report.line(lost).endswith("called fits |")


def test_two_rows_and_a_resume(tmp_path: Path) -> None:
    arguments = ["--layers", "1,1", "--heads", "1", "--results", str(tmp_path)]

    def run(rows: str, *more: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--rows", rows, *arguments, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment(), cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("lora-checkpointed-256")
    said = run("lora-checkpointed-256,lora-4-attn-kept-512", "--resume")
    assert said.count("| lora-") == 1 and "2 measured" in said
    (file,) = tmp_path.glob("memory-*.json")
    rows = json.loads(file.read_text("utf-8"))["rows"]
    assert [row["row"] for row in rows] == ["lora-checkpointed-256", "lora-4-attn-kept-512"]
    for row in rows:
        assert row["outcome"] == "measured" and row["predicted_bytes"] == sum(row["terms"].values()), row
        assert 0.5 < row["loss_last"] < 5
    (picture,) = tmp_path.glob("memory-*.svg")
    ElementTree.parse(picture)
