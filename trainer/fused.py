"""One adapter for several layers, and several adapters in one: every change of form here is exact.

`parts` have a `(A, B)` each, by diffusers' layer name. Where they share one matrix elsewhere, either all have the
same A and their B are stacked, or their A are stacked and each B keeps to its own columns (block-diagonal), which
makes the rank the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations

import torch
from torch import Tensor
from xflux_trainer.targets import fused, parts_of

Pair = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""
A, B = ".lora_A.weight", ".lora_B.weight"


def pairs(weights: dict[str, Tensor]) -> dict[str, Pair]:
    """The factors of each adapter together, by its name. Every A must have its B."""
    return {name.removesuffix(A): (weights[name], weights[name.removesuffix(A) + B]) for name in weights if A in name}


def flat(adapters: dict[str, Pair]) -> dict[str, Tensor]:
    """The inverse of `pairs`."""
    return {name + end: factor for name, pair in adapters.items() for end, factor in zip((A, B), pair)}  # noqa: B905


def complete(weights: dict[str, Tensor], down: str, up: str) -> dict[str, Pair]:
    """(A, B) by the name before these endings. Raises ValueError for one without the other, or of another rank."""
    found = {}
    for stem in dict.fromkeys(name.removesuffix(down).removesuffix(up) for name in weights):
        pair = weights.get(stem + down), weights.get(stem + up)
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"{stem} has one factor only")
        if pair[0].dim() != 2 or pair[1].dim() != 2 or pair[0].shape[0] != pair[1].shape[1] or not len(pair[0]):
            raise ValueError(f"the factors of {stem} are {tuple(pair[0].shape)} and {tuple(pair[1].shape)}")
        found[stem] = (pair[0], pair[1])
    return found


def explode(adapters: dict[str, Pair]) -> dict[str, Pair]:
    """An adapter for each layer: a fused one becomes three with the same A and a third of B's rows each."""
    apart: dict[str, Pair] = {}
    for name, (down, up) in adapters.items():
        layers = parts_of(name)
        rows = up.shape[0] // len(layers)
        apart |= {layer: (down, up[k * rows : (k + 1) * rows]) for k, layer in enumerate(layers)}
    return apart


def fuse(parts: dict[str, Pair]) -> dict[str, Pair]:
    """q, k and v with the same A become one fused adapter; all others stay as they are."""
    adapters: dict[str, Pair] = {}
    for layer, pair in parts.items():
        name, layers = fused(layer)
        if len(layers) > 1 and all(part in parts and _alike(parts[part], pair) for part in layers):
            adapters.setdefault(name, (pair[0], torch.cat([parts[part][1] for part in layers])))
        else:
            adapters[layer] = pair
    return adapters


def _alike(one: Pair, two: Pair) -> bool:
    return torch.equal(one[0], two[0]) and one[1].shape == two[1].shape


def join(parts: list[Pair | None], rows: list[int]) -> Pair:
    """One (A, B) for layers of the same input, of that many rows; an absent one gets zeros."""
    downs: list[Tensor] = []
    places: list[tuple[int, int, int, Tensor]] = []  # row, which A, column of that A, B
    row = 0
    for part, height in zip(parts, rows):  # noqa: B905 (of one length)
        if part is not None:
            which = next((k for k, down in enumerate(downs) if torch.equal(down, part[0])), len(downs))
            if which == len(downs):
                downs.append(part[0])
            places.append((row, which, sum(len(down) for down in downs[:which]), part[1]))
        row += height
    joined = torch.cat(downs)
    stacked = joined.new_zeros(row, len(joined))
    for start, _, column, up in places:
        stacked[start : start + up.shape[0], column : column + up.shape[1]] = up
    return joined, stacked


def separate(pair: Pair, rows: list[int], optional: Collection[int] = ()) -> list[Pair | None]:
    """The inverse of `join`: parts that keep to columns of their own, or that share A. None for an absent one.

    In the shared form every part has the whole of A; an optional one whose rows are all zero is absent.
    """
    down, up = trim(pair)
    rank = len(down)
    ups = list(up.split(rows))
    used = torch.stack([part.ne(0).any(dim=0) for part in ups])  # (parts, rank): who uses which column
    for count in range(len(rows), 0, -1) if used.any() else ():
        if rank % count:
            continue
        width = rank // count
        for chosen in combinations(range(len(rows)), count):
            own = torch.zeros_like(used)
            for place, part in enumerate(chosen):
                own[part, place * width : (place + 1) * width] = True
            if not (used & ~own).any():
                slices = {part: slice(place * width, (place + 1) * width) for place, part in enumerate(chosen)}
                return [(down[slices[k]], ups[k][:, slices[k]]) if k in slices else None for k in range(len(rows))]
    return [None if k in optional and not used[k].any() else (down, ups[k]) for k in range(len(rows))]


def pad(pair: Pair, rank: int) -> Pair:
    """Zero rows below A and zero columns beside B, up to that rank."""
    down, up = pair
    more = rank - len(down)
    return torch.cat([down, down.new_zeros(more, down.shape[1])]), torch.cat([up, up.new_zeros(len(up), more)], dim=1)


def trim(pair: Pair) -> Pair:
    """The inverse of `pad`. What is zero throughout keeps one component."""
    down, up = pair
    used = (down.ne(0).any(dim=1) | up.ne(0).any(dim=0)).nonzero()
    rank = int(used[-1]) + 1 if len(used) else 1
    return down[:rank], up[:, :rank]


def refit(adapters: dict[str, Pair], wanted: Collection[str]) -> dict[str, Pair]:
    """The same adapters in the form that a run has: fused where `wanted` names the fused layer, else apart.

    What is not wanted and does nothing, its B being zero, is left out; what is not wanted and does something stays.
    """
    parts = explode(adapters)
    refitted: dict[str, Pair] = {}
    for layer, pair in parts.items():
        name, layers = fused(layer)
        if name != layer and name in wanted:
            if name not in refitted:
                height = len(pair[1])
                refitted[name] = join([parts.get(part) for part in layers], [height] * len(layers))
        elif layer in wanted or pair[1].any():
            refitted[layer] = pair
    return refitted
