"""The VAE in Black Forest Labs' single file, by diffusers' own converter; its sizes follow from the tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer.errors import ModelError

SCALING, SHIFT = 0.3611, 0.1159
"""FLUX.1's VAE: a latent is (z - SHIFT) * SCALING. (Source: BFL's `flux/util.py`.)"""


def load_vae(path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """diffusers' `AutoencoderKL` with the weights of `ae.safetensors`, in `dtype` on `device`. Raises `ModelError`."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is broken or cut short: {error}.", "Download it again.") from error
    try:
        settings = vae_config({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        converted = convert_ldm_vae_checkpoint(tensors, settings)
        with torch.device("meta"):
            vae: nn.Module = AutoencoderKL.from_config(settings)
        vae.load_state_dict(converted, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        seen = f"{path} is not FLUX.1's VAE in Black Forest Labs' layout: {reason}."
        raise ModelError(seen, "Use the ae.safetensors of FLUX.1-dev or FLUX.1-schnell.") from error
    return vae


def vae_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """diffusers' config of a VAE with tensors of these names and shapes. Raises KeyError when it is not one."""
    count = len({name.split(".")[2] for name in shapes if name.startswith("encoder.down.")})
    channels = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(count)]
    return {
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": len({name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")}),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "norm_num_groups": math.gcd(32, *channels),
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "sample_size": 1024,
        "scaling_factor": SCALING,
        "shift_factor": SHIFT,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
    }
