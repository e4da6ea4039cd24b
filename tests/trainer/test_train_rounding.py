"""Rounding by values: nothing lost on average, nothing changed that fits, nothing depends on what was drawn before."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from xflux_trainer import rounding  # noqa: E402
from xflux_trainer.rounding import generator, join, split, stochastic  # noqa: E402

CPU = torch.device("cpu")


def test_the_mean_is_the_value() -> None:
    """An eighth of the way to the next bf16 value goes up one time in eight, for both signs."""
    for value in (1 + 1 / 1024, -1 - 1 / 1024, 3e-5, -2.7e8, 1e-39):
        found = stochastic(torch.full((40_000,), value), generator(CPU, "mean", value)).float()
        below, above = found.min().item(), found.max().item()
        assert len(found.unique()) == 2
        assert below < value < above
        gap = above - below
        # Four standard deviations of a mean of 40,000 throws.
        assert abs(found.double().mean().item() - value) < 4 * gap * 0.5 / math.sqrt(40_000)


def test_the_two_are_the_neighbours() -> None:
    found = stochastic(torch.full((1000,), 1 + 1 / 1024), generator(CPU, 0)).float()
    assert sorted(found.unique().tolist()) == [1.0, 1 + 1 / 128]


def test_what_fits_is_kept() -> None:
    exact = torch.randn(2000, generator=generator(CPU, "exact")).bfloat16()
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, 2.0**-133, torch.finfo(torch.bfloat16).max])
    for value in (exact.float(), odd):
        for seed in range(3):
            found = stochastic(value, generator(CPU, seed))
            assert torch.equal(found.float(), value)
            assert torch.equal(torch.signbit(found), torch.signbit(value))
    strange = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaN, all of them
    assert stochastic(strange, generator(CPU, 0)).isnan().all()


def test_the_dice_follow_from_the_key_alone() -> None:
    value = torch.randn(100, generator=generator(CPU, 1))
    one = stochastic(value, generator(CPU, 3, "w", 5))
    torch.rand(7)
    assert torch.equal(one, stochastic(value, generator(CPU, 3, "w", 5)))
    assert not torch.equal(one, stochastic(value, generator(CPU, 3, "w", 6)))


def test_small_steps_are_not_lost() -> None:
    """1000 steps of 1e-4 on weights of 1: nearest rounding stays at 1, the others arrive at 0.9."""
    nearest = dice = high = torch.ones(4096).bfloat16()
    low = torch.zeros_like(high)
    for step in range(1000):
        nearest = (nearest.float() - 1e-4).bfloat16()
        dice = stochastic(dice.float() - 1e-4, generator(CPU, step))
        high, low = split(join(high, low) - 1e-4, torch.bfloat16)
    assert (nearest == 1).all()
    assert dice.float().mean().item() == pytest.approx(0.9, abs=2e-3)
    assert dice.float().std().item() < 0.02
    assert join(high, low).mean().item() == pytest.approx(0.9, abs=1e-3)


def test_splitting_has_twice_the_bits() -> None:
    value = torch.randn(5000, generator=generator(CPU, "split"))
    high, low = split(value, torch.bfloat16)
    assert torch.equal(high, value.bfloat16())
    assert high.dtype == low.dtype == torch.bfloat16
    assert ((join(high, low) - value).abs() <= value.abs() * 2.0**-16).all()
    again = split(join(high, low), torch.bfloat16)
    assert torch.equal(join(*again), join(high, low))  # what was joined is taken apart without loss


def test_generators_differ_by_device_and_key_only() -> None:
    assert generator(CPU, 1, 2).initial_seed() == generator(CPU, 1, 2).initial_seed()
    assert generator(CPU, 1, 2).initial_seed() != generator(CPU, 12).initial_seed()
    assert rounding.generator(CPU).device == CPU
