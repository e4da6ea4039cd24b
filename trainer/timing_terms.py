"""What one forward and backward pass costs the device: products, attention, bytes through its memory. Torch-free.

Fitted are, of each kind of block, the time of its kernels' starts and the number of its launches, U of diffusers'
blocks and of fp8, and the bytes of each library's quantised weights. The rest is counted in the code. `timing` sums it
up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from xflux_trainer import memory_fused
from xflux_trainer.config import TrainConfig
from xflux_trainer.kept import kept_by
from xflux_trainer.memory_terms import width
from xflux_trainer.savings import is_modulation, leaving, units
from xflux_trainer.settings import altered
from xflux_trainer.spec import FluxSpec, image_tokens
from xflux_trainer.speed import Matrices, flops_of, matrices, tokens_of
from xflux_trainer.timing_cards import Card
from xflux_trainer.trained import Trained, controlnet, trained


class _Blocks(NamedTuple):
    """What a block costs beside its products and its attention; U is one (tokens, hidden) tensor."""

    forward: float
    """U read or written in the forward pass."""
    backward: float
    again: float
    """U when a checkpointed block computes again what its backward pass reads."""
    starts: float
    """Seconds a block and step in which kernels start and run out, whatever the image's size; half as many again where
    it is recomputed."""
    launches: tuple[int, int, int]
    """Kernels of the forward and the backward pass, and of computing again."""


FUSED = _Blocks(17, 39, 11, 0.27e-3, (40, 70, 39))
"""Counted in `blocks`: modulate 2, norm and rotation 4, GELU 8, gate 3; their gradients and what is never kept 39."""
DIFFUSERS = _Blocks(130, 170, 130, 0.27e-3, (70, 105, 70))
"""U are fitted, for both directions together: each operation is a kernel of its own, and some compute in fp32."""
FP8 = 10
"""U more where products are in fp8: rows are read once more for their scales."""
DEQUANTISED = {
    "int8": 17, "fp8": 23, "torchao-int8": 25, "torchao-fp8": 25, "int4": 34, "nf4": 23, "fp8-dynamic": 3,
}  # fmt: skip
"""Bytes moved for a number each time that it is made dense: fitted to each library's chain of kernels, torchao-int8
taken for as slow as torchao-fp8; fp8-dynamic reads one byte and writes two."""
ARRIVES, ARRIVES_FP8, TURNS, MAKES_DENSE = 75, 125, 20, 26
"""Launches more in each step, and what the host does for them: for a streamed block, for one of fp8-dynamic, whose
weights are made dense as well, for a block whose modulation alone is streamed, and for one whose quantised weights are
made dense."""
TURNED = 2
"""Bytes moved for a number of fp8-dynamic's weights, which are transposed for the backward pass."""


class Job:
    """What of a run its time depends on, looked up once."""

    def __init__(
        self, config: TrainConfig, spec: FluxSpec, card: Card, strategy: str, *, triton: bool, flash4: bool
    ) -> None:
        self.config, self.spec, self.card, self.strategy = config, spec, card, strategy
        self.fused = memory_fused.computes(config, strategy, "cuda", triton=triton)
        self.recorded = self.fused and memory_fused.records(config, strategy, "cuda")
        self.what = trained(config, spec)
        self.kinds = _kinds(config, spec, self.fused)
        """The cost of a block, how many of them there are, and how many are computed again."""
        _, self.blocks, self.again = self.kinds[0]
        self.backend = _backend(config, card, fused=self.fused, flash4=flash4)
        self.memory, self.attention = card.memory * 1e9, card.attention[self.backend] * 1e12
        """Bytes and FLOPs a second."""
        lies = config.quantization, config.modulation, config.stream_blocks
        self.held = _held(*lies, width(config), spec, self.fused)
        self.matrices = _matrices(spec)
        """Numbers in the blocks' weights: those of the products, and the modulation's."""

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of what is trained."""
        return shapes(self.config, self.spec, self.what)


class _Held(NamedTuple):
    """What follows for a step from how the base's weights are held."""

    fp8: float
    """Share of the blocks whose products are in fp8."""
    more: float
    """U more of all blocks for that, in both directions."""
    dense: float
    """Bytes moved to make one number of a product's weight dense."""
    modulation: float
    """Bytes moved for one number of the modulation in the forward pass."""
    arriving: tuple[int, int]
    """Bytes that cross the link in the forward and in the backward pass: the modulation comes once."""
    launches: int
    """Those of a step beside the blocks' own kernels."""


