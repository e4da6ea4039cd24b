"""Hand-set weights for a tiny FLUX VAE: no training, yet its latents say what a photo looks like.

A random autoencoder gives latents without meaning and samples that are all noise. This one cuts each 8x8 patch
into Haar wavelets (three averages, thirteen details: 16 channels) and decodes the averages only, so a decoded
photo is its own blurred thumbnail. AutoencoderKL has GroupNorm and SiLU in the way; both are made nearly linear:

* every group holds two huge constant channels (+LEVEL, -LEVEL), which set the group's variance, whatever the photo;
* SiLU is used around BIAS, where silu(BIAS + x) is almost BIAS + x.
"""

from __future__ import annotations

from typing import Any

import torch
from flux_layout import SHIFT, VAE, diffusers_shapes
from torch import Tensor

CHANNELS, GROUPS = 32, 8
LEVEL, BIAS = 16.0, 8.0
SPREAD = 2.75
"""About 1 / 0.3611, FLUX's scaling: how far FLUX's own raw latents spread."""
LOG_VARIANCE = -6.0
"""Of the posterior: sampling moves a latent by 2 % of its spread."""

CONFIG: dict[str, Any] = {
    **VAE,
    "block_out_channels": [CHANNELS] * 4,
    "layers_per_block": 1,
    "norm_num_groups": GROUPS,
    "sample_size": 256,
}

# Groups of four channels: signal, signal, +LEVEL, -LEVEL. Signals s and s + 8 share a group, so that the
# averages (the first three) do not: GroupNorm takes off the group's mean, which would tint one by another.
SIGNALS = [channel for slot in (0, 1) for channel in range(slot, CHANNELS, 4)]
PLUS = [channel for channel in range(CHANNELS) if channel % 4 == 2]
MINUS = [channel for channel in range(CHANNELS) if channel % 4 == 3]

TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
"""RGB to luma, blue and red difference (JPEG's)."""
MEAN = torch.tensor([[1.0, 1.0], [1.0, 1.0]]) / 4
ACROSS = torch.tensor([[1.0, -1.0], [1.0, -1.0]]) / 4
DOWN = ACROSS.T
BOTH = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 4
HAAR = (ACROSS, DOWN, BOTH)

STAGES = (
    # (channel in, kernel) of each channel out; channels 0 to 2 stay the averages of luma, blue, red
    [(0, MEAN), (1, MEAN), (2, MEAN), *((0, kernel) for kernel in HAAR)],
    [(0, MEAN), (1, MEAN), (2, MEAN), *((0, kernel) for kernel in HAAR), (3, MEAN), (4, MEAN)],
    [
        *((channel, MEAN) for channel in (0, 1, 2)),
        *((channel, kernel) for channel in (0, 1, 2) for kernel in HAAR),
        *((channel, MEAN) for channel in (3, 4, 6, 7)),
    ],
)


def weights(photos: list[Tensor]) -> dict[str, Tensor]:
    """The VAE's tensors; the photos (3, H, W in -1..1) set the scales that make latents zero mean, unit variance."""
    tensors = {name: torch.zeros(shape) for name, shape in diffusers_shapes(CONFIG).items()}
    for name, tensor in tensors.items():
        if "norm" in name and name.endswith(".weight"):
            tensor.fill_(1.0)
    _encoder(tensors)
    mean, spread = _statistics(photos)
    _encoder_end(tensors, mean, spread)
    _decoder(tensors, mean[:3], spread[:3])
    return tensors


def analyse(photos: Tensor) -> Tensor:
    """(B, 3, H, W) to the 16 signals (B, 16, H/8, W/8), as the encoder below computes them."""
    signals = torch.einsum("oc,bchw->bohw", TO_YCC, photos)
    for stage in STAGES:
        kernels = torch.zeros(len(stage), signals.shape[1], 2, 2)
        for out, (channel, kernel) in enumerate(stage):
            kernels[out, channel] = kernel
        signals = torch.nn.functional.conv2d(signals, kernels, stride=2)
    return signals


