"""The held-out loss: fixed images, fixed times, fixed noise, so that two numbers differ by the adapter alone."""

from __future__ import annotations

from typing import Any

import torch
from xflux_trainer import cache, flow
from xflux_trainer.cache import Entry
from xflux_trainer.config import TrainConfig
from xflux_trainer.lora import generator
from xflux_trainer.model import Velocity
from xflux_trainer.ranks import Ranks


@torch.no_grad()
def heldout_loss(velocity: Velocity, config: TrainConfig, entries: list[Entry], ranks: Ranks) -> dict[str, Any]:
    """The mean loss, and the loss at each time. The (image, time) pairs are shared out over the ranks."""
    times = config.heldout_timesteps
    sums = [0.0] * len(times)
    pairs = [(image, k) for image in range(len(entries)) for k in range(len(times))]
    for image, k in pairs[ranks.rank :: ranks.world_size]:
        batch = cache.read_batch([entries[image]])
        x_0 = flow.pack(batch.latents)
        # No seed of the run in the key: runs with different seeds are compared at the same noise.
        eps = torch.randn(x_0.shape, generator=generator("heldout", image, k))
        loss = velocity_loss(velocity, config, batch, eps, torch.tensor([times[k]]), ranks.device)
        sums[k] += float(loss.sum())
    sums = ranks.total(sums)
    by_time = {f"{t:g}": value / len(entries) for t, value in zip(times, sums)}  # noqa: B905 (of one length)
    return {"mean": sum(sums) / len(pairs), "by_time": by_time}


def velocity_loss(
    model: Any, config: TrainConfig, batch: cache.Batch, eps: torch.Tensor, t: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """(B,) losses of a batch with this noise, packed as (B, N, 4C), at these times (B,)."""
    h, w = batch.latents.shape[2:]
    x_0, eps, t = flow.pack(batch.latents).to(device), eps.to(device), t.to(device)
    x_t = flow.mix(x_0, eps, t)
    ids, text_ids = flow.image_ids(h, w).to(device), flow.text_ids(batch.text.shape[1]).to(device)
    v = model(x_t, t, batch.text.to(device), batch.pooled.to(device), ids, text_ids, config.guidance)
    return flow.loss(v, x_0, eps)
