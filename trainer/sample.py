"""Draw images: Euler steps down the model's velocity, then the VAE.

The noise has its own generator, so that a sample on the way does not change the training after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from xflux_trainer import cache, files, flow
from xflux_trainer.config import PATCH, TrainConfig
from xflux_trainer.encoders import ImageCodec, free
from xflux_trainer.layout import Base
from xflux_trainer.lora import generator
from xflux_trainer.model import DTYPES, Velocity
from xflux_trainer.ranks import Ranks
from xflux_trainer.spec import FluxSpec, image_tokens, shift_mu


@dataclass(frozen=True)
class Prompt:
    """One image to draw: its number, the place of its embeddings, and where the image goes."""

    number: int
    text: Path
    image: Path


def draw(
    velocity: Velocity, spec: FluxSpec, config: TrainConfig, base: Base, ranks: Ranks, prompts: list[Prompt]
) -> None:
    """Draw the prompts, each rank its share, and write them as PNG."""
    ranks.together(lambda: _draw_own(velocity, spec, config, base, ranks, prompts[ranks.rank :: ranks.world_size]))


def _draw_own(
    velocity: Velocity, spec: FluxSpec, config: TrainConfig, base: Base, ranks: Ranks, own: list[Prompt]
) -> None:
    latents = [denoise(velocity, spec, config, ranks.device, *cache.read_text(p.text), p.number) for p in own]
    if own:
        # The VAE comes when the transformer's own work is done: the two never need their memory at once.
        codec = ImageCodec(base, ranks.device, DTYPES[config.mixed_precision])
        for prompt, z in zip(own, latents):  # noqa: B905 (of one length)
            write_png(prompt.image, codec.decode(z))
        del codec
        free()


@torch.no_grad()
def denoise(
    velocity: Velocity,
    spec: FluxSpec,
    config: TrainConfig,
    device: torch.device,
    text: Tensor,
    pooled: Tensor,
    number: int,
) -> Tensor:
    """(C, h, w) latents of one image."""
    h, w = 2 * config.sample_height // PATCH, 2 * config.sample_width // PATCH
    noise = torch.randn(1, spec.in_channels // 4, h, w, generator=generator("sample", config.sample_seed, number))
    x_t = flow.pack(noise).to(device)
    ids, text_ids = flow.image_ids(h, w).to(device), flow.text_ids(text.shape[1]).to(device)
    text, pooled = text.to(device), pooled.to(device)
    mu = shift_mu(image_tokens(config.sample_width, config.sample_height)) if spec.dynamic_shift else 0.0
    times = flow.sampling_times(config.sample_steps, mu)
    for t, t_next in pairwise(times):
        v = velocity(x_t, t.view(1).to(device), text, pooled, ids, text_ids, config.sample_guidance)
        x_t = x_t + float(t_next - t) * v.float()
    return flow.unpack(x_t, h, w)[0]


def write_png(path: Path, image: Tensor) -> None:
    """(3, H, W) in [0, 1]."""
    import io

    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    files.write_bytes(path, buffer.getvalue())
