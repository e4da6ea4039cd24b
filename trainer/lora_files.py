"""Adapter files: diffusers' format, kohya's (sd-scripts, ComfyUI) and X-Flux's own (XLabs).

Inside the trainer an adapter bears the name of its layer in diffusers' transformer, or of the fused layer. Scales
(alpha / rank) are multiplied into B on both ways: not every reader knows of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from xflux_trainer import kohya, xlabs
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import CheckpointError
from xflux_trainer.fused import A, B, Pair, complete, explode, flat, fuse, pairs
from xflux_trainer.targets import FILES, unplaced
from xflux_trainer.tensorfile import write_whole

ADAPTER_FILE = FILES["diffusers"]
PREFIX = "transformer."
"""What diffusers puts before the names of the transformer's adapters in a file."""


def write_all(output: Path, weights: dict[str, Tensor], config: TrainConfig) -> list[Path]:
    """Write a finished run's adapters in every format that the config asks for. Returns the files."""
    paths = []
    for form in config.formats:
        path = output / FILES[form]
        write(path, weights, form, scale=config.alpha / config.rank, about=about(config))
        paths.append(path)
    return paths


def about(config: TrainConfig) -> dict[str, str]:
    """What a file says of the run that it comes from."""
    return {"alpha": f"{config.alpha:g}", "base_model": config.base_model, "model_name": config.model_name}


def write(
    path: Path,
    weights: dict[str, Tensor],
    form: str = "diffusers",
    *,
    scale: float = 1.0,
    about: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write adapters in one format. Returns their largest rank there.

    `weights` are by inner names; their products count `scale` times. Raises `CheckpointError` for layers that the
    format has no place for, `WriteError` where the file cannot be written.
    """
    adapters = {
        name: (down.float(), up.float() if scale == 1 else up.float() * scale)
        for name, (down, up) in pairs(weights).items()
    }
    tensors = to_format(adapters, form)
    ranks = [tensor.shape[0] for name, tensor in tensors.items() if _is_down(name)]
    metadata = {
        "format": "pt",
        "rank": str(max(ranks)),
        "alpha_is_folded_in": "true",
        "trainer": "xflux_trainer",
        **(about or {}),
        **(kohya.metadata(max(ranks)) if form == "kohya" else {}),
    }
    # Adapters that share an A have a copy each, as every reader of a file expects.
    whole = {name: tensor if name.endswith(".alpha") else tensor.to(dtype) for name, tensor in tensors.items()}
    write_whole(path, whole, metadata)
    return max(ranks)


def to_format(adapters: dict[str, Pair], form: str) -> dict[str, Tensor]:
    """The tensors of a file of that format, by their names there."""
    parts = explode(adapters)
    homeless = unplaced(parts, form)
    if homeless:
        seen = f"X-Flux's format has no place for an adapter of {homeless[0]}."
        raise CheckpointError(seen, "Write it as diffusers or kohya: lora_formats, or --format of convert.")
    if form == "kohya":
        return kohya.write(parts)
    if form == "xlabs":
        return xlabs.write(parts)
    return {PREFIX + name: tensor for name, tensor in flat(parts).items()}


def read(path: Path) -> dict[str, Tensor]:
    """The adapters of a file of any of the formats, by inner names, in fp32 and with their scale in B.

    Raises `CheckpointError` for a file that holds something else.
    """
    tensors, metadata = _load(path)
    form = recognise(tensors)
    try:
        if form is None:
            raise ValueError(f"it holds {next(iter(tensors), 'nothing')}")
        if form == "kohya":
            parts = kohya.read(tensors)
        elif form == "xlabs":
            parts = xlabs.read(tensors)
        else:
            parts = _read_diffusers(tensors, metadata)
    except ValueError as error:
        known = "diffusers', kohya's or X-Flux's format"
        raise CheckpointError(f"{path} is not a FLUX.1 adapter in {known}: {error}.", "Name another file.") from error
    return flat(fuse(parts))


def recognise(names: dict[str, Any]) -> str | None:
    """The format of a file with tensors of these names."""
    if any(".processor." in name for name in names):
        return "xlabs"
    if any(name.startswith(kohya.PREFIX) for name in names):
        return "kohya"
    if any(name.startswith(PREFIX) for name in names):
        return "diffusers"
    return None


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself."""
    return _load(path)[1]


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise CheckpointError(f"The adapter file {path} does not exist.", "Train first, or name another.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}.", "Name an adapter file.") from error
    return {name: tensor.float() for name, tensor in tensors.items()}, metadata


def _read_diffusers(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Pair]:
    """Names are the layers' own. diffusers' own scripts write alpha into the metadata, others as tensors."""
    weights, alphas = {}, {}
    for name, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(lora_[AB]\.weight|alpha)", name)
        if match is None:
            raise ValueError(f"it holds {name}")
        (alphas if match[2] == "alpha" else weights)[f"{match[1]}.{match[2]}"] = tensor
    settings = _peft_settings(metadata.get("lora_adapter_metadata"))
    found = {}
    for name, (down, up) in complete(weights, A, B).items():
        alpha = alphas.pop(f"{name}.alpha", None)
        scale = _peft_scale(settings, name, len(down)) if alpha is None else float(alpha) / len(down)
        found[name] = (down, up * scale)
    return explode(found)


def _peft_settings(text: str | None) -> dict[str, Any]:
    """The settings that diffusers writes beside the tensors, where it does."""
    try:
        held = json.loads(text) if text else {}
        return {name.removeprefix(PREFIX): value for name, value in held.items() if name.startswith(PREFIX)}
    except (ValueError, AttributeError) as error:
        raise ValueError("its lora_adapter_metadata cannot be read") from error


def _peft_scale(settings: dict[str, Any], name: str, rank: int) -> float:
    """What peft would multiply this adapter with, by those settings; 1 where there are none."""
    if "lora_alpha" not in settings:
        return 1.0
    try:
        # A key of the pattern is the end of a layer's name, as a regular expression.
        patterns = dict(settings.get("alpha_pattern") or {}).items()
        own = [value for key, value in patterns if re.fullmatch(rf"(.*\.)?({key})", name)]
        alpha = float([*own, settings["lora_alpha"]][0])
    except (ValueError, TypeError, re.error) as error:
        raise ValueError("its lora_adapter_metadata cannot be read") from error
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _is_down(name: str) -> bool:
    return name.endswith((A, ".lora_down.weight", ".down.weight"))
