"""Which of the base's layers are quantised and which are streamed, and the bytes that this leaves. Free of torch."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from xflux_trainer.config import TrainConfig
from xflux_trainer.spec import FluxSpec, Linear

MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")
"""Endings of the layers that see one vector per image: 27 % of FLUX.1's weights and 1 in 10,000 of its FLOPs."""
GROUP = 128
"""Inputs that share a scale in int4."""
SLOTS = 5
"""Streamed units that are on the device at a time: the three of a double block, and what arrives meanwhile."""
KINDS = ("transformer_blocks", "single_transformer_blocks")
"""The names of the blocks, a number behind each."""
ORDER = ("to_q", "to_k", "to_v", "proj_mlp", "add_q_proj", "add_k_proj", "add_v_proj")
"""Layers of one input lie in this order in their unit, without gaps: their weights can be taken as one matrix."""


@functools.lru_cache(maxsize=4096)
def is_block(name: str) -> bool:
    """Whether a module of that name is one of the transformer's blocks."""
    return re.fullmatch(r"(single_)?transformer_blocks\.\d+", name) is not None


@functools.lru_cache(maxsize=4096)
def is_modulation(path: str) -> bool:
    """Whether a linear layer of that path, in a block or in the model, makes the modulation."""
    return path in MODULATION or path.endswith(tuple(f".{ending}" for ending in MODULATION))


def unit_of(path: str) -> str:
    """Which layers of a block travel together: those that are used at one time, at most 8 hidden² numbers in FLUX.1.

    One modulation, the attention (with a single block's first MLP layer, which has the same input), one feed-forward
    pair, a single block's last layer. `path` is the layer's in its block.
    """
    head = path.partition(".")[0]
    return "attn" if head == "proj_mlp" else head


def position(path: str) -> int:
    """Where a layer lies in its unit, by its path: sort by it, and leave equals in the order that they are in."""
    leaf = path.rpartition(".")[2]
    return ORDER.index(leaf) if leaf in ORDER else len(ORDER)


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


class Held(NamedTuple):
    """Bytes of the frozen base. `device` includes the slots that streamed weights arrive in; `host` is pinned."""

    device: int
    host: int
    slots: int
    traffic: int
    """Most bytes that go to the device in a step: the modulation for the forward pass, all else in each direction.

    What lies in the slots when the pass turns round needs no second copy.
    """


class Unit(NamedTuple):
    """Layers of a block that travel together, in every block of a kind: whether they make modulation, and the bytes of
    their weights."""

    kind: str
    modulation: bool
    bytes: int


def held(config: TrainConfig, spec: FluxSpec, width: int = 2) -> Held:
    """What a run's base takes, `width` bytes for each number that is not quantised."""
    return _base(config.quantization, config.modulation, config.stream_blocks, spec, width)


@functools.lru_cache(maxsize=256)
def _base(quantization: str, modulation: str, stream_blocks: int, spec: FluxSpec, width: int) -> Held:
    own = units(quantization, modulation, spec, width)
    return _held(modulation, stream_blocks, spec, own, _rest(spec, width))


def blocks_to_stream(config: TrainConfig, spec: FluxSpec, budget: int, width: int = 2) -> int | None:
    """The smallest `stream_blocks` with which the base takes at most `budget` bytes of the device; None: none does."""
    own, rest = units(config.quantization, config.modulation, spec, width), _rest(spec, width)
    for count in range(spec.double_blocks + spec.single_blocks + 1):
        if _held(config.modulation, count, spec, own, rest).device <= budget:
            return count
    return None


@functools.lru_cache(maxsize=16)
def units(quantization: str, modulation: str, spec: FluxSpec, width: int) -> tuple[Unit, ...]:
    """What the weights of one double and of one single block travel as: all of a kind are alike."""
    found = []
    for (kind, _), layers in _by_unit(spec).items():
        modulates = is_modulation(layers[0].name)
        quantised = quantization != "none" and (not modulates or modulation == "quantize")
        size = sum(stored(layer, quantization if quantised else "none", width) for layer in layers)
        found.append(Unit(kind, modulates, size))
    return tuple(found)


@functools.lru_cache(maxsize=16)
def _by_unit(spec: FluxSpec) -> dict[tuple[str, str], list[Linear]]:
    """The linear layers of the first block of each kind, by it and the name of their unit."""
    found: dict[tuple[str, str], list[Linear]] = {}
    for linear in spec.linears():
        kind, number, path = (*linear.name.split(".", 2), "", "")[:3]
        if kind in KINDS and number == "0":
            found.setdefault((kind, unit_of(path)), []).append(linear)
    return found


def _counts(spec: FluxSpec) -> dict[str, int]:
    """How many blocks of each kind there are."""
    return dict(zip(KINDS, (spec.double_blocks, spec.single_blocks), strict=True))


@functools.lru_cache(maxsize=16)
def _rest(spec: FluxSpec, width: int) -> int:
    """Bytes of everything but the blocks' weights; their biases are in it."""
    every = _counts(spec)
    weights = ((kind, layer.inputs * layer.outputs) for (kind, _), own in _by_unit(spec).items() for layer in own)
    return (spec.transformer_parameters - sum(every[kind] * size for kind, size in weights)) * width


@functools.lru_cache(maxsize=256)
def leaving(modulation: str, stream_blocks: int, spec: FluxSpec) -> dict[tuple[str, bool], int]:
    """In how many blocks a unit waits on the host, by its kind and by whether it makes modulation."""
    names = streamed_blocks(spec.double_blocks, spec.single_blocks, stream_blocks)
    single = sum(name.startswith("single_") for name in names)
    streamed = dict(zip(KINDS, (len(names) - single, single), strict=True))
    turned = _counts(spec) if modulation == "stream" else {}
    return {(kind, False): count for kind, count in streamed.items()} | {
        (kind, True): turned.get(kind, count) for kind, count in streamed.items()
    }


def _held(modulation: str, stream_blocks: int, spec: FluxSpec, own: tuple[Unit, ...], rest: int) -> Held:
    every, gone = _counts(spec), leaving(modulation, stream_blocks, spec)
    total = host = traffic = units_away = largest = 0
    for kind, modulates, size in own:
        total += every[kind] * size
        if count := gone[kind, modulates]:
            host += count * size
            traffic += count * size * (1 if modulates else 2)
            units_away, largest = units_away + count, max(largest, size)
    slots = min(SLOTS, units_away) * largest
    return Held(rest + total - host + slots, host, slots, traffic)


def stored(linear: Linear, quantization: str, width: int = 2) -> int:
    """Bytes of one layer's weight in a format, without its bias."""
    return _stored(linear.inputs, linear.outputs, quantization, width)


@functools.lru_cache(maxsize=1024)
def _stored(inputs: int, outputs: int, quantization: str, width: int) -> int:
    count = inputs * outputs
    if quantization == "none":
        return count * width
    if quantization == "int4":
        return count // 2 + 2 * width * count // group_size(inputs)
    if quantization == "nf4":
        return count // 2 + count // 64 + count // (64 * 256) * 4
    return count + outputs * 4  # a scale for each output channel


def block_of(layer: str) -> str:
    """transformer_blocks.3 of transformer_blocks.3.attn.to_q; "" of a layer that is in no block."""
    name = ".".join(layer.split(".")[:2])
    return name if is_block(name) else ""