@functools.lru_cache(maxsize=1024)
def _held(quantization: str, modulation: str, stream_blocks: int, each: int, spec: FluxSpec, fused: bool) -> _Held:
    """`each`: bytes of a number of the computation."""
    blocks, dynamic = spec.double_blocks + spec.single_blocks, quantization == "fp8-dynamic"
    streamed = min(stream_blocks, blocks) / blocks
    fp8, more, dense = 0.0, 0.0, float(DEQUANTISED.get(quantization, 0))
    if dynamic:  # what arrives is made dense, and multiplied in 16 bits
        fp8, more, dense = 1 - streamed, FP8 * blocks * (1 - streamed), dense * streamed
    turned: float = each
    if quantization != "none" and modulation == "quantize":
        turned = 1 if dynamic else DEQUANTISED[quantization]  # fp8's few rows are multiplied as the weight lies
    come = round(streamed * blocks)
    count = come * (ARRIVES_FP8 if dynamic else ARRIVES)
    count += (blocks - come) * TURNS * (modulation == "stream")
    if fused and quantization != "none" and not dynamic:  # diffusers' products do it in fewer
        count += blocks * MAKES_DENSE
    arrives = _arriving(quantization, modulation, stream_blocks, spec, each)
    return _Held(fp8, more, dense, turned, arrives, count)


@functools.lru_cache(maxsize=16)
def _matrices(spec: FluxSpec) -> tuple[int, int]:
    sizes = [
        (is_modulation(linear.name), count * linear.inputs * linear.outputs)
        for _, count, layers in spec.kinds()
        for linear in layers
    ]
    return sum(n for mod, n in sizes if not mod), sum(n for mod, n in sizes if mod)


def _kinds(config: TrainConfig, spec: FluxSpec, fused: bool) -> tuple[tuple[_Blocks, int, int], ...]:
    """The base's blocks and a ControlNet's."""
    blocks, own = spec.double_blocks + spec.single_blocks, config.controlnet_depth * (config.mode == "controlnet")
    every, own_again = (blocks, own) if config.gradient_checkpointing else (0, 0)
    again = memory_fused.checkpointed(config, spec) if fused else every
    return (FUSED if fused else DIFFUSERS, blocks, again), (DIFFUSERS, own, own_again)


def shapes(config: TrainConfig, spec: FluxSpec, what: Trained) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what is trained, by the names that `speed` knows."""
    if config.mode == "lora":
        return _sides(what, config.rank)
    if config.mode == "controlnet":
        net, every = controlnet(config.controlnet_depth, spec)
        return _weights(every, net)
    return _weights(what, spec)


@functools.lru_cache(maxsize=16)
def _weights(what: Trained, spec: FluxSpec) -> Mapping[str, tuple[int, ...]]:
    layers = (one for one in spec.linears() if one.name in what.layers)
    return MappingProxyType({f"{one.name}.weight": (one.outputs, one.inputs) for one in layers})


@functools.lru_cache(maxsize=16)
def _sides(what: Trained, rank: int) -> Mapping[str, tuple[int, ...]]:
    sides = {f"{one.name}.lora_A.weight": (rank, one.inputs) for one in what.adapters}
    return MappingProxyType(sides | {f"{one.name}.lora_B.weight": (one.outputs, rank) for one in what.adapters})


def _backend(config: TrainConfig, card: Card, *, fused: bool, flash4: bool) -> str:
    """The attention that computes, as `attention.choose` decides."""
    if not fused or config.deterministic:
        return "flash"
    if config.attention == "cudnn" and "cudnn" in card.attention:
        return "cudnn"
    wanted = config.attention in ("auto", "flash-attn-4")
    return "flash-attn-4" if flash4 and wanted and "flash-attn-4" in card.attention else "flash"


WHY = {
    "products": "matrix products in 16 bits, at {bf16:.0f} TFLOP/s",
    "products in fp8": "matrix products of frozen weights, at {fp8:.0f} TFLOP/s",
    "attention": "forward, and 2.5 times as much backward, by {backend} at {attention:.0f} TFLOP/s",
    "recomputing": "products and attention of {again} checkpointed blocks, and what lies between, a second time",
    "elementwise": "norms, modulation, rotation, GELU and gates, at {memory:.0f} GB/s",
    "adapters": "each reads its layer's input, and in the backward pass twice that and the gradient of its output",
    "modulation": "the weights of shift, scale and gate are read whole for each batch",
    "dense weights": "quantised weights are made dense, or turned, for each product",
    "kernels' starts": "each kernel fills and empties the card, whatever the image's size",
}


def words(job: Job) -> dict[str, float | str]:
    card = job.card
    return {"bf16": card.bf16, "fp8": card.fp8 or 0.0, "backend": job.backend, "again": job.again,
            "attention": card.attention[job.backend], "memory": card.memory}  # fmt: skip


class Work(NamedTuple):
    """What one batch of one size asks for: FLOPs as (products, attention), and bytes."""

    forward: tuple[float, float]
    backward: tuple[float, float]
    again: tuple[float, float]
    unit: int
    """Bytes of one (batch, tokens, hidden) tensor."""
    low: int
    """Bytes of all adapters' inputs."""
    high: int
    """Bytes of their outputs."""
    units: tuple[float, float]
    """U read or written between products, in the forward and in the backward pass."""
    starts: float
    """Seconds in which kernels start and run out."""


def work(job: Job, side: int) -> Work:
    """`speed.step_flops` split up, and the sizes of what is moved, for images of `side` pixels squared."""
    batch = job.config.train_batch_size
    ahead, behind, again, unit, low, high, units, starts = _work(job.config, job.spec, job.fused, side)
    return Work(
        (batch * ahead[0], batch * ahead[1]), (batch * behind[0], batch * behind[1]),
        (batch * again[0], batch * again[1]), batch * unit, batch * low, batch * high, units, starts,
    )  # fmt: skip


