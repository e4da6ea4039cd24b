"""The bill's terms where this trainer's own blocks compute: what each keeps and needs. Torch-free.

U is one (tokens, hidden) tensor in the format of the products: 27 MiB at 1024 px in bf16. The counts are those of
`blocks`: what a block keeps between the passes, what it makes again, and the most that its backward pass holds at once.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from xflux_trainer.config import TrainConfig
from xflux_trainer.kept import kept_by
from xflux_trainer.memory_diffusers import Norms, beside_controlnet, saved_per_block
from xflux_trainer.memory_passes import Passed, gradients_so_far, parameters_by_block
from xflux_trainer.memory_terms import CUBLAS, Part, Term, dense, moments, part, width
from xflux_trainer.savings import KINDS, is_modulation, streamed_blocks
from xflux_trainer.settings import altered
from xflux_trainer.spec import FluxSpec, image_tokens
from xflux_trainer.trained import Trained, controlnet, trained

_T = TypeVar("_T")
STREAMS = 3
"""Of a recording: the one that it is launched from, its own, and the one beside it."""
DOUBLE, SINGLE = KINDS
ALIGNED, BURST = 8, 32
"""As in `extended`, which imports torch."""
_QKV, _TEXT_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_GROUPS: dict[str, tuple[tuple[tuple[str, ...], bool], ...]] = {
    SINGLE: (((*_QKV, "proj_mlp"), True), (("proj_out",), True)),
    DOUBLE: (
        (_TEXT_QKV, True), (_QKV, True), (("attn.to_add_out",), False), (("attn.to_out.0",), False),
        (("ff_context.net.0.proj",), True), (("ff.net.0.proj",), True),
        (("ff_context.net.2",), True), (("ff.net.2",), True),
    ),
}  # fmt: skip
"""The layers of one input, as `blocks` groups them, and whether that is written with room for the narrow products."""


def computes(config: TrainConfig, strategy: str, device: str, *, triton: bool = True) -> bool:
    """Whether this trainer's blocks compute and not diffusers', as `fast` decides; `triton`: whether it works there."""
    if config.kernels == "diffusers" or strategy in ("zero3", "fsdp"):
        return False
    return config.kernels == "fused" or (device == "cuda" and config.mixed_precision != "no" and triton)


def records(config: TrainConfig, strategy: str, device: str) -> bool:
    """Whether steps of these blocks are recorded, as `graphs.recorder` decides."""
    if not config.cuda_graphs or device != "cuda" or config.stream_blocks or config.modulation == "stream":
        return False
    plain = config.mode == "lora" and config.mixed_precision == "bf16" and not config.step_in_backward
    return plain and strategy in ("single", "ddp")


def checkpointed(config: TrainConfig, spec: FluxSpec) -> int:
    """How many blocks, the first ones, keep their input alone."""
    if not config.gradient_checkpointing:
        return 0
    count = spec.double_blocks + spec.single_blocks
    return count if config.checkpointed_blocks is None else min(count, config.checkpointed_blocks)


def copies(config: TrainConfig, spec: FluxSpec, *, apart: bool) -> Iterator[Term]:
    """What stands beside the trained weights for these blocks' sake. `apart`: several passes of a step are recorded."""
    what = trained(config, spec)
    inside = _inside(what, config.rank)
    if what.adapters:
        yield Term("adapters' copies", what.parameters * width(config), "train", "in the format of the products")
    if inside and config.quantization == "none":
        beside = _beside(what, spec, config.rank, config.stream_blocks) * width(config)
        yield Term("adapters beside weights", beside, "train", "in one matrix with them, filled up with zeros")
    if inside and apart:
        yield Term("gradients of one pass", inside * 4, "train", "fp32: a recorded pass writes them to their own place")


@functools.lru_cache(maxsize=64)
def _inside(what: Trained, rank: int) -> int:
    """Parameters of the adapters that the blocks' own products take."""
    return sum(one.parameters(rank) for one in what.adapters if not is_modulation(one.name))


def _beside(what: Trained, spec: FluxSpec, rank: int, stream_blocks: int) -> int:
    """Elements by which a group's matrix of weights and adapters (`extended`) is larger than the weights and the
    narrow factors that lie in it."""
    every = _beside_each(what, spec, rank)
    streamed = streamed_blocks(spec.double_blocks, spec.single_blocks, stream_blocks)
    return sum(every.values()) - sum(every[block] for block in streamed)


