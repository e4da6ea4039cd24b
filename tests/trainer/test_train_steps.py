"""Every optimizer with every way to round, alone and on two ranks: resumed exactly, and right by values."""

from __future__ import annotations

import importlib.util
import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from steps_kit import CONFIG, Layers, equal, inputs, make, pair, state, take  # noqa: E402
from torch import nn  # noqa: E402
from xflux_trainer import averages, checkpoint, optim, slots  # noqa: E402
from xflux_trainer.checkpoint import Progress  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import Unsupported, UserError  # noqa: E402
from xflux_trainer.lossscale import LossScale  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402

OPTIMIZERS = ["adamw", "adafactor", *(["adamw8bit"] if importlib.util.find_spec("torchao") else [])]
UPDATES = ["fp32", "master", "stochastic", "kahan", "nearest"]
CLIPS = [None, "exact", "previous", "tensor"]


def cases() -> list[dict[str, Any]]:
    """Every optimizer with every rounding, after the backward pass and inside it, with an average and without."""
    found = [
        {"optimizer": optimizer, "weight_update": update, "backward_clip": clip or "exact",
         "step_in_backward": clip is not None, "ema_decay": decay}
        for (optimizer, update), (clip, decay) in product(
            product(OPTIMIZERS, UPDATES), ((None, 0.9), ("previous", 0.9)))
    ]  # fmt: skip
    first = found[0] | {"ema_decay": 0.0}
    return [*found, first, *(first | {"step_in_backward": True, "backward_clip": clip} for clip in ("exact", "tensor"))]


def build(case: dict[str, Any], **more: Any) -> tuple[Any, Layers]:
    plain = case["weight_update"] == "fp32"
    case = case | {"weight_update": "auto"} if plain else case
    return make(dtype=torch.float32 if plain else torch.bfloat16, **case, **more)


def stop_and_go(case: dict[str, Any], ranks: Ranks, folder: Path) -> bool:
    """Two steps, a checkpoint, two more; the same from the checkpoint in a stepper with other weights."""
    whole, first = build(case, ranks=ranks)
    for step in range(2):
        take(whole, step, ranks.rank)
    place = checkpoint.save(folder, whole, Progress(step=2), CONFIG, ranks, {}, {})
    norms = [take(whole, step, ranks.rank) for step in (2, 3)]
    other, module = build(case, ranks=ranks, seed=9)
    module.frozen.data.copy_(first.frozen)
    take(other, 0, ranks.rank)
    loaded = checkpoint.load(place, ranks)
    other.load(loaded.read, loaded.scalars)
    assert norms == [take(other, step, ranks.rank) for step in (2, 3)], case
    assert all(module.trained[name].grad is None for name in module.trained)
    return equal(state(whole), state(other))


