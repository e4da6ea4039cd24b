"""Adapters: put them into the transformer, seed them, and start them from a file.

Adapter weights stay in fp32, since in bf16 most of an Adam step of 1e-4 is rounded away. The products are
computed in the format of the layer's input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from xflux_trainer import fused, lora_files
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import CheckpointError, ConfigError, Problem
from xflux_trainer.lora_files import ADAPTER_FILE
from xflux_trainer.spec import Adapter, Linear, adapters_of, count_blocks, unmatched
from xflux_trainer.targets import Layer, parts_of, unplaced

__all__ = [
    "ADAPTER_FILE", "AdapterLinear", "FusedAdapter", "FusedAdapterLinear", "attach", "attach_file", "check", "compare",
    "fill", "generator", "layers_of", "put", "refuse_unmatched", "seed",
]  # fmt: skip


class LowRank(nn.Module):
    """One factor of an adapter, (out, in) in fp32. It follows its input's format, not the input its own.

    A cast of the input to fp32 would double the largest activations, and keep one more copy for the backward pass.
    """

    def __init__(self, outputs: int, inputs: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=torch.float32, device=device))

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """(…, in) to (…, out), or to those rows of it."""
        weight = self.weight if rows is None else self.weight[rows]
        return F.linear(x, weight.to(x.dtype))


class _Wrapper(nn.Module):
    """A linear layer, whatever holds its weight, with something added to its output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return int(self.base_layer.in_features)

    @property
    def out_features(self) -> int:
        return int(self.base_layer.out_features)


class AdapterLinear(_Wrapper):
    """y = base(x) + B A x · scale, for any layer that maps (…, in_features) to (…, out_features)."""

    def __init__(self, base: nn.Module, rank: int, scale: float, device: torch.device | None = None) -> None:
        super().__init__(base)
        self.lora_A = LowRank(rank, self.in_features, device)
        self.lora_B = LowRank(self.out_features, rank, device)
        self.scale = scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        low: Tensor = self.lora_A(x)
        # On the narrow product: that is a hundredth of the work it would be on y.
        return y + self.lora_B(low if self.scale == 1 else low * self.scale)


class FusedAdapter(nn.Module):
    """X-Flux's adapter of q, k and v: one A for the three, and B with their rows one below the other."""

    def __init__(self, inputs: int, rows: list[int], rank: int, scale: float, device: torch.device | None) -> None:
        super().__init__()
        self.rows = [slice(start, end) for start, end in pairwise(accumulate(rows, initial=0))]
        self.lora_A = LowRank(rank, inputs, device)
        self.lora_B = LowRank(sum(rows), rank, device)
        self.scale = scale
        self._held: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, part: int) -> Tensor:
        """B A x · scale, those rows of it that are the part's."""
        return self.lora_B(self._low(x, part), self.rows[part])  # type: ignore[no-any-return]

    def _low(self, x: Tensor, part: int) -> Tensor:
        """A x · scale: computed for the first part, and used by the others when they are given that very tensor.

        Every forward pass, a recomputed one too, begins with the first part, so nothing of another pass is used;
        and the last one lets go of it.
        """
        if part and self._held is not None and self._held[0] is x:
            low = self._held[1]
        else:
            low = self.lora_A(x)
            low = low if self.scale == 1 else low * self.scale
        self._held = (x, low) if part < len(self.rows) - 1 else None
        return low


class FusedAdapterLinear(_Wrapper):
    """One of the layers that share a fused adapter, which hangs beside them and not below any."""

    def __init__(self, base: nn.Module, adapter: FusedAdapter, part: int) -> None:
        super().__init__(base)
        self._adapter = (adapter,)  # in a tuple, so that its parameters have one name only
        self._part = part

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y + self._adapter[0](x, self._part)


