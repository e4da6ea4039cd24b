"""The tiny FLUX of the tests in Black Forest Labs' layout, and diffusers' converter at its sizes."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer_kit import tiny_flux
from xflux_trainer import bfl

FILE = "diffusion_pytorch_model.safetensors"
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def bfl_folder(folder: Path, *, text: bool = True) -> Path:
    """`flux1-dev.safetensors` and `ae.safetensors`, and diffusers' folders of the text encoders."""
    folder.mkdir(parents=True, exist_ok=True)
    bfl.write_single_of(tiny_flux() / "transformer", folder / "flux1-dev.safetensors")
    save_file(ldm_vae(load_file(tiny_flux() / "vae" / FILE)), folder / "ae.safetensors")
    for part in TEXT if text else ():
        shutil.copytree(tiny_flux() / part, folder / part)
    return folder


LDM = [
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]


def ldm_vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE of four levels by BFL's names, where the attention's linear layers are convolutions."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, new in LDM:
            name = re.sub(pattern, new, name)
        matrix = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        renamed[name] = (tensor[:, :, None, None] if matrix else tensor).clone().contiguous()
    return renamed


def diffusers_converter(hidden: int) -> Callable[..., dict[str, Tensor]]:
    """diffusers' own, whose only size in the code is FLUX.1's width of 3072."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    space: dict[str, Any] = {"torch": torch}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {hidden}"), space)
    return space["convert_flux_transformer_checkpoint_to_diffusers"]
