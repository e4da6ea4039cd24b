"""One trained parameter with what its steps need: a master or a compensation, and its optimizer's state.

Optimizers are given fp32. Where the weight is held in 16 bits, the step of one parameter after the other is computed on
an fp32 copy that lives as long as the step, so that the memory this takes is that of the largest parameter. On a GPU
the kernels of `fusedsteps` do without the copy, for the optimizers that they know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from xflux_trainer import fusedsteps, optimizers, rounding
from xflux_trainer.config import TrainConfig

Value = TypeVar("Value")


def weight_update(config: TrainConfig, dtype: torch.dtype) -> str:
    """How a parameter of that format takes its steps: fp32 | master | stochastic | kahan | nearest.

    `auto` is a master where a part is trained, whose size allows it, and stochastic rounding where the whole model is.
    fp16 has too little range for dice or compensations, so its weights always have masters.
    """
    if dtype == torch.float32:
        return "fp32"
    if dtype == torch.float16:
        return "master"
    if config.weight_update == "auto":
        return "stochastic" if config.mode == "finetune" and not config.train_parameters else "master"
    return config.weight_update


def of_result(values: Mapping[str, Value]) -> dict[str, Value]:
    """Of what a parameter's piece is made of, what its result is: the average where there is one, else the weight."""
    key = "ema" if "ema" in values else "weight"
    return {key: values[key]}


class Slot:
    """A parameter of the model (`weight`), and the one that its optimizer knows (`_held`), fp32."""

    def __init__(self, index: int, name: str, weight: nn.Parameter, config: TrainConfig) -> None:
        self.name = name
        self.weight = weight
        self._key = (config.seed, "rounding", index)
        self.update = weight_update(config, weight.dtype)
        self._compensation: Tensor | None = None
        self.optimizer: torch.optim.Optimizer
        """The one that has `held` among its parameters, once `use` has said so."""
        self._fused = False
        self._measured: tuple[Tensor, fusedsteps.Squares] | None = None
        if self.update == "fp32":
            self._held = weight
            return
        empty = torch.empty(0, dtype=torch.float32, device=weight.device)
        self._held = nn.Parameter(weight.detach().float() if self.update == "master" else empty, requires_grad=False)
        if self.update == "kahan":
            self._compensation = torch.zeros_like(weight, requires_grad=False)

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer that has `_held` among its parameters."""
        self.optimizer = optimizer
        self._fused = fusedsteps.usable(optimizer, self.weight)

    @property
    def held(self) -> nn.Parameter:
        return self._held

    @property
    def in_8_bits(self) -> bool:
        """Whether its moments are, if they are large enough."""
        return optimizers.in_8_bits(self.optimizer)

    def value(self) -> Tensor:
        """The weight at its finest, fp32; not a copy where it is held so."""
        if self.update in ("fp32", "master"):
            return self._held.detach()
        if self._compensation is not None:
            return rounding.join(self.weight.detach(), self._compensation)
        return self.weight.detach().float()

    def measure(self, grad: Tensor) -> Tensor:
        """The gradient's 2-norm, () in fp32, on its device. What else the pass finds is kept for the step after it."""
        if self._fused and fusedsteps.factored(self.optimizer, grad):
            squares = fusedsteps.measure(grad)
            self._measured = (grad, squares)
            return squares.norm()
        return torch.linalg.vector_norm(grad, dtype=torch.float32)

    @torch.no_grad()
    def step(self, grad: Tensor, coefficient: float | Tensor, steps: int) -> None:
        """The `steps`-th step, with `grad` times `coefficient`. Only where no other slot shares the optimizer."""
        if self._fused:
            known, self._measured = self._measured, None
            squares = known[1] if known and known[0] is grad else None
            seed = rounding.seed(*self._key, steps)
            fusedsteps.step(self.optimizer, self._held, self._place(), grad, coefficient, seed, squares)
            return
        held = self._held
        passing = self.update not in ("fp32", "master")
        if passing:
            held.data = self.value()
        held.grad = grad.float() * coefficient
        with optimizers.quietly(self.optimizer, held.device):
            self.optimizer.step()
        held.grad = None
        self._write(held.detach(), steps)
        if passing:
            held.data = torch.empty(0, dtype=torch.float32, device=held.device)

    def _place(self) -> fusedsteps.Place:
        other = self._held.detach() if self.update == "master" else self._compensation
        return fusedsteps.Place(self.update, self.weight.detach(), other)

    def _write(self, value: Tensor, steps: int) -> None:
        """Round the fp32 value into the weight."""
        if self.update == "fp32":
            return
        if self.update == "stochastic":
            dice = rounding.generator(value.device, *self._key, steps)
            self.weight.copy_(rounding.stochastic(value, dice))
        elif self._compensation is not None:
            high, low = rounding.split(value, self.weight.dtype)
            self.weight.copy_(high)
            self._compensation.copy_(low)
        else:
            self.weight.copy_(value)

    def parts(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, as it lies: the master or the weight, and the optimizer's tensors."""
        weight = self._held if self.update in ("fp32", "master") else self.weight
        found = {"weight": weight}
        if self._compensation is not None:
            found["compensation"] = self._compensation
        return found | optimizers.tensors(self.optimizer, self._held)

    @torch.no_grad()
    def load(self, piece: dict[str, Tensor], steps: int) -> None:
        """The inverse of `parts`; a weight in another format is taken as well, by the nearest value."""
        self.weight.copy_(piece["weight"])
        if self.update == "master":
            self._held.copy_(piece["weight"])
        if self._compensation is not None:
            low = piece.get("compensation")
            self._compensation.copy_(rounding.split(piece["weight"], self.weight.dtype)[1] if low is None else low)
        passing = self.update not in ("fp32", "master")
        if passing:  # torchao makes its buffers in the parameter's shape
            self._held.data = self.value()
        optimizers.restore(self.optimizer, self._held, piece, steps)
        if passing:
            self._held.data = torch.empty(0, dtype=torch.float32, device=self.weight.device)


def make(
    trained: dict[str, nn.Parameter], config: TrainConfig, device: torch.device, *, together: bool, rank: int = 0
) -> tuple[list[Slot], list[torch.optim.Optimizer]]:
    """Slots in the order of `trained`, and their optimizers: one of all where it may step `together`, else one each.

    `rank`: whose rows of the parameters these are, where they are cut up; each rank throws its own dice.
    """
    first = rank * len(trained)
    slots = [Slot(first + index, name, weight, config) for index, (name, weight) in enumerate(trained.items())]
    if together:
        groups: list[Any] = [slots]
    else:
        groups = [[slot] for slot in slots]
    made = []
    for group in groups:
        optimizer = optimizers.make([slot.held for slot in group], config, device)
        for slot in group:
            slot.use(optimizer)
        made.append(optimizer)
    return slots, made
