"""How fast a card is and how much a step asks of it: dense peaks by name, and the FLOPs of one image's step.

Torch-free. A multiply and an add are two FLOPs; what is recomputed by gradient checkpointing counts, for it is done.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from xflux_trainer.settings import TrainConfig
from xflux_trainer.spec import FluxSpec

PEAKS: tuple[tuple[str, float], ...] = (
    # TFLOP/s of dense bf16 with fp32 sums. NVIDIA's data sheets print twice as much, with sparsity.
    ("GB300", 2500), ("B300", 2250),  # Blackwell Ultra data sheets
    ("GB200", 2500), ("B200", 2250), ("B100", 1750),  # Blackwell architecture brief
    ("GH200", 989.4),  # Grace Hopper data sheet
    ("H200 NVL", 835.5), ("H200", 989.4),  # H200 data sheet: 1671 and 1979 with sparsity
    ("H100 NVL", 835.5), ("H100 PCIE", 756.4), ("H100", 989.4),  # H100 data sheet: 1671, 1513, 1979 with sparsity
    ("H800 PCIE", 756.4), ("H800", 989.4), ("H20", 148),
    ("A100", 311.8), ("A800", 311.8), ("A30", 165), ("A40", 149.7), ("A10G", 70), ("A10", 125),  # data sheets
    ("L40S", 362.05), ("L40", 181.05), ("L4", 121),  # data sheets
    ("RTX PRO 6000 BLACKWELL WORKSTATION", 503.8), ("RTX 6000 ADA", 364.2), ("RTX 5000 ADA", 261.1),  # RTX papers
    ("RTX A6000", 154.8), ("RTX A5000", 111.1), ("RTX A4000", 76.7),  # data sheets, halves of the sparse rate
    ("RTX 5090", 209.5), ("RTX 5080", 112.6),  # RTX Blackwell architecture paper, appendix A
    ("RTX 4090", 165.2), ("RTX 4080", 97.5),  # Ada architecture paper, appendix A
    ("RTX 3090 TI", 80), ("RTX 3090", 71.2), ("RTX 3080", 59.5),  # GA102 architecture paper: half with fp32 sums
)  # fmt: skip
"""Names are looked for in this order, as whole words."""

_OTHER = re.compile(r"LAPTOP|MAX-Q|\bMIG\b|\bD\b|-\d+[ABCQ]\b")
"""Cut-down relatives that carry a listed card's name, and slices of a card: their peak is another."""


def peak(name: str, precision: str) -> float | None:
    """TFLOP/s that the card of that name can do at the most; None for one that is not known, and in fp32.

    `precision` is the config's mixed_precision: fp16 is as fast as bf16 on all of these.
    """
    words = name.upper()
    if precision == "no" or _OTHER.search(words):
        return None
    # Whole words: an L40S is no L40, but "A100-SXM4-80GB" is an A100; and a 4080 SUPER is no 4080.
    return next((tflops for card, tflops in PEAKS if re.search(rf"\b{card}\b(?! (?:SUPER|TI)\b)", words)), None)


_ONCE = re.compile(r"\bnorm(1|1_context|_out)?\.linear\b")


@functools.lru_cache(maxsize=8192)
def tokens_of(name: str, image_tokens: int, text_tokens: int) -> int:
    """Tokens that go through the layer of that diffusers name; 1 for modulation and embeddings, once an image."""
    if name.startswith("time_text_embed.") or ("norm" in name and _ONCE.search(name)):
        return 1
    if name.startswith("single_transformer_blocks."):
        return image_tokens + text_tokens
    return text_tokens if "context" in name or "add" in name.rpartition("attn.")[2] else image_tokens


_Sizes = tuple[tuple[str, float], ...]
"""FLOPs by layer."""
_MODULATION = re.compile(r"\bnorm(1|1_context)?\.linear\b")


def step_flops(
    config: TrainConfig, spec: FluxSpec, trained: Mapping[str, tuple[int, ...]], image_tokens: int, text_tokens: int,
    *, fused: bool = False,
) -> float:  # fmt: skip
    """FLOPs of one image's forward and backward pass; `trained` are the trained parameters' shapes by name.

    `fused`: this trainer's blocks compute, which recompute less. As if gradients went through every block: of a run
    that trains late blocks alone it is an upper bound. The convolutions before a ControlNet (below 0.1 %) are left out.
    """
    return flops_of(config, spec, matrices(trained, image_tokens, text_tokens), image_tokens, text_tokens, fused=fused)


class Matrices:
    """Trained matrices, at one number of tokens. Equal is only itself: a plan's search keeps one for hundreds of
    steps, and finds by it what follows from it."""

    def __init__(self, sizes: _Sizes, whole: bool, gates: frozenset[str]) -> None:
        self.sizes, self.whole, self.gates = sizes, whole, gates
        """FLOPs by name; whether all modulations' gradients are asked for, and the blocks of which they are."""
        self.products = sum(size for _, size in sizes)

    @functools.cached_property
    def blocks(self) -> int:
        """How many blocks have some."""
        return len({tuple(name.split(".")[:2]) for name, _ in self.sizes if "transformer_blocks." in name})


def matrices(trained: Mapping[str, tuple[int, ...]], image_tokens: int, text_tokens: int) -> Matrices:
    """Of the trained parameters' shapes by name."""
    sizes = tuple(
        (name, 2.0 * math.prod(shape) * tokens_of(name, image_tokens, text_tokens))
        for name, shape in trained.items()
        if len(shape) == 2
    )
    return Matrices(sizes, *_modulated(trained))


