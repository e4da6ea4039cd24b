"""X-Flux's own adapter files (XLabs): q, k, v and the output layer of attention, in blocks that are whole.

X-Flux's loader takes one rank for the whole file and wants every matrix of a block that it finds there: what a run did
not train is written as zeros, and smaller ranks are filled up with zeros. Stream 1 is the image, 2 the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor
from xflux_trainer.fused import Pair, complete, join, pad, separate

DOWN, UP = ".down.weight", ".up.weight"
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_BLOCKS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "double_blocks": (
        "transformer_blocks",
        {
            "qkv_lora1": _QKV,
            "proj_lora1": ("attn.to_out.0",),
            "qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "proj_lora2": ("attn.to_add_out",),
        },
    ),
    "single_blocks": ("single_transformer_blocks", {"qkv_lora": _QKV, "proj_lora": ("proj_out",)}),
}
_SINGLE_OUTPUT = 5
"""Times the width that a single block's output layer takes: attention, and a feed-forward layer of four."""


def write(parts: dict[str, Pair]) -> dict[str, Tensor]:
    """Adapters by diffusers' layers, to the tensors of a file. All of them must have a place, see `unplaced`."""
    written: dict[str, Pair | None] = {}
    for kind, (head, slots) in _BLOCKS.items():
        for number in _numbers(parts, head):
            for slot, members in slots.items():
                given = [parts.get(f"{head}.{number}.{member}") for member in members]
                first = next((pair for pair in given if pair is not None), None)
                joined = join(given, [len(first[1])] * len(given)) if first is not None else None
                written[f"{kind}.{number}.processor.{slot}"] = joined
    rank = max(len(pair[0]) for pair in written.values() if pair is not None)
    width = _width(written)
    tensors: dict[str, Tensor] = {}
    for name, pair in written.items():
        down, up = pad(pair, rank) if pair is not None else _nothing(name, rank, width, next(iter(parts.values()))[0])
        tensors |= {name + DOWN: down, name + UP: up}
    return tensors


def _numbers(layers: Iterable[str], head: str) -> list[int]:
    return sorted({int(layer.split(".")[1]) for layer in layers if layer.startswith(head + ".")})


def _width(written: dict[str, Pair | None]) -> int:
    """The width of the model's streams."""
    name, pair = next((name, pair) for name, pair in written.items() if pair is not None)
    return pair[0].shape[1] if "qkv" in name else pair[1].shape[0]


def _nothing(name: str, rank: int, width: int, like: Tensor) -> Pair:
    """Zeros of the shapes that X-Flux's loader wants there."""
    inputs = width * _SINGLE_OUTPUT if name.endswith(".proj_lora") else width
    outputs = 3 * width if "qkv" in name else width
    return like.new_zeros(rank, inputs), like.new_zeros(outputs, rank)


def read(tensors: dict[str, Tensor]) -> dict[str, Pair]:
    """Adapters by diffusers' layers, without those that are nothing but zeros. Raises ValueError for other tensors."""
    named = {name.removeprefix("diffusion_model."): tensor for name, tensor in tensors.items()}
    found: dict[str, Pair] = {}
    for name, pair in complete(named, DOWN, UP).items():
        match = re.fullmatch(r"(double_blocks|single_blocks)\.(\d+)\.processor\.(\w+)", name)
        if match is None or match[3] not in _BLOCKS[match[1]][1]:
            raise ValueError(f"it holds {name}")
        head, slots = _BLOCKS[match[1]]
        layers = slots[match[3]]
        if len(pair[1]) % len(layers):
            raise ValueError(f"{name} has {len(pair[1])} rows")
        if pair[0].any() or pair[1].any():
            split = separate(pair, [len(pair[1]) // len(layers)] * len(layers))
            found |= {f"{head}.{int(match[2])}.{inner}": part for inner, part in zip(layers, split) if part}  # noqa: B905
    if not found:
        raise ValueError("it holds nothing but zeros")
    return found
