"""The optimizer: rates, clipping, state in and out, DeepSpeed's settings, and recorded losses."""

from __future__ import annotations

import base64
import gc
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from trainer_model import TINY, tiny_transformer  # noqa: E402
from xflux_trainer import evaluate, flow, lora, optim  # noqa: E402
from xflux_trainer.cache import Batch  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import Unsupported  # noqa: E402
from xflux_trainer.model import Velocity  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402
from xflux_trainer.zero import deepspeed_settings  # noqa: E402

CONFIG = TrainConfig(img_dir="x", rank=4, lora_targets="attn", learning_rate=1e-2, mixed_precision="no")
RANKS = Ranks(Launch(use_cpu=True))


def make(config: TrainConfig = CONFIG, accumulation: int = 1, dtype: Any = torch.float32) -> tuple[Any, dict]:
    transformer = tiny_transformer().to(dtype)
    adapters = lora.attach(transformer, config)
    velocity = Velocity(transformer, guidance=True)
    return optim.PlainStepper(velocity, adapters, config, RANKS, accumulation), adapters


def state(stepper: Any) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Everything that a checkpoint would hold of it."""
    return dict(stepper.pieces()), stepper.scalars()


def equal(one: Any, two: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if one[1] != two[1] or [*one[0]] != [*two[0]]:
        return False
    pairs = [(piece, two[0][name]) for name, piece in one[0].items()]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def take(stepper: Any, step: int, config: TrainConfig = CONFIG, accumulation: int = 1) -> tuple[float, float]:
    """One step on batches that follow from the step's number; returns the loss and the gradient's norm."""
    stepper.begin(optim.learning_rate(config, step, 10))
    total = 0.0
    for k in range(accumulation):
        dice = lora.generator("batch", step, k)
        batch = Batch(
            torch.randn(2, 16, 8, 8, generator=dice),
            torch.randn(2, 5, TINY.text_dim, generator=dice),
            torch.randn(2, TINY.pooled_dim, generator=dice),
        )
        t, eps = flow.sample_t(2, 0.63, "uniform", dice), torch.randn(2, 16, 64, generator=dice)
        with stepper.micro(k == accumulation - 1):
            loss = evaluate.velocity_loss(stepper, config, batch, eps, t, RANKS.device).mean()
            stepper.backward(loss)
        total += float(loss.detach()) / accumulation
    return total, stepper.step()


RECORDED = {
    "no": [3.733083, 3.629667, 3.994296, 4.451818, 3.315416, 3.129468],
    "bf16": [3.73136, 3.62929, 3.98998, 4.45280, 3.31516, 3.12800],
}
"""Losses of six steps, recorded on torch 2.4.0 and 2.13.0: these agree to 1e-7 in fp32 and to 5e-4 in bf16."""


@pytest.mark.parametrize("precision", RECORDED)
def test_the_losses_are_the_recorded_ones(precision: Any) -> None:
    """A change that is said not to alter the training shows it here; one that does records anew, and says why."""
    config = replace(CONFIG, mixed_precision=precision)
    stepper, _ = make(config, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    found = [take(stepper, step, config)[0] for step in range(6)]
    assert found == pytest.approx(RECORDED[precision], rel=2e-5 if precision == "no" else 1e-3)


def test_accumulated_batches_are_one_large_batch() -> None:
    """Two passes give the mean of their gradients, whatever the optimizer does with it."""
    stepper, _ = make(replace(CONFIG, max_grad_norm=0.0), accumulation=2)
    alone, others = make(replace(CONFIG, max_grad_norm=0.0))
    take(stepper, 0, accumulation=2)
    grads: dict[str, Any] = {}
    for k in range(2):
        dice = lora.generator("batch", 0, k)
        batch = Batch(
            torch.randn(2, 16, 8, 8, generator=dice),
            torch.randn(2, 5, TINY.text_dim, generator=dice),
            torch.randn(2, TINY.pooled_dim, generator=dice),
        )
        t, eps = flow.sample_t(2, 0.63, "uniform", dice), torch.randn(2, 16, 64, generator=dice)
        evaluate.velocity_loss(alone, CONFIG, batch, eps, t, RANKS.device).mean().div(2).backward()
    for name, parameter in others.items():
        grads[name] = parameter.grad
    pieces, _ = state(stepper)
    for name, grad in grads.items():
        assert torch.allclose(pieces[name]["exp_avg"], 0.1 * grad, rtol=1e-3, atol=1e-8)


def test_clipping_is_by_the_global_norm() -> None:
    free, _ = make(replace(CONFIG, max_grad_norm=0.0))
    bound, _ = make(replace(CONFIG, max_grad_norm=0.01))
    norms = take(free, 0)[1], take(bound, 0)[1]
    assert norms[0] == pytest.approx(norms[1])  # the norm before clipping is told
    assert norms[0] > 0.01
    squares = sum(float((piece["exp_avg"] / 0.1).square().sum()) for piece in state(bound)[0].values())
    assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-3)


def test_state_in_and_out_is_exact() -> None:
    stepper, _ = make()
    for step in range(3):
        take(stepper, step)
    pieces, scalars = state(stepper)
    assert scalars == {"steps": 3.0}
    rest = [take(stepper, step) for step in range(3, 6)]
    other, _ = make(replace(CONFIG, seed=9))
    other.load(pieces.__getitem__, scalars)
    assert [take(other, step) for step in range(3, 6)] == rest
    assert equal(state(stepper), state(other))


def test_a_saved_state_does_not_move_with_the_training() -> None:
    stepper, _ = make(replace(CONFIG, ema_decay=0.9))
    saved, before = (state(stepper)[0] for _ in range(2))
    take(stepper, 0)
    assert equal((saved, {}), (before, {}))
    assert all(piece.keys() == {"weight", "ema"} for piece in saved.values())


def test_adapters_learn_in_fp32_on_a_bf16_model() -> None:
    """Steps of 1e-4 must not be rounded away: after 20 of them nearly every entry of A has moved."""
    config = replace(CONFIG, learning_rate=1e-4, mixed_precision="bf16")
    stepper, _ = make(config, dtype=torch.bfloat16)
    before = state(stepper)[0]
    for step in range(3):
        take(stepper, step, config)
    after = state(stepper)[0]
    moved = [
        float((before[name]["weight"] != after[name]["weight"]).float().mean()) for name in before if "lora_A" in name
    ]
    assert min(moved) > 0.95


def test_fp16_scales_its_gradients_and_keeps_the_scale() -> None:
    config = replace(CONFIG, mixed_precision="fp16")
    stepper, _ = make(config, dtype=torch.float16)
    losses = [take(stepper, step, config)[0] for step in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    pieces, scalars = state(stepper)
    assert scalars.keys() == {"steps", "loss_scale", "growth_tracker"}
    other, _ = make(config, dtype=torch.float16)
    other.load(pieces.__getitem__, scalars | {"loss_scale": 128.0, "growth_tracker": 7.0})
    assert other.scalars() == scalars | {"loss_scale": 128.0, "growth_tracker": 7.0}


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("constant_with_warmup", [0.25, 0.5, 1, 1, 1]),
        ("linear", [0.25, 0.5, 1, 0.5, 1 / 6]),
        ("cosine", [0.25, 0.5, 1, 0.5, 0.0669873]),
    ],
)
def test_learning_rates(scheduler: Any, rates: list[float]) -> None:
    config = replace(CONFIG, learning_rate=1.0, lr_scheduler=scheduler, lr_warmup_steps=4)
    found = [optim.learning_rate(config, step, 10) for step in (0, 1, 4, 7, 9)]
    assert found == pytest.approx(rates)


def zero(environ: dict[str, str], **changes: Any) -> tuple[dict[str, Any], list[str]]:
    return deepspeed_settings(environ, replace(CONFIG, **changes), 2, 4, 5_000_000)


def test_deepspeed_settings_from_xfluxs_file() -> None:
    environ = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_GRADIENT_CLIPPING": "1.0",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    }  # fmt: skip
    settings, notes = zero(environ, mixed_precision="bf16", train_batch_size=3)
    assert notes == []
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5_000_000}
    assert (settings["train_micro_batch_size_per_gpu"], settings["train_batch_size"]) == (3, 24)
    assert settings["gradient_accumulation_steps"] == 4
    assert (settings["bf16"], settings["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert settings["gradient_clipping"] == 1.0


def test_deepspeed_settings_that_are_changed_are_told() -> None:
    environ = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    }  # fmt: skip
    settings, notes = zero(environ)
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert settings["zero_force_ds_cpu_optimizer"] is False  # that one is compiled at its first start
    assert [note.split()[0] for note in notes] == ["gradients"]


def test_a_deepspeed_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    environ = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    path.write_text(
        json.dumps({
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 123}, "gradient_clipping": "auto",
            "optimizer": {"type": "Adam"}, "gradient_accumulation_steps": 8, "wall_clock_breakdown": True,
        })
    )  # fmt: skip
    settings, notes = zero(environ)
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 123}
    assert settings["gradient_clipping"] == CONFIG.max_grad_norm
    assert settings["wall_clock_breakdown"] is True
    assert len(notes) == 1
    launch = Launch.read({**environ, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_MIXED_PRECISION": "no"})
    assert launch.accumulation == 8
    assert launch.mixed_precision == ""  # the launcher's own default: its file may not name one beside a DeepSpeed file
    for text in ("", "[]"):
        path.write_text(text)
        with pytest.raises(Unsupported, match=r"ds\.json"):
            zero(environ)


def of_file(**values: Any) -> tuple[dict[str, Any], list[str]]:
    """The settings from a DeepSpeed file, given as base64 as accelerate takes it."""
    text = base64.urlsafe_b64encode(json.dumps(values).encode()).decode()
    return zero({"ACCELERATE_DEEPSPEED_CONFIG_FILE": text})


def test_a_deepspeed_file_that_says_otherwise_is_told() -> None:
    settings, notes = of_file(
        zero_optimization={"stage": "auto", "cpu_offload": True}, fp16={"enabled": True}, gradient_clipping=0.25,
        train_micro_batch_size_per_gpu=7, wall_clock_breakdown="auto",
    )  # fmt: skip
    offload = {"offload_optimizer": {"device": "cpu"}}
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5_000_000, **offload}
    assert (settings["fp16"], settings["gradient_clipping"]) == ({"enabled": False}, 0.25)
    assert settings["train_micro_batch_size_per_gpu"] == CONFIG.train_batch_size
    assert "wall_clock_breakdown" not in settings  # nobody fills "auto" there, and DeepSpeed fails with it
    assert [note.split()[0] for note in notes] == ["mixed_precision", "train_batch_size", "gradients"]
    assert "DeepSpeed file" in notes[-1]


def test_a_deepspeed_file_that_agrees_is_not_told() -> None:
    _, notes = of_file(
        zero_optimization={"stage": 2, "offload_optimizer": {"device": "none"}}, fp16={"enabled": "auto"},
        gradient_clipping=CONFIG.max_grad_norm, train_micro_batch_size_per_gpu="auto", train_batch_size="auto",
        **{CONFIG.mixed_precision: {"enabled": True}} if CONFIG.mixed_precision != "no" else {},
    )  # fmt: skip
    assert notes == []


@pytest.mark.parametrize(("values", "told"), [
    ({"gradient_clipping": "none of it"}, "gradient_clipping is 'none of it'"),
    ({"gradient_clipping": True}, "gradient_clipping is True"),
    ({"zero_optimization": True}, "zero_optimization is True"),
    ({"zero_optimization": {"stage": 4}}, "ZeRO stage 4"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}}, "asks for nvme"),
    ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer is 'cpu'"),
])  # fmt: skip
def test_a_deepspeed_file_that_cannot_be_used_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(Unsupported, match=told):
        of_file(**values)


@pytest.mark.parametrize("stage", ["0", "4", "none"])
def test_other_zero_stages_are_refused(stage: str) -> None:
    with pytest.raises(Unsupported, match=f"stage {stage}"):
        zero({"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage})


def test_the_rate_of_a_step_is_the_one_that_it_is_given() -> None:
    stepper, adapters = make()
    before = {name: value.detach().clone() for name, value in adapters.items()}
    still = replace(CONFIG, adam_weight_decay=0.0, lr_scheduler="constant_with_warmup", lr_warmup_steps=10**9)
    take(stepper, 0, still)  # a rate of nearly nothing
    assert all(torch.allclose(value, before[name], atol=1e-9) for name, value in adapters.items())
    take(stepper, 0)
    assert any(not torch.allclose(value, before[name], atol=1e-4) for name, value in adapters.items())


def test_adamw_is_what_the_config_says() -> None:
    config = replace(CONFIG, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, adam_weight_decay=0.3)
    _, adapters = make()
    (group,) = optim.adamw(list(adapters.values()), config, torch.device("cpu")).param_groups
    assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6 and group["weight_decay"] == 0.3


@pytest.mark.parametrize("inside", [False, True])
def test_what_was_trained_is_let_go_with_its_stepper(inside: bool) -> None:
    """Hooks on the weights lie where Python's collector does not look: 28 GiB of a model stayed on the card."""
    config = replace(CONFIG, step_in_backward=inside)
    stepper, adapters = make(config)
    take(stepper, 0, config)
    seen = [weakref.ref(weight) for weight in adapters.values()]
    del stepper, adapters
    gc.collect()
    assert not any(reference() is not None for reference in seen)