def flops_of(
    config: TrainConfig, spec: FluxSpec, asked: Matrices, image_tokens: int, text_tokens: int, *, fused: bool
) -> float:
    """`step_flops` of these."""
    count = _checkpointed(config, spec) if fused else 0
    base = spec.step_flops(image_tokens, text_tokens, checkpointing=config.gradient_checkpointing and not fused)
    if count:
        attention = 4 * (image_tokens + text_tokens) ** 2 * spec.hidden
        base += count * attention + _base_again(spec, image_tokens, text_tokens, asked)[count]
    products = asked.products
    if config.mode == "finetune":
        return base + products  # the weights' own gradients; forward and input gradients are in the base
    if config.mode == "controlnet":
        # Its blocks, diffusers' own, attend as well. It stands beside the base, through which its gradients come.
        passes = 1 if config.gradient_checkpointing else 0
        attention = 4 * (image_tokens + text_tokens) ** 2 * spec.hidden
        return base + products * (3 + passes) + asked.blocks * (3.5 + passes) * attention
    if not fused:
        return base + products * (4 if config.gradient_checkpointing else 3)
    again = _again(asked, spec.double_blocks)
    return base + products * 3 + again[min(count, len(again) - 1)]


def _checkpointed(config: TrainConfig, spec: FluxSpec) -> int:
    """How many blocks, the first ones, compute a second time."""
    every = spec.double_blocks + spec.single_blocks
    if not config.gradient_checkpointing:
        return 0
    return every if config.checkpointed_blocks is None else min(every, config.checkpointed_blocks)


@functools.lru_cache(maxsize=64)
def _base_again(spec: FluxSpec, image_tokens: int, text_tokens: int, asked: Matrices) -> tuple[float, ...]:
    """FLOPs that the first fused blocks compute a second time, by how many: all but a block's last layers, which nobody
    reads (7/12 of a single block's products, 8/12 of a double block's), unless its gate's gradient wants them."""
    each = []
    for kind, count, layers in spec.kinds():
        named = {f"{kind}.0.{linear.name}": linear for linear in layers if linear.per_token}
        alike = tuple(
            (name, 2.0 * linear.inputs * linear.outputs * tokens_of(name, image_tokens, text_tokens))
            for name, linear in named.items()
        )
        for _, _, inner, last in _by_block(alike, 0):
            each += [inner + last * (asked.whole or f"{kind}.{number}" in asked.gates) for number in range(count)]
    return tuple(itertools.accumulate(each, initial=0.0))


@functools.lru_cache(maxsize=64)
def _again(asked: Matrices, double: int) -> tuple[float, ...]:
    """The same of what is trained in them."""
    blocks = _by_block(asked.sizes, double)
    each = [0.0] * (1 + max((place for place, *_ in blocks), default=-1))
    for place, block, inner, last in blocks:
        each[place] = inner + last * (asked.whole or block in asked.gates)
    return tuple(itertools.accumulate(each, initial=0.0))


def _by_block(sizes: _Sizes, double: int) -> tuple[tuple[int, str, float, float], ...]:
    """(its place among all blocks, its name, FLOPs of its inner layers, of its last ones)."""
    found: dict[str, list[float]] = {}
    for name, size in sizes:
        kind, number, leaf = (*name.split(".", 2), "", "")[:3]
        if kind in ("transformer_blocks", "single_transformer_blocks"):
            last = leaf.startswith(("proj_out", "ff.net.2", "ff_context.net.2"))
            found.setdefault(f"{kind}.{number}", [0.0, 0.0])[last] += size
    return tuple(
        (int(block.rpartition(".")[2]) + double * block.startswith("single"), block, inner, last)
        for block, (inner, last) in found.items()
    )


def _modulated(names: Collection[str]) -> tuple[bool, frozenset[str]]:
    """Whether all modulations' gradients are asked for, and the blocks of which they are."""
    whole = any(name.startswith("time_text_embed.") for name in names)
    own = {".".join(name.split(".")[:2]) for name in names if "norm" in name and _MODULATION.search(name)}
    return whole, frozenset(own)


def costs(
    config: TrainConfig, spec: FluxSpec, trained: Mapping[str, tuple[int, ...]], *, fused: bool = False
) -> Callable[[int, int], float]:
    """`step_flops` of image and text tokens, reckoned once for each size: a step has no milliseconds for it."""
    return functools.cache(lambda image, text: step_flops(config, spec, trained, image, text, fused=fused))


class Rates(NamedTuple):
    """What a run does at present."""

    seconds: float
    """A step's, the median."""
    samples: float
    """Images a second, of all ranks together."""
    tflops: float
    """TFLOP/s of this rank's card."""
    waiting: float
    """Share of a step's time in which there was no batch to train on."""


class _Step(NamedTuple):
    seconds: float
    images: int
    flops: float
    waited: float


class Window:
    """The newest steps, and the rates over them together: images of different sizes cost different steps."""

    def __init__(self, size: int = 100) -> None:
        self._steps: deque[_Step] = deque(maxlen=size)

    def add(self, seconds: float, images: int, flops: float, waited: float) -> dict[str, float]:
        """One step: images of all ranks, FLOPs and seconds without a batch of this one. Returns the step's own line."""
        step = _Step(max(seconds, 1e-9), images, flops, waited)
        self._steps.append(step)
        return {"seconds": seconds, **_line([step])}

    def clear(self) -> None:
        self._steps.clear()

    def line(self) -> dict[str, float]:
        """samples_per_second, tflops and data_wait over the window; noughts before the first step."""
        return _line(list(self._steps))


def _line(steps: list[_Step]) -> dict[str, float]:
    seconds = sum(step.seconds for step in steps) or math.inf
    return {
        "samples_per_second": sum(step.images for step in steps) / seconds,
        "tflops": sum(step.flops for step in steps) / seconds / 1e12,
        "data_wait": sum(step.waited for step in steps) / seconds,
    }
