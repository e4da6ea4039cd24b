"""Rectified flow, in the order of the paper: a straight line from an image to noise, and the model's velocity on it.

Shapes: B images, C = 16 latent channels, h x w latents, N = h/2 * w/2 image tokens, L text tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from xflux_trainer.config import TrainConfig
from xflux_trainer.spec import FluxSpec, shift_mu


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) to (B, N, 4C): every 2x2 patch becomes one token."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)  # (B, h/2, w/2, C, 2, 2)
    return patches.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """(B, N, 4C) back to (B, C, h, w)."""
    b, _, c = tokens.shape
    patches = tokens.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)  # (B, C, h/2, 2, w/2, 2)
    return patches.reshape(b, c // 4, h, w)


def image_ids(h: int, w: int) -> Tensor:
    """(N, 3): the row and the column of every image token, for the rotary embedding."""
    ids = torch.zeros(h // 2, w // 2, 3)
    ids[..., 1] = torch.arange(h // 2)[:, None]
    ids[..., 2] = torch.arange(w // 2)[None, :]
    return ids.view(-1, 3)


def text_ids(length: int) -> Tensor:
    """(L, 3): text has no place in the image."""
    return torch.zeros(length, 3)


def shift(t: Tensor, mu: float) -> Tensor:
    """Move times towards noise, as the model does when it samples images of many tokens."""
    e = math.exp(mu)
    return e * t / (1 + (e - 1) * t)  # = e / (e + (1/t - 1)), without dividing by t


def training_mu(config: TrainConfig, spec: FluxSpec, tokens: int) -> float:
    """The shift for images of that many tokens; 0 is none."""
    if config.timestep_shift == "none" or (config.timestep_shift == "auto" and not spec.dynamic_shift):
        return 0.0
    return shift_mu(tokens) if config.timestep_shift == "auto" else float(config.timestep_shift)


def sample_t(batch: int, mu: float, sampling: str, generator: torch.Generator) -> Tensor:
    """(B,) in fp32: a time of its own for every image. bf16 would leave 506 of 1000 times distinct."""
    if sampling == "logit_normal":
        t = torch.randn(batch, generator=generator).sigmoid()
    else:
        t = torch.rand(batch, generator=generator)
    return shift(t, mu)


def mix(x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t on the line from the image x_0 (t = 0) to noise (t = 1). All (B, N, 4C) but t, which is (B,)."""
    t = t.view(-1, 1, 1)
    return (1 - t) * x_0 + t * eps


def loss(v: Tensor, x_0: Tensor, eps: Tensor) -> Tensor:
    """(B,): the mean squared distance of the predicted velocity from the line's own, in fp32."""
    return (v.float() - (eps - x_0)).square().mean(dim=(1, 2))


def sampling_times(steps: int, mu: float) -> Tensor:
    """(steps + 1,): from 1 to 0, shifted."""
    times = torch.linspace(1, 1 / steps, steps)
    return torch.cat([shift(times, mu), torch.zeros(1)])
