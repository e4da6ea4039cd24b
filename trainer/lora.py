"""Adapters: put them into the transformer by peft, and write them in diffusers' format.

Adapter weights stay in fp32, since in bf16 most of an Adam step of 1e-4 is rounded away. The products are
computed in the format of the layer's input.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import CheckpointError, ConfigError, Problem
from xflux_trainer.files import write_bytes
from xflux_trainer.spec import count_blocks, is_target, unmatched

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
"""What diffusers puts before the names of the transformer's adapters in a file."""


class AdapterLinear(peft_layer.Linear):
    """peft's layer, but the fp32 adapter follows the input's format, instead of the input following the adapter's.

    peft casts the input to fp32 for every adapter, which doubles the largest activations and keeps one more
    copy for the backward pass of each.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            a: Any = self.lora_A[name].weight  # (r, in)
            b: Any = self.lora_B[name].weight  # (out, r)
            y = y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * self.scaling[name]
        return y


def attach(transformer: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Put a fresh adapter on every target. Returns the trained parameters by their diffusers names."""
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    refuse_unmatched(config, linears)
    names = [
        name for name in linears if is_target(name, config.lora_targets, config.single_blocks, config.double_blocks)
    ]
    if not names:
        seen = f"matches no layer of {config.base_model}"
        raise ConfigError("train config", (Problem("lora_targets", seen, "Name endings such as attn.to_q."),))
    adapters = attach_to(transformer, names, config.rank, config.alpha)
    seed(adapters, config.seed)
    return adapters


def refuse_unmatched(config: TrainConfig, linears: list[str]) -> None:
    """Raise `ConfigError` for blocks and endings that a model of these layers has not: none is dropped silently."""
    problems = []
    for key, count in count_blocks(linears).items():
        absent = [number for number in getattr(config, key) or () if number >= count]
        if absent:
            kind = key.replace("_", " ")
            seen = f"names {', '.join(map(str, absent))}, which {config.base_model} does not have"
            hint = f"Its {kind} are 0 to {count - 1}." if count else f"It has no {kind}."
            problems.append(Problem(key, seen, hint))
    for ending in unmatched(linears, config.lora_targets):
        seen = f'"{ending}" matches no layer of {config.base_model}'
        problems.append(Problem("lora_targets", seen, "Name endings such as attn.to_q."))
    if problems:
        raise ConfigError("train config", tuple(problems))


def attach_to(transformer: nn.Module, names: list[str], rank: int, alpha: float) -> dict[str, nn.Parameter]:
    """Put adapters on exactly these layers."""
    pattern = "|".join(re.escape(name) for name in names)
    model: Any = transformer
    settings: Any = {"r": rank, "lora_alpha": alpha, "target_modules": pattern}
    model.add_adapter(LoraConfig(**settings))
    for module in transformer.modules():
        if type(module) is peft_layer.Linear:
            module.__class__ = AdapterLinear
    adapters = {
        name.replace(".default.weight", ".weight"): parameter
        for name, parameter in transformer.named_parameters()
        if parameter.requires_grad
    }
    for parameter in adapters.values():
        parameter.data = parameter.data.float()
    return adapters


def seed(adapters: dict[str, nn.Parameter], number: int) -> None:
    """A ~ N(0, 1/r), B = 0, from the seed and the layer's name: alike on every rank, machine and peft release."""
    for name, parameter in adapters.items():
        if ".lora_B." in name:
            nn.init.zeros_(parameter)
            continue
        values = torch.randn(parameter.shape, generator=generator(number, "adapter", name)) / parameter.shape[0]
        with torch.no_grad():
            parameter.copy_(values)


def generator(*key: object) -> torch.Generator:
    """A random generator that depends on the key and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def write(path: Path, values: dict[str, Tensor], config: TrainConfig, dtype: torch.dtype = torch.float32) -> None:
    """Write adapters in diffusers' format.

    Readers that find no alpha take a scale of 1, so a scale is multiplied into B rather than left to them.
    """
    scale = config.alpha / config.rank
    tensors = {
        PREFIX + name: (value * scale if ".lora_B." in name and not math.isclose(scale, 1) else value)
        .to(dtype)
        .contiguous()
        for name, value in values.items()
    }
    metadata = {
        "format": "pt",
        "rank": str(config.rank),
        "alpha": f"{config.alpha:g}",
        "alpha_is_folded_in": "true",
        "base_model": config.base_model,
        "trainer": "xflux_trainer",
    }
    write_bytes(path, save(tensors, metadata))


def read(path: Path) -> dict[str, Tensor]:
    """Adapters in diffusers' format, by their names in the transformer."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise CheckpointError(f"The adapter file {path} does not exist.", "Train first, or name another.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}.", "Name an adapter file.") from error
    odd = [name for name in tensors if not re.fullmatch(re.escape(PREFIX) + r".+\.lora_[AB]\.weight", name)]
    if odd or not tensors:
        seen = f"{path} is not an adapter in diffusers' format" + (f": it holds {odd[0]}." if odd else ".")
        raise CheckpointError(seen, "Convert it first.")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def attach_file(transformer: nn.Module, path: Path) -> dict[str, nn.Parameter]:
    """Put the adapters of a file into the transformer."""
    values = read(path)
    ranks = {tensor.shape[0] for name, tensor in values.items() if ".lora_A." in name}
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in values})
    known = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    missing = [layer for layer in layers if layer not in known]
    if missing or len(ranks) != 1:
        why = f"the model has no layer {missing[0]}" if missing else "its adapters differ in rank"
        raise CheckpointError(f"{path} does not fit this model: {why}.", "Was it trained on another model?")
    adapters = attach_to(transformer, layers, rank := ranks.pop(), float(rank))
    fill(adapters, values, path)
    return adapters


def fill(adapters: dict[str, nn.Parameter], values: dict[str, Tensor], source: Path) -> None:
    """Copy values into adapters of the same names and shapes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in adapters.items()}
    compare(shapes, {name: tuple(value.shape) for name, value in values.items()}, source)
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(values[name])


def compare(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]], source: Path) -> None:
    """Raise `CheckpointError` when a file's adapters are not those of the run."""
    if wanted != given:
        first = next(name for name in {**wanted, **given} if wanted.get(name) != given.get(name))
        seen = f"{source} holds other adapters than this run: {first} is {given.get(first)}, not {wanted.get(first)}."
        raise CheckpointError(seen, "Keep rank, lora_targets and the block lists as they were, or start afresh.")
