"""What holds of every bill: more work needs no less, sharing needs no more, and a phase is the sum of its terms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from xflux_trainer import memory_fused
from xflux_trainer.config import TrainConfig
from xflux_trainer.memory import PHASES, STRATEGIES, Bill, forecast
from xflux_trainer.memory_passes import Passed, turn
from xflux_trainer.memory_terms import ADAM, MASTERS, SHARDS
from xflux_trainer.rules import between
from xflux_trainer.spec import FLUX_DEV

STATES = (ADAM, MASTERS, SHARDS, "gradients", "moving average", "fp32 weights", "compensation")
SPEC = replace(FLUX_DEV, double_blocks=3, single_blocks=4)
OPTIONAL: dict[str, Any] = {
    "mode": st.sampled_from(("lora", "finetune", "controlnet")),
    "rank": st.integers(1, 256),
    "lora_targets": st.sampled_from(("xflux", "attn", "diffusers", "all-linear")),
    "train_batch_size": st.integers(1, 8),
    "img_size": st.integers(4, 96).map(lambda patches: 16 * patches),
    "gradient_checkpointing": st.booleans(),
    "checkpointed_blocks": st.none() | st.integers(0, 7),
    "kernels": st.sampled_from(("auto", "fused", "diffusers")),
    "quantization": st.sampled_from(("none", "fp8-dynamic", "fp8", "int8", "int4", "nf4", "torchao-int8")),
    "modulation": st.sampled_from(("keep", "quantize", "stream")),
    "stream_blocks": st.integers(0, 7),
    "optimizer": st.sampled_from(("adamw", "adamw8bit", "adafactor")),
    "step_in_backward": st.booleans(),
    "weight_update": st.sampled_from(("auto", "master", "stochastic", "kahan", "nearest")),
    "gradient_accumulation_steps": st.integers(1, 4),
    "ema_decay": st.sampled_from((0.0, 0.99)),
    "mixed_precision": st.sampled_from(("bf16", "fp16", "no")),
    "max_text_tokens": st.integers(1, 512),
    "cuda_graphs": st.booleans(),
    "controlnet_depth": st.integers(1, 3),
    "train_parameters": st.sampled_from(((), ("txt_attn",), ("single_transformer_blocks",))),
    "disable_sampling": st.booleans(),
}
CONFIGS = st.fixed_dictionaries({}, optional=OPTIONAL)


def config_of(keys: dict[str, Any], **changes: Any) -> TrainConfig:
    """The config, where the rules allow it."""
    made = TrainConfig("x", **{**keys, **changes})
    assume(not between(made))
    return made


def bill(config: TrainConfig, world_size: int = 1, strategy: str = "single") -> Bill:
    return forecast(config, SPEC, world_size=world_size, strategy=strategy, device="cuda")


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.integers(1, 8))
def test_a_larger_batch_needs_no_less(keys: dict[str, Any], more: int) -> None:
    small = config_of(keys)
    large = replace(small, train_batch_size=small.train_batch_size + more)
    assert bill(small).gpu_phases["train"] < bill(large).gpu_phases["train"]
    assert bill(small).gpu_allocated <= bill(large).gpu_allocated


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.integers(1, 64))
def test_larger_images_need_no_less(keys: dict[str, Any], patches: int) -> None:
    small = config_of(keys)
    large = replace(small, img_size=small.img_size + 16 * patches)
    assert bill(small).gpu_phases["train"] < bill(large).gpu_phases["train"]
    assert bill(small).gpu_allocated <= bill(large).gpu_allocated


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.integers(1, 256))
def test_a_higher_rank_needs_no_less(keys: dict[str, Any], more: int) -> None:
    small = config_of(keys, mode="lora")
    large = replace(small, rank=small.rank + more)
    assert bill(small).gpu_phases["train"] < bill(large).gpu_phases["train"]
    assert bill(small).gpu_allocated <= bill(large).gpu_allocated


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.sampled_from(("ddp", "zero1", "zero2", "zero3", "fsdp")), st.integers(1, 8), st.integers(1, 8))
def test_sharding_never_raises_what_a_rank_holds(keys: dict[str, Any], strategy: str, few: int, more: int) -> None:
    """Weights, gradients and the optimizer's states; buffers for an exchange are no states."""
    config = config_of(keys, quantization="none", modulation="keep", stream_blocks=0)

    def states(world_size: int) -> int:
        terms = bill(config, world_size, strategy).gpu
        return sum(term.bytes for term in terms if term.phase == "train" and term.name in STATES)

    assert states(few + more) <= states(few)


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.sampled_from(STRATEGIES), st.integers(1, 8), st.sampled_from(("cuda", "cpu")))
def test_a_phase_is_the_sum_of_its_terms(keys: dict[str, Any], strategy: str, ranks: int, device: Any) -> None:
    config = config_of(keys)
    made = forecast(config, SPEC, world_size=ranks, strategy=strategy, device=device)
    for terms, phases in ((made.gpu, made.gpu_phases), (made.host, made.host_phases)):
        assert all(isinstance(term.bytes, int) and term.bytes >= 0 and term.phase in PHASES for term in terms)
        for phase in PHASES:
            assert phases.get(phase, 0) == sum(term.bytes for term in terms if term.phase == phase)
    assert made.gpu_allocated == max(made.gpu_phases.values(), default=0)


BYTES = st.integers(0, 5)
"""Few, so that blocks often need the same."""


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(BYTES, BYTES, BYTES, BYTES, BYTES), max_size=8))
def test_the_sums_along_the_blocks_are_those_of_each_block(drawn: list[tuple[int, int, int, int, int]]) -> None:
    whole = [Passed(kept, needed, checkpointed=False, grads=grads) for kept, needed, _, _, grads in drawn]
    inputs = [Passed(kept, needed, checkpointed=True, grads=grads) for _, _, kept, needed, grads in drawn]
    ways = memory_fused._Ways(whole, inputs)
    for again in range(len(drawn) + 1):
        blocks = [*inputs[:again], *whole[again:]]
        there = [
            sum(other.kept for other in blocks[: number + 1]) + block.needed + sum(o.grads for o in blocks[number:])
            for number, block in enumerate(blocks)
        ]
        assert ways.most(again) == max(there, default=0)
        assert ways.turn(again) == turn(blocks) == (there.index(max(there)) if there else 0)