@kept_by("gradient_checkpointing", "checkpointed_blocks")
def _work(config: TrainConfig, spec: FluxSpec, fused: bool, side: int) -> Work:
    """That of one image. Of a plan's many ways to hold the same work one is enough."""
    what, kinds = trained(config, spec), _kinds(config, spec, fused)
    image, text = image_tokens(side, side), config.max_text_tokens
    one = 4.0 * (image + text) ** 2 * spec.hidden
    attention = sum(n for _, n, _ in kinds) * one
    again = sum(n for _, _, n in kinds) * one
    once = whole = _flops(altered(config, gradient_checkpointing=False), spec, image, text, fused)
    if again:
        whole = _flops(config, spec, image, text, fused)
    ahead = spec.forward_flops(image, text) - kinds[0][1] * one
    low, high = _beside(what, image, text)
    return Work(
        (ahead, attention),
        (once - ahead - 3.5 * attention, 2.5 * attention),
        (whole - once - again, again),
        (image + text) * spec.hidden * width(config),
        width(config) * low,
        width(config) * high,
        (sum(n * kind.forward for kind, n, _ in kinds), sum(n * kind.backward for kind, n, _ in kinds)),
        sum(n * kind.starts for kind, n, _ in kinds),
    )


@functools.lru_cache(maxsize=64)
def _beside(what: Trained, image: int, text: int) -> tuple[int, int]:
    """Numbers that go into all adapters for one image, and that come out."""
    rows = [(tokens_of(adapter.name, image, text), adapter) for adapter in what.adapters]
    return sum(count * one.inputs for count, one in rows), sum(count * one.outputs for count, one in rows)


@kept_by("gradient_checkpointing", "checkpointed_blocks")
def _flops(config: TrainConfig, spec: FluxSpec, image: int, text: int, fused: bool) -> float:
    return flops_of(config, spec, _asked(config, spec, image, text), image, text, fused=fused)


@kept_by()
def _asked(config: TrainConfig, spec: FluxSpec, image: int, text: int) -> Matrices:
    return matrices(shapes(config, spec, trained(config, spec)), image, text)


def forward(job: Job, asked: Work) -> tuple[float, ...]:
    """Seconds of the device in the forward pass, in the order of `WHY`."""
    memory, held = job.memory, job.held
    linear, attention = asked.forward
    products, modulation = job.matrices
    return (
        *_products(job, linear),
        attention / job.attention,
        0.0,
        asked.unit * (asked.units[0] + 0.4 * held.more) / memory,
        asked.low / memory,
        modulation * held.modulation / memory,
        products * held.dense / memory,
        asked.starts / 3,
    )


def backward(job: Job, asked: Work) -> tuple[float, ...]:
    """The same of the backward pass, with what is recomputed in it."""
    config, memory, unit, held = job.config, job.memory, asked.unit, job.held
    linear, attention = asked.backward
    linear_again, attention_again = asked.again
    products, modulation = job.matrices
    share = job.again / job.blocks
    again = sum(_products(job, linear_again)) + attention_again / job.attention
    again += (
        sum(n * (unit * kind.again / memory + kind.starts / 2) for kind, _, n in job.kinds) + share * asked.low / memory
    )
    # A fused block leaves its last products out.
    dense = (1 + share * (2 / 3 if job.fused else 1)) * products * held.dense
    turned = products * TURNED if config.quantization == "fp8-dynamic" else 0
    # diffusers' blocks make it anew. Trained, its gradient is written, and it is read for the time's.
    again_modulation = 0 if job.fused else share * held.modulation
    if config.mode == "finetune" and any(is_modulation(name) for name in job.what.layers):
        again_modulation += 2 * width(config)
    return (
        *_products(job, linear),
        attention / job.attention,
        again,
        unit * (asked.units[1] + 0.6 * held.more) / memory,
        2 * (asked.low + asked.high) / memory,  # the gradients of its two factors are sums in fp32, two passes each
        modulation * again_modulation / memory,
        (dense + turned) / memory,
        asked.starts * 2 / 3,
    )


def _products(job: Job, flops: float) -> tuple[float, float]:
    """Seconds of products, and of those of blocks whose weights are multiplied in fp8."""
    share = job.held.fp8
    fast = share * flops / ((job.card.fp8 or 1) * 1e12)
    return (1 - share) * flops / (job.card.bf16 * 1e12), fast


NONE = (0, 0)
"""Where nothing arrives."""


def _arriving(quantization: str, modulated: str, count: int, spec: FluxSpec, each: int) -> tuple[int, int]:
    if not count and modulated != "stream":
        return NONE
    gone = leaving(modulated, count, spec)
    there = back = 0
    for unit in units(quantization, modulated, spec, each):
        size = gone[unit.kind, unit.modulation] * unit.bytes
        there += size
        back += 0 if unit.modulation else size
    return there, back
