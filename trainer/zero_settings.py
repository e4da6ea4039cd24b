"""DeepSpeed's settings: what `accelerate launch` leaves in the environment, laid under the train config."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
from xflux_trainer.memory_terms import BUCKET
from xflux_trainer.sharded import refuse_optimizer, refuse_rounding

FALLING_BACK = "Set {0}_device to cpu in the accelerate config, or the device of {0} in the DeepSpeed file."


def deepspeed_settings(
    environ: Mapping[str, str], config: TrainConfig, world_size: int, accumulation: int, trained: int
) -> tuple[dict[str, Any], list[str]]:
    """DeepSpeed's config from what `accelerate launch` leaves in the environment, and notes on what was changed.

    `trained` counts the trained parameters. Raises `Unsupported` for a file that cannot be read and for what this
    trainer does not do: stage 0, NVMe, an optimizer that needs whole weights.
    """
    refuse_optimizer(config, "DeepSpeed")
    refuse_rounding(config, "DeepSpeed")
    settings, notes = _deepspeed_file(environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")), []
    zero = settings.pop("zero_optimization", {})
    if not isinstance(zero, dict):
        raise Unsupported(f"The DeepSpeed file's zero_optimization is {zero!r}.", "Write keys and values there.")
    stage = _stage(zero, environ)
    notes += _overruled(settings, config)
    settings = {key: value for key, value in settings.items() if value != "auto" or key == "gradient_clipping"}
    for name in ("optimizer", "scheduler"):
        if settings.pop(name, None) is not None:
            notes.append(f"the DeepSpeed file's {name} is not used: the train config names it.")
    # accelerate fills "auto" from the model's hidden size; where nobody does, DeepSpeed takes no word for a number.
    zero = {key: value for key, value in zero.items() if value != "auto"}
    offload, more = _offload(zero, environ, stage)
    notes += more
    where = "DeepSpeed file" if "gradient_clipping" in settings else "accelerate config"
    clipping = settings.pop("gradient_clipping", environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto"))
    limit = config.max_grad_norm if clipping in ("auto", "none", "", None) else _limit(clipping, where)
    if limit != config.max_grad_norm:
        notes.append(f"gradients are clipped to {limit:g}, as the {where} says; max_grad_norm is ignored.")
    # The default of 5e8 elements would allocate a gigabyte for a few million gradients.
    zero.setdefault("reduce_bucket_size", min(max(trained, 1 << 20), BUCKET))
    precision = config.mixed_precision
    notes += _sum_in_fp32(settings, stage, precision, accumulation)
    settings.update(
        train_micro_batch_size_per_gpu=config.train_batch_size,
        gradient_accumulation_steps=accumulation,
        train_batch_size=config.train_batch_size * accumulation * world_size,
        gradient_clipping=limit,
        steps_per_print=2**31,
        zero_allow_untested_optimizer=True,
        # DeepSpeed's own CPU Adam is compiled at the first start; torch's does the same without a compiler.
        zero_force_ds_cpu_optimizer=False,
        bf16={"enabled": precision == "bf16"},
        fp16=_fp16(settings.get("fp16"), precision == "fp16"),
        zero_optimization={**zero, **offload, "stage": stage},
    )
    return settings, notes


def _stage(zero: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    stage = zero.get("stage", environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    stage = "2" if stage == "auto" else stage  # what accelerate writes there
    if str(stage) not in ("1", "2", "3"):
        raise Unsupported(
            f"The accelerate config asks for ZeRO stage {stage}, which this trainer does not do.",
            "Set zero_stage to 2; 3 only where the model does not fit on one device, since it costs time.",
        )
    return int(stage)


def _offload(
    zero: dict[str, Any], environ: Mapping[str, str], stage: int
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`offload_optimizer` and `offload_param` as DeepSpeed takes them, taken out of `zero`, and notes."""
    found: dict[str, dict[str, Any]] = {}
    notes = []
    for kind, older in (("optimizer", "cpu_offload"), ("param", "cpu_offload_param")):
        name = f"offload_{kind}"
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind.upper()}_DEVICE", "none")
        asked = zero.pop(older, None) and {"device": "cpu"}
        asked = zero.pop(name, None) or asked or {"device": device}
        if not isinstance(asked, dict):
            raise Unsupported(f"The DeepSpeed file's {name} is {asked!r}.", 'Write {"device": "cpu"} there.')
        asked = {key: value for key, value in asked.items() if value != "auto" and value is not None}
        device = str(asked.get("device", "none")).lower()
        if device == "none":
            continue
        if device != "cpu":
            seen = f"{name} asks for {device}, for which DeepSpeed compiles a module of its own against libaio."
            raise Unsupported(seen, FALLING_BACK.format(name))
        if kind == "param" and stage != 3:
            notes.append(f"offload_param is not used: ZeRO {stage} computes with whole weights, only 3 cuts them up.")
            continue
        found[name] = {**asked, "device": "cpu"}
    return found, notes


def _sum_in_fp32(settings: dict[str, Any], stage: int, precision: str, accumulation: int) -> list[str]:
    """Let ZeRO 2 and 3 sum a step's gradients in fp32: in bf16 a sum of eight has lost three of its eight bits."""
    types = settings.pop("data_types", None)
    types = dict(types) if isinstance(types, dict) else {}
    notes = []
    if stage == 1 and types.get("grad_accum_dtype") == "fp32" and precision == "bf16":
        # DeepSpeed would take another optimizer for it, without parts that could be addressed.
        del types["grad_accum_dtype"]
        notes.append("the DeepSpeed file's data_types.grad_accum_dtype is not used with ZeRO 1: set the stage to 2.")
    elif stage > 1 and precision == "bf16" and accumulation > 1:
        types.setdefault("grad_accum_dtype", "fp32")
    if types:
        settings["data_types"] = types
    return notes


def _fp16(block: Any, enabled: bool) -> dict[str, Any]:
    """The file's loss scaling, where the train config asks for fp16."""
    scaling = {key: value for key, value in block.items() if value != "auto"} if isinstance(block, dict) else {}
    return {**scaling, "enabled": True} if enabled else {"enabled": False}


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
