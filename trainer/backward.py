"""Step every weight as soon as its gradient is there, and free that: no more than a few gradients exist at a time.

Of a whole-model fine-tune in bf16 this saves 2 bytes for every weight. The price is the clipping, which wants the norm
of all gradients before the first step:

`exact`     two backward passes: the first only measures. The graph is kept for the second, and every checkpointed block
            is computed once more. The result is that of a step after the backward pass, up to rounding.
`previous`  the norm of the step before stands for this one's. A sudden jump is clipped one step late; the first step,
            which has none before it, is taken exactly.
`tensor`    every gradient is brought below max_grad_norm by its own norm. That is not the global norm: N tensors
            together may reach max_grad_norm times the root of N.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

Take = Callable[[nn.Parameter, Tensor, "float | Tensor"], None]
"""(parameter, its gradient, what that is to be multiplied with)"""
Measure = Callable[[nn.Parameter, Tensor], Tensor]
"""(parameter, its gradient) to the gradient's 2-norm, () in fp32, on its device"""


def norm_of(_: nn.Parameter, grad: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grad, dtype=torch.float32)


class BackwardSteps:
    """Hooks on the parameters; `run` is a backward pass and a step in one.

    `measure` is asked for the norm of each gradient that `take` is given right after it, so that both can share a pass
    over the gradient. No hook waits for the device: `run` reads the loss before the pass and the norm after it.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        clip: Literal["exact", "previous", "tensor"],
        max_norm: float,
        take: Take,
        measure: Measure = norm_of,
    ) -> None:
        self._clip, self._max_norm, self._take, self._measure = clip, max_norm, take, measure
        self._stepping = False
        self._coefficient: float | None = 1.0
        self._squares: list[Tensor] = []
        self.norm = 0.0
        """Global norm of the last step's gradients, before clipping."""
        self.previous: float | None = None
        """The same, None before the first step: what `previous` clips by."""
        own = weakref.ref(self)

        def receive(parameter: nn.Parameter) -> None:
            # Held by a hook, this and all that it holds would never be let go: Python's collector sees no hooks.
            steps = own()
            if steps is not None:
                steps._receive(parameter)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(receive)

    def run(self, loss: Tensor) -> bool:
        """Returns whether a step was taken: none is where the loss is not finite."""
        if not math.isfinite(float(loss.detach())):
            self.norm = math.nan
            return False
        norm = self.previous
        if self._max_norm and (self._clip == "exact" or (self._clip == "previous" and norm is None)):
            norm = self._pass(loss, stepping=False, retain_graph=True)
            if not math.isfinite(norm):
                self.norm = norm
                return False
        own = self._clip == "tensor" and self._max_norm > 0
        self._coefficient = None if own else coefficient(norm or 0.0, self._max_norm)
        self.norm = self._pass(loss, stepping=True, retain_graph=False)
        self.previous = self.norm
        return True

    def _pass(self, loss: Tensor, *, stepping: bool, retain_graph: bool) -> float:
        self._stepping, self._squares = stepping, []
        loss.backward(retain_graph=retain_graph)
        return float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0

    def _receive(self, parameter: nn.Parameter) -> None:
        grad = parameter.grad
        if grad is None:
            return
        norm = (self._measure if self._stepping else norm_of)(parameter, grad)
        self._squares.append(norm.square())
        parameter.grad = None
        if self._stepping:
            own = (self._max_norm / (norm + 1e-6)).clamp(max=1.0) if self._coefficient is None else self._coefficient
            self._take(parameter, grad, own)


def coefficient(norm: float, max_norm: float) -> float:
    """What brings gradients of that norm below max_norm, 0: any norm is fine."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