def _normalized(signals: Tensor) -> Tensor:
    """What GroupNorm makes of the signals: pairs share a group with the two constant channels."""
    pairs = signals.unflatten(1, (2, -1)).transpose(1, 2)  # (B, 8, 2, h, w)
    level = torch.full_like(pairs, LEVEL)
    level[:, :, 1] = -LEVEL
    groups = torch.cat([pairs, level], dim=2).flatten(1, 2)
    return torch.nn.functional.group_norm(groups, GROUPS, eps=1e-6)[:, SIGNALS]


def _statistics(photos: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each normalized signal over all photos' positions."""
    values = torch.cat([_normalized(analyse(photo[None])).flatten(2)[0] for photo in photos], dim=1)
    return values.mean(1), values.std(1)


def _encoder(tensors: dict[str, Tensor]) -> None:
    first = tensors["encoder.conv_in.weight"]
    first[SIGNALS[:3], :, 1, 1] = TO_YCC
    tensors["encoder.conv_in.bias"][PLUS] = LEVEL
    tensors["encoder.conv_in.bias"][MINUS] = -LEVEL
    for number, stage in enumerate(STAGES):
        # This convolution is padded on the right and below only, so its upper left 2x2 covers each block once.
        kernels = tensors[f"encoder.down_blocks.{number}.downsamplers.0.conv.weight"]
        for out, (channel, kernel) in enumerate(stage):
            kernels[SIGNALS[out], SIGNALS[channel], :2, :2] = kernel
        for channel in (*PLUS, *MINUS):
            kernels[channel, channel, 0, 0] = 1.0


def _encoder_end(tensors: dict[str, Tensor], mean: Tensor, spread: Tensor) -> None:
    tensors["encoder.conv_norm_out.weight"][SIGNALS] = 1 / spread
    tensors["encoder.conv_norm_out.bias"][SIGNALS] = BIAS - mean / spread
    last, bias = tensors["encoder.conv_out.weight"], tensors["encoder.conv_out.bias"]
    for latent, channel in enumerate(SIGNALS):
        last[latent, channel, 1, 1] = SPREAD
    bias[: len(SIGNALS)] = SHIFT - SPREAD * BIAS
    bias[len(SIGNALS) :] = LOG_VARIANCE


def _decoder(tensors: dict[str, Tensor], mean: Tensor, spread: Tensor) -> None:
    """Averages back to RGB, each doubling smoothed by a triangle filter; the details are left out."""
    level = LEVEL / 2**0.5  # a group of signal, -signal, +LEVEL, -LEVEL has about this standard deviation
    to_rgb = torch.linalg.inv(TO_YCC)  # (rgb, ycc)
    first, bias = tensors["decoder.conv_in.weight"], tensors["decoder.conv_in.bias"]
    for color in range(3):
        # The encoder divided by the level (GroupNorm) and by the spread; both are undone here.
        row = to_rgb[color] * spread * level / SPREAD
        offset = (to_rgb[color] * mean).sum() * level - SHIFT * row.sum()
        for sign, channel in ((1, 4 * color), (-1, 4 * color + 1)):
            first[channel, :3, 1, 1] = sign * row
            bias[channel] = sign * offset
    bias[PLUS] = LEVEL
    bias[MINUS] = -LEVEL
    triangle = torch.tensor([0.25, 0.5, 0.25])
    for block in range(3):
        kernels = tensors[f"decoder.up_blocks.{block}.upsamplers.0.conv.weight"]
        for channel in SIGNALS:
            kernels[channel, channel] = torch.outer(triangle, triangle)
        for channel in (*PLUS, *MINUS):
            kernels[channel, channel, 1, 1] = 1.0
    gain = 4.0
    tensors["decoder.conv_norm_out.weight"].fill_(gain * level)
    tensors["decoder.conv_norm_out.bias"].fill_(BIAS)
    for color in range(3):
        tensors["decoder.conv_out.weight"][color, 4 * color, 1, 1] = 1 / gain
        tensors["decoder.conv_out.bias"][color] = -BIAS / gain
