"""The doctor's LA116 against the trainer's own refusals: the same settings, the same sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from xflux_trainer import fast, fsdp, quantize
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
from xflux_trainer.optim import refuse_step_in_backward
from xflux_trainer.sharded import refuse_optimizer, refuse_rounding

from xflux_doctor.checks import packages
from xflux_doctor.refused import refusals

BASE = TrainConfig(img_dir="x")
CHANGES: list[dict[str, Any]] = [
    {},
    {"mode": "finetune"},
    {"mode": "controlnet", "quantization": "nf4"},
    {"optimizer": "adamw8bit"},
    {"mode": "finetune", "optimizer": "adafactor"},
    *({"mode": "finetune", "weight_update": word} for word in ("master", "stochastic", "kahan", "nearest")),
    {"weight_update": "stochastic"},
    {"mode": "finetune", "step_in_backward": True},
    {"mode": "finetune", "step_in_backward": True, "mixed_precision": "fp16"},
    {"step_in_backward": True},
    {"quantization": "int8", "modulation": "quantize"},
    {"stream_blocks": 19},
    {"quantization": "nf4", "modulation": "stream"},
    {"mode": "finetune", "optimizer": "adafactor", "weight_update": "kahan", "step_in_backward": True},
    {"kernels": "fused"},
    {"checkpointed_blocks": 20},
    {"checkpointed_blocks": 20, "kernels": "fused"},
    {"checkpointed_blocks": 20, "gradient_checkpointing": False},
]


def said(*calls: Callable[[], None]) -> set[tuple[str, str]]:
    """What each refusal says, and what it advises."""
    found = set()
    for call in calls:
        try:
            call()
        except Unsupported as error:
            found.add((error.seen, error.hint))
    return found


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_doctor_says_what_the_trainer_will(strategy: str, accumulation: int) -> None:
    """Each of the trainer's functions stops at its first reason, so the doctor may know more, never less."""
    for changes in CHANGES:
        config = replace(BASE, **changes)
        trainers = _trainer(config, strategy, accumulation)
        doctors = {(finding.seen, finding.hint) for finding in refusals(config, strategy, accumulation)}
        assert trainers <= doctors, changes
        assert bool(trainers) == bool(doctors), changes
        # What the trainer did not come to is refused by itself.
        for seen, _ in doctors - trainers:
            alone = [one for one in _apart(changes) if any(seen == s for s, _ in _trainer(one, strategy, accumulation))]
            assert alone, seen


def _apart(changes: dict[str, Any]) -> list[TrainConfig]:
    keys = [key for key in changes if key != "mode"]
    kept = {key: value for key, value in changes.items() if key == "mode"}
    return [
        replace(BASE, **kept, **{key: changes[key] for key, on in zip(keys, mask, strict=True) if on})
        for mask in product((False, True), repeat=len(keys))
    ]


def _trainer(config: TrainConfig, strategy: str, accumulation: int) -> set[tuple[str, str]]:
    who = "FSDP" if strategy == "fsdp" else "DeepSpeed"
    sharded, zero = strategy not in ("single", "ddp"), strategy.startswith("zero")
    return said(
        lambda: refuse_optimizer(config, who) if zero else None,
        lambda: refuse_rounding(config, who) if zero else None,
        lambda: fsdp.refuse(config) if strategy == "fsdp" else None,
        lambda: quantize.refuse(config, strategy) if sharded else None,
        lambda: refuse_step_in_backward(config, strategy, accumulation),
        lambda: _kernels(config) if strategy in ("zero3", "fsdp") else None,
    )


def _kernels(config: TrainConfig) -> None:
    """Where a model is cut up, whatever it is, its own blocks compute or the trainer stops."""
    assert fast.build(torch.nn.Linear(1, 1), config, torch.device("cpu"), cut=True) == (None, [])


def test_the_doctor_knows_the_package_of_every_format() -> None:
    assert {name: package for name, (_, package) in quantize.PACKAGES.items()} == packages._FORMATS
