"""The held-out loss: how it is shared out, how often it is taken, and what else a batch hands to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from xflux_trainer import cache, evaluate  # noqa: E402
from xflux_trainer.cache import Batch, Entry  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402

CONFIG = TrainConfig("x")


def rank(number: int, world: int) -> Ranks:
    return Ranks(Launch(rank=number, world_size=world, use_cpu=True))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 20])
def test_every_forward_is_done_once_and_sharded_ranks_do_as_many(world: int, count: int) -> None:
    for sharded in (False, True):
        shares = [evaluate.turns(count, rank(k, world), sharded=sharded) for k in range(world)]
        assert sorted(index for share in shares for index, kept in share if kept) == list(range(count))
        if sharded:
            assert len({len(share) for share in shares}) == 1
        else:
            assert all(kept for share in shares for _, kept in share)


class Seen:
    """A model that is 1 everywhere, and remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, x_t: torch.Tensor, *args: Any) -> torch.Tensor:
        self.calls.append((x_t, *args))
        return torch.ones_like(x_t)


def entries(monkeypatch: pytest.MonkeyPatch, count: int, **more: Any) -> list[Entry]:
    def read(wanted: list[Entry]) -> Batch:
        dice = torch.Generator().manual_seed(int(wanted[0].latents.name))
        return Batch(torch.randn(1, 16, 4, 6, generator=dice), torch.zeros(1, 5, 8), torch.zeros(1, 3), **more)

    monkeypatch.setattr(cache, "read_batch", read)
    return [Entry(Path(str(k)), Path("t"), (16, 4, 6)) for k in range(count)]


@pytest.mark.parametrize("sharded", [False, True])
def test_the_shares_of_ranks_add_up_to_the_loss_of_one(monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    images = entries(monkeypatch, 3)
    alone = evaluate.heldout_loss(Seen(), CONFIG, images, rank(0, 1))
    assert list(alone["by_time"]) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert alone["mean"] == pytest.approx(sum(alone["by_time"].values()) / 5)
    parts: list[list[float]] = []
    models = [Seen() for _ in range(4)]
    for number, model in enumerate(models):
        ranks = rank(number, 4)
        monkeypatch.setattr(ranks, "total", lambda sums: parts.append(sums) or sums)
        evaluate.heldout_loss(model, CONFIG, images, ranks, sharded=sharded)
    assert [sum(column) / 3 for column in zip(*parts, strict=True)] == pytest.approx(list(alone["by_time"].values()))
    assert [len(model.calls) for model in models] == ([4] * 4 if sharded else [4, 4, 4, 3])


def test_the_same_noise_whatever_the_seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    images = entries(monkeypatch, 2)
    before = torch.get_rng_state()
    a = evaluate.heldout_loss(Seen(), CONFIG, images, rank(0, 1))
    b = evaluate.heldout_loss(Seen(), TrainConfig("x", seed=9), images, rank(0, 1))
    assert a == b
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn from the run's own


def test_mask_and_condition_reach_the_model_by_place() -> None:
    latents, text, pooled = torch.randn(2, 16, 4, 6), torch.zeros(2, 5, 8), torch.zeros(2, 3)
    mask, condition = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
    eps, t, cpu = torch.randn(2, 6, 64), torch.rand(2), torch.device("cpu")
    for batch, more in (
        (Batch(latents, text, pooled), ()),
        (Batch(latents, text, pooled, mask), (mask, None)),
        (Batch(latents, text, pooled, None, condition), (None, condition)),
        (Batch(latents, text, pooled, mask, condition), (mask, condition)),
    ):
        model = Seen()
        loss = evaluate.velocity_loss(model, CONFIG, batch, eps, t, cpu)
        assert loss.shape == (2,)
        assert len(model.calls[0][7:]) == len(more)
        assert all(a is b for a, b in zip(model.calls[0][7:], more, strict=True))


def test_how_often_it_is_taken() -> None:
    """20 forwards are 2 % of what 435 steps of one image cost."""
    assert evaluate.interval(CONFIG, 4, 1) == 500
    assert evaluate.interval(TrainConfig("x", checkpointing_steps=100), 4, 1) == 500
    assert evaluate.interval(TrainConfig("x", checkpointing_steps=100), 4, 16) == 100
    assert evaluate.interval(TrainConfig("x", checkpointing_steps=100, heldout_timesteps=(0.5,)), 4, 1) == 100
