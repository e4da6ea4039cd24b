"""The bill's terms where diffusers' blocks compute: what autograd saves of each, with flash attention. Torch-free.

U is one (tokens, hidden) tensor in the format of the products: 27 MiB at 1024 px in bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

from xflux_trainer.config import TrainConfig
from xflux_trainer.memory_passes import Passed, gradients_so_far, parameters_by_block, turn
from xflux_trainer.memory_terms import CUBLAS, Term, dense, width
from xflux_trainer.savings import block_of
from xflux_trainer.spec import FluxSpec, image_tokens
from xflux_trainer.trained import Trained, controlnet, trained

SINGLE_PASSES, DOUBLE_PASSES = 10, 4
"""U of gradients at once in the backward pass of diffusers' blocks: of the output and its product with the gate, of
[attention | MLP] (5), of GELU's input (4)."""
Norms = Literal["fused", "torch", "diffusers"]
"""How diffusers' blocks norm queries and keys in 16 bits: see `norms_of`."""
NORMS: dict[Norms, tuple[int, int]] = {"fused": (0, 0), "torch": (2, 2), "diffusers": (5, 4)}
"""U that these keep in a double and in a single block, beyond what one kernel keeps: fp32 copies, and more. Counted on
torch's meta device (benchmarks/memory_meta.py)."""


def norms_of(diffusers: tuple[int, ...], torch: tuple[int, ...]) -> Norms:
    """By the releases: diffusers had a class of its own before 0.35, and torch composed its norm of others before it
    had a kernel of CUDA's for it in 2.9."""
    return "diffusers" if diffusers < (0, 35) else "torch" if torch < (2, 9) else "fused"


