"""AdamW inside DeepSpeed's engine, ZeRO 1 and 2, with settings from what `accelerate launch` leaves behind."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
from xflux_trainer.optim import MOMENTS, Piece, Read, adamw
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
            model=module, optimizer=adamw(list(adapters.values()), config, ranks.device), config=settings
        )
        self._zero: Any = self._engine.optimizer
        self.load(lambda name: {"weight": masters[name]}, {})

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

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        held = self._zero.optimizer.state.get(self._master, {})
        for name, parameter in self._adapters.items():
            piece = {"weight": self._gather(parameter, self._master)}
            piece |= {key: self._gather(parameter, held[key]) for key in MOMENTS if key in held}
            yield name, piece

    def scalars(self) -> dict[str, float]:
        held = self._zero.optimizer.state.get(self._master, {})
        return {"steps": float(held["step"]) if held else 0.0}

    def load(self, read: Read, scalars: dict[str, float]) -> None:
        steps = scalars.get("steps", 0.0)
        held = {key: torch.zeros_like(self._master) for key in MOMENTS}
        for name, parameter in self._adapters.items():
            piece = read(name)
            self._scatter(parameter, self._master, piece["weight"])
            # The next forward pass reads the bf16 copy, which the engine renews only after a step.
            parameter.data.copy_(piece["weight"])
            for key in MOMENTS if steps else ():
                self._scatter(parameter, held[key], piece[key])
        if steps:
            place = self._device if self._device.type == "cuda" else torch.device("cpu")
            self._zero.optimizer.state[self._master] = {"step": torch.tensor(steps, device=place), **held}

    def averaged(self) -> Any:
        return nullcontext()

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
    zero = settings.pop("zero_optimization", {})
    if not isinstance(zero, dict):
        raise Unsupported(f"The DeepSpeed file's zero_optimization is {zero!r}.", "Write keys and values there.")
    zero = dict(zero)
    stage = zero.get("stage", environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    stage = "2" if stage == "auto" else stage  # what accelerate writes there
    stage = int(stage) if str(stage).isdigit() else stage
    if stage not in (1, 2):
        raise Unsupported(
            f"The accelerate config asks for ZeRO stage {stage}, which this trainer does not do.",
            "Set zero_stage to 2: adapters are so small that stage 3 saves nothing but costs time.",
        )
    notes += _overruled(settings, config)
    settings = {key: value for key, value in settings.items() if value != "auto" or key == "gradient_clipping"}
    for name in ("optimizer", "scheduler"):
        if settings.pop(name, None) is not None:
            notes.append(f"the DeepSpeed file's {name} is not used: the train config names it.")
    for name in ("optimizer", "param"):
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE", "none")
        old = zero.pop("cpu_offload" if name == "optimizer" else "cpu_offload_param", None)
        named = zero.pop(f"offload_{name}", None) or (old and "cpu")
        if (named.get("device", "none") if isinstance(named, dict) else named or "none") != "none" or device != "none":
            notes.append(f"offload_{name} is not used: the optimizer of {trained:,} parameters fits on the device.")
    where = "DeepSpeed file" if "gradient_clipping" in settings else "accelerate config"
    clipping = settings.pop("gradient_clipping", environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto"))
    limit = config.max_grad_norm if clipping in ("auto", "none", "", None) else _limit(clipping, where)
    if limit != config.max_grad_norm:
        notes.append(f"gradients are clipped to {limit:g}, as the {where} says; max_grad_norm is ignored.")
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


def _overruled(settings: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """A note for each thing that the DeepSpeed file says otherwise and the train config decides."""
    notes = []
    for name in ("bf16", "fp16", "bfloat16"):
        block = settings.get(name)
        on = block.get("enabled") if isinstance(block, dict) else block
        if str(on).lower() == "true" and config.mixed_precision != ("bf16" if name == "bfloat16" else name):
            own = config.mixed_precision
            notes.append(f"mixed_precision is {own}, as the train config says; the DeepSpeed file's {name} is ignored.")
    own, other = config.train_batch_size, settings.get("train_micro_batch_size_per_gpu", "auto")
    if other not in ("auto", None, own):
        notes.append(f"train_batch_size is {own}, as the train config says; the DeepSpeed file's {other} is ignored.")
    return notes


def _limit(value: Any, where: str) -> float:
    """A number, also one that is written as text."""
    try:
        limit = float(value)
    except (TypeError, ValueError, OverflowError):
        limit = math.nan
    if not math.isfinite(limit) or isinstance(value, bool):
        raise Unsupported(f"The {where}'s gradient_clipping is {value!r}.", "Set it to a number; 0 clips nothing.")
    return limit


def _deepspeed_file(name: str) -> dict[str, Any]:
    """A path, or base64 of JSON, or (from accelerate 1.4.0 on) JSON itself: as accelerate takes it."""
    if name in ("", "none"):
        return {}
    try:
        settings = json.loads(_text(name))
    except (OSError, ValueError) as error:
        raise Unsupported(f"The DeepSpeed file {name} cannot be read: {error}.", "Correct or remove it.") from error
    if not isinstance(settings, dict):
        raise Unsupported(f"The DeepSpeed file {name} is not a JSON object.", "Correct or remove it.")
    return settings


def _text(name: str) -> str:
    if os.path.exists(name):  # noqa: PTH110 - base64 may be too long for a path, on which Path.exists raises
        return Path(name).read_text(encoding="utf-8")
    if name.lstrip().startswith("{"):
        return name
    try:
        text = base64.urlsafe_b64decode(name).decode("utf-8")
        json.loads(text)
    except ValueError:
        return Path(name).read_text(encoding="utf-8")  # its error is the one to show
    return text
