"""AdamW on the adapters: alone or under DDP here, inside DeepSpeed's engine in `zero`.

Both kinds give and take the same values: fp32 weights and Adam's moments by parameter name. A checkpoint does
not show which of them wrote it.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from xflux_trainer.config import TrainConfig
from xflux_trainer.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class State:
    """What AdamW knows, on the host: fp32 weights, both moments, and the number of steps taken."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    steps: int
    scale: float | None = None
    """fp16's loss scale."""


class Stepper(Protocol):
    """One optimizer step, whoever carries it out. `state` and `load` are called by every rank."""

    strategy: str

    def __call__(self, *args: Any) -> Tensor: ...
    def begin(self, learning_rate: float) -> None: ...
    def micro(self, last: bool) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> float: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def state(self) -> State: ...
    def load(self, state: State) -> None: ...


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of the step with that number, counted from 0."""
    kind, warm = config.lr_scheduler, config.lr_warmup_steps
    if kind == "constant":
        return config.learning_rate
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    if kind == "constant_with_warmup":
        return config.learning_rate
    progress = min(1.0, (step - warm) / max(1, total - warm))
    falling = 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * falling


def adamw(adapters: dict[str, nn.Parameter], config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(adapters.values()),
        lr=config.learning_rate,  # every step sets its own
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=device.type == "cuda",
    )


class PlainStepper:
    """One process, or several under DDP."""

    def __init__(
        self, module: nn.Module, adapters: dict[str, nn.Parameter], config: TrainConfig, ranks: Ranks, accumulation: int
    ) -> None:
        self.strategy = "ddp" if ranks.world_size > 1 else "single"
        self._adapters = adapters
        self._accumulation = accumulation
        self._max_norm = config.max_grad_norm
        self._optimizer = adamw(adapters, config, ranks.device)
        self._scaler = (
            torch.amp.GradScaler(ranks.device.type) if config.mixed_precision == "fp16" else None  # type: ignore[attr-defined]
        )
        self._model = module
        if ranks.world_size > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self._model = nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def __call__(self, *args: Any) -> Tensor:
        v: Tensor = self._model(*args)
        return v

    def micro(self, last: bool) -> Any:
        """Around forward and backward: gradients are exchanged once, in the last pass of a step."""
        if last or not isinstance(self._model, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss = loss / self._accumulation
        (self._scaler.scale(loss) if self._scaler else loss).backward()

    def begin(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> float:
        """Returns the gradients' global norm before clipping."""
        if self._scaler:
            self._scaler.unscale_(self._optimizer)
        limit = self._max_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(list(self._adapters.values()), limit))
        if self._scaler:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._adapters.items()}

    def state(self) -> State:
        weights, moments, steps = {}, {}, 0
        for name, parameter in self._adapters.items():
            weights[name] = parameter.detach().float().cpu().clone()
            held = self._optimizer.state.get(parameter, {})
            if held:
                moments[name] = {key: held[key].float().cpu().clone() for key in MOMENTS}
                steps = int(held["step"])
        return State(weights, moments, steps, self._scaler.get_scale() if self._scaler else None)

    def load(self, state: State) -> None:
        for name, parameter in self._adapters.items():
            with torch.no_grad():
                parameter.copy_(state.weights[name])
            if name in state.moments:
                held = {key: state.moments[name][key].to(parameter.device) for key in MOMENTS}
                # Fused AdamW counts on the device, the other kinds on the host.
                place = parameter.device if parameter.device.type == "cuda" else torch.device("cpu")
                step = torch.tensor(float(state.steps), device=place)
                self._optimizer.state[parameter] = {"step": step, **held}
        if self._scaler and state.scale:
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": state.scale})
