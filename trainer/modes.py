"""What a run trains and what it writes, as its mode says: adapters, the model itself, or a ControlNet beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer import controlnet, fast, finetune, lora, lora_files, optimizers
from xflux_trainer.config import TrainConfig
from xflux_trainer.layout import Base
from xflux_trainer.model import Velocity
from xflux_trainer.ranks import Ranks
from xflux_trainer.spec import FluxSpec
from xflux_trainer.trained import names, parameters

Weights = Iterator[tuple[str, Tensor]]


@dataclass
class Trainee:
    """The module that is called, its trained parameters by name, and how they are written at the end."""

    module: nn.Module
    """Called as `Velocity` is: (x_t, t, text, pooled, ids, text_ids, guidance, mask, condition) to the velocity."""
    trained: dict[str, nn.Parameter]
    write: Callable[[Path, Weights], list[Path]]
    """Writes the result from (name, whole value on the host), and says where it is. Uses the iterator up."""
    result: str
    """What it is called when the run says where it is."""


def build(
    config: TrainConfig, base: Base, spec: FluxSpec, transformer: nn.Module, dtype: torch.dtype, ranks: Ranks,
    *, cut: bool = False,
) -> tuple[Trainee, list[str]]:  # fmt: skip
    """Make of a loaded, frozen transformer what the mode trains; and what is worth a note. `cut`: its weights are cut
    up among the ranks. Raises `ConfigError`, `ModelError`, `Unsupported`."""
    trainee = _build(config, base, spec, transformer, dtype, ranks)
    module: Any = trainee.module
    velocity = module.velocity if config.mode == "controlnet" else module
    velocity.fast, notes = fast.build(transformer, config, ranks.device, cut=cut)
    return trainee, notes


def fused(trainee: Trainee) -> bool:
    """Whether the trainer's own blocks compute the transformer, and not diffusers'."""
    module: Any = trainee.module
    return getattr(module, "velocity", module).fast is not None


def _build(
    config: TrainConfig, base: Base, spec: FluxSpec, transformer: nn.Module, dtype: torch.dtype, ranks: Ranks
) -> Trainee:
    if config.gradient_checkpointing:
        checkpointed: Any = transformer
        checkpointed.enable_gradient_checkpointing()
    if config.mode == "finetune":
        own = finetune.select(transformer, config)
        return Trainee(
            Velocity(transformer, guidance=spec.guidance_embeds),
            own,
            lambda output, weights: [finetune.write(output, weights, base, config)],
            "the transformer",
        )
    if config.mode == "controlnet":
        net: Any = controlnet.build(base, config, dtype, ranks.device)
        if config.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        idle = controlnet.idle(net)
        return Trainee(
            controlnet.ControlVelocity(net, transformer, guidance=spec.guidance_embeds),
            controlnet.parameters(net),
            lambda output, weights: controlnet.write(output, {**idle, **dict(weights)}, config, net),
            "the ControlNet",
        )
    adapters = lora.attach(transformer, config)
    return Trainee(
        Velocity(transformer, guidance=spec.guidance_embeds),
        adapters,
        lambda output, weights: lora_files.write_all(output, dict(weights), config),
        "the adapter",
    )


def refuse(config: TrainConfig, base: Base, spec: FluxSpec) -> None:
    """What of the config this model has not, before anything is encoded or loaded. Raises `UserError`."""
    if config.mode == "lora":
        lora.check(config, spec.linears())
    elif config.mode == "finetune":
        finetune.refuse_overwriting(Path(config.output_dir), base)
        names((name for name, _ in parameters(spec)), config)
    else:
        controlnet.check(config, spec)
    optimizers.check(config)
