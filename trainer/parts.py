"""Optimizer steps of parameters that are cut up by rows: each rank steps its own, and checkpoints hold the whole.

AdamW looks at one number at a time, so a part is stepped as a parameter of its own (`slots`). Its moments in 8 bits
have a scale for each 256 numbers in a row: where every part is made of such blocks, the parts' codes and scales below
one another are those of the whole parameter, and a checkpoint holds them; where one is not, it holds the values.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from xflux_trainer import optimizers, slots
from xflux_trainer.config import TrainConfig
from xflux_trainer.optimizers import MOMENTS
from xflux_trainer.ranks import Ranks

BLOCK, LEAST = 256, 4096
"""Numbers that share a scale, and the fewest of a tensor that torchao holds in 8 bits."""


def rows(value: Tensor, ranks: Ranks) -> Tensor:
    """This rank's, as `fully_shard` deals them out."""
    chunks = value.chunk(ranks.world_size)
    return chunks[ranks.rank] if ranks.rank < len(chunks) else value[:0]


class Part:
    """One trained parameter: its slot with this rank's rows, and the shape of all."""

    def __init__(self, slot: slots.Slot, shape: tuple[int, ...], ranks: Ranks, *, whole: bool) -> None:
        self.slot, self._shape, self._ranks, self._whole = slot, shape, ranks, whole

    def pieces(self, steps: int, average: Tensor | None, *, result: bool = False) -> dict[str, Tensor]:
        """What a checkpoint holds of it, or a result, on the host of rank 0; empty on the others. Every rank asks."""
        own = self.slot.parts()
        values = {key: own[key] for key in ("weight", "compensation") if key in own}
        if average is not None:
            values["ema"] = average
        if result:
            values, steps = slots.of_result(values), 0
        found = {key: self._gather(value) for key, value in values.items()}
        for key in MOMENTS if steps else ():
            found |= self._moment(key, own)
        return {key: value.to("cpu", copy=True) for key, value in found.items()} if self._ranks.main else {}

    def load(self, piece: dict[str, Tensor], steps: int) -> None:
        """Take this rank's rows of a whole piece."""
        own = {key: self.rows(piece[key]) for key in ("weight", "compensation") if key in piece}
        for key in MOMENTS:
            if f"{key}_codes" in piece:
                own |= self._own_codes(key, piece)
            elif key in piece:
                own[key] = self.rows(piece[key])
        if self.slot.weight.numel():
            self.slot.load(own, steps)

    def rows(self, value: Tensor) -> Tensor:
        """This rank's of a whole value."""
        return value if self._whole else rows(value, self._ranks)

    def _counts(self) -> list[int]:
        """Numbers of every part."""
        if self._whole:
            return [math.prod(self._shape)]
        row = math.prod(self._shape[1:])
        first = self._shape[0] if self._shape else 1
        each = -(-first // self._ranks.world_size)
        return [row * max(0, min(each, first - rank * each)) for rank in range(self._ranks.world_size)]

    def _in_blocks(self) -> bool:
        """Whether all parts have moments in 8 bits, whose blocks are those of the whole."""
        return all(count >= LEAST and count % BLOCK == 0 for count in self._counts() if count)

    def _moment(self, key: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same keys on all ranks, also where a part of no rows was never stepped."""
        weight = self.slot.weight
        codes, scale = own.get(f"{key}_codes"), own.get(f"{key}_scale")
        if self.slot.in_8_bits and self._in_blocks():
            if codes is None or scale is None:
                codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
                scale = torch.zeros(weight.numel() // BLOCK, device=weight.device)
            return {f"{key}_codes": self._gather(codes), f"{key}_scale": self._gather(scale, BLOCK)}
        if codes is not None:
            value = optimizers.values8(self.slot.optimizer, key, codes, own[f"{key}_scale"])
        else:
            value = own.get(key, torch.zeros(weight.shape, device=weight.device))
        return {key: self._gather(value)}

    def _own_codes(self, key: str, piece: dict[str, Tensor]) -> dict[str, Tensor]:
        codes, scale = piece[f"{key}_codes"], piece[f"{key}_scale"]
        if self._whole:
            return {f"{key}_codes": codes, f"{key}_scale": scale}
        if not self._in_blocks():
            return {key: self.rows(optimizers.values8(self.slot.optimizer, key, codes, scale))}
        counts = self._counts()
        before, count = (sum(counts[: self._ranks.rank]) // BLOCK, counts[self._ranks.rank] // BLOCK)
        return {f"{key}_codes": self.rows(codes), f"{key}_scale": scale[before : before + count]}

    def _gather(self, value: Tensor, each: int = 1) -> Tensor:
        """All ranks' parts below one another; `each`: numbers of the parameter for one of the value."""
        if self._whole or self._ranks.world_size == 1:
            return value.detach()
        counts = [count // each for count in self._counts()]
        # Bytes: not every backend knows every format, and what waits on the host is none of NCCL's.
        flat = torch.zeros(max(counts), dtype=value.dtype, device=self._ranks.device)
        flat[: value.numel()].copy_(value.detach().flatten())
        found = [torch.empty_like(flat) for _ in counts]
        dist.all_gather([part.view(torch.uint8) for part in found], flat.view(torch.uint8))
        all_of_it = torch.cat([part[:count] for part, count in zip(found, counts)])  # noqa: B905 (of one length)
        return all_of_it.view(self._shape) if each == 1 else all_of_it


def make(
    parameters: dict[str, nn.Parameter], shapes: dict[str, tuple[int, ...]], whole: set[str], config: TrainConfig,
    ranks: Ranks,
) -> tuple[dict[str, Part], list[torch.optim.Optimizer]]:  # fmt: skip
    """The parts by name, and an optimizer for each. `whole`: names of those that every rank has all of.

    Dice are thrown for each rank's rows; of what is whole all ranks must make the same step.
    """
    found, made = slots.make(parameters, config, ranks.device, together=False, rank=ranks.rank)
    return {slot.name: Part(slot, shapes[slot.name], ranks, whole=slot.name in whole) for slot in found}, made
