"""Rectified flow, in the order of the paper: a straight line from an image to noise, and the model's velocity on it.

Shapes: B images, C = 16 latent channels, h x w latents, N = h/2 * w/2 image tokens, L text tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from xflux_trainer.config import TrainConfig
from xflux_trainer.lora import generator
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


def sample_t(batch: int, mu: float, sampling: str, dice: torch.Generator) -> Tensor:
    """(B,) in fp32: a time of its own for every image. bf16 would leave 506 of 1000 times distinct."""
    if sampling == "logit_normal":
        t = torch.randn(batch, generator=dice).sigmoid()
    else:
        t = torch.rand(batch, generator=dice)
    return shift(t, mu)


def strata(images: int, seed: int, step: int) -> Tensor:
    """(images,) in [0, 1), fp64: one draw from each of as many equal slices, in an order of the step's own.

    A function of the seed and the step alone: how the step's images are shared out over ranks, batches and
    accumulation does not enter, so every split sees the same times.
    """
    dice = generator("times", seed, step)
    slices = torch.randperm(images, generator=dice)
    return (slices + torch.rand(images, generator=dice, dtype=torch.float64)) / images


def stratified_t(u: Tensor, mu: float, sampling: str) -> Tensor:
    """(B,) in fp32: the times at these quantiles u (B,) of the distribution that `sample_t` draws from."""
    # In fp64 up to here: the inverse of the normal distribution is steep at both ends.
    t = torch.special.ndtri(u.double()).sigmoid() if sampling == "logit_normal" else u
    return shift(t, mu).float()


@dataclass(frozen=True)
class Draws:
    """The noise and the times of a run's batches: functions of the seed and the batch's number.

    Neither the device nor who trains on the batch enters, so a resumed run and one of other ranks see the same.
    `draw` may be called by the thread that reads ahead: a million normals take 3 ms of a host's core.
    """

    config: TrainConfig
    spec: FluxSpec
    per_step: int
    """Batches of one optimizer step: ranks times accumulation."""
    step: int = 0
    """Steps taken when the run starts or resumes …"""
    batches: int = 0
    """… and the batches trained on by then: a resume under other ranks need not start at a multiple of per_step."""

    def draw(self, number: int, shape: tuple[int, ...] | torch.Size) -> tuple[Tensor, Tensor]:
        """eps (B, N, 4C) and t (B,), both fp32 on the host, for the batch of that number.

        `shape` is that of the packed latents, so that the shift is that of their true number of tokens.
        """
        dice = generator("train", self.config.seed, number)
        t = self._times(number, shape[0], training_mu(self.config, self.spec, shape[1]), dice)
        return torch.randn(shape, generator=dice), t

    def _times(self, number: int, batch: int, mu: float, dice: torch.Generator) -> Tensor:
        sampling = self.config.timestep_sampling
        if not self.config.stratified_timesteps:
            return sample_t(batch, mu, sampling, dice)
        steps, place = divmod(number - self.batches, self.per_step)
        u = strata(batch * self.per_step, self.config.seed, self.step + steps)
        return stratified_t(u[place * batch : (place + 1) * batch], mu, sampling)


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
