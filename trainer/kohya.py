"""kohya's adapter files (sd-scripts, ComfyUI): Black Forest Labs' names of the layers, q, k and v in one matrix.

In a single block `linear1` is q, k, v and the first feed-forward layer in one. Which of diffusers' layers is which of
Black Forest Labs' is told by diffusers' `scripts/convert_flux_to_diffusers.py`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from xflux_trainer.fused import Pair, complete, join, separate

PREFIX = "lora_unet_"
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
DOUBLE: dict[str, tuple[str, ...]] = {
    "img_attn_qkv": _QKV,
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",), "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",), "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",), "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",), "txt_mod_lin": ("norm1_context.linear",),
}  # fmt: skip
SINGLE = {"linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation_lin": ("norm.linear",)}
ENDS = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_adaLN_modulation_1": "norm_out.linear", "final_layer_linear": "proj_out",
}  # fmt: skip
_SWAPPED = "norm_out.linear"
"""Shift, then scale in Black Forest Labs' model; scale, then shift in diffusers'."""
_BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}


def metadata(rank: int) -> dict[str, str]:
    """What sd-scripts' own files say, for the programs that list adapters."""
    return {
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_base_model_version": "flux1",
    }


def write(parts: dict[str, Pair]) -> dict[str, Tensor]:
    """Adapters by diffusers' layers, to the tensors of a file. An alpha equal to the rank stands for a scale of 1."""
    tensors: dict[str, Tensor] = {}
    for name, layers in _places(parts).items():
        given = [parts.get(layer) for layer in layers]
        down, up = _swap(layers[0], join(given, _heights(layers, given)))
        tensors |= {name + DOWN: down, name + UP: up, name + ALPHA: torch.tensor(float(len(down)))}
    return tensors


def _places(parts: dict[str, Pair]) -> dict[str, tuple[str, ...]]:
    """The names in a file, and the layers that are one there."""
    places: dict[str, tuple[str, ...]] = {}
    for layer in parts:
        head, _, rest = layer.partition(".")
        number, _, inner = rest.partition(".")
        kind = next((kind for kind, (place, _) in _BLOCKS.items() if place == head), None)
        if kind is None:
            ends = {inner: outer for outer, inner in ENDS.items()}
            places[PREFIX + ends[layer]] = (layer,)
            continue
        slot = next(slot for slot, members in _BLOCKS[kind][1].items() if inner in members)
        members = _BLOCKS[kind][1][slot]
        places[f"{PREFIX}{kind}_{number}_{slot}"] = tuple(f"{head}.{number}.{member}" for member in members)
    return places


def _heights(layers: tuple[str, ...], given: list[Pair | None]) -> list[int]:
    """Rows of each layer. q, k and v map a width to itself; the feed-forward layer, where absent, to four of it."""
    width = next(pair[0].shape[1] for pair in given if pair is not None)
    return [
        len(pair[1]) if pair is not None else 4 * width if layer.endswith(".proj_mlp") else width
        for layer, pair in zip(layers, given)  # noqa: B905 (of one length)
    ]


def read(tensors: dict[str, Tensor]) -> dict[str, Pair]:
    """Adapters by diffusers' layers. Raises ValueError for what is no adapter of FLUX.1's transformer."""
    odd = next((name for name in tensors if not name.startswith(PREFIX)), None)
    if odd is not None:
        text = odd.startswith(("lora_te", "text_encoder"))
        raise ValueError(f"it holds {odd}{', and text encoders are not trained here' if text else ''}")
    alphas = {name.removesuffix(ALPHA): float(value) for name, value in tensors.items() if name.endswith(ALPHA)}
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(ALPHA)}
    found: dict[str, Pair] = {}
    for name, (down, up) in complete(weights, DOWN, UP).items():
        layers = _layers(name)
        up = up * (alphas.get(name, len(down)) / len(down))
        rows = _rows(layers, down.shape[1], up.shape[0], name)
        # A linear1 that q, k and v alone are adapted in has zeros for the feed-forward layer.
        optional = [k for k, layer in enumerate(layers) if layer.endswith(".proj_mlp")]
        split = separate(_swap(layers[0], (down, up)), rows, optional)
        found |= {layer: pair for layer, pair in zip(layers, split) if pair is not None}  # noqa: B905
    return found


def _layers(name: str) -> tuple[str, ...]:
    """diffusers' layers that are in the matrix of that name."""
    bare = name.removeprefix(PREFIX)
    match = re.fullmatch(r"(double_blocks|single_blocks)_(\d+)_(\w+)", bare)
    if match is None and bare in ENDS:
        return (ENDS[bare],)
    if match is None or match[3] not in _BLOCKS[match[1]][1]:
        raise ValueError(f"it holds {name}")
    head, slots = _BLOCKS[match[1]]
    return tuple(f"{head}.{int(match[2])}.{member}" for member in slots[match[3]])


def _rows(layers: tuple[str, ...], width: int, height: int, name: str) -> list[int]:
    if len(layers) == 1:
        return [height]
    rows = [width] * 3 + [height - 3 * width] * (len(layers) - 3)
    if sum(rows) != height or min(rows) < 1:
        raise ValueError(f"{name} maps {width} to {height} channels")
    return rows


def _swap(layer: str, pair: Pair) -> Pair:
    """The halves of B in the other order, for the one layer where the two models differ in that."""
    if layer != _SWAPPED:
        return pair
    first, second = pair[1].chunk(2)
    return pair[0], torch.cat([second, first])