def test_one_rank_resumes_exactly(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(Launch(use_cpu=True))
    wrong = [case for case in cases() if not stop_and_go(case, ranks, tmp_path)]
    assert wrong == []


def test_two_ranks_resume_exactly_and_stay_equal() -> None:
    together = [case for case in cases() if not case["step_in_backward"]]

    def work(ranks: Ranks, folder: Path) -> list[Any]:
        exact = [stop_and_go(case, ranks, folder) for case in together]
        weights = []
        for case in together:
            stepper, module = build(case, ranks=ranks)
            for step in range(3):
                take(stepper, step, ranks.rank, accumulation=1)
            weights.append([value.detach().float().numpy().tobytes() for value in module.trained.values()])
        return [exact, weights]

    (exact, one), (also, two) = pair(work)
    assert all(exact) and all(also)
    assert one == two  # the dice of the rounding are the same on every rank


def test_the_frozen_weights_are_not_sent_around() -> None:
    """Rank 0's trained weights are everybody's; what is frozen, and buffers, stay as each rank has read them."""

    def work(ranks: Ranks, _: Path) -> list[list[float]]:
        stepper, module = make(ranks=ranks, seed=ranks.rank)
        take(stepper, 0, ranks.rank)
        return [value.detach().float().flatten()[:3].tolist() for value in (module.first, module.frozen, module.table)]

    one, two = pair(work)
    assert one[0] == two[0]
    assert one[1:] == [[1.0] * 3] * 2
    assert two[1:] == [[2.0] * 3] * 2


def test_two_ranks_are_one_with_both_batches() -> None:
    def work(ranks: Ranks, _: Path) -> list[list[float]]:
        stepper, module = make(dtype=torch.float32, ranks=ranks, accumulation=2)
        for step in range(2):
            take(stepper, step, ranks.rank, accumulation=2)
        return [value.detach().flatten().tolist() for value in module.trained.values()]

    one, two = pair(work)
    assert one == two
    alone, module = make(dtype=torch.float32, accumulation=4)
    for step in range(2):
        alone.begin(1e-2 / (1 + step))
        for rank, k in product(range(2), range(2)):
            x, y = inputs(step, rank, k)
            alone.backward((alone(x) - y).square().mean())
        alone.step()
    for value, expected in zip(module.trained.values(), one, strict=True):
        assert torch.allclose(value.detach().flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_ranks_can_part_right_after_they_have_talked() -> None:
    """torch 2.4 took gloo down while a thread of it waited for the interpreter: half of such processes never ended."""

    def work(ranks: Ranks, _: Path) -> bool:
        ranks._joined = True  # else the group is somebody else's to leave
        ranks.gather(["something"] * 20)
        ranks.leave()
        return True

    for _ in range(4):
        assert pair(work) == [True, True]


def reference(optimizer: Any, module: Layers, steps: int) -> dict[str, Any]:
    """torch's loop as everybody writes it, in fp32, with gradients clipped by torch's own function."""
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        x, y = inputs(step)
        (module(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), CONFIG.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in module.trained.items()}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_in_fp32_it_is_the_librarys_optimizer(name: str, inside: bool) -> None:
    own, module = make(dtype=torch.float32, optimizer=name, step_in_backward=inside, backward_clip="exact")
    for step in range(4):
        take(own, step)
    theirs = Layers(torch.float32)
    if name == "adamw":
        optimizer: Any = torch.optim.AdamW(list(theirs.trained.values()), lr=1, weight_decay=0.1)
    else:
        from transformers.optimization import Adafactor

        plain = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        optimizer = Adafactor(list(theirs.trained.values()), lr=1, weight_decay=0.1, **plain)
    for key, value in reference(optimizer, theirs, 4).items():
        assert torch.allclose(module.trained[key], value, rtol=1e-5, atol=1e-7), key


def test_a_master_is_adamw_on_fp32_weights() -> None:
    """With the gradients that the bf16 weights give, torch's AdamW on fp32 copies has the masters' very bits."""
    own, module = make(weight_update="master", max_grad_norm=0.0)
    copies = [nn.Parameter(value.detach().float()) for value in module.trained.values()]
    theirs = torch.optim.AdamW(copies, weight_decay=0.1)
    real = own.step
    for step in range(3):
        grads: list[Any] = []
        own.step = lambda grads=grads: grads.extend(p.grad.float() for p in module.trained.values()) or 0.0  # type: ignore[misc]
        take(own, step)
        real()
        for copy, grad in zip(copies, grads, strict=True):
            copy.grad = grad
        theirs.param_groups[0]["lr"] = 1e-2 / (1 + step)
        theirs.step()
    for copy, (name, piece) in zip(copies, own.pieces(), strict=True):
        assert torch.equal(piece["weight"], copy), name
        assert torch.equal(module.trained[name], copy.bfloat16())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_small_steps_move_16_bit_weights(optimizer: str) -> None:
    """50 steps of some 2e-5: the nearest value is the old one; the others come where fp32 comes."""
    moved = {}
    for update in ("master", "stochastic", "kahan", "nearest"):
        stepper, module = make(optimizer=optimizer, weight_update=update, adam_weight_decay=0.0)
        before = module.first.detach().float()
        for _ in range(50):
            stepper.begin(2e-5)
            x, y = inputs(0)  # always the same, so that all steps go one way
            stepper.backward((stepper(x.bfloat16()).float() - y).square().mean())
            stepper.step()
        moved[update] = stepper._slots[0].value() - before
    size = float(moved["master"].abs().mean())
    assert size > 2e-4
    large = module.first.detach().float().abs() > 0.1  # bf16's next value is more than 4e-4 away
    along = {key: float((value * moved["master"].sign())[large].mean()) / size for key, value in moved.items()}
    assert along["nearest"] < 0.2
    assert along["kahan"] == pytest.approx(along["master"], rel=0.1)
    assert along["stochastic"] == pytest.approx(along["master"], rel=0.3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("update", ["fp32", "master", "stochastic", "kahan"])
def test_exact_steps_in_the_backward_pass_are_those_after_it(update: str, checkpointing: bool) -> None:
    case = {"optimizer": "adamw", "weight_update": update, "checkpointing": checkpointing, "ema_decay": 0.9}
    after, one = build(case)
    inside, two = build(case | {"step_in_backward": True, "backward_clip": "exact"})
    for step in range(3):
        assert take(after, step) == pytest.approx(take(inside, step), rel=1e-3 if step else 1e-6)
    for name, value in one.trained.items():
        assert torch.allclose(value.float(), two.trained[name].float(), rtol=1e-2, atol=1e-3), name


def test_gradients_are_freed_as_they_come() -> None:
    stepper, module = make(step_in_backward=True, backward_clip="previous")
    alive: list[int] = []
    hooks = stepper._in_backward
    real = hooks._take  # type: ignore[union-attr]

    def count(weight: Any, grad: Any, factor: Any) -> None:
        alive.append(sum(value.grad is not None for value in module.trained.values()))
        real(weight, grad, factor)

    hooks._take = count  # type: ignore[union-attr]
    for step in range(2):
        take(stepper, step)
    assert len(alive) == 8  # four weights in two steps
    assert max(alive) == 0


def grads_of(scale: float, step: int = 0) -> tuple[dict[str, Any], float]:
    module = Layers(torch.float32)
    x, y = inputs(step)
    ((module(x) - y).square().mean() * scale).backward()
    grads = {name: value.grad for name, value in module.trained.items()}
    return grads, math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))


@pytest.mark.parametrize("clip", CLIPS)
def test_what_each_clipping_does(clip: Any) -> None:
    """The first moment after one step is 0.1 of the clipped gradient; the norm that is told is the unclipped one."""
    limit = 0.05
    more = {"step_in_backward": clip is not None, "backward_clip": clip or "exact", "max_grad_norm": limit}
    stepper, _ = make(dtype=torch.float32, **more)
    grads, norm = grads_of(1.0)
    assert norm > 2 * limit
    assert take(stepper, 0) == pytest.approx(norm, rel=1e-5)
    for name, piece in stepper.pieces():
        # The first step has no norm before it, so `previous` is exact there.
        own = float(grads[name].norm()) if clip == "tensor" else norm
        assert torch.allclose(piece["exp_avg"] / 0.1, grads[name] * min(1.0, limit / own), rtol=1e-3, atol=1e-7), name


def test_the_last_norm_clips_the_next_step() -> None:
    stepper, _ = make(dtype=torch.float32, step_in_backward=True, backward_clip="previous", max_grad_norm=0.05,
                      adam_beta1=0.0)  # fmt: skip
    first = take(stepper, 0)
    assert stepper.scalars()["previous_norm"] == first
    weights = {name: piece["weight"] for name, piece in stepper.pieces()}
    second = take(stepper, 1, scale=100.0)  # a jump, clipped by what was before it
    assert second > 20 * first
    fresh, module = make(dtype=torch.float32, max_grad_norm=0.0, adam_beta1=0.0)
    with torch.no_grad():
        for name, value in module.trained.items():
            value.copy_(weights[name])
    take(fresh, 1, scale=100.0)
    for (name, piece), (_, other) in zip(stepper.pieces(), fresh.pieces(), strict=True):
        assert torch.allclose(piece["exp_avg"], other["exp_avg"] * (0.05 / first), rtol=1e-3, atol=1e-7), name
    assert stepper.scalars()["previous_norm"] == second


@pytest.mark.parametrize("case", [{}, {"step_in_backward": True, "backward_clip": "exact"},
                                  {"step_in_backward": True, "backward_clip": "previous"}])  # fmt: skip
def test_no_step_is_taken_where_the_gradient_is_not_finite(case: dict[str, Any]) -> None:
    for weights in ({}, {"weight_update": "master"}):
        stepper, _ = make(**case, **weights)
        before = state(stepper)
        assert not math.isfinite(take(stepper, 0, scale=math.inf))
        assert equal(before, state(stepper))


def test_stepping_in_the_backward_pass_is_refused_where_it_cannot_be() -> None:
    inside = {"step_in_backward": True}
    with pytest.raises(Unsupported, match="under ddp"):
        make(ranks=Ranks(Launch(world_size=2, use_cpu=True)), **inside)
    with pytest.raises(Unsupported, match="gradient_accumulation_steps is 2"):
        make(accumulation=2, **inside)
    with pytest.raises(Unsupported, match="mixed_precision is fp16"):
        make(mixed_precision="fp16", **inside)


def test_a_missing_torchao_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "torchao.optim", "torchao.prototype.low_bit_optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unsupported, match=r"torchao cannot be imported.*pip install 'torchao"):
        make(optimizer="adamw8bit")


@pytest.mark.skipif("adamw8bit" not in OPTIMIZERS, reason="torchao is not installed")
def test_moments_in_8_bits_are_saved_as_they_are() -> None:
    stepper, _ = make(optimizer="adamw8bit", weight_update="master")
    take(stepper, 0)
    pieces, _ = state(stepper)
    assert pieces["first"].keys() == {
        "weight", "exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale",
    }  # fmt: skip
    assert pieces["first"]["exp_avg_codes"].dtype == torch.uint8
    assert pieces["first"]["exp_avg_scale"].shape == (16,)  # a scale for 256 values
    assert pieces["last"].keys() == pieces["scale"].keys() == {"weight", "exp_avg", "exp_avg_sq"}  # too small
    # They follow AdamW's own to what 8 bits can hold.
    plain, _ = make(weight_update="master")
    take(plain, 0)
    for name, piece in plain.pieces():
        assert torch.allclose(piece["weight"], pieces[name]["weight"], atol=1e-4), name


@pytest.mark.parametrize(
    ("changes", "dtype", "update"),
    [
        ({}, torch.bfloat16, "stochastic"),
        ({"train_parameters": ("txt_attn",)}, torch.bfloat16, "master"),
        ({"mode": "controlnet"}, torch.bfloat16, "master"),
        ({"mode": "lora"}, torch.float32, "fp32"),
        ({"weight_update": "kahan"}, torch.bfloat16, "kahan"),
        ({"weight_update": "kahan"}, torch.float32, "fp32"),
        ({"weight_update": "nearest"}, torch.float16, "master"),
    ],
)
def test_which_weights_take_steps_how(changes: dict[str, Any], dtype: Any, update: str) -> None:
    assert slots.weight_update(TrainConfig(img_dir="x", **{"mode": "finetune", **changes}), dtype) == update


def test_checkpoints_pass_between_the_ways_to_round() -> None:
    """A master goes into a bf16 weight by its nearest value, into a compensated one by its first 16 bits."""
    for source, target in product(UPDATES[1:], UPDATES[1:]):
        one, _ = make(weight_update=source)
        take(one, 0)
        other, _ = make(weight_update=target, seed=4)
        other.load(dict(one.pieces()).__getitem__, one.scalars())
        for a, b in zip(one._slots, other._slots, strict=True):
            assert torch.allclose(a.value(), b.value(), rtol=2.0**-8, atol=0)
            if "kahan" in (source, target) and "master" in (source, target):
                assert torch.allclose(a.value(), b.value(), rtol=2.0**-15, atol=0) or source == "kahan"


def test_a_plain_checkpoint_begins_an_average() -> None:
    one, _ = make()
    take(one, 0)
    other, module = make(ema_decay=0.99, seed=3)
    other.load(dict(one.pieces()).__getitem__, one.scalars())
    for name, piece in other.pieces():
        assert torch.equal(piece["ema"], module.trained[name].detach().float())


def test_the_ramp_of_the_average() -> None:
    assert [averages.decay_at(0.99, steps) for steps in (1, 10, 100, 10_000)] == [2 / 11, 11 / 20, 101 / 110, 0.99]


@pytest.mark.parametrize("update", UPDATES)
def test_the_average_is_one_and_is_swapped_exactly(update: str) -> None:
    stepper, module = build({"optimizer": "adamw", "weight_update": update, "ema_decay": 0.5})
    expected = {slot.name: slot.value().clone() for slot in stepper._slots}
    for step in range(4):
        take(stepper, step)
        for slot in stepper._slots:
            decay = averages.decay_at(0.5, step + 1)
            expected[slot.name] = expected[slot.name] * decay + slot.value() * (1 - decay)
    pieces, _ = before = state(stepper)
    weights = {name: value.detach().clone() for name, value in module.trained.items()}
    addresses = [value.data_ptr() for value in module.trained.values()]
    with stepper.averaged():
        for name, value in module.trained.items():
            assert torch.allclose(pieces[name]["ema"], expected[name], rtol=1e-5, atol=1e-7)
            assert torch.equal(value, pieces[name]["ema"].to(value.dtype))
            assert not torch.equal(value, weights[name])
    assert equal(before, state(stepper))
    assert all(torch.equal(value, weights[name]) for name, value in module.trained.items())
    assert addresses == [value.data_ptr() for value in module.trained.values()]
    with pytest.raises(RuntimeError, match="drawing"), stepper.averaged():
        raise RuntimeError("drawing")
    assert equal(before, state(stepper))


def test_without_an_average_nothing_is_swapped() -> None:
    stepper, module = make()
    with stepper.averaged():
        assert torch.equal(module.first, Layers(torch.bfloat16).first)


def test_the_loss_scale_is_torchs() -> None:
    """The same overflows give the same scales as `torch.amp.GradScaler` has."""
    own = LossScale(interval=5)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", growth_interval=5)
    dice = torch.Generator().manual_seed(0)
    for _ in range(60):
        overflow = bool(torch.rand(1, generator=dice) < 0.15)
        theirs.scale(parameter.sum()).backward()
        parameter.grad = torch.full((1,), math.inf if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        own.update(overflow)
        assert own.scale == theirs.get_scale()
        assert own.scalars()["growth_tracker"] == theirs.state_dict()["_growth_tracker"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_overflow_leaves_the_step_out(dtype: Any) -> None:
    """Weights in fp16 have masters, and their gradients come back to their scale there."""
    stepper, _ = make(dtype=dtype, mixed_precision="fp16")
    pieces, _ = state(stepper)
    assert not math.isfinite(take(stepper, 0, scale=1e9 if dtype == torch.float16 else 1e36))
    assert stepper.scalars() == {"steps": 0.0, "loss_scale": 32768.0, "growth_tracker": 0.0}
    assert equal((pieces, {}), (state(stepper)[0], {}))
    stepper.load(pieces.__getitem__, {"steps": 0.0, "loss_scale": 256.0})
    plain, _ = make(dtype=torch.float32)
    assert take(stepper, 0) == pytest.approx(take(plain, 0), rel=1e-2)
    for (name, one), (_, two) in zip(stepper.pieces(), plain.pieces(), strict=True):
        assert torch.allclose(one["weight"], two["weight"], atol=2e-2), name
        assert torch.allclose(one["exp_avg"], two["exp_avg"], rtol=5e-2, atol=1e-4), name


def test_norms_of_16_bit_gradients_are_summed_in_fp32() -> None:
    """Ten thousand squares of 0.01 are 1, whose sum bf16 would end at a hundredth of."""
    assert optim.global_norm([torch.full((10_000,), 0.01).bfloat16()] * 4) == pytest.approx(2.0, rel=5e-3)
    assert optim.global_norm([]) == 0.0


def test_gradients_that_overflow_at_any_scale_end_the_run() -> None:
    """A thousand halvings would end in a division by zero."""
    scale = LossScale()
    with pytest.raises(UserError, match="bf16"):
        for _ in range(1000):
            scale.update(overflow=True)
    assert 1 / scale.scale < 1e4
