"""The forecast of a step's time against every step that was measured at full size, and how it moves with the settings.

`MEASURED` is what the constants were fitted to: that all hold with so few says that the parts are the right ones, not
that an unseen card's step is as near.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from xflux_trainer import timing
from xflux_trainer.config import TrainConfig
from xflux_trainer.spec import FLUX_DEV
from xflux_trainer.timing_cards import card_of
from xflux_trainer.trained import trained

CONFIG = TrainConfig("x", img_size=1024, lora_targets="diffusers", max_train_steps=1000)
KEPT: dict[str, Any] = {"gradient_checkpointing": False}
SMALL: dict[str, Any] = {"img_size": 512}
XFLUX: dict[str, Any] = {"lora_targets": "xflux"}
FP8: dict[str, Any] = {"quantization": "fp8-dynamic", "modulation": "quantize", **KEPT}
INT4: dict[str, Any] = {"quantization": "int4", "modulation": "quantize"}
FINETUNE: dict[str, Any] = {"mode": "finetune", "optimizer": "adafactor", "step_in_backward": True}
OWN: dict[str, Any] = {"kernels": "diffusers", **XFLUX}
EXAMPLE: dict[str, Any] = {"kernels": "diffusers"}

MEASURED: list[tuple[str, bool, dict[str, Any], float]] = [
    # Fused blocks; the second value is whether flash-attn-4 is there. Ranges are given by their middle.
    ("H200", True, KEPT, 0.298), ("H200", True, {**KEPT, **SMALL}, 0.091),
    ("H200", True, {}, 0.397), ("H200", True, SMALL, 0.117),
    ("H200", True, FP8, 0.2303), ("H200", True, {**FP8, **SMALL}, 0.073),
    ("H200", True, {**KEPT, "train_batch_size": 4}, 1.189),
    ("H200", True, INT4, 0.595), ("H200", True, {**INT4, **SMALL}, 0.330),
    ("H200", True, {"stream_blocks": 4}, 0.417), ("H200", True, {"stream_blocks": 4, **SMALL}, 0.382),
    ("H200", True, {"cuda_graphs": False, **XFLUX}, 0.428), ("H200", True, {"modulation": "stream", **XFLUX}, 0.436),
    ("H200", True, {"stream_blocks": 35, **XFLUX}, 0.538),
    ("H200", True, {"modulation": "stream", "stream_blocks": 28, **XFLUX}, 0.543),
    ("H200", False, {"cuda_graphs": False, **KEPT}, 0.409),
    ("H200", True, {**FINETUNE, **KEPT, "backward_clip": "previous"}, 0.509),
    ("H200", True, {**FINETUNE, "backward_clip": "previous"}, 0.707),
    # Of benchmarks/limits.py: streamed and quantised blocks, and full fine-tunes.
    ("H200", False, KEPT, 0.392), ("H200", False, {}, 0.500), ("H200", False, {"checkpointed_blocks": 6}, 0.405),
    ("H200", False, FP8, 0.320), ("H200", False, {"quantization": "int8", **KEPT}, 0.462),
    ("H200", False, {"quantization": "int8", "stream_blocks": 20, **KEPT}, 0.494),
    ("H200", False, {"checkpointed_blocks": 14, "stream_blocks": 16}, 0.451),
    ("H200", False, {"checkpointed_blocks": 55, "stream_blocks": 36, "modulation": "stream"}, 0.672),
    ("H200", False, {**FP8, "gradient_checkpointing": True, "checkpointed_blocks": 35, "stream_blocks": 28}, 0.526),
    ("H200", False, {"quantization": "fp8-dynamic", "modulation": "stream", "checkpointed_blocks": 46}, 0.455),
    ("H200", False, {**INT4, "modulation": "stream", "stream_blocks": 57, "checkpointed_blocks": 27}, 0.7),
    ("H200", False, {**FINETUNE, **KEPT, "backward_clip": "previous"}, 0.587),
    ("H200", False, {**FINETUNE, "checkpointed_blocks": 40, "backward_clip": "previous"}, 0.703),
    ("H200", False, {**FINETUNE, "checkpointed_blocks": 40, "backward_clip": "exact"}, 1.122),
    ("H200", False, {**FINETUNE, **KEPT, "step_in_backward": False}, 0.659),
    ("H200", False, {**FINETUNE, **KEPT, "optimizer": "adamw8bit", "backward_clip": "previous"}, 0.653),
    ("H200", False, {**FINETUNE, **KEPT, "optimizer": "adamw8bit", "backward_clip": "exact"}, 1.011),
    ("H200", False, {**FINETUNE, **KEPT, "optimizer": "adamw8bit", "step_in_backward": False}, 0.647),
    ("H200", False, {**FINETUNE, **KEPT, "optimizer": "adamw", "step_in_backward": False}, 0.581),
    ("H200", False, {**FINETUNE, "optimizer": "adamw", "step_in_backward": False}, 0.740),
    # diffusers' blocks, torch's flash.
    ("H200", False, {**OWN, **KEPT}, 0.511), ("H200", False, OWN, 0.715),
    ("H200", False, {**OWN, "quantization": "int8"}, 0.82), ("H200", False, {**OWN, "quantization": "fp8"}, 0.86),
    ("H200", False, {**OWN, "quantization": "torchao-fp8"}, 0.90),
    ("H200", False, {**OWN, "quantization": "int4"}, 0.96), ("H200", False, {**OWN, "quantization": "nf4"}, 0.86),
    ("H200", False, {**OWN, "quantization": "nf4", "modulation": "stream"}, 0.80),
    ("H200", False, {**OWN, "stream_blocks": 19}, 0.73), ("H200", False, {**EXAMPLE, "mode": "controlnet"}, 0.71),
    ("H100 80GB HBM3", False, EXAMPLE, 0.820), ("H100 80GB HBM3", False, {**EXAMPLE, **KEPT}, 0.548),
    ("H100 80GB HBM3", False, {**EXAMPLE, **KEPT, **SMALL}, 0.449),
]  # fmt: skip


def step(card: str = "NVIDIA H200", **keys: Any) -> timing.Forecast:
    about: dict[str, Any] = {"world_size": 1, "strategy": "single", "device": "cuda", "flash4": True}
    about |= {key: keys.pop(key) for key in (*about, "triton") if key in keys}
    return timing.seconds_per_step(replace(CONFIG, **keys), FLUX_DEV, card, **about)


def seconds(forecast: timing.Forecast, name: str) -> float:
    return next((term.seconds for term in forecast.terms if term.name == name), 0.0)


@pytest.mark.parametrize(("card", "flash4", "keys", "measured"), MEASURED)
def test_what_was_measured(card: str, flash4: bool, keys: dict[str, Any], measured: float) -> None:
    found = step(f"NVIDIA {card}", flash4=flash4, **keys)
    assert found.seconds == pytest.approx(measured, rel=0.10)
    assert found.seconds == pytest.approx(sum(term.seconds for term in found.terms))
    assert all(term.seconds > 0 and term.why for term in found.terms) and found.error == 0.12


def test_a_step_at_1024_px_is_its_products_and_its_attention() -> None:
    """119 TFLOP of products and 1 of adapters at 744 TFLOP/s, 52 of attention at 614: known without any fit."""
    found = step(**KEPT)
    assert seconds(found, "products") == pytest.approx(120 / 744, rel=0.01)
    assert seconds(found, "attention") == pytest.approx(52.05 / 614, rel=0.01)
    assert seconds(step(**FP8), "products in fp8") == pytest.approx(120 / 1450, rel=0.01)


@pytest.mark.parametrize("keys", [KEPT, {}, FP8, INT4, FINETUNE, OWN, {"stream_blocks": 20}, {"mode": "controlnet"}])
def test_more_work_takes_longer(keys: dict[str, Any]) -> None:
    plain = step(**keys).seconds
    assert step(**{**keys, "train_batch_size": 2}).seconds > plain
    assert step(**{**keys, "img_size": 1280}).seconds > plain > step(**{**keys, "img_size": 768}).seconds
    assert step(**{**keys, "rank": 64}).seconds >= plain
    assert step(**{**keys, "flash4": False}).seconds >= plain


def test_a_batch_takes_less_than_its_images_one_by_one() -> None:
    one = step(**SMALL, **KEPT).seconds
    assert 2 * one < step(**SMALL, **KEPT, train_batch_size=4).seconds < 4 * one


def test_passes_and_sizes() -> None:
    one, small = step(**KEPT), step(**KEPT, **SMALL)
    twice = step(**KEPT, gradient_accumulation_steps=2)
    assert twice.seconds == pytest.approx(2 * one.seconds - seconds(one, "optimizer"))
    both = step(**KEPT, resolutions=(512,))
    assert both.seconds == pytest.approx((one.seconds + small.seconds) / 2)


def test_recomputing_fewer_blocks_takes_less() -> None:
    times = [step(checkpointed_blocks=count).seconds for count in (0, 10, 30, 57)]
    assert times == sorted(set(times)) and times[0] == pytest.approx(step(**KEPT).seconds)
    assert times[-1] == pytest.approx(step().seconds)


def test_the_host_is_waited_for_where_steps_are_not_recorded() -> None:
    assert seconds(step(**SMALL), "waiting for the host") == 0
    assert seconds(step(**SMALL, cuda_graphs=False), "waiting for the host") > 0.2
    assert seconds(step(**SMALL, triton=False), "waiting for the host") > 0.2  # diffusers' blocks


def test_the_link_is_hidden_by_what_computes_until_it_is_too_slow() -> None:
    assert seconds(step(stream_blocks=4), "waiting for the link") == 0
    assert seconds(step(stream_blocks=57, modulation="stream"), "waiting for the link") > 0.1
    quarter = step(stream_blocks=57, quantization="int4", modulation="quantize")
    assert seconds(quarter, "waiting for the link") == 0


def test_ranks_exchange_gradients() -> None:
    """An all-reduce sends 2 (n - 1) / n of them; adapters' are in fp32."""
    parameters = 16 * sum(one.inputs + one.outputs for one in trained(CONFIG, FLUX_DEV).adapters)
    for count in (2, 8):
        found = step(world_size=count, strategy="ddp", **KEPT)
        wanted = 2 * (count - 1) / count * parameters * 4 / 360e9
        assert seconds(found, "exchange between ranks") == pytest.approx(wanted)
        assert found.error > step(**KEPT).error
    shares = [step(world_size=n, strategy="zero2", **KEPT) for n in (2, 8)]
    assert seconds(shares[0], "optimizer") == pytest.approx(4 * seconds(shares[1], "optimizer"))


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("NVIDIA H200", True), ("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100-SXM4-80GB", True),
        ("NVIDIA A100 80GB PCIe", True), ("H100", True),
        ("NVIDIA H100 PCIe", False), ("NVIDIA H200 NVL", False), ("NVIDIA GH200 480GB", False), ("", False),
        ("NVIDIA GeForce RTX 4090", False), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", False), ("Tesla T4", False),
    ],
)  # fmt: skip
def test_unknown_cards_have_no_forecast(card: str, known: bool) -> None:
    assert (card_of(card) is not None) is known
    if known:
        assert step(card).seconds > 0.2
    else:
        with pytest.raises(timing.NoForecast, match="is not known"):
            step(card)


