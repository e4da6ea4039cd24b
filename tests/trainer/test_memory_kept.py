"""What is kept of a config by some of its settings is what would be found by all of them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace

from xflux_trainer import kept, settings
from xflux_trainer.config import TrainConfig, altered
from xflux_trainer.settings import VARIED

CHILD = """
import random, sys
from xflux_trainer import kept
if sys.argv[1] == "plain":  # before the modules that use it are loaded
    kept.kept_by = lambda *settings: lambda function: function
from xflux_trainer import memory, memory_fused, spec, timing
from xflux_trainer.config import TrainConfig
draw = random.Random(11)
for _ in range(400):
    mode = draw.choice(["lora", "lora", "finetune", "controlnet"])
    config = TrainConfig(
        "none", mode=mode, img_size=draw.choice([512, 1024]), train_batch_size=draw.choice([1, 2, 8]),
        gradient_accumulation_steps=draw.choice([1, 1, 4]), gradient_checkpointing=draw.random() < 0.7,
        checkpointed_blocks=draw.choice([None, 0, 7, 30]), cuda_graphs=draw.random() < 0.7,
        quantization=draw.choice(["none", "none", "int8", "fp8-dynamic", "nf4"]),
        modulation=draw.choice(["keep", "stream", "quantize"]), stream_blocks=draw.choice([0, 0, 8, 57]),
        optimizer=draw.choice(["adamw", "adamw8bit", "adafactor"]), step_in_backward=draw.random() < 0.3,
        backward_clip=draw.choice(["exact", "previous", "tensor"]),
        weight_update=draw.choice(["auto", "stochastic", "kahan"]), kernels=draw.choice(["auto", "diffusers"]),
        rank=draw.choice([4, 16]), lora_targets=draw.choice(["xflux", "all-linear"]),
        disable_sampling=draw.random() < 0.5, resolutions=draw.choice([(), (768,)]),
    )
    strategy = draw.choice(["single", "ddp", "zero2", "zero3", "fsdp"])
    shared = {"world_size": 1 if strategy == "single" else 2, "strategy": strategy, "triton": draw.random() < 0.8}
    bill = memory.forecast(config, spec.FLUX_DEV, device="cuda", gpu_only=True, **shared)
    peak = memory.peak(config, spec.FLUX_DEV, **shared)
    assert (peak.allocated, peak.holes, peak.context) == (bill.gpu_allocated, bill.gpu_holes, bill.gpu_context)
    passing = [term.bytes for term in bill.gpu if term.passing]
    count = memory_fused.checkpointed(config, spec.FLUX_DEV)
    ours = memory_fused.computes(config, strategy, "cuda", triton=shared["triton"])
    if passing and ours and strategy in ("single", "ddp") and (count or not config.gradient_checkpointing):
        assert memory.passing(config, spec.FLUX_DEV, **shared)(count) == sum(passing)
    try:
        step = timing.seconds_per_step(config, spec.FLUX_DEV, "NVIDIA H200", device="cuda", **shared)
    except timing.NoForecast as error:
        print(bill.gpu, error)
    else:
        print(bill.gpu, step.seconds.hex(), step.terms)
"""


def test_bills_and_times_are_the_same_without_anything_kept() -> None:
    """A function that reads a setting which it does not name would be handed its default."""
    kept_, plain = (
        subprocess.run([sys.executable, "-c", CHILD, how], capture_output=True, text=True, check=True, timeout=300)
        for how in ("kept", "plain")
    )
    assert kept_.stdout == plain.stdout and kept_.stdout.count("\n") == 400


def test_a_function_sees_the_settings_that_it_names_alone() -> None:
    asked = []

    @kept.kept_by("train_batch_size")
    def of(config: TrainConfig, more: int) -> int:
        asked.append((config.train_batch_size, config.quantization, config.rank))
        return config.train_batch_size + more

    config = TrainConfig("none", train_batch_size=4, quantization="int8", rank=7)
    assert of(config, 1) == of(altered(config, quantization="nf4"), 1) == of(replace(config, stream_blocks=3), 1) == 5
    assert asked == [(4, "none", 7)]
    assert (
        of(replace(config, rank=8), 1) == 5 and of(altered(config, train_batch_size=2), 1) == 3 and of(config, 2) == 6
    )
    assert asked[1:] == [(4, "none", 8), (2, "none", 7), (4, "none", 7)]


def test_a_family_is_all_that_differs_in_nothing_else() -> None:
    config = TrainConfig("none", rank=7)
    like = altered(config, train_batch_size=8, quantization="int8", optimizer="adafactor")
    assert like.family is config.family and replace(like, img_size=1024).family is config.family
    for other in (altered(config, rank=8), replace(config, disable_sampling=True)):
        assert other.family is not config.family
    # It stands beside the settings: equals stay equals, and hash as such.
    again = replace(config, train_batch_size=8, quantization="int8", optimizer="adafactor")
    settings._FAMILIES.clear()  # as after four thousand others
    afresh = replace(again, seed=1, train_batch_size=8)
    assert hash(replace(afresh, seed=config.seed)) == hash(like)
    for twin in (again, copy.copy(like), copy.deepcopy(like), pickle.loads(pickle.dumps(like))):
        assert twin == like and hash(twin) == hash(like) and vars(twin) == vars(like)
    assert set(VARIED) <= vars(config).keys()