def layers_of(transformer: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can be adapted, by name: nn.Linear, and what other libraries put in its place."""
    found: dict[str, nn.Module] = {}
    for name, module in transformer.named_modules():
        sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        above = accumulate(name.split(".")[:-1], "{}.{}".format)
        if all(isinstance(size, int) for size in sizes) and found.keys().isdisjoint(above):
            found[name] = module
    return found


def attach(transformer: nn.Module, config: TrainConfig, device: torch.device | None = None) -> dict[str, nn.Parameter]:
    """Put an adapter on every target, fresh or from `lora_init`. Returns the trained parameters by their names.

    `device` is where the adapters lie; None: where each layer's weight does.
    """
    modules = layers_of(transformer)
    layers = [_sizes(name, module) for name, module in modules.items()]
    refuse_unmatched(config, list(modules))
    chosen = adapters_of(layers, config.lora_targets, config.single_blocks, config.double_blocks)
    if not chosen:
        seen = f"matches no layer of {config.base_model}"
        raise ConfigError("train config", (Problem("lora_targets", seen, "Name endings such as attn.to_q."),))
    parameters = put(transformer, chosen, dict.fromkeys((a.name for a in chosen), config.rank), _scale(config), device)
    seed(parameters, config.seed)
    if config.lora_init:
        _start_from(parameters, initial(Path(config.lora_init), chosen, config))
    return parameters


def check(config: TrainConfig, layers: Iterable[Layer]) -> None:
    """Raise `UserError` for what `attach`, or the writing of the result, would find wrong: asked before all work."""
    known = list(layers)
    refuse_unmatched(config, [layer.name for layer in known])
    chosen = adapters_of(known, config.lora_targets, config.single_blocks, config.double_blocks)
    for form in config.formats:
        homeless = unplaced((layer for adapter in chosen for layer in adapter.layers), form)
        if homeless:
            seen = f"names {form}, X-Flux's format, which has no place for {homeless[0]}"
            hint = "Remove it, or set lora_targets to xflux or attn."
            raise ConfigError("train config", (Problem("lora_formats", seen, hint),))
    if config.lora_init:
        initial(Path(config.lora_init), chosen, config)


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


def put(
    transformer: nn.Module,
    adapters: list[Adapter],
    ranks: dict[str, int],
    scale: float,
    device: torch.device | None = None,
) -> dict[str, nn.Parameter]:
    """Put exactly these adapters in, not yet filled, and freeze all else. Returns their parameters by name."""
    transformer.requires_grad_(False)  # optimum-quanto's frozen weights ask for gradients
    parameters: dict[str, nn.Parameter] = {}
    for adapter in adapters:
        bases = [transformer.get_submodule(layer) for layer in adapter.layers]
        place = device or _device(bases[0])
        stem, _, leaf = adapter.name.rpartition(".")
        if adapter.layers == (adapter.name,):
            module: nn.Module = AdapterLinear(bases[0], ranks[adapter.name], scale, place)
        else:
            rows = [base.out_features for base in bases]
            module = FusedAdapter(adapter.inputs, rows, ranks[adapter.name], scale, place)  # type: ignore[arg-type]
            for part, (layer, base) in enumerate(zip(adapter.layers, bases)):  # noqa: B905
                _replace(transformer, layer, FusedAdapterLinear(base, module, part))
        transformer.get_submodule(stem).add_module(leaf, module)
        for factor in ("lora_A", "lora_B"):
            parameters[f"{adapter.name}.{factor}.weight"] = module.get_parameter(f"{factor}.weight")
    return parameters


def _replace(transformer: nn.Module, name: str, module: nn.Module) -> None:
    stem, _, leaf = name.rpartition(".")
    setattr(transformer.get_submodule(stem), leaf, module)


def _sizes(name: str, module: Any) -> Linear:
    return Linear(name, module.in_features, module.out_features)


def _scale(config: TrainConfig) -> float:
    return config.alpha / config.rank


def _device(base: nn.Module) -> torch.device | None:
    return next((tensor.device for tensor in chain(base.parameters(), base.buffers())), None)


def seed(adapters: dict[str, nn.Parameter], number: int) -> None:
    """A ~ N(0, 1/r), B = 0, from the seed and the adapter's name: alike on every rank, machine and release."""
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


def initial(path: Path, adapters: list[Adapter], config: TrainConfig) -> dict[str, fused.Pair]:
    """What the run's adapters start from, in the run's own form. Raises `CheckpointError` where that is not exact.

    q, k and v that are apart in the file become a fused adapter of three times the rank: that must be the run's,
    and the file's other adapters use a part of it only.
    """
    pairs = fused.refit(fused.pairs(lora_files.read(path)), {adapter.name for adapter in adapters})
    wanted = {adapter.name: adapter for adapter in adapters}
    odd = next((name for name in {**wanted, **pairs} if name not in wanted or name not in pairs), None)
    if odd is not None:
        what = "no adapter for" if odd in wanted else "an adapter for"
        then = "which this run trains" if odd in wanted else "which this run does not train"
        hint = "Set lora_targets and the block lists to what it holds, or remove lora_init."
        raise CheckpointError(f"{path} holds {what} {odd}, {then}.", hint)
    for name, (down, up) in pairs.items():
        adapter = wanted[name]
        if (down.shape[1], up.shape[0]) != (adapter.inputs, adapter.outputs):
            seen = f"{path} maps {down.shape[1]} to {up.shape[0]} channels at {name}, not {adapter.inputs} to "
            raise CheckpointError(f"{seen}{adapter.outputs}.", "Was it trained on another model?")
    rank = max(len(down) for down, _ in pairs.values())
    if rank != config.rank:
        seen = f"{path} holds adapters of rank {rank} in the form that this run has, not {config.rank}."
        raise CheckpointError(seen, f"Set rank to {rank}, or remove lora_init.")
    # Files are read with their scale in B; the run multiplies with its own.
    return {name: (down, up / _scale(config)) for name, (down, up) in pairs.items()}


def _start_from(parameters: dict[str, nn.Parameter], pairs: dict[str, fused.Pair]) -> None:
    """Copy the pairs in. Components beyond the rank of one stay fresh, and add nothing as their B is zero."""
    with torch.no_grad():
        for name, (down, up) in pairs.items():
            parameters[f"{name}.lora_A.weight"][: len(down)] = down.to(parameters[f"{name}.lora_A.weight"].device)
            parameters[f"{name}.lora_B.weight"][:, : len(down)] = up.to(parameters[f"{name}.lora_B.weight"].device)


def attach_file(transformer: nn.Module, path: Path, device: torch.device | None = None) -> dict[str, nn.Parameter]:
    """Put the adapters of a file, of any format, into the transformer."""
    weights = lora_files.read(path)
    modules = layers_of(transformer)
    adapters, ranks = [], {}
    for name, (down, up) in fused.pairs(weights).items():
        layers = parts_of(name)
        absent = next((layer for layer in layers if layer not in modules), None)
        if absent is not None:
            seen = f"{path} does not fit this model: the model has no layer {absent}."
            raise CheckpointError(seen, "Was it trained on another model?")
        sizes = [_sizes(layer, modules[layer]) for layer in layers]
        adapters.append(Adapter(name, layers, sizes[0].inputs, sum(size.outputs for size in sizes)))
        ranks[name] = len(down)
        if (down.shape[1], up.shape[0]) != (adapters[-1].inputs, adapters[-1].outputs):
            seen = f"{path} does not fit this model: {name} maps {down.shape[1]} to {up.shape[0]} channels there."
            raise CheckpointError(seen, "Was it trained on another model?")
    parameters = put(transformer, adapters, ranks, 1.0, device)
    fill(parameters, weights, path)
    return parameters


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
