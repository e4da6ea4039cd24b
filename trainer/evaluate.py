"""The held-out loss: fixed images, fixed times, fixed noise, so that two numbers differ by what was trained alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from xflux_trainer import cache, flow
from xflux_trainer.cache import Entry
from xflux_trainer.config import TrainConfig
from xflux_trainer.lora import generator
from xflux_trainer.pulse import PULSE
from xflux_trainer.ranks import Ranks

SHARDED = ("zero3", "fsdp")
"""Strategies whose ranks each hold a part of the model: a forward pass of one needs all of them."""
SHARE = 0.02
"""How much of the time may go into held-out losses between the start and the end."""
STEP_FORWARDS = 2.3
"""Forward passes that training on one image costs at the least: adapters at 1024 px without checkpointing."""


def turns(count: int, ranks: Ranks, *, sharded: bool) -> list[tuple[int, bool]]:
    """This rank's part of so many forward passes, and whether each is one to keep.

    Where the model is sharded every rank gets as many: those that would have none repeat the last one.
    """
    own = [(index, True) for index in range(ranks.rank, count, ranks.world_size)]
    if sharded and count:
        own += [(count - 1, False)] * (math.ceil(count / ranks.world_size) - len(own))
    return own


@torch.no_grad()
def heldout_loss(
    velocity: Callable[..., Tensor], config: TrainConfig, entries: list[Entry], ranks: Ranks, *, sharded: bool = False
) -> dict[str, Any]:
    """The mean loss, and the loss at each time: {"mean": float, "by_time": {"0.1": float, …}}.

    Collective. The (image, time) pairs are shared out over the ranks.
    """
    times = config.heldout_timesteps
    sums = [0.0] * len(times)
    pairs = [(image, k) for image in range(len(entries)) for k in range(len(times))]
    for index, kept in turns(len(pairs), ranks, sharded=sharded):
        image, k = pairs[index]
        PULSE.tick()
        batch = cache.read_batch([entries[image]])
        x_0 = flow.pack(batch.latents)
        # No seed of the run in the key: runs with different seeds are compared at the same noise.
        eps = torch.randn(x_0.shape, generator=generator("heldout", image, k))
        loss = velocity_loss(velocity, config, batch, eps, torch.tensor([times[k]]), ranks.device)
        sums[k] += float(loss.sum()) if kept else 0.0
    sums = ranks.total(sums)
    by_time = {f"{t:g}": value / len(entries) for t, value in zip(times, sums)}  # noqa: B905 (of one length)
    return {"mean": sum(sums) / len(pairs), "by_time": by_time}


def interval(config: TrainConfig, images: int, images_per_step: int) -> int:
    """Steps between the held-out losses on the way: at every checkpoint, or at every so many of them that they cost
    no more than 2 % of the training. Counted and not timed, so that all ranks come to the same."""
    forwards = images * len(config.heldout_timesteps)
    steps = forwards / (SHARE * STEP_FORWARDS * images_per_step)
    return config.checkpointing_steps * max(1, math.ceil(steps / config.checkpointing_steps))


def velocity_loss(
    model: Callable[..., Tensor], config: TrainConfig, batch: cache.Batch, eps: Tensor, t: Tensor, device: torch.device
) -> Tensor:
    """(B,) losses of a batch with this noise, packed as (B, N, 4C), at these times (B,)."""
    return losses(model, config, *inputs(batch, eps, t, device))


def inputs(batch: cache.Batch, eps: Tensor, t: Tensor, device: torch.device) -> tuple[Tensor | None, ...]:
    """What `losses` computes from, on the device; out of pinned memory nothing is waited for. Positions are the same
    tensors for all batches of one size."""
    h, w = batch.latents.shape[2:]
    batch = batch.to(device)
    eps, t = (value.to(device, non_blocking=True) for value in (eps, t))
    places = _positions(h, w, device), _positions(0, batch.text.shape[1], device)
    more = extras(batch.mask, batch.condition, device)
    return flow.pack(batch.latents), eps, t, batch.text, batch.pooled, *places, *more


def losses(
    model: Callable[..., Tensor], config: TrainConfig, x_0: Tensor, eps: Tensor, t: Tensor, text: Tensor,
    pooled: Tensor, ids: Tensor, text_ids: Tensor, *more: Tensor | None,
) -> Tensor:  # fmt: skip
    """(B,): of tokens x_0 (B, N, 4C) with this noise at these times. Nothing here waits for the device."""
    v = model(flow.mix(x_0, eps, t), t, text, pooled, ids, text_ids, config.guidance, *more)
    return flow.loss(v, x_0, eps)


@functools.lru_cache(maxsize=256)
def _positions(h: int, w: int, device: torch.device) -> Tensor:
    """(N, 3) of an image of h by w latents, or of a text of w tokens where h is 0."""
    return (flow.image_ids(h, w) if h else flow.text_ids(w)).to(device)


def extras(mask: Tensor | None, condition: Tensor | None, device: torch.device) -> tuple[Tensor | None, ...]:
    """What comes after the guidance, by place: a wrapped module takes no names. The mask of the text (B, L) and a
    ControlNet's condition (B, 3, H, W), either of which may be None; nothing where both are."""
    if mask is None and condition is None:
        return ()
    return tuple(value if value is None else value.to(device) for value in (mask, condition))