@functools.lru_cache(maxsize=16)
def _beside_each(what: Trained, spec: FluxSpec, rank: int) -> dict[str, int]:
    """The same of each block."""
    sizes = {linear.name: (linear.inputs, linear.outputs) for linear in spec.linears()}
    counts: dict[str, int] = {}
    """Adapters by the layer that they begin at."""
    for adapter in what.adapters:
        counts[adapter.layers[0]] = counts.get(adapter.layers[0], 0) + 1
    found = {}
    for kind, blocks in ((DOUBLE, spec.double_blocks), (SINGLE, spec.single_blocks)):
        for block in (f"{kind}.{index}" for index in range(blocks)):
            total = 0
            for layers, beside in _GROUPS[kind]:
                names = [f"{block}.{layer}" for layer in layers]
                depth = sum(counts.get(name, 0) for name in names) * rank
                if depth:
                    inputs, height = sizes[names[0]][0], sum(sizes[name][1] for name in names)
                    extra = -(-depth // ALIGNED) * ALIGNED
                    pitch = -(-(inputs + extra * beside) // BURST) * BURST
                    total += (height + extra) * pitch - (height + depth) * inputs
            found[block] = total
    return found


def gradients_at_once(config: TrainConfig, spec: FluxSpec) -> int:
    """Most parameters whose gradients are there before the first is stepped: a block's come together."""
    blocks = [size for name, size in parameters_by_block(config, spec, modulation=False).items() if name]
    return max([trained(config, spec).largest, *blocks])


def activations(
    config: TrainConfig, spec: FluxSpec, *, growing: int = 0, recorded: bool = False, norms: Norms = "fused"
) -> Iterator[Term]:
    """What lies there when a step needs most, at the largest size that is trained on: while one block goes backward.

    `growing`: bytes of a parameter's gradient that is made in the backward pass, 0 where its place is there before.
    """
    for one in (*moving(config, spec, growing, norms), *still(config, spec, recorded)):
        yield from one.terms


def moving(config: TrainConfig, spec: FluxSpec, growing: int, norms: Norms) -> tuple[Part, ...]:
    """Those that come and go with the passes."""
    beside = (_controlnet(config, spec, norms),) if config.mode == "controlnet" else ()
    return (_through_blocks(config, spec, growing), *beside)


def still(config: TrainConfig, spec: FluxSpec, recorded: bool) -> tuple[Part, ...]:
    """Those that are there at the end of a step too."""
    return _products(config, spec, recorded), _ends(config, spec)


def _kept_by_products(*settings: str) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """`kept_by` those; where products are in fp8 by how weights are held as well, which changes nothing of what passes
    where they are multiplied in 16 bits."""

    def keep(function: Callable[..., _T]) -> Callable[..., _T]:
        usual, fp8 = kept_by(*settings)(function), kept_by(*settings, "quantization", "stream_blocks")(function)

        @functools.wraps(function)
        def found(config: TrainConfig, *values: Any) -> _T:
            return (fp8 if config.quantization == "fp8-dynamic" else usual)(config, *values)

        return found

    return keep


@_kept_by_products(
    "img_size", "train_batch_size", "gradient_checkpointing", "checkpointed_blocks", "step_in_backward",
    "backward_clip", "optimizer",
)  # fmt: skip
def _through_blocks(config: TrainConfig, spec: FluxSpec, growing: int) -> Part:
    return part(_passing(config, spec, growing))


def _passing(config: TrainConfig, spec: FluxSpec, growing: int) -> Iterator[Term]:
    tokens = _tokens(config)
    shape = f"{config.train_batch_size} x {tokens} tokens"
    blocks, turning = _blocks(config, spec, tokens, growing)
    if not blocks:
        return
    number, last, needed = _fullest(config, spec, blocks, turning, _images(config, spec))
    there = blocks[: last + 1]
    inputs = [block.kept for block in there if block.checkpointed]
    whole = [block.kept for block in there if not block.checkpointed]
    if inputs:
        why = f"{len(inputs)} checkpointed blocks, {shape} each"
        yield Term("block inputs", sum(inputs), "train", why, passing=True)
    if whole:
        why = f"{len(whole)} blocks keep inputs, q, k, v, attention's output and the MLP's input, {shape}"
        yield Term("activations", sum(whole), "train", why, passing=True)
    again = "what it computes again, " if blocks[number].checkpointed else ""
    why = f"{again}the gradients on their way, and those that attention sums up in fp32"
    yield Term("one block's backward pass", needed, "train", why, passing=True)
    yield from gradients_so_far(blocks, number)


def _tokens(config: TrainConfig) -> int:
    side = max(config.sizes)
    return image_tokens(side, side) + config.max_text_tokens


def _unit(config: TrainConfig, spec: FluxSpec) -> int:
    return config.train_batch_size * _tokens(config) * spec.hidden * width(config)


def _images(config: TrainConfig, spec: FluxSpec) -> int:
    """U of the images' tokens."""
    tokens = _tokens(config)
    return _unit(config, spec) // tokens * (tokens - config.max_text_tokens)


@kept_by("img_size", "train_batch_size")
def _ends(config: TrainConfig, spec: FluxSpec) -> Part:
    """Before the first block and behind the last one."""
    size = width(config)
    tokens = _tokens(config)
    own = config.train_batch_size * (tokens * spec.in_channels * 12 + config.max_text_tokens * spec.text_dim * size)
    return part([Term("inputs and loss", own, "train", "latents, noise and prediction in fp32, and the captions")])


def _fullest(
    config: TrainConfig, spec: FluxSpec, blocks: Sequence[Passed], number: int, unit: int
) -> tuple[int, int, int]:  # fmt: skip
    """The block in whose backward pass most is there, the last one that still keeps something then, and the bytes that
    the pass needs beside. `number`: that block where nothing is clipped; `unit`: U of the images' tokens.

    Clipping exactly in the backward pass takes two of them, and nothing is let go in the first, not even what is behind
    the blocks. Where the norm of the step before is used, that is the first step, which finds no optimizer's moments.
    """
    needed = blocks[number].needed
    if not _norm_in_backward(config):
        return number, number, needed
    what = trained(config, spec)
    largest = max(range(len(blocks)), key=lambda each: blocks[each].needed)
    # The last norm's input, and what it is multiplied with where the factor is trained; the last layer's input.
    behind = unit * (1 + ("norm_out.linear" in what.layers) + ("proj_out" in what.layers))
    absent = 0.0 if config.backward_clip == "exact" else moments(config) * what.parameters
    first = blocks[largest].needed + behind - int(absent)
    more = sum(block.kept for block in blocks[number + 1 :])
    return (largest, len(blocks) - 1, first) if first + more > needed else (number, number, needed)


def _norm_in_backward(config: TrainConfig) -> bool:
    """Whether weights are stepped in the backward pass, by the norm of all gradients."""
    return config.step_in_backward and config.max_grad_norm > 0 and config.backward_clip != "tensor"


@kept_by("img_size", "train_batch_size", "gradient_checkpointing")
def _controlnet(config: TrainConfig, spec: FluxSpec, norms: Norms) -> Part:
    """Its own blocks are diffusers', and go backward when the base's have."""
    unit = _unit(config, spec)
    net, every = controlnet(config.controlnet_depth, spec)
    saved = saved_per_block(config, net, every, _tokens(config), norms)
    kept = len(saved) * unit if config.gradient_checkpointing else sum(saved)
    why = f"its {len(saved)} blocks are diffusers' own"
    own = Term("ControlNet's activations", kept, "train", why, passing=True)
    return part([own, *beside_controlnet(config, unit)])


@kept_by("quantization", "modulation", "stream_blocks")
def _products(config: TrainConfig, spec: FluxSpec, recorded: bool) -> Part:
    """What matrix products need beside their operands."""
    streams = STREAMS if recorded else 1
    found = [Term("cuBLAS", 2 * CUBLAS * streams, "train", f"its workspaces, and cuBLASLt's, of {streams} streams")]
    if config.quantization == "fp8-dynamic":
        largest = (3 * spec.hidden + spec.mlp) * spec.hidden
        found.append(Term("a weight transposed", largest, "train", "as fp8 products want it in the backward pass"))
    if config.quantization != "fp8-dynamic" or config.stream_blocks:
        found += dense(config, spec)
    return part(found)


class Curve:
    """Bytes that come and go with the passes, by how many blocks compute again: the more, the fewer bytes, but for the
    last block. A plan's search goes along it for hundreds of ways to hold the same blocks' weights."""

    def __init__(self, config: TrainConfig, spec: FluxSpec, growing: int, norms: Norms) -> None:
        self._config, self._spec = config, spec
        self._ways = _ways(config, spec, _tokens(config), growing)
        self._before = _before(spec, self._ways)
        self._beside = (0, 0)
        """Bytes of a ControlNet where none computes again, and where some do."""
        if config.mode == "controlnet":
            kinds = (altered(config, gradient_checkpointing=again) for again in (False, True))
            self._beside = tuple(sum(_controlnet(kind, spec, norms).sizes) for kind in kinds)
        self._known: dict[int, int] = {}

    def __call__(self, count: int) -> int:
        found = self._known.get(count)
        if found is None:
            again = min(max(0, count - self._before), len(self._ways.whole))
            found = self._known[count] = self._through(again) + self._beside[count > 0]
        return found

    def _through(self, again: int) -> int:
        ways, config = self._ways, self._config
        if not ways.whole or not _norm_in_backward(config):
            return ways.most(again)
        blocks, turning = _mixed(ways, again)
        number, last, needed = _fullest(config, self._spec, blocks, turning, _images(config, self._spec))
        kept, gradients = (block.kept for block in blocks[: last + 1]), (block.grads for block in blocks[number:])
        return sum(kept) + needed + sum(gradients)


@_kept_by_products("img_size", "train_batch_size", "step_in_backward", "backward_clip", "optimizer")
def curve(config: TrainConfig, spec: FluxSpec, growing: int, norms: Norms) -> Curve:
    return Curve(config, spec, growing, norms)


class _Ways:
    """Of each block, from the first one that a gradient passes through, what it takes either way. Equal is only itself,
    so that what follows from one is quickly found."""

    def __init__(self, whole: Sequence[Passed], inputs: Sequence[Passed]) -> None:
        self.whole = whole
        """Where it keeps what it needs."""
        self.inputs = inputs
        """Where it keeps its inputs alone."""
        # What `memory_passes.turn` adds up, once for all numbers of blocks that are computed again.
        grads = [one.grads for one in whole]
        left = list(itertools.accumulate(grads, operator.sub, initial=sum(grads)))
        self._kept: list[list[int]] = []
        """What the first blocks keep, by how many, where all keep what they need; and where they keep their inputs."""
        self._there: list[list[int]] = []
        """Of each block what is there in its backward pass, either way."""
        for some in (whole, inputs):
            kept = list(itertools.accumulate([one.kept for one in some], initial=0))
            there = map(operator.add, kept[1:], [one.needed for one in some])
            self._kept.append(kept)
            self._there.append(list(map(operator.add, there, left)))
        self._later = [*itertools.accumulate(reversed(self._there[0]), max)][::-1]
        self._first = [*itertools.accumulate(self._there[1], max)]
        """The most from each block on where they keep what they need, and up to each where they keep their inputs."""

    def most(self, again: int) -> int:
        """The most that is there in a block's backward pass where the first so many are computed again, in bytes."""
        return max(self._either(again))

    def turn(self, again: int) -> int:
        """`memory_passes.turn` of the same."""
        first, later = self._either(again)
        if not self.whole:
            return 0
        if again and first >= later:
            return self._there[1].index(first)
        return self._there[0].index(self._later[again], again)

    def _either(self, again: int) -> tuple[int, int]:
        """The most among those, and among the others."""
        kept = self._kept[1][again] - self._kept[0][again]
        later = self._later[again] + kept if again < len(self.whole) else 0
        return self._first[again - 1] if again else 0, later


def _before(spec: FluxSpec, ways: _Ways) -> int:
    """Blocks before the first one that a gradient passes through: they keep nothing, computed again or not."""
    return spec.double_blocks + spec.single_blocks - len(ways.whole)


def _blocks(config: TrainConfig, spec: FluxSpec, tokens: int, growing: int = 0) -> tuple[Sequence[Passed], int]:
    """The blocks from the first one that a gradient passes through, and in whose backward pass most is there."""
    ways = _ways(config, spec, tokens, growing)
    return _mixed(ways, max(0, checkpointed(config, spec) - _before(spec, ways)))


@functools.lru_cache(maxsize=1024)
def _mixed(ways: _Ways, again: int) -> tuple[Sequence[Passed], int]:
    """The blocks where the first so many are computed again, and in whose backward pass most is there. Kept: a plan's
    search asks for the same ones, whose weights are held in other ways."""
    return [*ways.inputs[:again], *ways.whole[again:]], ways.turn(again)


@_kept_by_products("train_batch_size")
def _ways(config: TrainConfig, spec: FluxSpec, tokens: int, growing: int) -> _Ways:
    what = trained(config, spec)
    rows = config.train_batch_size * tokens
    unit = rows * spec.hidden * width(config)
    lse = rows * spec.heads * 4
    dynamic, weights, wide = config.quantization == "fp8-dynamic", config.mode == "finetune", 4 / width(config)
    streamed = frozenset(streamed_blocks(spec.double_blocks, spec.single_blocks, config.stream_blocks))
    time, kinds, blocks = _by_block(what, spec)
    named = list(blocks.items())
    if not time and config.mode != "controlnet" and what.layers.isdisjoint(("x_embedder", "context_embedder")):
        first = next((place for place, (_, number) in enumerate(named) if kinds[number].own), len(named))
        named = named[first:]
    sizes = parameters_by_block(config, spec) if growing else {}

    def either(number: int, fp8: bool, grads: int) -> tuple[Passed, Passed]:
        single, own, adapters = kinds[number]
        shape = _Shape(own, weights, time or any(map(is_modulation, own)), fp8, wide)
        # Half of a double block's adapters see the text alone, the others the image.
        low = adapters * rows * config.rank * width(config) // (1 if single else 2)
        units = shape.single if single else shape.double
        kept, made, needed = units(again=False)
        whole = Passed(int((kept + made) * unit) + lse + low, int(needed * unit), checkpointed=False, grads=grads)
        kept, made, needed = units(again=True)
        more = int((made + needed) * unit) + lse + low
        return whole, Passed(int(kept * unit), more, checkpointed=True, grads=grads)

    keys = [(number, dynamic and name not in streamed, sizes.get(name, 0) * growing) for name, number in named]
    known = {key: either(*key) for key in dict.fromkeys(keys)}  # most blocks are alike
    return _Ways([known[key][0] for key in keys], [known[key][1] for key in keys])


class _Kind(NamedTuple):
    """Blocks that are alike in what is trained of them."""

    single: bool
    own: frozenset[str]
    """Layers that are trained, or have adapters."""
    adapters: int


@functools.lru_cache(maxsize=16)
def _by_block(what: Trained, spec: FluxSpec) -> tuple[bool, list[_Kind], dict[str, int]]:
    """Whether the time's embedding is trained; the kinds of blocks, and of each block by its name which it is."""
    names = [f"{DOUBLE}.{k}" for k in range(spec.double_blocks)] + [f"{SINGLE}.{k}" for k in range(spec.single_blocks)]
    layers: dict[str, set[str]] = {name: set() for name in names}
    for name in what.layers:
        if (block := _block(name)) in layers:
            layers[block].add(name[len(block) + 1 :])
    adapters = dict.fromkeys(names, 0)
    for adapter in what.adapters:
        # Those of a modulation see one row for each image.
        if (block := _block(adapter.name)) in adapters and not is_modulation(adapter.name):
            adapters[block] += 1
    time = any(name.startswith("time_text_embed.") for name in what.layers)
    kinds: dict[_Kind, int] = {}
    blocks = {
        name: kinds.setdefault(_Kind(name.startswith(SINGLE), frozenset(layers[name]), adapters[name]), len(kinds))
        for name in names
    }
    return time, list(kinds), blocks


class _Shape(NamedTuple):
    """What decides on a block's memory; its counts of U."""

    own: frozenset[str]
    """Layers that are trained, or have adapters."""
    weights: bool
    """Their weights are trained, not adapters."""
    gates: bool
    """The modulation gets a gradient, so what a gate multiplies is kept."""
    fp8: bool
    """Products are in fp8."""
    wide: float
    """fp32 as against the format of the products."""

    def single(self, *, again: bool) -> tuple[float, float, float]:
        """U of its input, of what it makes beside (kept, or made again), and of the most that it needs backward."""
        made = 8.0 + self.gates  # q, k, v; h; o; y
        # What attention is given and gives: q and k ready for it, dq and dk, and its sums in fp32.
        attention = 4 + self.wide
        if self.fp8:
            mlp = 7 * ("proj_mlp" in self.own)  # the gradient in 16 bits too, where an adapter reads it
            aside = 0 if again else 3  # the gradient of q, k and v: in their own place, or in one of its own
            return 1, made, 1 + 5 + max(attention + (aside or 1), aside + 3.5 + mlp)
        # dv waits aside where v's own place takes it; else the gradient of [q k v h] has a place of its own.
        back = 5 + attention + (1 if again else 7)
        if self.weights and "proj_out" in self.own:
            back = max(back, 1 + 5 + 5 + 2 * again)  # dy, its product, [o | GELU(h)], q and k where they wait
        return 1, made, 1 + back

    def double(self, *, again: bool) -> tuple[float, float, float]:
        """As `single`'s."""
        made = 9.0 + 2 * self.gates  # q, k, v; o; the tokens after attention; h; y, z
        attention = 4 + self.wide
        back = attention + (1 if again else 3)
        # dz, dh, and GELU(h) for the last layer's own gradients: weights' when dh is there, adapters' before.
        down = bool(self.own & {"ff.net.2", "ff_context.net.2"})
        mlp = 1 + 4 + 4 * (down and self.weights) + 2.0 * again
        if self.fp8:
            mlp += 2 + 4 * bool(self.own & {"ff.net.0.proj", "ff_context.net.0.proj"})
        return 1, made, 2 + max(back, mlp)


def _block(name: str) -> str:
    return ".".join(name.split(".")[:2])
