"""The moment of a step when most is there: what blocks keep and need, and which goes backward then. Torch-free."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from xflux_trainer.config import TrainConfig
from xflux_trainer.memory_terms import GRADIENTS, Term
from xflux_trainer.savings import block_of, is_modulation
from xflux_trainer.spec import FluxSpec
from xflux_trainer.trained import Trained, trained


class Passed(NamedTuple):
    """Bytes of one block that a gradient passes through."""

    kept: int
    """Between the passes."""
    needed: int
    """In its backward pass, beside what was kept."""
    checkpointed: bool
    grads: int = 0
    """Gradients that its backward pass leaves, where they have no place before."""


def turn(blocks: Sequence[Passed]) -> int:
    """The block in whose backward pass most is there: what later ones kept is gone, and their gradients are there."""
    there = sum([block.grads for block in blocks])
    most, found = -1, 0
    for number, (kept, needed, _, grads) in enumerate(blocks):
        there += kept
        if there + needed > most:
            most, found = there + needed, number
        there -= grads
    return found


def gradients_so_far(blocks: Sequence[Passed], number: int, *, cut: bool = False) -> Iterator[Term]:
    """Those that are there in the backward pass of the block of that number. Where they are `cut` up among ranks its
    own are still on their way, and the second block of all needs more than the first: it is gathered meanwhile."""
    there = sum(block.grads for block in blocks[max(number, 1) + 1 if cut else number :])
    if there:
        yield Term(GRADIENTS, there, "train", "those that are there while most activations are", passing=True)


def grow(config: TrainConfig, strategy: str, *, recorded: bool) -> bool:
    """Whether gradients come as activations go: under DDP and in a recording their places are there all along, and so
    they are where several passes add to them."""
    if config.gradient_accumulation_steps > 1 or recorded or config.step_in_backward:
        return False
    return strategy == "single" or (strategy == "fsdp" and config.mode == "finetune")


def parameters_by_block(config: TrainConfig, spec: FluxSpec, *, modulation: bool = True) -> dict[str, int]:
    """Trained parameters of every block that has some, without those of its modulation where that is said; under ""
    those of layers outside of the blocks."""
    return _by_block(trained(config, spec), spec, config.rank, config.mode == "finetune", modulation)


@functools.lru_cache(maxsize=64)
def _by_block(what: Trained, spec: FluxSpec, rank: int, weights: bool, modulation: bool) -> dict[str, int]:
    sizes: dict[str, int] = {}
    own = [(one.name, one.parameters(rank)) for one in what.adapters]
    if weights:
        own += [(linear.name, linear.parameters) for linear in spec.linears() if linear.name in what.layers]
    for name, size in own:
        if modulation or not is_modulation(name):
            block = block_of(name)
            sizes[block] = sizes.get(block, 0) + size
    return sizes
