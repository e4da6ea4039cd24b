"""Which implementation of `pointwise` a device gets: Triton's kernels where they work, plain torch elsewhere."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from xflux_trainer import pointwise

VARIABLE = "XFLUX_POINTWISE"
"""An environment variable: `torch` takes plain torch everywhere, `triton` the kernels even on the CPU, where only
Triton's interpreter can run them (TRITON_INTERPRET=1)."""


def ops(device: torch.device) -> ModuleType:
    """`kernels` or `pointwise`, which have the same functions; asked once for each device."""
    return _chosen(device)[0]


def why_not(device: torch.device) -> str:
    """Why this device does not get the kernels; empty where it does."""
    return _chosen(device)[1]


@functools.cache
def _chosen(device: torch.device) -> tuple[ModuleType, str]:
    asked = os.environ.get(VARIABLE, "")
    if asked == "torch":
        return pointwise, f"{VARIABLE}=torch"
    if device.type != "cuda" and asked != "triton":
        return pointwise, f"on {device.type}"
    try:
        from xflux_trainer import kernels

        # A first launch needs a C compiler, a driver that takes the code, and a folder to keep it in.
        x = torch.zeros((1, 1, 32), dtype=torch.bfloat16, device=device)
        if device.type == "cuda":
            with torch.cuda.device(device):
                kernels.gelu(x, x)
                torch.cuda.synchronize(device)
        else:
            kernels.gelu(x, x)
    except Exception as error:  # noqa: BLE001 (whatever it is, plain torch does the same work)
        return pointwise, f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
    return kernels, ""
