"""AdamW on the adapters: alone, under DDP, or inside DeepSpeed's ZeRO 1 and 2.

Both kinds give and take the same values: fp32 weights and Adam's moments by parameter name. A checkpoint does
not show which of them wrote it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
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


def prepare(
    module: nn.Module, adapters: dict[str, nn.Parameter], config: TrainConfig, ranks: Ranks, accumulation: int
) -> Stepper:
    """The stepper that the launcher asks for."""
    if ranks.launch.deepspeed:
        return ZeroStepper(module, adapters, config, ranks, accumulation)
    return PlainStepper(module, adapters, config, ranks, accumulation)


def _adamw(adapters: dict[str, nn.Parameter], config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
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
        self._optimizer = _adamw(adapters, config, ranks.device)
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


class ZeroStepper:
    """DeepSpeed's engine with ZeRO 1 or 2. The adapters in the model are bf16 copies of its fp32 masters."""

    def __init__(
        self, module: nn.Module, adapters: dict[str, nn.Parameter], config: TrainConfig, ranks: Ranks, accumulation: int
    ) -> None:
        import deepspeed

        trained = sum(parameter.numel() for parameter in adapters.values())
        settings, notes = deepspeed_settings(os.environ, config, ranks.world_size, accumulation, trained)
        for note in notes:
            ranks.say(f"note: {note}")
        deepspeed.utils.logger.setLevel("WARNING")
        if ranks.device.type == "cpu":
            # DeepSpeed would compile collectives of its own at every first start: minutes, and a compiler, for
            # nothing that gloo does not do.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.strategy = f"zero{settings['zero_optimization']['stage']}"
        self._adapters = adapters
        self._device = ranks.device
        masters = {name: parameter.detach().float().clone() for name, parameter in adapters.items()}
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=_adamw(adapters, config, ranks.device), config=settings
        )
        self._zero: Any = self._engine.optimizer
        self.load(State(masters, {}, 0))

    def __call__(self, *args: Any) -> Tensor:
        v: Tensor = self._engine(*args)
        return v

    @contextmanager
    def micro(self, last: bool) -> Iterator[None]:
        """The engine counts the passes itself."""
        yield
        self._engine.step()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def begin(self, learning_rate: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = learning_rate

    def step(self) -> float:
        """The engine has stepped at the end of the last pass; this is the norm that it saw."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._adapters.items()}

    def state(self) -> State:
        weights = {name: self._gather(parameter, self._master) for name, parameter in self._adapters.items()}
        held = self._zero.optimizer.state.get(self._master, {})
        if "exp_avg" not in held:
            return State(weights, {}, 0)
        moments = {
            name: {key: self._gather(parameter, held[key]) for key in MOMENTS}
            for name, parameter in self._adapters.items()
        }
        return State(weights, moments, int(held["step"]))

    def load(self, state: State) -> None:
        for name, parameter in self._adapters.items():
            self._scatter(parameter, self._master, state.weights[name])
            # The next forward pass reads the bf16 copy, which the engine renews only after a step.
            parameter.data.copy_(state.weights[name])
        if not state.moments:
            return
        place = self._device if self._device.type == "cuda" else torch.device("cpu")
        held = {key: torch.zeros_like(self._master) for key in MOMENTS}
        for name, parameter in self._adapters.items():
            for key in MOMENTS:
                self._scatter(parameter, held[key], state.moments[name][key])
        self._zero.optimizer.state[self._master] = {"step": torch.tensor(float(state.steps), device=place), **held}

    @property
    def _master(self) -> Tensor:
        """This rank's part of the fp32 weights, flat; all adapters are in one parameter group."""
        master: Tensor = self._zero.single_partition_of_fp32_groups[0]
        return master

    def _gather(self, parameter: nn.Parameter, flat: Tensor) -> Tensor:
        """The whole of one parameter's value, of which every rank holds a part or none in its `flat`."""
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=self._device)
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            whole.narrow(0, here.start, here.numel).copy_(flat.detach().narrow(0, there.start, there.numel))
        dist.all_reduce(whole)
        return whole.view(parameter.shape).cpu()

    def _scatter(self, parameter: nn.Parameter, flat: Tensor, value: Tensor) -> None:
        """Put this rank's part of `value` where it belongs in `flat`."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            part = value.flatten().narrow(0, here.start, here.numel)
            with torch.no_grad():
                flat.narrow(0, there.start, there.numel).copy_(part)


def deepspeed_settings(
    environ: Mapping[str, str], config: TrainConfig, world_size: int, accumulation: int, trained: int
) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's config from what `accelerate launch` leaves in the environment, and notes on what was changed."""
    settings, notes = _deepspeed_file(environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")), []
    zero = dict(settings.pop("zero_optimization", {}))
    stage = int(zero.get("stage", environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    if stage not in (1, 2):
        raise Unsupported(
            f"The accelerate config asks for ZeRO stage {stage}, which this trainer does not do.",
            "Set zero_stage to 2: adapters are so small that stage 3 saves nothing but costs time.",
        )
    for name in ("optimizer", "scheduler"):
        if settings.pop(name, None) is not None:
            notes.append(f"the DeepSpeed file's {name} is not used: the train config names it.")
    for name in ("optimizer", "param"):
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE", "none")
        if zero.pop(f"offload_{name}", None) or device != "none":
            notes.append(f"offload_{name} is not used: the optimizer of {trained:,} parameters fits on the device.")
    clipping = settings.pop("gradient_clipping", environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto"))
    limit = config.max_grad_norm if clipping in ("auto", "none", "") else float(clipping)
    if limit != config.max_grad_norm:
        notes.append(f"gradients are clipped to {limit:g}, as the accelerate config says; max_grad_norm is ignored.")
    if zero.get("reduce_bucket_size", "auto") == "auto":
        # The default of 5e8 elements would allocate a gigabyte for a few million gradients.
        zero["reduce_bucket_size"] = max(trained, 1 << 20)
    precision = config.mixed_precision
    settings.update(
        train_micro_batch_size_per_gpu=config.train_batch_size,
        gradient_accumulation_steps=accumulation,
        train_batch_size=config.train_batch_size * accumulation * world_size,
        gradient_clipping=limit,
        steps_per_print=2**31,
        zero_allow_untested_optimizer=True,
        bf16={"enabled": precision == "bf16"},
        fp16={"enabled": precision == "fp16"},
        zero_optimization={**zero, "stage": stage},
    )
    return settings, notes


def _deepspeed_file(name: str) -> dict[str, Any]:
    if name in ("", "none"):
        return {}
    try:
        settings = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unsupported(f"The DeepSpeed file {name} cannot be read: {error}.", "Correct or remove it.") from error
    if not isinstance(settings, dict):
        raise Unsupported(f"The DeepSpeed file {name} is not a JSON object.", "Correct or remove it.")
    return settings
