"""The comparison of fp8's loss curves with those of bf16 seeds: its measures by hand, its runs small."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import yaml
from trainer_kit import ROOT, tiny_flux

sys.path.insert(0, str(ROOT / "benchmarks"))

import fp8_curve
from xflux_trainer import config

SEEDS = [[4.0, 2.0, 3.0, 1.0], [6.0, 4.0, 5.0, 3.0], [5.0, 3.0, 4.0, 2.0]]
"""Running means of two steps: 3, 2.5, 2; 5, 4.5, 4; 4, 3.5, 3. Their standard deviation is 1 at every place."""


def shifted(by: float) -> list[list[float]]:
    return [[loss + by for loss in curve] for curve in SEEDS]


def test_the_measures() -> None:
    assert fp8_curve.smooth(SEEDS[0], 2) == [3.0, 2.5, 2.0]
    assert fp8_curve.spread(SEEDS) == 1.0
    assert fp8_curve.spread([[0.0, 0.0], [0.0, 2.0]]) == 1.0  # of variances 0 and 2
    assert fp8_curve.distance([[1.0, 5.0], [3.0, 5.0]], [[2.0, 4.0], [2.0, 8.0]]) == 1.0


def test_an_arm_is_within_where_training_and_heldout_are() -> None:
    ends = {"bf16": [1.0, 1.2, 1.1], "near": [1.0, 1.2, 1.13], "far": [1.0, 1.2, 1.1], "ends high": [1.2, 1.3, 1.4]}
    curves = {"bf16": SEEDS, "near": shifted(-0.25), "far": shifted(1.5), "ends high": SEEDS}
    found = fp8_curve.compare(curves, ends, window=2)
    assert found["noise"] == {"training": pytest.approx(1.0), "heldout": pytest.approx(0.1)}
    arms: dict[str, Any] = found["arms"]
    assert {name: row["within"] for name, row in arms.items()} == {"near": True, "far": False, "ends high": False}
    assert arms["near"]["distance_in_noise"] == {"training": pytest.approx(0.25), "heldout": pytest.approx(0.1)}
    assert arms["far"]["distance_in_noise"]["training"] == pytest.approx(1.5)
    assert arms["ends high"]["distance_in_noise"] == {"training": 0.0, "heldout": pytest.approx(2.0)}
    first = (0.25 / 3 + 0.25 / 2.5 + 0.25 / 2) / 3
    assert arms["near"]["relative_difference_by_seed"][0] == pytest.approx(first)
    assert arms["near"]["relative_bias_by_seed"][0] == pytest.approx(-first)
    shown = fp8_curve.table(found, ends).splitlines()
    assert shown[2] == "| bf16 | 1.1000 | – | 1 | 1 | the yardstick |"
    assert shown[3].endswith("| 0.250 | 0.100 | within |") and shown[4].endswith("| 1.500 | 0.000 | outside |")


def test_every_arm_is_a_config_and_one_trains(tmp_path: Path) -> None:
    options = Namespace(steps=3, size=64, jobs=2, cpu=True)
    (tmp_path / "flux").symlink_to(tiny_flux(), target_is_directory=True)
    for arm in fp8_curve.ARMS:
        file = tmp_path / "train.yaml"
        file.write_text(yaml.safe_dump(fp8_curve.train_config(tmp_path, "run", arm, 1, options)), encoding="utf-8")
        made = config.load(file)
        assert (made.seed, made.max_train_steps, made.img_size, made.mixed_precision) == (1, 3, 64, "bf16")
        assert (made.kernels == "fused") == ("diffusers" not in arm)
        assert (made.quantization == "fp8-dynamic") == (arm in fp8_curve.FP8)
    found = fp8_curve.train(tmp_path, "fp8, modulation too", 1, options)
    assert len(found["losses"]) == 3 and found["device"] == "cpu"
    assert all(0 < found[key] < 10 for key in ("heldout_before", "heldout_after"))
    assert fp8_curve._short(found)["loss_by_20_steps"] == [round(sum(found["losses"]) / 3, 5)]
