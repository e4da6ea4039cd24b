"""What a run trains, by the config and the model's sizes alone: no weights, no torch."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import ConfigError, Problem
from xflux_trainer.spec import Adapter, FluxSpec, adapters_of

HINT_CHANNELS = 16
"""Channels of every layer of X-Flux's hint block, eight convolutions of 3 x 3 from 3 channels."""


class Trained:
    """Trained parameters: their number, the largest tensor of them, and the base's linear layers that they change.

    Equal is only itself: what is asked for twice is the same object, and others are found by it.
    """

    def __init__(
        self, parameters: int, largest: int, layers: frozenset[str], adapters: tuple[Adapter, ...] = ()
    ) -> None:
        self.parameters, self.largest, self.layers, self.adapters = parameters, largest, layers, adapters


def trained(config: TrainConfig, spec: FluxSpec) -> Trained:
    """What the run's mode trains."""
    if config.mode == "lora":
        return _adapters(spec, config.rank, config.lora_targets, config.single_blocks, config.double_blocks)
    return _others(config.mode, config.train_parameters, config.controlnet_depth, spec)


@functools.lru_cache(maxsize=64)
def _adapters(
    spec: FluxSpec, rank: int, targets: str | tuple[str, ...], single: tuple[int, ...] | None,
    double: tuple[int, ...] | None,
) -> Trained:  # fmt: skip
    """Kept: they are the same for all plans of a job."""
    chosen = tuple(adapters_of(spec.linears(), targets, single, double))
    sizes = [rank * side for adapter in chosen for side in (adapter.inputs, adapter.outputs)]
    layers = frozenset(name for one in chosen for name in one.layers)
    return Trained(sum(sizes), max(sizes, default=0), layers, chosen)


@functools.lru_cache(maxsize=16)
def _others(mode: str, parts: tuple[str, ...], depth: int, spec: FluxSpec) -> Trained:
    config = TrainConfig("", mode=mode, train_parameters=parts, controlnet_depth=depth)  # type: ignore[arg-type]
    if mode == "controlnet":
        return Trained(controlnet_parameters(config, spec), spec.largest_tensor, frozenset())
    sizes_by_name = dict(parameters(spec))
    try:
        found = {name: sizes_by_name[name] for name in names(sizes_by_name, config)}
    except ConfigError:  # the trainer says which name is wrong; nothing of it can be counted
        found = {}
    layers = frozenset(name.rpartition(".")[0] for name in found if name.endswith(".weight"))
    linears = {linear.name for linear in spec.linears()}
    return Trained(sum(found.values()), max(found.values(), default=0), layers & linears)


def names(own: Iterable[str], config: TrainConfig) -> list[str]:
    """Those of a transformer's parameters (diffusers' names) that are trained, in their order. Raises `ConfigError`."""
    own = list(own)
    if not config.train_parameters:
        return own
    spellings = {name: _spellings(name) for name in own}
    problems = []
    for part in config.train_parameters:
        if not any(_has(spelling, part) for both in spellings.values() for spelling in both):
            seen = f'"{part}" is in no name of {config.base_model}'
            problems.append(Problem("train_parameters", seen, _near(part, spellings)))
    if problems:
        raise ConfigError("train config", tuple(problems))
    parts = config.train_parameters
    return [
        name for name, both in spellings.items() if any(_has(spelling, part) for spelling in both for part in parts)
    ]


def parameters(spec: FluxSpec) -> Iterator[tuple[str, int]]:
    """Every parameter of the transformer by its diffusers name, with its number of elements."""
    for linear in spec.linears():
        yield f"{linear.name}.weight", linear.inputs * linear.outputs
        yield f"{linear.name}.bias", linear.outputs
    norms = {"transformer_blocks": ("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
             "single_transformer_blocks": ("norm_q", "norm_k")}  # fmt: skip
    for kind, count in (("transformer_blocks", spec.double_blocks), ("single_transformer_blocks", spec.single_blocks)):
        for index in range(count):
            for norm in norms[kind]:
                yield f"{kind}.{index}.attn.{norm}.weight", spec.head_dim


def controlnet_spec(config: TrainConfig, spec: FluxSpec) -> FluxSpec:
    """The ControlNet's double blocks and embedders, as a transformer of its own; its last layers do not count."""
    return controlnet(config.controlnet_depth, spec)[0]


@functools.lru_cache(maxsize=16)
def controlnet(depth: int, spec: FluxSpec) -> tuple[FluxSpec, Trained]:
    """A ControlNet of so many blocks, and all of its linear layers as what is trained."""
    net = replace(spec, name="controlnet", double_blocks=depth, single_blocks=0)
    return net, Trained(0, 0, frozenset(linear.name for linear in net.linears()))


def controlnet_parameters(config: TrainConfig, spec: FluxSpec) -> int:
    """What can learn in a ControlNet: 649.4 of 743.8 million for FLUX.1-dev at X-Flux's depth of 2.

    The last block's text output is used by nobody, so what is behind it never gets a gradient.
    """
    return controlnet_size(config, spec) - _idle(spec)


def _idle(spec: FluxSpec) -> int:
    """ff_context, attn.to_add_out, add_q_proj and norm_added_q of the last block."""
    h, mlp = spec.hidden, spec.mlp
    return 2 * h * mlp + h + mlp + 2 * (h * h + h) + spec.head_dim


def controlnet_size(config: TrainConfig, spec: FluxSpec) -> int:
    """Parameters of the ControlNet: 743,807,280 for FLUX.1-dev at X-Flux's depth of 2."""
    parts = controlnet_spec(config, spec).parameters()
    own = sum(size for name, size in parts.items() if name not in ("norm_out", "proj_out"))
    outputs = config.controlnet_depth * (spec.hidden + 1) * spec.hidden
    condition = (spec.in_channels + 1) * spec.hidden
    convolutions = (3 * 9 + 1) * HINT_CHANNELS + 7 * (HINT_CHANNELS * 9 + 1) * HINT_CHANNELS
    return own + outputs + condition + convolutions


def _spellings(name: str) -> tuple[str, ...]:
    """diffusers' name, and BFL's of the tensor that it lies in."""
    from xflux_trainer import bfl  # where parts of the model are named alone

    place = bfl.place(name)
    return (name, place.name) if place else (name,)


def _has(name: str, part: str) -> bool:
    return f".{part.strip('.')}." in f".{name}."


def _near(part: str, spellings: Mapping[str, tuple[str, ...]]) -> str:
    """Pieces of names that look alike, as many dots deep as what was written."""
    depth = part.count(".") + 1
    words = {
        ".".join(pieces[start : start + depth])
        for both in spellings.values()
        for pieces in (spelling.split(".") for spelling in both)
        for start in range(len(pieces) - depth + 1)
    }
    import difflib  # for a misspelt name alone

    near = difflib.get_close_matches(part, sorted(words), 3, 0.6)
    return f"Did you mean {' or '.join(near)}?" if near else "Names such as txt_attn, attn.to_q or single_blocks.3."
