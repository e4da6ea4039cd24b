"""From a checkpoint, or from an adapter file, to an adapter file of any format."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from xflux_trainer import checkpoint, lora_files
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import CheckpointError
from xflux_trainer.targets import FILES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(source: Path, output: Path | None, form: str = "diffusers", dtype: str = "fp32") -> tuple[Path, list[str]]:
    """Write the adapter of a checkpoint folder or an adapter file. Returns the new file, and what is worth saying."""
    if source.is_dir():
        weights, config = _checkpoint(source)
        scale, about = config.alpha / config.rank, lora_files.about(config)
        path = output or source / FILES[form]
    else:
        weights, held = lora_files.read(source), lora_files.read_metadata(source)
        scale, about = 1.0, {key: held[key] for key in ("alpha", "base_model", "model_name") if key in held}
        path = output or source.with_name(f"{source.stem}_{form}.safetensors")
    before = max(tensor.shape[0] for name, tensor in weights.items() if ".lora_A." in name)
    after = lora_files.write(path, weights, form, scale=scale, about=about, dtype=DTYPES[dtype])
    notes = []
    if after > before:
        grows = f"the rank grows from {before} to {after}, with zeros between them; the adapter does the same."
        notes.append(f"layers with adapters of their own are one matrix in this format: {grows}")
    return path, notes


def newest(config: TrainConfig) -> Path:
    """The newest checkpoint of the config's run."""
    found = checkpoint.list_checkpoints(Path(config.output_dir))
    if not found:
        raise CheckpointError(f"{config.output_dir} holds no checkpoint.", "Train first, or name --checkpoint.")
    return found[-1]


def _checkpoint(folder: Path) -> tuple[dict[str, Tensor], TrainConfig]:
    """The adapters of a checkpoint, and what they were trained with, whatever a config file says today."""
    loaded = checkpoint.load(folder)
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{key: value for key, value in loaded.config.items() if key in names})
    if config.mode != "lora":
        seen = f"{folder} is of a run in mode {config.mode}, which trains no adapter."
        raise CheckpointError(seen, "Its result is written when the run ends: resume it to its end.")
    return dict(loaded.weights(averaged=True)), config
