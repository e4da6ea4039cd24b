"""What is in the tiny FLUX.1: random transformer and text encoders, a hand-set VAE, tokenizers of the captions.

Everything follows from the seed, the photos and the captions, and is the same under every release of the libraries.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import caption_tokenizers
import flux_layout
import numpy as np
import tiny_vae
import torch
from flux_layout import Shapes
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

PHOTOS = Path(__file__).resolve().parent / "photos"
PHOTO_SIZE = 256

TRANSFORMER: dict[str, Any] = {
    **flux_layout.TRANSFORMER,
    "attention_head_dim": 32,
    "axes_dims_rope": [4, 14, 14],  # the original's 1 : 3.5 : 3.5, and even numbers
    "joint_attention_dim": 64,
    "num_attention_heads": 4,
    "num_layers": 2,
    "num_single_layers": 4,
    "pooled_projection_dim": 64,
}
CLIP: dict[str, Any] = {
    **flux_layout.CLIP,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "projection_dim": 64,
}
T5: dict[str, Any] = {
    **flux_layout.T5,
    "d_ff": 128,
    "d_kv": 16,
    "d_model": 64,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_layers": 2,
}


def write_parts(out: Path, seed: int) -> None:
    """All folders of the pipeline."""
    captions = caption_tokenizers.read_captions(PHOTOS)
    clip_tokens = caption_tokenizers.write_clip_tokenizer(out / "tokenizer", captions)
    t5_tokens = caption_tokenizers.write_t5_tokenizer(out / "tokenizer_2", captions)
    # CLIP pools at the end token, which is the last one, and pads with it, as FLUX's own tokenizer does.
    end = clip_tokens - 1
    clip = {**CLIP, "vocab_size": clip_tokens, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    t5 = {**T5, "vocab_size": t5_tokens}
    _write_model(out / "text_encoder", clip, random_tensors(flux_layout.clip_shapes(clip), seed))
    _write_model(out / "text_encoder_2", t5, random_tensors(flux_layout.t5_shapes(t5), seed + 1))
    _write_model(out / "transformer", TRANSFORMER, random_transformer(seed + 2))
    _write_model(out / "vae", tiny_vae.CONFIG, tiny_vae.weights(read_photos()))
    (out / "scheduler").mkdir()
    caption_tokenizers.write_json(out / "scheduler" / "scheduler_config.json", flux_layout.SCHEDULER)
    caption_tokenizers.write_json(out / "model_index.json", flux_layout.MODEL_INDEX)


def _write_model(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Config and weights, in bf16 as FLUX.1's own."""
    folder.mkdir()
    caption_tokenizers.write_json(folder / "config.json", config)
    name = "model.safetensors" if "model_type" in config else "diffusion_pytorch_model.safetensors"
    rounded = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in tensors.items()}
    save_file(rounded, folder / name, metadata={"format": "pt"})


def read_photos() -> list[Tensor]:
    """The demo's photos as (3, H, W) in -1..1, the long side PHOTO_SIZE, both sides multiples of 16."""
    photos = []
    for file in sorted(PHOTOS.glob("*.jpg")):
        with Image.open(file) as image:
            scale = PHOTO_SIZE / max(image.size)
            width, height = (max(16, round(side * scale / 16) * 16) for side in image.size)
            pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        photos.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1)
    return photos


def random_tensors(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Norms 1, biases 0, and random matrices that keep the size of what goes through them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in sorted(shapes):  # a library may list them in another order some day
        shape = shapes[name]
        if len(shape) == 1:
            tensors[name] = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        else:
            rows_are_looked_up = name.endswith("_embedding.weight")
            gain = 1.0 if rows_are_looked_up else 1 / math.sqrt(shape[1])
            tensors[name] = torch.randn(shape, generator=generator) * gain
    return tensors


# Transformer --------------------------------------------------------------------------------------------

GATE_SPREAD = 1.0
BRANCH_ENDS = (
    ".attn.to_out.0.weight",
    ".attn.to_add_out.weight",
    ".ff.net.2.weight",
    ".ff_context.net.2.weight",
    ".proj_out.weight",
)
"""The layers at the end of every branch, which add to the stream; the model's own last layer has no dot before it."""


def random_transformer(seed: int) -> dict[str, Tensor]:
    """A random transformer that an adapter can teach in a minute.

    A plainly random one cannot be: its time embedding is noise, its gates are shut, and its last layer reads
    directions in which nothing was written. Here these three are as they are in any trained model, and all
    else is random. On the photos the loss starts near 2.4; a model that always answers 0 has 2.
    """
    tensors = random_tensors(flux_layout.diffusers_shapes(TRANSFORMER), seed)
    _slow_time(tensors)
    _open_gates(tensors)
    _ends_that_match(tensors, seed)
    return tensors


def _slow_time(tensors: dict[str, Tensor]) -> None:
    """The time embedding sees only waves of at most one cycle between t = 0 and t = 1."""
    matrix = tensors["time_text_embed.timestep_embedder.linear_1.weight"]  # (D, 256): 128 cosines, 128 sines
    half = matrix.shape[1] // 2
    cycles = 1000 / (2 * math.pi) * torch.exp(-math.log(10000) * torch.arange(half) / half)
    slow = (cycles <= 1).float().repeat(2)
    matrix *= slow * 2 * torch.sqrt(len(slow) / slow.sum())
    for name in ("text_embedder", "guidance_embedder"):  # what does not change with t is not to drown it
        tensors[f"time_text_embed.{name}.linear_2.weight"] *= 0.3


def _open_gates(tensors: dict[str, Tensor]) -> None:
    """Modulations change with t, and gates are about 1; what blocks add to the stream is small."""
    for name, tensor in tensors.items():
        if name.endswith("linear.weight") and "norm" in name:
            width = tensor.shape[1]
            rows = tensor.view(-1, width, width)  # shift, scale, gate; twice in a double block; two in the last norm
            gates = range(2, len(rows), 3)
            bias = tensors[name.replace(".weight", ".bias")].view(-1, width)
            for row in range(len(rows)):
                rows[row] *= GATE_SPREAD if row in gates else 0.3
            for gate in gates:
                bias[gate] = 1.0
        elif name.endswith(BRANCH_ENDS):
            tensor *= 0.3


def _ends_that_match(tensors: dict[str, Tensor], seed: int) -> None:
    """The last layer reads exactly what the first one wrote; a constant in other directions keeps it quiet."""
    width, channels = tensors["x_embedder.weight"].shape
    generator = torch.Generator().manual_seed(seed)
    basis = hadamard(width)[torch.randperm(width, generator=generator)]
    written = basis[:, :channels] / math.sqrt(channels)
    tensors["x_embedder.weight"] = written
    constant = basis[:, channels:] @ torch.randn(width - channels, generator=generator)
    tensors["x_embedder.bias"] = constant / constant.std() * 1.5
    tensors["proj_out.weight"] = written.T * channels / width


def hadamard(size: int) -> Tensor:
    """(size, size) of 1 and -1 with orthogonal columns; size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
