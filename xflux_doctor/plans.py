"""A plan's row: the job under one set of settings, what it needs of a card and how long a step takes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from xflux_trainer.config import TrainConfig, altered
from xflux_trainer.memory_terms import Term

from xflux_doctor.finding import Edit
from xflux_doctor.verdict import fitting, reserved

_LOSSY = frozenset({"quantization", "optimizer", "weight_update", "img_size"})
"""Settings that change the numbers which are computed, by the names that the config's `allow` has for them."""


def lossy_keys(changes: dict[str, Any]) -> frozenset[str]:
    """Those of the changes, by the names of `allow`. A quantised modulation is a part of its base's quantisation; with
    `backward_clip: exact` a step inside the backward pass is the step after it."""
    found = set(_LOSSY & changes.keys())
    found |= {"quantization"} if changes.get("modulation") == "quantize" else set()
    inside = changes.get("step_in_backward") and changes.get("backward_clip") != "exact"
    return frozenset(found | ({"backward_clip"} if inside else set()))


class Card(msgspec.Struct, frozen=True):
    """What one rank trains on."""

    name: str
    total: int | None
    limit: int
    """Bytes that the rank may hold of it: what is free, or the limit given."""


_CAPABILITIES = (
    (r"\bB300\b", (10, 3)), (r"\bG?B200\b", (10, 0)), (r"\bBLACKWELL\b|\b50[5-9]0\b", (12, 0)),
    (r"\bG?H(20|100|200|800)\b", (9, 0)), (r"\bL(4|40S?)\b|\bADA\b|\b40[5-9]0\b", (8, 9)),
)  # fmt: skip
"""Compute capabilities by the words of a card's name, of those that multiply fp8 (developer.nvidia.com/cuda-gpus)."""


def capability_of(name: str) -> tuple[int, int]:
    """Of a card that is not here; what is not known multiplies no fp8."""
    words = name.upper().replace("_", " ").replace("-", " ")
    return next((found for known, found in _CAPABILITIES if re.search(known, words)), (8, 0))


class Row(msgspec.Struct, frozen=True):
    """The job under one set of settings, and what a rank of it needs of its GPU at its peak."""

    label: str
    changes: dict[str, Any]
    """{setting: value} where it differs from the job's own."""
    terms: dict[str, int]
    context: int
    seconds: float | None = None
    """Of one step, where it can be foretold."""
    order: float = 0.0
    """What puts it among others where it cannot: the same by another card's times."""
    allowed: bool = True
    """Whether it may be taken without asking: what it loses is in the config's `allow`."""
    fits: bool = False
    holes: int = 0
    """Bytes that the allocator holds between weights."""
    host: int | None = None
    """Bytes of the first rank's host memory; None where they are not known."""
    lacks: int = 0
    """Bytes of the host's memory that are missing for all ranks."""
    sharing: tuple[Edit, ...] = ()
    """What makes the ranks share the work as this plan has it, where that is not as the job's file says."""

    @property
    def allocated(self) -> int:
        return sum(self.terms.values())

    @property
    def device(self) -> int:
        return self.allocated + self.reserve + self.context

    @property
    def reserve(self) -> int:
        """Bytes that the allocator keeps beyond the peak of its tensors."""
        return reserved(self.allocated, self.holes) - self.allocated

    @property
    def lossy(self) -> bool:
        return bool(lossy_keys(self.changes))

    def verdict(self, cards: tuple[Card, ...]) -> str | None:
        """Of the card that has least; None without one."""
        return fitting(self.device, min(card.limit for card in cards)) if cards else None


def at_peak(terms: Iterable[Term], phase: str) -> dict[str, int]:
    """{name: bytes} of one phase, largest first."""
    found: dict[str, int] = {}
    for term in sorted(terms, key=lambda term: -term.bytes):
        if term.phase == phase:
            found[term.name] = found.get(term.name, 0) + term.bytes
    return found


def recomputing(config: TrainConfig, count: int | None) -> TrainConfig:
    """Recomputing so many blocks; None: all."""
    if count == 0:
        return altered(config, gradient_checkpointing=False, checkpointed_blocks=None)
    return altered(config, gradient_checkpointing=True, checkpointed_blocks=count)


def describe(config: TrainConfig, own: TrainConfig, blocks: int) -> str:
    """A plan in words: the size, what is recomputed, and what is held or computed in another way than the job says."""
    count = config.checkpointed_blocks if config.checkpointed_blocks is not None else blocks
    again = f"recomputing {count} of {blocks} blocks" if count < blocks else "recomputing every block"
    sizes = f"{min(config.sizes)} to {max(config.sizes)} px" if len(config.sizes) > 1 else f"{config.img_size} px"
    words = [sizes, again if config.gradient_checkpointing and count else "keeping every activation"]
    if config.train_batch_size != own.train_batch_size:
        words.append(f"{own.train_batch_size // config.train_batch_size} passes of {config.train_batch_size} a step")
    if config.quantization != own.quantization:
        words.append(
            f"base {'and products in fp8' if config.quantization == 'fp8-dynamic' else 'in ' + config.quantization}"
        )
    if config.modulation != own.modulation:
        words.append({"stream": "modulation streamed", "quantize": "modulation too", "keep": "modulation kept"}[
            config.modulation
        ])  # fmt: skip
    if config.stream_blocks != own.stream_blocks:
        words.append(f"{config.stream_blocks} blocks streamed" if config.stream_blocks else "no block streamed")
    if config.optimizer != own.optimizer:
        words.append(config.optimizer)
    if config.weight_update != own.weight_update:
        words.append("weights in 16 bits, rounded by dice")
    if config.step_in_backward and not own.step_in_backward:
        words.append("stepped in the backward pass" + (", clipped exactly" if config.backward_clip == "exact" else ""))
    if own.cuda_graphs and not config.cuda_graphs:
        words.append("launched kernel by kernel")
    return ", ".join(words)
