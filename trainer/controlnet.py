"""A ControlNet as X-Flux trains it: the base's first double blocks, fed with an image, beside the frozen base.

It is diffusers' `FluxControlNetModel` with X-Labs' parts: a hint block of eight convolutions that takes the image to
latent size, and one zero layer for each block. The residuals are added after the base's double blocks in turn: block i
gets residual i modulo the depth. (X-Flux takes i modulo 2, whatever the depth; its nets have 2.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer import bfl, files
from xflux_trainer.bfl import Place
from xflux_trainer.bfl_spec import axes
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import ConfigError, ModelError, Problem
from xflux_trainer.layout import Base
from xflux_trainer.lora import generator
from xflux_trainer.model import DTYPES, Inputs, Velocity, put_tensor, read_spec
from xflux_trainer.spec import FluxSpec
from xflux_trainer.tensorfile import TensorFile, write_placed
from xflux_trainer.weights import STEM, Weights, open_weights

FILE = "controlnet.safetensors"
"""In X-Flux's format."""
FOLDER = "controlnet"
"""In diffusers' layout."""
HINT_CHANNELS = 16


class ControlVelocity(nn.Module):
    """A ControlNet and the frozen transformer, called as `Velocity` is; only the ControlNet is trained."""

    controlnet: Any

    def __init__(self, controlnet: nn.Module, transformer: nn.Module, *, guidance: bool) -> None:
        super().__init__()
        self.controlnet = controlnet
        self.velocity = Velocity(transformer, guidance=guidance)
        self._inputs = Inputs(controlnet)

    @property
    def transformer(self) -> Any:
        return self.velocity.transformer

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor,
        ids: Tensor,
        text_ids: Tensor,
        guidance: float,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """(B, N, 4C) velocity; `condition` is (B, 3, H, W) in uint8, of the size of the images. Else as `Velocity`."""
        if condition is None:
            raise ValueError("a ControlNet wants a condition")
        dtype = self.controlnet.x_embedder.weight.dtype
        self._inputs.take(t, mask, x_t.shape[1])
        residuals: list[Tensor] = self.controlnet(
            hidden_states=x_t.to(dtype),
            controlnet_cond=(condition.float() / 127.5 - 1).to(dtype),
            timestep=t,
            guidance=torch.full((len(t),), guidance, device=t.device) if self.velocity.guidance else None,
            encoder_hidden_states=text.to(dtype),
            pooled_projections=pooled.to(dtype),
            img_ids=ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        v: Tensor = self.velocity(x_t, t, text, pooled, ids, text_ids, guidance, mask, None, residuals)
        return v


def build(base: Base, config: TrainConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """diffusers' `FluxControlNetModel` in training mode, in `dtype` on `device`; `parameters` says what is trained.

    From `controlnet_init`; without one, what it shares with the base has the base's weights, read from the files, and
    the rest is drawn from the seed. Raises `ConfigError`, `ModelError`.
    """
    spec = read_spec(base)
    check(config, spec)
    module = empty(spec, config.controlnet_depth)
    if config.controlnet_init:
        _fill_from(module, Path(config.controlnet_init).expanduser(), config, dtype, device)
    else:
        _start(module, base, config.seed, dtype, device)
    for parameter in parameters(module).values():
        parameter.requires_grad_(True)
    return module.train()


def check(config: TrainConfig, spec: FluxSpec) -> None:
    """Raise `ConfigError` or `ModelError` for what `build` would refuse: asked before all work."""
    if config.controlnet_depth > spec.double_blocks:
        seen = f"is {config.controlnet_depth}, and {config.base_model} has {spec.double_blocks} double blocks"
        problem = Problem("controlnet_depth", seen, f"Write {spec.double_blocks} or less.")
        raise ConfigError("train config", (problem,))
    if config.controlnet_init:
        with _opened(Path(config.controlnet_init).expanduser(), torch.device("cpu")) as weights:
            _same_depth(weights, config)


def parameters(controlnet: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by diffusers' names: all that can learn.

    Only the image's half of the last block's output is used. What is behind its text's half never gets a gradient,
    which DDP would wait for, and the optimizer would keep 12 bytes for each of its parameters.
    """
    net: Any = controlnet
    last = f"transformer_blocks.{len(net.transformer_blocks) - 1}."
    idle = tuple(last + part for part in ("ff_context.", "attn.to_add_out.", "attn.add_q_proj.", "attn.norm_added_q."))
    return {name: parameter for name, parameter in net.named_parameters() if not name.startswith(idle)}


def idle(net: nn.Module) -> dict[str, Tensor]:
    """What is not trained, on the host, by diffusers' names: `write` wants it whole, and ZeRO-3 and FSDP cut it up."""
    trained = parameters(net)
    return {name: value.to("cpu", copy=True) for name, value in net.state_dict().items() if name not in trained}


def write(
    output: Path,
    weights: Mapping[str, Tensor],
    config: TrainConfig,
    net: nn.Module,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write `controlnet.safetensors` as X-Flux reads it, and the folder `controlnet` as diffusers does.

    What is not among the `weights` is the net's own. In the format that the run computed in if
    `dtype` is None. Raises `WriteError`.
    """
    dtype = dtype or DTYPES[config.mixed_precision]
    weights = {**net.state_dict(), **weights}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    single = write_placed(output / FILE, weights.items(), shapes, place, dtype)
    with files.new_folder(output / FOLDER) as folder:
        files.write_json(folder / "config.json", settings_of(shapes))
        with TensorFile(folder / f"{STEM}.safetensors", shapes, dtype) as file:
            for name, value in weights.items():
                file.put(name, value)
    return [single, output / FOLDER]


def load(source: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The ControlNet of a file in X-Flux's format or of a folder in diffusers' layout, frozen. Raises `ModelError`."""
    with _opened(source, device) as weights:
        module = _module(_settings_in(weights))
        _fill(module, weights, dtype)
    return module.eval()


def place(name: str) -> Place | None:
    """Where diffusers' tensor of that name lies in X-Flux's file."""
    layer, _, leaf = name.rpartition(".")
    if layer == "controlnet_x_embedder":
        return Place(f"pos_embed_input.{leaf}")
    if re.fullmatch(r"controlnet_blocks\.\d+", layer):
        return Place(name)
    if layer in HINT_LAYERS:
        return Place(f"input_hint_block.{HINT_LAYERS[layer]}.{leaf}")
    return bfl.place(name)


# Convolutions with a SiLU after each but the last.
HINT_LAYERS = {
    "input_hint_block.conv_in": 0,
    **{f"input_hint_block.blocks.{number}": 2 * number + 2 for number in range(6)},
    "input_hint_block.conv_out": 14,
}
"""diffusers' name of each convolution of the hint block, and its number in X-Flux's."""


def empty(spec: FluxSpec, depth: int) -> nn.Module:
    """A ControlNet for that base, without weights: on the meta device."""
    return _module({
        "num_layers": depth, "num_attention_heads": spec.heads, "attention_head_dim": spec.head_dim,
        "in_channels": spec.in_channels, "joint_attention_dim": spec.text_dim,
        "pooled_projection_dim": spec.pooled_dim, "guidance_embeds": spec.guidance_embeds,
    })  # fmt: skip


def settings_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """diffusers' config of a ControlNet with tensors of these names and shapes. Raises KeyError when it is not one."""
    hidden, channels = shapes["x_embedder.weight"]
    (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    return {
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}),
        "num_attention_heads": hidden // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        **_fixed(head_dim),
    }


def _fixed(head_dim: int) -> dict[str, Any]:
    return {
        "_class_name": "FluxControlNetModel",
        "axes_dims_rope": list(axes(head_dim)),
        "conditioning_embedding_channels": HINT_CHANNELS,
        "num_mode": None,
        "num_single_layers": 0,
        "patch_size": 2,
    }


def _module(settings: dict[str, Any]) -> nn.Module:
    from diffusers import FluxControlNetModel

    with torch.device("meta"):
        module: nn.Module = FluxControlNetModel.from_config({**_fixed(settings["attention_head_dim"]), **settings})
    return module


def _start(module: nn.Module, base: Base, seed: int, dtype: torch.dtype, device: torch.device) -> None:
    with open_weights(base.transformer, device) as weights:
        for name, parameter in list(module.named_parameters()):
            shared = not name.startswith(("controlnet_", "input_hint_block."))
            tensor = weights.read(name) if shared else _fresh(module, name, parameter.shape, seed).to(device)
            put_tensor(module, name, tensor.to(dtype))


def _fresh(module: nn.Module, name: str, shape: torch.Size, seed: int) -> Tensor:
    """Zero where the net must add nothing at first; else torch's own start, from the seed and the name.

    Only the last of the hint block is zero before the blocks: were the layer after it zero too, neither would learn.
    """
    if name.startswith(("controlnet_blocks.", "input_hint_block.conv_out.")):
        return torch.zeros(shape)
    weight: Any = module.get_submodule(name.rpartition(".")[0]).weight
    bound = weight[0].numel() ** -0.5
    return (torch.rand(shape, generator=generator(seed, "controlnet", name)) * 2 - 1) * bound


def _fill_from(module: nn.Module, source: Path, config: TrainConfig, dtype: torch.dtype, device: torch.device) -> None:
    with _opened(source, device) as weights:
        _same_depth(weights, config)
        _fill(module, weights, dtype)


def _same_depth(weights: Weights, config: TrainConfig) -> None:
    depth = _settings_in(weights)["num_layers"]
    if depth != config.controlnet_depth:
        seen = f"is {config.controlnet_depth}, and the ControlNet of controlnet_init has {depth} blocks"
        raise ConfigError("train config", (Problem("controlnet_depth", seen, f"Write {depth}."),))


def _fill(module: nn.Module, weights: Weights, dtype: torch.dtype) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    weights.refuse(shapes)
    for name in shapes:
        put_tensor(module, name, weights.read(name).to(dtype))


def _opened(source: Path, device: torch.device) -> AbstractContextManager[Weights]:
    if source.name == f"{STEM}.safetensors":
        source = source.parent
    if source.is_file() and source.suffix != ".safetensors":
        seen = f"{source} is not a safetensors file; other weight files can run code when they are read."
        hint = "Save it anew: `safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)`."
        raise ModelError(seen, hint)
    if not source.exists():
        raise ModelError(f"The ControlNet {source} does not exist.", "Correct controlnet_init in the train config.")
    return open_weights(source, device, place if source.is_file() else Place)


def _settings_in(weights: Weights) -> dict[str, Any]:
    """diffusers' config of the ControlNet in these files."""
    stored = weights.names()
    blocks = {name.split(".")[1] for name in stored if name.startswith(("double_blocks.", "transformer_blocks."))}
    guidance = any("guidance" in name for name in stored)
    # Its names follow from these two; its sizes are still to be read.
    names = empty(FluxSpec("", heads=1, head_dim=32, guidance_embeds=guidance), len(blocks)).state_dict()
    try:
        return settings_of({name: weights.shape(name) for name in names})
    except (KeyError, ValueError) as error:
        seen = f"{weights.source} is not a ControlNet as X-Flux trains it: it lacks {error}."
        raise ModelError(seen, "Name a controlnet.safetensors of X-Flux's format, or diffusers' folder.") from error
