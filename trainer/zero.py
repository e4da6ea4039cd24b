"""AdamW inside DeepSpeed's engine, ZeRO 1 and 2, with settings from what `accelerate launch` leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
from xflux_trainer.optim import MOMENTS, State, adamw
from xflux_trainer.ranks import Ranks


class ZeroStepper:
    """DeepSpeed's engine with ZeRO 1 or 2. The adapters in the model are bf16 copies of its fp32 masters."""

    def __init__(
        self, module: nn.Module, adapters: dict[str, nn.Parameter], config: TrainConfig, ranks: Ranks, accumulation: int
    ) -> None:
        if ranks.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would take a GPU that is there, asked for or not
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
            model=module, optimizer=adamw(adapters, config, ranks.device), config=settings
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
    stage = zero.get("stage", environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    stage = int(stage) if str(stage).isdigit() else stage
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
