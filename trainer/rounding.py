"""From fp32 to the 16 bits that a weight is held in, so that steps smaller than it resolves are not lost.

bf16 keeps 8 significant bits: of a weight near 1 the next smaller value is 1/256 away, and an AdamW step of 1e-4 is
rounded away every time. Three remedies: a master in fp32 (4 bytes more for a weight), the rounding error kept beside it
(2 bytes more, Kahan's compensation), or rounding up as often as the value lies above (no bytes, a little noise).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

LOW_BITS = {torch.bfloat16: 16}
"""Bits of an fp32 value that a format cuts off."""


def seed(*key: object) -> int:
    """A number below 2^63 that depends on the key and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator on `device` that depends on the key and on nothing else."""
    return torch.Generator(device).manual_seed(seed(*key))


def stochastic(value: Tensor, dice: torch.Generator) -> Tensor:
    """fp32 to bf16: up with the probability of the distance to the value below, so that the mean is the value.

    Values that bf16 has are kept, and so are infinities and NaN. `dice` is a generator on the value's device.
    """
    value = value.float()
    cut = 1 << LOW_BITS[torch.bfloat16]
    bits = torch.randint(0, cut, value.shape, dtype=torch.int32, device=value.device, generator=dice)
    # The low bits of an IEEE number are its distance to the one below, for negative numbers towards -inf.
    bits = bits.add_(value.view(torch.int32)).bitwise_and_(-cut)
    rounded = bits.view(torch.float32).bfloat16()
    return torch.where(value.isfinite(), rounded, value.bfloat16())


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 as the nearest value of `dtype`, and what that leaves out, rounded to the same format.

    The sum of both has twice the format's significant bits: 16 with bf16, against 24 of fp32.
    """
    value = value.float()
    high = value.to(dtype)
    return high, (value - high.float()).to(dtype)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 value that `split` took apart."""
    return high.float() + low.float()
