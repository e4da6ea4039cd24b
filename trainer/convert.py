"""From a checkpoint to an adapter file that diffusers reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from xflux_trainer import checkpoint, lora
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(config: TrainConfig | None, folder: Path | None, output: Path | None, dtype: str) -> Path:
    """Write the adapter of `folder`, or of the newest checkpoint of the config's run. Returns the file."""
    if folder is None:
        assert config is not None
        found = checkpoint.list_checkpoints(Path(config.output_dir))
        if not found:
            raise CheckpointError(f"{config.output_dir} holds no checkpoint.", "Train first, or name --checkpoint.")
        folder = found[-1]
    loaded = checkpoint.load(folder)
    # What the checkpoint was trained with counts, whatever the config file says today.
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    known = {key: value for key, value in loaded.config.items() if key in names}
    path = output or folder / lora.ADAPTER_FILE
    lora.write(path, loaded.state.weights, TrainConfig(**known), DTYPES[dtype])
    return path
