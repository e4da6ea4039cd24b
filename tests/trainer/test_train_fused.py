"""The fused steps by values: the library's own, unbiased, the same again, and interchangeable with the plain ones.

They run on a GPU where there is one, else in Triton's interpreter, which has to be chosen before Triton is imported:
in a process of its own, where these very tests run.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("transformers")

from steps_kit import make, state, take  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from xflux_trainer import fusedsteps, optimizers, rounding  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
here = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="in a process with Triton's interpreter")
torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
CONFIG = TrainConfig(img_dir="x", mode="finetune", learning_rate=1e-2, adam_weight_decay=0.1, optimizer="adafactor")
SHAPES = [(40, 700), (130, 64), (33, 1030), (700,), (5000,)]


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRETED, reason="they run here")
def test_these_in_the_interpreter() -> None:
    """On a machine without a GPU."""
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "XFLUX_POINTWISE": "triton"}
    done = subprocess.run(argv, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def draw(*shape: int, key: object = 0, spread: float = 0.0) -> Tensor:
    dice = rounding.generator(torch.device("cpu"), "fused", key, shape)
    value = torch.randn(*shape, generator=dice) * 10 ** (spread * torch.randn(*shape, generator=dice))
    return value.bfloat16().to(DEVICE)


def optimizer_of(weight: Tensor, name: Any = "adafactor") -> tuple[nn.Parameter, Any]:
    held = nn.Parameter(weight.float().clone(), requires_grad=False)
    return held, optimizers.make([held], replace(CONFIG, optimizer=name), DEVICE)


def own_step(held: nn.Parameter, optimizer: Any, grad: Tensor) -> None:
    held.grad = grad.float()
    with optimizers.quietly(optimizer, DEVICE):
        optimizer.step()


def moments(optimizer: Any, held: nn.Parameter) -> dict[str, Tensor]:
    return optimizers.tensors(optimizer, held)


@here
@pytest.mark.parametrize("shape", SHAPES)
def test_adafactor_is_the_librarys(shape: tuple[int, ...]) -> None:
    weight = draw(*shape)
    (one, theirs), (two, ours) = optimizer_of(weight), optimizer_of(weight)
    for step in range(3):
        grad = draw(*shape, key=step, spread=1.0)
        own_step(one, theirs, grad.float() * 0.3)
        factor = torch.tensor(0.3, device=DEVICE) if step else 0.3  # either is taken
        fusedsteps.step(ours, two, fusedsteps.Place("fp32", two.data, None), grad, factor, 1)
        assert torch.allclose(one, two, rtol=1e-6, atol=2e-6)
    for key, value in moments(theirs, one).items():
        assert torch.allclose(value, moments(ours, two)[key], rtol=2e-6, atol=0), key
    assert ours.state[two]["step"] == 3


@here
def test_a_gradient_of_zeros_and_one_that_is_not_finite() -> None:
    weight = draw(40, 700)
    zeros = torch.zeros_like(weight)
    held, optimizer = optimizer_of(weight)
    place = fusedsteps.Place("fp32", held.data, None)
    fusedsteps.step(optimizer, held, place, zeros, 1.0, 1)
    assert torch.allclose(held, weight.float() * (1 - 1e-2 * 0.1), rtol=1e-6)  # the decay alone
    zeros[3, 5] = math.nan
    fusedsteps.step(optimizer, held, place, zeros, 1.0, 1)
    assert held.isnan().all()  # as the library has it: the norm of the update is of all of it


@here
@pytest.mark.parametrize("shape", [(40, 96), (3840,)])
def test_the_rounding_is_fair(shape: tuple[int, ...]) -> None:
    """Of 64 seeds each gives one of the two neighbours of the fp32 result, and their mean is that result."""
    weight = draw(*shape)
    grad = draw(*shape, key="grad")
    exact, theirs = optimizer_of(weight)
    own_step(exact, theirs, grad)
    nearest = exact.detach().bfloat16().float()
    total, count = torch.zeros(shape, dtype=torch.float64, device=DEVICE), 64
    for seed in range(count):
        rounded = weight.clone()
        held, ours = optimizer_of(weight)
        fusedsteps.step(ours, held, fusedsteps.Place("stochastic", rounded, None), grad, 1.0, seed * 7919)
        assert ((rounded.float() - exact).abs() <= nearest.abs() * 2.0**-7 + 1e-30).all()
        total += rounded.double()
    gap = (nearest.abs().double() * 2.0**-7).clamp(min=1e-30)
    bias = (total / count - exact.detach().double()) / gap
    deviation = 0.5 / math.sqrt(count)  # of one element's mean, in gaps, at most
    assert bias.abs().max() < 6 * deviation
    assert abs(float(bias.mean())) < 5 * deviation / math.sqrt(bias.numel())
    # Neighbours that share a throw are not thrown alike.
    flat = bias.reshape(40, 96)
    for shift in (1, 2, 4):
        both = (flat[:-shift] * flat[shift:]).mean() / bias.square().mean()
        assert abs(float(both)) < 6 / math.sqrt(flat.numel())


@here
def test_what_was_measured_is_what_the_step_begins_with() -> None:
    weight, grad = draw(40, 700), draw(40, 700, key="grad", spread=1.0)
    squares = fusedsteps.measure(grad)
    assert float(squares.norm()) == pytest.approx(float(grad.double().norm()), rel=1e-6)
    found = []
    for known in (squares, None):
        held, ours = optimizer_of(weight)
        fusedsteps.step(ours, held, fusedsteps.Place("fp32", held.data, None), grad, 0.5, 1, known)
        found.append(held)
    assert torch.equal(*found)


@here
def test_the_dice_follow_from_the_seed_alone() -> None:
    weight, grad = draw(40, 700), draw(40, 700, key="grad")
    found = []
    for seed in (1, 1, 2):
        rounded = weight.clone()
        held, ours = optimizer_of(weight)
        torch.rand(3, device=DEVICE)
        fusedsteps.step(ours, held, fusedsteps.Place("stochastic", rounded, None), grad, 1.0, seed)
        found.append(rounded)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@here
@pytest.mark.parametrize("shape", [(40, 700), (5000,)])
@pytest.mark.parametrize("name", ["adafactor", "adamw", pytest.param("adamw8bit", marks=torchao)])
def test_every_way_to_hold_the_value(name: str, shape: tuple[int, ...]) -> None:
    weight, grad = draw(*shape), draw(*shape, key="grad")
    master = weight.float() + 1e-4
    held, ours = optimizer_of(master, name)
    fusedsteps.step(ours, held, fusedsteps.Place("fp32", held.data, None), grad, 1.0, 1)
    for update in ("nearest", "kahan", "master"):
        rounded, compensation = rounding.split(master, torch.bfloat16)
        other = {"kahan": compensation, "master": master.clone()}.get(update)
        start = rounding.join(rounded, compensation) if update == "kahan" else rounded.float()
        value, optimizer = optimizer_of(start if update != "master" else master, name)
        place = fusedsteps.Place("fp32", value.data, None)
        fusedsteps.step(optimizer, value, place, grad, 1.0, 1)
        again, optimizer = optimizer_of(start, name)
        fusedsteps.step(optimizer, again, fusedsteps.Place(update, rounded, other), grad, 1.0, 1)
        expected = rounding.split(value.detach(), torch.bfloat16)
        assert torch.equal(rounded, expected[0])
        if update == "kahan":
            assert torch.equal(other, expected[1])
        if update == "master":
            assert torch.equal(other, held)


@here
@pytest.mark.parametrize("shape", [(40, 768), (3, 5, 700), (7,)])
@pytest.mark.parametrize("before", [0, 2])
def test_adamw_is_torchs(shape: tuple[int, ...], before: int) -> None:
    """From torch's own state, whose count may lie on the device, one step of each."""
    one, theirs = optimizer_of(draw(*shape), "adamw")
    for step in range(before):
        own_step(one, theirs, draw(*shape, key=step))
    two, ours = optimizer_of(one, "adamw")
    optimizers.restore(ours, two, moments(theirs, one), before)
    grad = draw(*shape, key="last")
    own_step(one, theirs, grad.float() * 0.3)
    fusedsteps.step(ours, two, fusedsteps.Place("fp32", two.data, None), grad, 0.3, 1)
    assert torch.allclose(one, two, rtol=1e-6, atol=1e-7)
    expected, found = moments(theirs, one), moments(ours, two)
    assert expected.keys() == found.keys() == set(optimizers.MOMENTS)
    for key, value in expected.items():
        assert torch.allclose(value, found[key], rtol=1e-6, atol=1e-8), key
    assert int(ours.state[two]["step"]) == before + 1


