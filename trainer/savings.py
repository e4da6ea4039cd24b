"""Which of the base's layers are quantised and which are streamed, and the bytes that this leaves. Free of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from xflux_trainer.config import TrainConfig
from xflux_trainer.spec import FluxSpec, Linear

MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")
"""Endings of the layers that see one vector per image: 27 % of FLUX.1's weights and 1 in 10,000 of its FLOPs."""
GROUP = 128
"""Inputs that share a scale in int4."""
SLOTS = 2
"""Streamed units that are on the device at a time: one computes, one arrives."""


def is_block(name: str) -> bool:
    """Whether a module of that name is one of the transformer's blocks."""
    return re.fullmatch(r"(single_)?transformer_blocks\.\d+", name) is not None


def is_modulation(path: str) -> bool:
    """Whether a linear layer of that path, in a block or in the model, makes the modulation."""
    return path in MODULATION or path.endswith(tuple(f".{ending}" for ending in MODULATION))


def group_size(inputs: int) -> int:
    """The inputs that share a scale in int4: 128, fewer where that does not divide a row, or the whole row."""
    return next((size for size in (GROUP, 64, 32) if inputs % size == 0), inputs)


def streamed_blocks(double: int, single: int, count: int) -> tuple[str, ...]:
    """The names of `count` blocks, evenly spread over the model.

    A copy has all the time from one streamed block to the next: spread out, the same link keeps up with a quicker
    card than if all streamed blocks stood in a row.
    """
    names = [f"transformer_blocks.{k}" for k in range(double)]
    names += [f"single_transformer_blocks.{k}" for k in range(single)]
    count = min(count, len(names))
    return tuple(names[(2 * k + 1) * len(names) // (2 * count)] for k in range(count))


@dataclass(frozen=True)
class Held:
    """Bytes of the frozen base. `device` includes the slots that streamed weights arrive in; `host` is pinned."""

    device: int
    host: int
    slots: int
    traffic: int
    """Bytes that go to the device in one forward pass; a backward pass moves those of whole blocks once more."""


def held(config: TrainConfig, spec: FluxSpec, width: int = 2) -> Held:
    """What a run's base takes, `width` bytes for each number that is not quantised."""
    device = spec.transformer_parameters * width
    streamed = set(streamed_blocks(spec.double_blocks, spec.single_blocks, config.stream_blocks))
    units: dict[str, int] = {}
    for linear in spec.linears():
        block = _block(linear)
        if not block:
            continue
        modulation = is_modulation(linear.name)
        quantised = config.quantization != "none" and (not modulation or config.modulation == "quantize")
        size = stored(linear, config.quantization if quantised else "none", width)
        device += size - linear.inputs * linear.outputs * width
        if block in streamed or (modulation and config.modulation == "stream"):
            units[block] = units.get(block, 0) + size
    host = sum(units.values())
    slots = min(SLOTS, len(units)) * max(units.values(), default=0)
    return Held(device - host + slots, host, slots, host)


def stored(linear: Linear, quantization: str, width: int = 2) -> int:
    """Bytes of one layer's weight in a format, without its bias."""
    count = linear.inputs * linear.outputs
    if quantization == "none":
        return count * width
    if quantization == "int4":
        return count // 2 + 2 * width * count // group_size(linear.inputs)
    if quantization == "nf4":
        return count // 2 + count // 64 + count // (64 * 256) * 4
    return count + linear.outputs * 4


def _block(linear: Linear) -> str:
    """The name of the block that a layer is part of, or an empty text."""
    name = ".".join(linear.name.split(".")[:2])
    return name if is_block(name) else ""
