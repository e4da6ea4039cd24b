"""Which layers of FLUX.1 get adapters, and which of them share one: names and sizes only, no torch.

X-Flux's adapters are fused: q, k and v of a stream have one `A` in common, and one `B` of three times the height.
`xflux` trains that form; every other choice of targets gives each layer an adapter of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Layer(Protocol):
    """What must be known of a linear layer: `spec.Linear` has it, and so has `lora.layers_of` a real model."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...


class Adapter(NamedTuple):
    """One adapter, `A` (rank, inputs) and `B` (outputs, rank), and the layers whose outputs `B` is stacked for."""

    name: str
    """The layer's own name, or diffusers' name of the fused layer, such as `transformer_blocks.0.attn.to_qkv`."""
    layers: tuple[str, ...]
    inputs: int
    outputs: int

    def parameters(self, rank: int) -> int:
        return rank * (self.inputs + self.outputs)


_ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attn": _ATTENTION,
    # X-Flux adapts the attention of both streams, and all of a single block's output layer.
    "xflux": (*_ATTENTION, "single:proj_out"),
    # The default of diffusers' own Flux script: attention and the double blocks' feed-forward layers.
    "diffusers": (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    "all-linear": ("*",),
}
"""Named sets of module name endings. `single:` binds an ending to single blocks; `*` is every linear layer."""

FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
"""Layers that X-Flux's adapters have in common, in the order of their rows, by diffusers' name of the fused layer."""

_TOGETHER = {leaf: (together, leaves) for together, leaves in FUSED.items() for leaf in leaves}

BLOCKS = {"single_blocks": "single_transformer_blocks", "double_blocks": "transformer_blocks"}
"""The train config's block lists, and where in diffusers' transformer those blocks hang."""


def adapters_of(
    linears: Iterable[Layer],
    targets: str | tuple[str, ...],
    single_blocks: tuple[int, ...] | None = None,
    double_blocks: tuple[int, ...] | None = None,
) -> list[Adapter]:
    """The adapters of a model with these layers, in the layers' order. `None` means all blocks."""
    chosen = {layer.name: layer for layer in linears if is_target(layer.name, targets, single_blocks, double_blocks)}
    adapters: dict[str, Adapter] = {}
    for name, layer in chosen.items():
        together, parts = fused(name) if targets == "xflux" else (name, (name,))
        if together not in adapters:
            rows = sum([chosen[part].outputs for part in parts])
            adapters[together] = Adapter(together, parts, layer.inputs, rows)
    return list(adapters.values())


def fused(name: str) -> tuple[str, tuple[str, ...]]:
    """The fused layer that a layer is part of, and its parts in order; a layer that is part of none is its own."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in _TOGETHER or not stem.endswith("attn"):
        return name, (name,)
    together, leaves = _TOGETHER[leaf]
    return f"{stem}.{together}", tuple([f"{stem}.{part}" for part in leaves])


def parts_of(name: str) -> tuple[str, ...]:
    """The layers of an adapter of that name: those of a fused layer, or the one layer itself."""
    stem, _, leaf = name.rpartition(".")
    return tuple(f"{stem}.{part}" for part in FUSED[leaf]) if leaf in FUSED else (name,)


def count_blocks(names: Iterable[str]) -> dict[str, int]:
    """How many blocks of either kind a model with linear layers of these names has, by the keys of `BLOCKS`."""
    found = {tuple(name.split(".")[:2]) for name in names}
    return {key: sum(head == place[0] for place in found) for key, head in BLOCKS.items()}


def unmatched(names: Iterable[str], targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """Endings of a list that match none of these layers, whatever blocks are chosen.

    A named set has none: it is written for every FLUX.1 model.
    """
    if isinstance(targets, str):
        return ()
    layers = tuple(names)
    return tuple(ending for ending in targets if not any(is_target(name, (ending,)) for name in layers))


def is_target(
    name: str,
    targets: str | tuple[str, ...],
    single_blocks: tuple[int, ...] | None = None,
    double_blocks: tuple[int, ...] | None = None,
) -> bool:
    """Whether the linear layer of that diffusers name gets an adapter. `None` means all blocks."""
    head, _, rest = name.partition(".")
    number, _, inner = rest.partition(".")
    chosen = {"transformer_blocks": double_blocks, "single_transformer_blocks": single_blocks}.get(head)
    if chosen is not None and int(number) not in chosen:
        return False
    if isinstance(targets, str) and head in BLOCKS.values():  # which block it is says nothing to a named set
        return _ends(head, inner, LORA_TARGETS[targets])
    return _ends(head, name, LORA_TARGETS[targets] if isinstance(targets, str) else tuple(targets))


@functools.lru_cache(maxsize=1024)
def _ends(head: str, path: str, endings: tuple[str, ...]) -> bool:
    for ending in endings:
        kind, colon, bare = ending.rpartition(":")
        if colon and head != f"{kind}_transformer_blocks":
            continue
        if bare == "*" or path == bare or path.endswith("." + bare):
            return True
    return False


FILES = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "kohya": "pytorch_lora_weights_kohya.safetensors",
    "xlabs": "lora.safetensors",
}
"""The formats of adapter files, and what a run calls its own: the names that diffusers and X-Flux look for."""
_XLABS = {*_ATTENTION, "proj_out"}
"""What X-Flux's own format has places for, by the name inside a block."""


def unplaced(names: Iterable[str], form: str) -> tuple[str, ...]:
    """Of these layers, those that an adapter file of that format has no place for."""
    if form != "xlabs":
        return ()
    return tuple(name for name in names if not _has_xlabs_place(name))


def _has_xlabs_place(name: str) -> bool:
    head, _, inner = name.split(".", 2) if name.count(".") >= 2 else ("", "", name)
    # The model's last layer is a proj_out as well, and a double block has none.
    return head in BLOCKS.values() and inner in _XLABS and (inner != "proj_out" or head == BLOCKS["single_blocks"])


def growth(adapters: Iterable[Adapter], form: str) -> int:
    """By how much the rank grows in a file of that format, which holds layers in one that are apart here.

    Each of them keeps its own rows and columns there, so that nothing is lost.
    """
    together: dict[str, set[str]] = {}
    if form == "diffusers":
        return 1
    for adapter in adapters:
        for layer in adapter.layers:
            place = fused(layer)[0]
            if form == "kohya" and place.startswith(BLOCKS["single_blocks"]) and layer.endswith(".proj_mlp"):
                place = place.removesuffix("proj_mlp") + "attn.to_qkv"
            together.setdefault(place, set()).add(adapter.name)
    return max((len(names) for names in together.values()), default=1)