@here
@torchao
@pytest.mark.parametrize("shape", [(40, 768), (16384,), (5, 64), (700,)])
@pytest.mark.parametrize("before", [0, 2])
def test_adamw_in_8_bits_is_the_librarys(shape: tuple[int, ...], before: int) -> None:
    """From the library's own state, one step of each. A code may differ by one where a moment lies, up to rounding, in
    the middle of two values."""
    one, theirs = optimizer_of(draw(*shape), "adamw8bit")
    for step in range(before):
        own_step(one, theirs, draw(*shape, key=step, spread=0.3))
    two, ours = optimizer_of(one, "adamw8bit")
    optimizers.restore(ours, two, moments(theirs, one), before)
    grad = draw(*shape, key="last", spread=0.3)
    own_step(one, theirs, grad.float() * 0.3)
    fusedsteps.step(ours, two, fusedsteps.Place("fp32", two.data, None), grad, 0.3, 1)
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)
    expected, found = moments(theirs, one), moments(ours, two)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if key.endswith("_codes"):
            assert (value.int() - found[key].int()).abs().max() <= 1
            assert (value != found[key]).float().mean() < 3e-3
        else:
            assert torch.allclose(value, found[key], rtol=1e-5, atol=1e-6 * float(value.abs().max())), key
    assert int(ours.state[two]["step"]) == before + 1


