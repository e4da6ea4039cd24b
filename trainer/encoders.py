"""The models around the transformer: captions to T5 and CLIP embeddings, images to latents and back.

Each is loaded straight to the device when it is needed and dropped when it is not.
"""

from __future__ import annotations

import gc
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from xflux_trainer.errors import ModelError
from xflux_trainer.layout import Base
from xflux_trainer.vae_file import load_vae

TILE = 512
"""Pixels on a side of the tiles in which images are decoded while the transformer fills the device."""


class TextEncoders:
    """T5 and CLIP as FLUX uses them.

    `full`: T5's tokens are padded to `max_tokens` and no mask is used, neither in T5 nor in the transformer. FLUX was
    trained so and samples so: the states of the padding are part of what it attends to, and it uses them.
    `none`: T5 sees the caption's own tokens, and there is nothing else to attend to. That is what T5's states are
    under its attention mask (its positions are relative, and softmax gives masked ones nothing), for less work.
    """

    def __init__(self, base: Base, device: torch.device, max_tokens: int, padding: str = "full") -> None:
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        self.device = device
        self.max_tokens = max_tokens
        self.padding = padding
        self.clip_tokenizer = _load(CLIPTokenizer, base.tokenizer)
        self.t5_tokenizer = _load(T5TokenizerFast, base.tokenizer_2)
        self.clip = _load_weights(CLIPTextModel, base.text_encoder, device)
        self.t5 = _load_weights(T5EncoderModel, base.text_encoder_2, device)
        self.cut = 0
        """Captions that were longer than `max_tokens`."""

    @torch.no_grad()
    def encode(self, caption: str) -> tuple[Tensor, Tensor]:
        """(L, D) T5 states and the (P,) pooled CLIP vector, in bf16; L is max_tokens or the caption's own length."""
        length = len(self.t5_tokenizer(caption).input_ids)
        self.cut += length > self.max_tokens
        padded = self.max_tokens if self.padding == "full" else min(length, self.max_tokens)
        t5_ids = self._ids(self.t5_tokenizer, caption, padded)
        clip_ids = self._ids(self.clip_tokenizer, caption, self.clip.config.max_position_embeddings)
        text = self.t5(t5_ids)[0][0]
        pooled = self.clip(clip_ids, output_hidden_states=False).pooler_output[0]
        return text.to(torch.bfloat16), pooled.to(torch.bfloat16)

    def _ids(self, tokenizer: Any, caption: str, length: int) -> Tensor:
        batch = tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = batch.input_ids.to(self.device)
        return ids


class ImageCodec:
    """The VAE, and the scale and shift between its latents and the transformer's."""

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKL

        self.device = device
        self.dtype = dtype
        if base.vae.is_file():
            self.vae: Any = load_vae(base.vae, device, dtype).eval().requires_grad_(False)
        else:
            self.vae = _load_weights(AutoencoderKL, base.vae, device, dtype)
        self.scale = float(self.vae.config.scaling_factor)
        self.shift = float(self.vae.config.shift_factor or 0.0)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """(3, H, W) in [-1, 1] to (C, H/8, W/8) in fp32.

        The mode of the posterior, not a draw: FLUX's VAE is so sure of itself that a draw adds next to
        nothing, and the mode makes a cache entry a function of its key.
        """
        latents: Tensor = self.vae.encode(image[None].to(self.device, self.dtype)).latent_dist.mode()[0]
        return (latents.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(C, h, w) to (3, 8h, 8w) in [0, 1], in tiles when the image is larger than one."""
        # An image of 1024 px is one tile to the VAE's own reckoning, and costs gigabytes beside the transformer.
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size = TILE
        self.vae.tile_latent_min_size = TILE // 2 ** (len(self.vae.config.block_out_channels) - 1)
        latents = latents.to(self.device) / self.scale + self.shift
        image: Tensor = self.vae.decode(latents[None].to(self.dtype), return_dict=False)[0][0]
        return (image.float() / 2 + 0.5).clamp(0, 1).cpu()


def free() -> None:
    """Give back what models that are no longer referred to held."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _load(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder} cannot be loaded: {reason}", "Download the model again.") from error


def _load_weights(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A frozen model; with safetensors only, because other weight files can run code when they are read."""

    class Loader:
        @staticmethod
        def from_pretrained(folder: Path) -> Any:
            name = "dtype" if _renamed(kind) else "torch_dtype"
            options: dict[str, Any] = {name: dtype, "use_safetensors": True, "low_cpu_mem_usage": True}
            if device.type == "cuda" and not kind.__module__.startswith("diffusers."):
                options["device_map"] = {"": device}
            return kind.from_pretrained(folder, **options).to(device)

    model = _load(Loader, folder)
    return model.eval().requires_grad_(False)


def _renamed(kind: Any) -> bool:
    """transformers 4.56 calls `torch_dtype` `dtype`."""
    return kind.__module__.startswith("transformers.") and Version(version("transformers")) >= Version("4.56")
