"""Black Forest Labs' names: where each tensor of diffusers' FLUX.1 transformer lies in a single file, as values.

One table serves both directions: a reader asks for the rows that make up a tensor, a writer puts a tensor into them.
Fused layers are cut by rows: q, k and v lie under each other in `qkv`, and a single block's q, k, v and the first
layer of its MLP, which is as high as four of them, in `linear1`. (Source: BFL's `flux/model.py`, and diffusers'
`convert_flux_transformer_checkpoint_to_diffusers`, against which the tests compare.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the doctor reads the names, and torch must stay out of its process
    import torch
    from torch import Tensor

    Shapes = Mapping[str, tuple[int, ...]]

COMFY = "model.diffusion_model."
"""What some tools put before the names in a single file."""


class Place(NamedTuple):
    """Where a tensor of diffusers' lies: in the tensor `name`, from share `start` on, `size` of `of` equal shares."""

    name: str
    start: int = 0
    size: int = 1
    of: int = 1
    swapped: bool = False
    """The two halves of the rows have changed places: BFL's shift and scale are diffusers' scale and shift."""

    def rows(self, total: int) -> tuple[int, int]:
        """First row and end, of a stored tensor of `total` rows."""
        return self.start * total // self.of, (self.start + self.size) * total // self.of

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of diffusers' tensor, for a stored one of that shape."""
        return (stored[0] * self.size // self.of, *stored[1:])

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the stored tensor that a tensor of that shape is a part of."""
        return (shape[0] * self.of // self.size, *shape[1:])


def _fused(layer: str, *parts: tuple[str, int]) -> dict[str, Place]:
    total, start, places = sum(size for _, size in parts), 0, {}
    for name, size in parts:
        places[name] = Place(layer, start, size, total)
        start += size
    return places


def _plain(names: Mapping[str, str]) -> dict[str, Place]:
    return {name: Place(layer) for name, layer in names.items()}


_ENDS = {
    **_plain({
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "proj_out": "final_layer.linear",
    }),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
}  # fmt: skip
_DOUBLE = {
    **_plain({
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }),
    **_fused("img_attn.qkv", ("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1)),
    **_fused("txt_attn.qkv", ("attn.add_q_proj", 1), ("attn.add_k_proj", 1), ("attn.add_v_proj", 1)),
}  # fmt: skip
_SINGLE = {
    **_plain({
        "norm.linear": "modulation.lin",
        "attn.norm_q": "norm.query_norm",
        "attn.norm_k": "norm.key_norm",
        "proj_out": "linear2",
    }),
    **_fused("linear1", ("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4)),
}  # fmt: skip
_NAME = re.compile(r"(?:(transformer_blocks|single_transformer_blocks)\.(\d+)\.)?(.+)\.(weight|bias)")


def place(name: str) -> Place | None:
    """Where diffusers' tensor of that name lies in BFL's file; None for a name that FLUX.1 has not."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    kind, number, layer, leaf = match.groups()
    table = {None: _ENDS, "transformer_blocks": _DOUBLE, "single_transformer_blocks": _SINGLE}[kind]
    found = table.get(layer)
    if found is None:
        return None
    head = {None: "", "transformer_blocks": "double_blocks.", "single_transformer_blocks": "single_blocks."}[kind]
    if found.name.endswith("_norm"):
        leaf = "scale"
    stored = f"{head}{number}.{found.name}.{leaf}" if head else f"{found.name}.{leaf}"
    return Place(stored, found.start, found.size, found.of, found.swapped)


def write_single(
    path: Path, tensors: Iterable[tuple[str, Tensor]], shapes: Shapes, dtype: torch.dtype | None = None
) -> Path:
    """Write a transformer as BFL's single file, tensor by tensor; the host never holds more than one.

    `tensors` are diffusers' names and values in any order, `shapes` all of their shapes; `dtype` is bf16 if None.
    """
    from xflux_trainer.tensorfile import write_placed

    return write_placed(path, tensors, shapes, place, dtype)


def write_single_of(folder: Path, path: Path, dtype: torch.dtype | None = None) -> Path:
    """A transformer's folder in diffusers' layout as BFL's single file."""
    import torch
    from xflux_trainer.weights import open_weights

    with open_weights(folder, torch.device("cpu")) as weights:
        shapes = {name: weights.shape(name) for name in weights.names()}
        return write_single(path, ((name, weights.read(name)) for name in shapes), shapes, dtype)
