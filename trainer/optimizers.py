"""The optimizers by name, and their state as plain tensors that a checkpoint can hold."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(
    parameters: list[nn.Parameter], config: TrainConfig, device: torch.device, *, fused_on_host: bool = False
) -> torch.optim.AdamW:
    """torch's, in one kernel on a GPU; on the host as well, where sharded weights may wait, if that is asked for."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,  # every step sets its own
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=device.type == "cuda" or (fused_on_host and device.type == "cpu"),
    )


def make(parameters: list[nn.Parameter], config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """The config's optimizer over parameters in fp32. Raises `Unsupported` where its package is missing."""
    if config.optimizer == "adamw8bit":
        return _adamw8bit(parameters, config)
    if config.optimizer == "adafactor":
        return _adafactor(parameters, config)
    return adamw(parameters, config, device)


def _adafactor(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """transformers' own, since torch has one only from 2.5 on. The learning rate is the config's, and not relative to
    the step or to the weights; there is no first moment, so that the state is a row and a column for each matrix."""
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters, lr=config.learning_rate, scale_parameter=False, relative_step=False, warmup_init=False, beta1=None,
        weight_decay=config.adam_weight_decay,
    )  # fmt: skip


def check(config: TrainConfig) -> None:
    """Raise `Unsupported` for an optimizer whose package is missing: asked before all work."""
    if config.optimizer == "adamw8bit":
        _torchaos()


def _torchaos() -> Any:
    """torchao's class. Raises `Unsupported` with the line that installs it."""
    try:
        try:
            from torchao.optim import AdamW8bit
        except ImportError:  # before 0.10
            from torchao.prototype.low_bit_optim import AdamW8bit
    except ImportError as error:
        pin = "torchao" if torch.__version__ >= "2.6" else "torchao==0.7.0"
        raise Unsupported(
            f"optimizer is adamw8bit, but torchao cannot be imported: {error}.",
            f"Run `pip install '{pin}'`, or set optimizer to adamw or adafactor.",
        ) from error
    return AdamW8bit


def _adamw8bit(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """torchao's, whose blockwise 8-bit moments work on every device. Weights stay in fp32 here: what rounds them is
    `slots`, whose dice a resumed run throws again, and not torchao's own."""
    optimizer: torch.optim.Optimizer = _torchaos()(
        parameters, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )  # fmt: skip
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's: compiled once, with the rate as an input
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def quietly(optimizer: torch.optim.Optimizer, device: torch.device) -> AbstractContextManager[Any]:
    """Around a step. torchao compiles its step, which on a GPU saves copies of the weights; on a CPU it would want a
    C++ compiler and seconds for every shape, for models that are there to be tested with."""
    if device.type == "cpu" and in_8_bits(optimizer):
        if hasattr(torch.compiler, "set_stance"):  # from 2.6 on
            return torch.compiler.set_stance("force_eager")
        from torch._dynamo import config as dynamo

        return dynamo.patch(disable=True)
    return nullcontext()


def tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer knows of one parameter, as it lies, without the count of its steps. Empty before the first.

    Moments in 8 bits come as their codes and scales, `exp_avg_codes` and `exp_avg_scale`.
    """
    found = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if key in ("step", "RMS") or not isinstance(value, Tensor):  # RMS: Adafactor's, made anew in every step
            continue
        if hasattr(value, "codes"):
            found |= {f"{key}_codes": value.codes, f"{key}_scale": value.scale}
        else:
            found[key] = value
    return found


def restore(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, piece: dict[str, Tensor], steps: int) -> None:
    """The inverse of `tensors`, after `steps` steps. The piece's other tensors are left alone."""
    place = parameter.device
    held: dict[str, Any]
    if in_8_bits(optimizer):
        held = {key: _moment8(optimizer, parameter, key, piece) for key in MOMENTS if _has(piece, key)}
    else:
        known = (*MOMENTS, "exp_avg_sq_row", "exp_avg_sq_col")
        held = {key: piece[key].to(place, copy=True) for key in known if key in piece}
    if not held:
        optimizer.state.pop(parameter, None)
        return
    if type(optimizer).__name__ == "Adafactor":
        optimizer.state[parameter] = {"step": steps, "RMS": 0, **held}
        return
    # Fused AdamW counts on the device, the other kinds on the host.
    fused = any(group.get("fused") for group in optimizer.param_groups)
    step = torch.tensor(float(steps), device=place if fused else torch.device("cpu"))
    optimizer.state[parameter] = {"step": step, **held}


def _has(piece: dict[str, Tensor], key: str) -> bool:
    return key in piece or f"{key}_codes" in piece


def _moment8(optimizer: Any, parameter: nn.Parameter, key: str, piece: dict[str, Tensor]) -> Tensor:
    moment: Tensor = optimizer._new_buffer(parameter, key == "exp_avg")
    if f"{key}_codes" in piece:
        moment.codes.copy_(piece[f"{key}_codes"])
        moment.scale.copy_(piece[f"{key}_scale"])
    else:  # a tensor too small for blocks, or values of one that was cut up between them
        moment.copy_(piece[key].to(moment.device))
    return moment


def in_8_bits(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == "AdamW8bit"


def values8(optimizer: Any, key: str, codes: Tensor, scale: Tensor) -> Tensor:
    """The fp32 values of a moment of torchao's, of any shape that it holds in 8 bits."""
    like = torch.empty((), dtype=torch.float32, device=codes.device).expand(codes.shape)
    moment = optimizer._new_buffer(like, key == "exp_avg")
    moment.codes.copy_(codes)
    moment.scale.copy_(scale)
    values: Tensor = moment.dequantize()
    return values
