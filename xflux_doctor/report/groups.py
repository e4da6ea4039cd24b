"""A bill's terms in the few groups that a picture can show, and how far the picture reaches."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import msgspec

GIB = 1 << 30
_LONGEST = 1.5
"""How much longer than the card a picture is at most; a longer bar is cut."""
_PART = re.compile(r", 1/\d+ of them$")


class Group(msgspec.Struct, frozen=True):
    """What is drawn as one segment."""

    name: str
    why: str
    terms: tuple[str, ...] = ()
    """The names that the trainer's bill and that of X-Flux's scripts give to what belongs here."""


GROUPS = (
    Group("weights", "the transformer, and the encoders while they are there", (
        "transformer", "text encoders", "VAE beyond the text encoders", "VAE", "transformer in fp32",
        "transformer in bf16", "whole blocks", "T5, CLIP and the autoencoder",
        "bf16 copies of frozen weights that autocast keeps",
    )),
    Group("trained, optimizer", "what is trained, its gradients and the optimizer's states", (
        "adapters", "adapters' copies", "adapters beside weights", "ControlNet", "gradients", "gradients of one pass",
        "gradients on their way", "Adam", "Adam and fp32 weights", "fp32 weights", "fp32 shards", "compensation",
        "moving average", "one tensor's step", "what is trained and its optimizer", "LoRA weights",
        "optimizer states", "optimizer states and fp32 weights",
    )),
    Group("activations", "what the forward pass keeps, and what passes through in the backward pass", (
        "activations", "block inputs", "one block's activations", "one block's backward pass", "backward's own",
        "ControlNet's activations", "residuals", "condition", "inputs and loss", "text activations",
        "one block forward", "VAE activations", "double blocks' activations", "single blocks' activations",
        "gradients that pass through a block",
    )),
    Group("workspaces, rest", "what matrix products and exchanges between ranks need beside their operands", (
        "cuBLAS", "a weight in 16 bits", "a weight transposed", "one layer on its way", "reduce buckets",
        "DeepSpeed's bucket, 2 x reduce_bucket_size",
    )),
    Group("allocator's reserve", "what PyTorch's allocator keeps beyond its tensors"),
    Group("CUDA context", "CUDA and its libraries, outside of the allocator"),
)  # fmt: skip
"""In the order in which they are drawn."""
REST, RESERVE, CONTEXT = 3, 4, 5
"""Places in it: of a name that no group lists, and of the two that no term makes."""
_PLACES = {name: place for place, group in enumerate(GROUPS) for name in group.terms}


def place_of(term: str) -> int | None:
    """The group that lists a term of that name; None where none does."""
    return _PLACES.get(_PART.sub("", term))


def sizes(terms: Mapping[str, int], context: int, reserve: int) -> tuple[int, ...]:
    """Bytes of each group, in their order: their sum is what the process holds of its card."""
    found = [0] * len(GROUPS)
    for name, size in terms.items():
        place = place_of(name)
        found[REST if place is None else place] += size
    found[RESERVE] = reserve
    found[CONTEXT] = context
    return tuple(found)


def scale(devices: Iterable[int], limit: int | None, total: int | None) -> int:
    """Bytes that the whole width stands for: the card, and the longest bar as far as that leaves the card its place."""
    longest = max(devices, default=0)
    card = max(limit or 0, total or 0)
    return max(1, card, min(longest, math.ceil(card * _LONGEST)) if card else longest)


def printable(text: str) -> str:
    """One line of text that a terminal and a page can show: names come from command lines and drivers."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def gib(size: float) -> str:
    """`37.9 GiB`"""
    return f"{size / GIB:.1f} GiB"
