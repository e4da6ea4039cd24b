"""Draw images: Euler steps down the model's velocity, then the VAE.

The noise has its own generator and the model stays in the mode that it is in, so that a sample on the way does not
change the training after it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from xflux_trainer import cache, files, flow
from xflux_trainer.cache import Entry
from xflux_trainer.config import PATCH, TrainConfig
from xflux_trainer.encoders import ImageCodec, free
from xflux_trainer.evaluate import extras, turns
from xflux_trainer.layout import Base
from xflux_trainer.lora import generator
from xflux_trainer.model import DTYPES
from xflux_trainer.pulse import PULSE
from xflux_trainer.ranks import Ranks
from xflux_trainer.spec import FluxSpec, image_tokens, shift_mu


@dataclass(frozen=True)
class Prompt:
    """One image to draw: its number, the place of its embeddings, and where the image goes."""

    number: int
    text: Path
    image: Path
    caption: str = ""
    """The prompt in words, which is written into the image."""
    condition: Entry | None = None
    """What a ControlNet is shown: the condition of this sample of the data set."""


@dataclass(frozen=True)
class _Inputs:
    """text (1, L, D), pooled (1, P) and condition (1, 3, H, W) uint8 or None."""

    text: Tensor
    pooled: Tensor
    condition: Tensor | None = None


def draw(
    velocity: Callable[..., Tensor],
    spec: FluxSpec,
    config: TrainConfig,
    base: Base,
    ranks: Ranks,
    prompts: list[Prompt],
    *,
    sharded: bool = False,
) -> None:
    """Draw the prompts, each rank its share, and write them as PNG. Collective.

    Where the model is `sharded` every rank takes part in every forward pass: all do as many, and drop what is too much.
    """
    shares = turns(len(prompts), ranks, sharded=sharded)
    inputs: list[_Inputs] = []
    # What can fail on one rank alone is kept apart from the forward passes, in which the others may wait for it.
    ranks.together(lambda: inputs.extend(_read(prompts[index], config) for index, _ in shares))
    drawn = []
    for (index, kept), i in zip(shares, inputs, strict=True):
        prompt = prompts[index]
        z = denoise(velocity, spec, config, ranks.device, i.text, i.pooled, prompt.number, i.condition)
        drawn += [(prompt, z)] if kept else []
    ranks.together(lambda: _write(config, base, ranks, drawn))


def _read(prompt: Prompt, config: TrainConfig) -> _Inputs:
    text, pooled = cache.read_text(prompt.text)
    if prompt.condition is None:
        return _Inputs(text, pooled)
    condition = cache.read_batch([prompt.condition]).condition
    assert condition is not None, "the sample has no condition"
    return _Inputs(text, pooled, fit(condition, config.sample_width, config.sample_height))


def _write(config: TrainConfig, base: Base, ranks: Ranks, drawn: list[tuple[Prompt, Tensor]]) -> None:
    if not drawn:
        return
    # The VAE comes when the transformer's own work is done: the two never need their memory at once.
    codec = ImageCodec(base, ranks.device, DTYPES[config.mixed_precision])
    for prompt, z in drawn:
        write_png(prompt.image, codec.decode(z), prompt.caption)
    del codec
    free()


@torch.no_grad()
def denoise(
    velocity: Callable[..., Tensor],
    spec: FluxSpec,
    config: TrainConfig,
    device: torch.device,
    text: Tensor,
    pooled: Tensor,
    number: int,
    condition: Tensor | None = None,
) -> Tensor:
    """(C, h, w) latents of one image: text (1, L, D), pooled (1, P), condition (1, 3, H, W) uint8 or None."""
    h, w = 2 * config.sample_height // PATCH, 2 * config.sample_width // PATCH
    noise = torch.randn(1, spec.in_channels // 4, h, w, generator=generator("sample", config.sample_seed, number))
    x_t = flow.pack(noise).to(device)
    ids, text_ids = flow.image_ids(h, w).to(device), flow.text_ids(text.shape[1]).to(device)
    text, pooled = text.to(device), pooled.to(device)
    more = extras(None, condition, device)
    mu = shift_mu(image_tokens(config.sample_width, config.sample_height)) if spec.dynamic_shift else 0.0
    times = flow.sampling_times(config.sample_steps, mu)
    for t, t_next in pairwise(times):
        PULSE.tick()
        v = velocity(x_t, t.view(1).to(device), text, pooled, ids, text_ids, config.sample_guidance, *more)
        x_t = x_t + float(t_next - t) * v.float()
    return flow.unpack(x_t, h, w)[0]


def fit(condition: Tensor, width: int, height: int) -> Tensor:
    """(1, 3, H, W) uint8 to (1, 3, height, width): scaled to cover it and cut at its middle, as the data is."""
    if condition.shape[2:] == (height, width):
        return condition
    image = Image.fromarray(condition[0].permute(1, 2, 0).contiguous().numpy())
    return torch.frombuffer(
        bytearray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS).tobytes()), dtype=torch.uint8
    ).view(1, height, width, 3).permute(0, 3, 1, 2).contiguous()  # fmt: skip


def write_png(path: Path, image: Tensor, caption: str = "") -> None:
    """(3, H, W) in [0, 1]. The caption goes into the file, as its `Description`."""
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    info = PngInfo()
    if caption:
        info.add_itxt("Description", caption)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    files.write_bytes(path, buffer.getvalue())
