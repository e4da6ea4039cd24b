"""What must hold of and between the train config's values, and what is worth a note."""

from __future__ import annotations

import dataclasses
from typing import Any

from xflux_trainer.errors import Problem
from xflux_trainer.settings import MODE_KEYS, PATCH, RANGES, TrainConfig


def out_of_range(key: str, shown: str, value: Any) -> list[Problem]:
    if key not in RANGES or not isinstance(value, (int, float)):
        return []
    low, high = RANGES[key]
    if low <= value <= high:
        return []
    return [Problem(shown, f"is {value}", f"It must lie between {low:g} and {high:g}.")]


def between(config: TrainConfig) -> list[Problem]:
    """What must hold of and between values that are right by themselves."""
    problems = []
    for key in ("img_size", "sample_width", "sample_height"):
        pixels = getattr(config, key)
        if pixels % PATCH:
            near = max(PATCH, round(pixels / PATCH) * PATCH)
            problems.append(Problem(key, f"is {pixels}, not a multiple of {PATCH}", f"Write {near}."))
    problems += _sizes(config) + _modes(config)
    if config.max_train_steps is None and config.num_train_epochs is None:
        problems.append(Problem("max_train_steps", "is null", "Give max_train_steps or num_train_epochs a number."))
    if config.single_blocks == () and config.double_blocks == ():
        problems.append(Problem("double_blocks", "and single_blocks are both empty", "Nothing would be trained."))
    if any(not 0 <= t <= 1 for t in config.heldout_timesteps) or not config.heldout_timesteps:
        problems.append(
            Problem("heldout_timesteps", f"is {list(config.heldout_timesteps)}", "Times lie between 0 and 1.")
        )
    return problems


def notes_on(config: TrainConfig) -> list[str]:
    notes = [
        f"{key} does nothing in mode {config.mode}."
        for mode, keys in MODE_KEYS.items()
        for key in keys
        if mode != config.mode and getattr(config, key) != _DEFAULTS[key]
    ]
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        notes.append("lr_scheduler constant has no warm-up, so lr_warmup_steps does nothing (it never did in X-Flux).")
    if config.random_ratio:
        notes.append("random_ratio picks one crop for each image by the seed, because images are encoded once.")
    if config.checkpointed_blocks is not None and not config.gradient_checkpointing:
        notes.append("checkpointed_blocks does nothing without gradient_checkpointing.")
    if config.quantization == "fp8-dynamic" and config.kernels == "diffusers":
        notes.append(
            "fp8-dynamic multiplies in fp8 with fused kernels alone: with kernels diffusers it saves memory only."
        )
    if config.quantization == "fp8-dynamic" and config.stream_blocks:
        notes.append("fp8-dynamic multiplies the blocks that stream_blocks streams in bf16: they only travel in fp8.")
    if config.max_train_steps is not None and config.num_train_epochs is not None:
        notes.append("max_train_steps is set, so num_train_epochs does nothing.")
    return notes


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def _sizes(config: TrainConfig) -> list[Problem]:
    low, high = RANGES["img_size"]
    odd = [size for size in config.resolutions if size % PATCH or not low <= size <= high]
    if odd:
        hint = f"Sizes are multiples of {PATCH} from {low:g} to {high:g}."
        return [Problem("resolutions", f"names {', '.join(map(str, odd))}", hint)]
    return []


def _modes(config: TrainConfig) -> list[Problem]:
    """What a mode cannot be told."""
    problems = []
    if config.quantization != "none" and config.mode == "finetune":
        seen = f"is {config.quantization} in mode {config.mode}"
        problems.append(Problem("quantization", seen, "Only a frozen base can be quantised: write none."))
    if config.quantization == "fp8-dynamic" and config.mixed_precision != "bf16":
        seen = f"is fp8-dynamic with mixed_precision {config.mixed_precision}"
        problems.append(Problem("quantization", seen, "Its products come out in bf16: set mixed_precision to bf16."))
    if config.stream_blocks and config.mode == "finetune":
        problems.append(Problem("stream_blocks", "is set in mode finetune", "Only frozen blocks can be streamed."))
    if config.modulation == "quantize" and config.quantization == "none":
        hint = "Set quantization, or modulation to keep."
        problems.append(Problem("modulation", "is quantize without a quantization", hint))
    if config.modulation == "stream" and config.mode == "finetune":
        problems.append(Problem("modulation", "is stream in mode finetune", "Only frozen layers can be streamed."))
    if config.mode == "controlnet" and config.control_type == "files" and not config.control_dir:
        problems.append(Problem("control_dir", "is missing", "Name the folder of condition images."))
    if config.canny_low > config.canny_high:
        problems.append(Problem("canny_low", f"is {config.canny_low}, above canny_high", "Lower it."))
    if config.step_in_backward and config.gradient_accumulation_steps > 1:
        hint = "Set gradient_accumulation_steps to 1 and raise train_batch_size, or step_in_backward to false."
        problems.append(Problem("step_in_backward", "cannot accumulate gradients", hint))
    if config.checkpointed_blocks is not None and config.kernels == "diffusers" and config.gradient_checkpointing:
        hint = "Set kernels to auto, or checkpointed_blocks to null."
        problems.append(
            Problem("checkpointed_blocks", "is set, and diffusers' blocks are all recomputed or none", hint)
        )
    if config.deterministic and config.attention in ("flash-attn-4", "cudnn"):
        seen = f"is {config.attention}, whose gradients differ from one time to the next, and deterministic is on"
        problems.append(Problem("attention", seen, "Set it to auto, which then takes torch's flash attention."))
    if config.lora_formats == ():
        problems.append(Problem("lora_formats", "is empty", "Nothing would be written: name a format, or null."))
    return problems
