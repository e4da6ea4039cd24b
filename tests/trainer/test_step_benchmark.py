"""The step beside the peers', and what a step costs as work grows: small, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))

import children
import step
import step_ceilings
import step_report
from random_flux import spec_of

SMALL = ("--layers", "1,1", "--heads", 1, "--sizes", 32, "--steps", 2)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment(), cwd=ROOT)


def result(folder: Path, kind: str) -> dict[str, Any]:
    (file,) = folder.glob(f"{kind}-*.json")
    return dict(json.loads(file.read_text("utf-8")))


def test_ours_beside_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    done = run(
        "step.py",
        *SMALL,
        "--batches",
        "1,2",
        "--rows",
        "ours-kept,diffusers-kept",
        "--rounds",
        1,
        "--shared",
        "--results",
        tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = result(tmp_path, "step")
    rows = {(row["row"], row["batch"]): row for row in found["rows"]}
    assert set(rows) == {(name, size) for name in ("ours-kept", "diffusers-kept") for size in (1, 2)}
    for row in rows.values():
        assert row["outcome"] == "measured", row
        assert 0 < row["seconds_min"] <= row["seconds_per_step"] <= row["seconds_max"]
        assert 0.5 < row["loss_first"] < 5  # noise and latents have a variance of 1 each
    # The same adapters on the same layers: what differs is how the step is taken.
    trained = {row["trained_parameters"] for row in rows.values()}
    h, mlp, rank = 128, 512, 16
    assert trained == {rank * (11 * 2 * h + 4 * (h + mlp))}
    assert [one["batch"] for one in found["ratios"]] == [1, 2]
    assert found["ceilings_tflops"]["bf16"] > 0
    (picture,) = tmp_path.glob("step-*.svg")
    bars = ElementTree.parse(picture).getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + len(rows)


@pytest.mark.skipif("XFLUX_CHECKOUT" not in os.environ, reason="XFLUX_CHECKOUT names no checkout of X-Flux")
def test_xflux_from_a_checkout(tmp_path: Path) -> None:
    pytest.importorskip("einops")
    checkout = os.environ["XFLUX_CHECKOUT"]
    done = run(
        "step.py", *SMALL, "--batches", 2, "--rows", "xflux", "--rounds", 1, "--xflux", checkout, "--results", tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = result(tmp_path, "step")["rows"]
    assert row["outcome"] == "measured", row
    h, rank = 128, 16
    # q, k and v together and the output of both streams; q, k and v and the whole output layer of a single block.
    assert row["trained_parameters"] == rank * (2 * (h + 3 * h + h + h) + (h + 3 * h) + (5 * h + h))
    assert checkout not in json.dumps(result(tmp_path, "step"))


def test_a_folder_that_is_no_checkout(tmp_path: Path) -> None:
    done = run("step.py", *SMALL, "--batches", 1, "--rows", "xflux", "--xflux", tmp_path, "--results", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (row,) = result(tmp_path / "out", "step")["rows"]
    assert row["outcome"] == "not there" and "src/flux/model.py" in row["why"]


def test_the_work_of_a_step() -> None:
    """119 TFLOP of linear layers and 52 of attention at 1024 px: 0.237 s at an H100's 792 and 596 TFLOP/s."""
    work = step_ceilings.work(spec_of((19, 38), 24), 1024, 1)
    assert round(work.linear / 1e12) == 119 and round(work.attention / 1e12) == 52
    assert abs(work.limit(792, 596) - 0.237) < 1e-3
    assert step_ceilings.work(spec_of((19, 38), 24), 1024, 4).total == pytest.approx(4 * work.total)
    tuned = step_ceilings.work(spec_of((19, 38), 24), 1024, 1, finetune=True)
    assert tuned.linear == pytest.approx(1.5 * work.linear) and tuned.attention == work.attention


def test_rounds_and_ratios() -> None:
    def measured(name: str, *seconds: float, gib: float) -> dict[str, Any]:
        row = next(row for row in step.ROWS if row.name == name)
        one = {"outcome": "measured", "allocated_gib": gib, "reserved_gib": gib}
        return {"tflops": 1.0, **step.combine(row, 1024, 1, [{**one, "seconds": [s, 9 * s, s]} for s in seconds])}

    own, peer = measured("ours-kept", 0.2, 0.4, gib=30), measured("xflux", 0.6, 0.6, gib=60)
    assert own["rounds"] == [0.2, 0.4] and own["seconds_per_step"] == pytest.approx(0.3)
    lost = step.combine(
        next(row for row in step.ROWS if row.name == "diffusers-kept"),
        1024,
        1,
        [{"outcome": "out of memory", "why": "it is full"}],
    )
    (pair,) = step_report.pairs([own, lost, peer])
    assert pair["times_as_fast"] == pytest.approx(2) and pair["memory"] == pytest.approx(0.5)
    assert step_report.line(lost) == "| diffusers-kept | 1024 | 1 | out of memory | – | – | – | – | – | – | – |"
    assert {line.count("|") for line in step_report.table([own, lost, peer]).splitlines()} == {12}


def test_what_was_written_before_the_deadline_is_kept(tmp_path: Path) -> None:
    writes = "import sys, time, pathlib; pathlib.Path(sys.argv[-1]).write_text('{\"first\": 1}'); time.sleep(60)"
    found = children.run([sys.executable, "-c", writes], 5)
    assert found == {"first": 1, "outcome": "too slow", "why": "not done after 5 s"}
    dies = children.run([sys.executable, "-c", "raise SystemExit('no such thing')"], 20)
    assert dies == {"outcome": "failed", "why": "exit code 1: no such thing"}


def test_every_row_is_a_config() -> None:
    from xflux_trainer.rules import between
    from xflux_trainer.settings import TrainConfig

    names = [row.name for row in step.ROWS]
    assert len(names) == len(set(names))
    for row in step.ROWS:
        assert not between(TrainConfig("none", img_size=1024, **{**step.OURS, **row.keys})), row.name


def test_cost_over_sizes_and_ranks(tmp_path: Path) -> None:
    small = ("--rank-layers", "1,1", "--rank-heads", 1, "--rank-pixels", 32, "--rank-steps", 2, "--rounds", 1)
    done = run("cost.py", *SMALL, "--batches", "1,2", *small, "--ranks", "1,2", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = result(tmp_path, "cost")
    assert [(row["pixels"], row["batch"], row["outcome"]) for row in found["grid"]] == [
        (32, 1, "measured"),
        (32, 2, "measured"),
    ]
    one, two = found["ranks"]
    assert one["outcome"] == two["outcome"] == "measured", found["ranks"]
    assert one["exchange_seconds"] == 0 and two["exchange_seconds"] > 0
    assert two["exchange_share"] == pytest.approx(1 - two["seconds_apart"] / two["seconds_per_step"])
    assert "| px | batch 1 | batch 2 |" in done.stdout
