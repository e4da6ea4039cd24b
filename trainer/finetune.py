"""Fine-tuning: which of the base's own weights are trained, and the model that comes out, as files.

A parameter is named as diffusers or as Black Forest Labs call it, whole or in part: `txt_attn`, X-Flux's choice, is
the text stream's attention in every double block; `single_blocks.3`, `transformer_blocks.3.attn.to_q` and
`norm_out` are names too. Parts are whole between dots, so that block 1 is not block 10.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer import files
from xflux_trainer.bfl_spec import transformer_config
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import WriteError
from xflux_trainer.layout import Base
from xflux_trainer.model import empty_transformer, read_spec
from xflux_trainer.tensorfile import TensorFile
from xflux_trainer.trained import names
from xflux_trainer.weights import STEM, open_weights

FOLDER = "transformer"
SHARD = 5 * 10**9
"""Bytes that a shard holds at most, as diffusers' own."""


def select(transformer: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Make the parameters that `train_parameters` names trainable, all others not. Returns them by diffusers' names.

    Raises `ConfigError` for a name that is of no parameter.
    """
    own = dict(transformer.named_parameters())
    wanted = set(names(own, config))
    for name, parameter in own.items():
        parameter.requires_grad_(name in wanted)
    return {name: parameter for name, parameter in own.items() if name in wanted}


def refuse_overwriting(output: Path, base: Base) -> None:
    """Raise `WriteError` where the trained transformer would take the place of the base's own."""
    if (output / FOLDER).resolve() == base.transformer.resolve():
        seen = f"The fine-tuned transformer would replace the base model's own, {base.transformer}."
        raise WriteError(seen, "Set output_dir to another folder.")


def write(
    output: Path, weights: Iterator[tuple[str, Tensor]], base: Base, config: TrainConfig,
    dtype: torch.dtype | None = None,
) -> Path:  # fmt: skip
    """Write the whole transformer in diffusers' layout to `output/transformer`; in bf16 if `dtype` is None, or in fp32
    where nothing is mixed.

    `weights` are the trained ones, the others come from the base's files; one tensor is in memory at a time.
    The iterator is used up even when the disk is full, because other ranks wait in it. Raises `WriteError`.
    """
    try:
        return _write(output, weights, base, dtype or saved_in(config))
    except BaseException:
        for _ in weights:
            pass
        raise


def _write(output: Path, weights: Iterator[tuple[str, Tensor]], base: Base, dtype: torch.dtype) -> Path:
    refuse_overwriting(output, base)
    shapes = shapes_of(base)
    plan = shards(shapes, dtype.itemsize)
    with files.new_folder(output / FOLDER) as folder, ExitStack() as stack:
        files.write_json(folder / "config.json", _config(base))
        if len(plan) > 1:
            _write_index(folder, plan, shapes, dtype)
        place = {}
        for file, members in plan.items():
            shard = TensorFile(folder / file, {name: shapes[name] for name in members}, dtype)
            place |= dict.fromkeys(members, stack.enter_context(shard))
        for name, tensor in whole(weights, base, shapes):
            place[name].put(name, tensor)
        # Closing them checks that they are whole, and flushes them, before the folder gets its name.
        stack.close()
    return output / FOLDER


def saved_in(config: TrainConfig) -> torch.dtype:
    """The format that a run writes its model in."""
    return torch.float32 if config.mixed_precision == "no" else torch.bfloat16


def shapes_of(base: Base) -> dict[str, tuple[int, ...]]:
    """Of all the transformer's parameters, by diffusers' names."""
    return {name: tuple(parameter.shape) for name, parameter in empty_transformer(base).named_parameters()}


def whole(
    weights: Iterable[tuple[str, Tensor]], base: Base, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Every tensor of the fine-tuned transformer: the trained `weights`, and after them the base's own."""
    left = dict.fromkeys(names)
    for name, tensor in weights:
        del left[name]
        yield name, tensor
    with open_weights(base.transformer, torch.device("cpu")) as stored:
        for name in left:
            yield name, stored.read(name)


def shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int | None = None) -> dict[str, list[str]]:
    """Names of the files, and of the tensors in each: in order, at most `limit` bytes a file."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        more = math.prod(shape) * itemsize
        if groups[-1] and size + more > (limit or SHARD):
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    if len(groups) == 1:
        return {f"{STEM}.safetensors": groups[0]}
    return {f"{STEM}-{k:05d}-of-{len(groups):05d}.safetensors": group for k, group in enumerate(groups, 1)}


def _write_index(
    folder: Path, plan: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    places = {name: file for file, members in plan.items() for name in members}
    files.write_json(
        folder / f"{STEM}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places}
    )


def _config(base: Base) -> dict[str, Any]:
    if base.transformer.is_file():
        return transformer_config(read_spec(base))
    return dict(json.loads((base.transformer / "config.json").read_text(encoding="utf-8")))