def test_a100() -> None:
    """Not measured: slower than an H100 by as much as its products are, and no products in fp8."""
    ampere, hopper = (step(card, flash4=False, **KEPT) for card in ("A100", "H100"))
    assert 2 < ampere.seconds / hopper.seconds < 3 and ampere.error > hopper.error
    with pytest.raises(timing.NoForecast, match="fp8"):
        step("A100", **FP8)


@pytest.mark.parametrize("keys", [{"device": "cpu"}, {"mixed_precision": "no"}])
def test_only_gpus_in_16_bits(keys: dict[str, Any]) -> None:
    with pytest.raises(timing.NoForecast, match="GPUs"):
        step(**keys)


def test_hours() -> None:
    found = step(**KEPT)
    assert timing.hours(CONFIG, found, world_size=1) == pytest.approx(1000 * found.seconds / 3600)
    epochs = replace(CONFIG, max_train_steps=None, num_train_epochs=3, train_batch_size=2, resolutions=(512,))
    # 100 images at two sizes, three times, four at a time by two ranks.
    assert timing.hours(epochs, found, world_size=2, images=100) == pytest.approx(150 * found.seconds / 3600)
    assert timing.hours(epochs, found, world_size=2) is None


TWO_GPUS = Path(__file__).parents[2] / "benchmarks" / "results" / "two-gpus-nvidia-h200-2026-11-30.json"


@pytest.mark.parametrize(("part", "row", "strategy", "changes", "near"), [
    ("lora", "ddp", "ddp", {"gradient_accumulation_steps": 4}, 0.05), ("lora", "zero2", "zero2", {}, 0.15),
    ("finetune", "adamw8bit", "fsdp", {"optimizer": "adamw8bit", "weight_update": "stochastic"}, 0.15),
    ("fp32", "fp32", "fsdp", {}, 0.15),
])  # fmt: skip
def test_what_two_ranks_were_measured_at(
    part: str, row: str, strategy: str, changes: dict[str, Any], near: float
) -> None:
    """benchmarks/two_gpus.py: within the error that the forecast itself names, and nearer."""
    told = json.loads(TWO_GPUS.read_text("utf-8"))[part]["rows"][row]
    config = replace(TrainConfig("x", img_size=1024), mode="lora" if part == "lora" else "finetune", **changes)
    made = timing.seconds_per_step(
        config, FLUX_DEV, "NVIDIA H200", world_size=2, strategy=strategy, device="cuda", flash4=False
    )  # fmt: skip
    assert near < made.error and made.seconds == pytest.approx(told["seconds_per_step"], rel=near)
