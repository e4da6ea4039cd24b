"""A module of a few layers with everything that the trained ones have, and steps of it: for tests of the optimizers."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer.config import TrainConfig
from xflux_trainer.optim import PlainStepper
from xflux_trainer.ranks import Launch, Ranks
from xflux_trainer.rounding import generator

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    img_dir="x", mode="finetune", learning_rate=1e-2, mixed_precision="bf16", max_grad_norm=0.5, adam_weight_decay=0.1
)


class Layers(nn.Module):
    """Two trained matrices of whole 8-bit blocks, one too small for them, a vector; a frozen weight, a buffer."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, checkpointing: bool = False) -> None:
        super().__init__()
        dice = generator(CPU, "layers", seed)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=dice).div(shape[-1] ** 0.5).to(dtype))

        self.first, self.second, self.last, self.scale = draw(64, 64), draw(64, 64), draw(6, 64), draw(64)
        self.frozen = nn.Parameter(torch.full((64,), float(seed + 1)).to(dtype), requires_grad=False)
        self.register_buffer("table", torch.full((64,), float(seed + 1)).to(dtype))
        self._checkpointing = checkpointing

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, name) for name in ("first", "second", "last", "scale")}

    def _middle(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(x, self.second)) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(nn.functional.linear(x, self.first)) + self.frozen * 0.1
        if self._checkpointing:
            x = torch.utils.checkpoint.checkpoint(self._middle, x, use_reentrant=False)
        else:
            x = self._middle(x)
        return nn.functional.linear(x, self.last)


def make(
    config: TrainConfig = CONFIG, dtype: torch.dtype = torch.bfloat16, seed: int = 0, ranks: Ranks | None = None,
    accumulation: int = 1, **changes: Any,
) -> tuple[PlainStepper, Layers]:  # fmt: skip
    module = Layers(dtype, seed, checkpointing=changes.pop("checkpointing", False))
    ranks = ranks or Ranks(Launch(use_cpu=True))
    return PlainStepper(module, module.trained, replace(config, **changes), ranks, accumulation), module


def inputs(step: int, rank: int = 0, k: int = 0) -> tuple[Tensor, Tensor]:
    """x (8, 64) and y (8, 6) of one micro batch."""
    dice = generator(CPU, "batch", step, rank, k)
    return torch.randn(8, 64, generator=dice), torch.randn(8, 6, generator=dice)


def take(stepper: PlainStepper, step: int, rank: int = 0, accumulation: int = 1, scale: float = 1.0) -> float:
    """One step on inputs that follow from its number and the rank; returns the norm."""
    stepper.begin(1e-2 / (1 + step))
    dtype = next(iter(stepper._trained.values())).dtype
    for k in range(accumulation):
        x, y = inputs(step, rank, k)
        with stepper.micro(k == accumulation - 1):
            stepper.backward((stepper(x.to(dtype)).float() - y).square().mean() * scale)
    return stepper.step()


def state(stepper: PlainStepper) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    return dict(stepper.pieces()), stepper.scalars()


def equal(one: Any, two: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if one[1] != two[1] or [*one[0]] != [*two[0]]:
        return False
    pairs = [(piece, two[0][name]) for name, piece in one[0].items()]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def pair(work: Callable[[Ranks, Path], Any]) -> list[Any]:
    """Run `work` on two ranks, forked from here, that talk over gloo; what they return, by rank."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        answers = context.Queue()
        processes = [context.Process(target=_rank, args=(work, rank, Path(folder), answers)) for rank in range(2)]
        for process in processes:
            process.start()
        try:
            found = dict(answers.get(timeout=60) for _ in processes)
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    for value in found.values():
        assert not isinstance(value, str), value
    return [found[rank] for rank in range(2)]


def _rank(work: Callable[[Ranks, Path], Any], rank: int, folder: Path, answers: Any) -> None:
    try:
        torch.set_num_threads(1)
        store = torch.distributed.FileStore(str(folder / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        ranks = Ranks(Launch(rank=rank, local_rank=rank, world_size=2, local_world_size=2, use_cpu=True))
        answers.put((rank, work(ranks, folder)))
    except BaseException:  # noqa: BLE001 (the process that waits for the answer is told)
        answers.put((rank, f"rank {rank}: {traceback.format_exc()}"))
    finally:
        answers.close()
        answers.join_thread()
        os._exit(0)