def activations(
    config: TrainConfig, spec: FluxSpec, *, growing: float = 0, cut: bool = False, norms: Norms = "fused"
) -> Iterator[Term]:
    """What the forward pass keeps for the backward pass, at the largest size that is trained on.

    `growing`: bytes of a parameter's gradient that is made in the backward pass, 0 where its place is there before; of
    one that is `cut` up among ranks, of a rank's part.
    """
    size = width(config)
    side = max(config.sizes)
    tokens = image_tokens(side, side) + config.max_text_tokens
    unit = config.train_batch_size * tokens * spec.hidden * size
    what = trained(config, spec)
    own = parameters_by_block(config, spec)
    saved = saved_per_block(config, spec, what, tokens, norms)
    names = [f"transformer_blocks.{k}" for k in range(spec.double_blocks)]
    names = [*names, *(f"single_transformer_blocks.{k}" for k in range(spec.single_blocks))][-len(saved) :]
    if config.mode == "controlnet":
        net, every = controlnet(config.controlnet_depth, spec)
        saved += saved_per_block(config, net, every, tokens, norms)
        names += [""] * (len(saved) - len(names))
    again = config.gradient_checkpointing
    blocks = []
    for name, kept in zip(names, saved):  # noqa: B905 (where none saves anything, [-0:] are all names)
        passes = unit * (SINGLE_PASSES if name.startswith("single_") else DOUBLE_PASSES)
        grads = round(own.get(name, 0) * growing)
        blocks.append(Passed(unit if again else kept, passes + kept * again, again, grads))
    shape = f"{config.train_batch_size} x {tokens} tokens"
    if blocks:
        number = turn(blocks)
        there = blocks[: number + 1]
        kept = sum(block.kept for block in there)
        if again:
            yield Term("block inputs", kept, "train", f"{len(there)} checkpointed blocks, {shape} each", passing=True)
            once = saved[number]
            yield Term("one block's activations", once, "train", "recomputed when its turn comes", passing=True)
        else:
            yield Term("activations", kept, "train", f"{len(there)} blocks keep theirs, {shape}", passing=True)
        passes = blocks[number].needed - again * saved[number]
        yield Term("backward's own", passes, "train", "gradients on their way through one block", passing=True)
        yield from gradients_so_far(blocks, number, cut=cut)
        if config.mode == "lora" and size == 2:
            copies = what.parameters * size
            why = "in the format of the products" + (", of one block" if again else "")
            yield Term("adapters' copies", copies // len(blocks) if again else copies, "train", why, passing=True)
    if config.mode == "controlnet":
        yield from beside_controlnet(config, unit)
    yield Term("cuBLAS", 2 * CUBLAS, "train", "its workspace, and cuBLASLt's")
    yield from dense(config, spec)
    ends = 2 * config.train_batch_size * tokens * (spec.in_channels * 12 + spec.hidden * size)
    yield Term("inputs and loss", ends, "train", "latents, noise and prediction in fp32, and the embedded tokens")


def beside_controlnet(config: TrainConfig, unit: int) -> Iterator[Term]:
    """What a ControlNet gives and is given; its blocks are diffusers' own. `unit`: U."""
    residuals = 2 * config.controlnet_depth * unit
    yield Term("residuals", residuals, "train", "the ControlNet's outputs, and their sums", passing=True)
    hint = config.train_batch_size * 16 * max(config.sizes) ** 2 * width(config) * 3
    yield Term("condition", hint, "train", "the hint block's layers at full resolution", passing=True)


def saved_per_block(
    config: TrainConfig, spec: FluxSpec, what: Trained, tokens: int, norms: Norms = "fused"
) -> list[int]:
    """Bytes that autograd saves in each block, from the first one that a gradient passes through."""
    size = width(config)
    unit = config.train_batch_size * tokens * spec.hidden * size
    # Attention keeps the log-sum-exp of every row, the two QK-norms their scales, in fp32.
    rows = 3 * config.train_batch_size * tokens * spec.heads * 4
    low_rank = config.train_batch_size * tokens * config.rank * size
    kept = _saved(what, spec, _norms(config, norms), config.mode == "controlnet")
    return [units * unit + rows + adapters * low_rank for units, adapters in kept]


@functools.lru_cache(maxsize=64)
def _saved(what: Trained, spec: FluxSpec, norms: tuple[int, int], reached: bool) -> tuple[tuple[int, int], ...]:
    """Of those blocks the U that are saved, and the number of adapters."""
    ends = ("x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1")
    reached = reached or any(name in what.layers for name in ends)
    layers, adapters = _in_blocks(what)
    kinds = (("transformer_blocks", spec.double_blocks, _double, norms[0]),
             ("single_transformer_blocks", spec.single_blocks, _single, norms[1]))  # fmt: skip
    found = []
    for kind, count, units, more in kinds:
        for index in range(count):
            own = layers.get(f"{kind}.{index}", frozenset())
            reached = reached or bool(own)
            if reached:
                found.append((units(own) + more, adapters.get(f"{kind}.{index}", 0)))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _in_blocks(what: Trained) -> tuple[dict[str, frozenset[str]], dict[str, int]]:
    """Of every block the layers that are trained, by their names in it, and how many adapters it has."""
    layers: dict[str, set[str]] = {}
    for name in what.layers:
        if block := block_of(name):
            layers.setdefault(block, set()).add(name.removeprefix(f"{block}."))
    adapters: dict[str, int] = {}
    for adapter in what.adapters:
        if block := block_of(adapter.name):
            adapters[block] = adapters.get(block, 0) + 1
    return {block: frozenset(own) for block, own in layers.items()}, adapters


def _norms(config: TrainConfig, norms: Norms) -> tuple[int, int]:
    """U of the norms of a double and a single block; what trained weights multiply is kept too."""
    if norms == "fused" or width(config) == 4:
        return 0, 0
    trained_too = 2 * (config.mode == "finetune" and not config.train_parameters)
    double, single = NORMS[norms]
    return double + trained_too, single + trained_too


def _double(own: frozenset[str]) -> int:
    """U that a double block saves: 12 for the gradient to pass through, more for each trained layer."""
    return (
        12
        + bool(own & {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")})
        + bool(own & {"ff.net.0.proj", "ff_context.net.0.proj"})
        + 4 * bool(own & {"ff.net.2", "ff_context.net.2"})
        + 4 * bool(own & {"norm1.linear", "norm1_context.linear"})
    )


def _single(own: frozenset[str]) -> int:
    """U that a single block saves: 11 for the gradient to pass through, more for each trained layer."""
    return (
        11
        + bool(own & {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"})
        + 5 * ("proj_out" in own)
        + 2 * ("norm.linear" in own)
    )