@here
@torchao
def test_states_pass_from_the_library_to_the_kernels() -> None:
    for name in ("adafactor", "adamw", "adamw8bit"):
        weight = draw(40, 768)
        one, theirs = optimizer_of(weight, name)
        own_step(one, theirs, draw(40, 768, key=0))
        two, ours = optimizer_of(one.detach(), name)
        optimizers.restore(ours, two, moments(theirs, one), 1)
        grad = draw(40, 768, key=1)
        own_step(one, theirs, grad)
        fusedsteps.step(ours, two, fusedsteps.Place("fp32", two.data, None), grad, 1.0, 1)
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6), name


@pytest.mark.skipif(not INTERPRETED, reason="the kit's layers are on the CPU")
@pytest.mark.parametrize("clip", [None, "exact", "previous", "tensor"])
def test_the_trainers_steps_take_this_way(clip: Any) -> None:
    """After the backward pass and inside it they arrive where fp32 does, up to the rounding; norms are the same."""
    changes: dict[str, Any] = {
        "step_in_backward": clip is not None,
        "backward_clip": clip or "exact",
        "optimizer": "adafactor",
    }
    (fused, _), (plain, _) = make(**changes), make(dtype=torch.float32, **changes)
    assert all(slot._fused for slot in fused._slots)
    for step in range(3):
        assert take(fused, step) == pytest.approx(take(plain, step), rel=2e-2)
    for (name, one), (_, two) in zip(state(fused)[0].items(), state(plain)[0].items(), strict=True):
        assert one["weight"].dtype == torch.bfloat16
        assert torch.allclose(one["weight"].float(), two["weight"], rtol=2e-2, atol=1.5e-2), name


@pytest.mark.skipif(not INTERPRETED, reason="the kit's layers are on the CPU")
def test_a_resumed_run_throws_the_same_dice() -> None:
    case: dict[str, Any] = {"optimizer": "adafactor", "step_in_backward": True, "backward_clip": "previous"}
    whole, first = make(**case)
    take(whole, 0)
    pieces, scalars = state(whole)
    take(whole, 1)
    other, second = make(seed=5, **case)
    second.frozen.data.copy_(first.frozen)
    other.load(pieces.__getitem__, scalars)
    take(other, 1)
    for name, piece in state(whole)[0].items():
        assert torch.equal(piece["weight"], state(other)[0][name]["weight"]), name
