"""Bring the base model's transformer onto the device tensor by tensor, and call it.

The module is made without weights, then every tensor goes from the file's pages straight to the device in
the wanted format: no fp32 copy, and no copy in the memory of the host for each rank.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer.bfl_spec import count_parts, read_single_file, transformer_config
from xflux_trainer.errors import ModelError
from xflux_trainer.find import locate, resolve
from xflux_trainer.layout import Base
from xflux_trainer.pulse import PULSE
from xflux_trainer.spec import FluxSpec, read_folder
from xflux_trainer.weights import open_weights

__all__ = [
    "DTYPES", "Inputs", "Velocity", "blocks", "empty_transformer", "fill", "fingerprint", "load_transformer", "locate",
    "put_tensor", "quiet_libraries", "read_spec", "resolve", "steady_attention",
]  # fmt: skip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
Prepare = Callable[[str, nn.Module], None]


def read_spec(base: Base) -> FluxSpec:
    """The sizes of a base model, by its config or its single file's header. Raises `ModelError`."""
    place = base.transformer
    try:
        spec = read_single_file(place) if place.is_file() else read_folder(place.parent)
        return count_parts(spec, vars(base))
    except (OSError, ValueError, KeyError, TypeError) as error:
        shown = place if place.is_file() else place.parent
        hint = "Name FLUX.1-dev's or FLUX.1-schnell's own, or download it again."
        raise ModelError(f"{shown} cannot be read as a FLUX.1 model: {error}.", hint) from error


def empty_transformer(base: Base) -> nn.Module:
    """diffusers' `FluxTransformer2DModel` of the base's sizes, without weights: on the meta device.

    Raises `ModelError`.
    """
    from diffusers import FluxTransformer2DModel

    place = base.transformer
    if place.is_file():
        settings = transformer_config(read_spec(base))
    else:
        settings = _settings(place)
    with torch.device("meta"):
        module: nn.Module = FluxTransformer2DModel.from_config(settings)
    return module


def _settings(place: Path) -> dict[str, Any]:
    """A transformer's config.json."""
    file = place / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if "num_layers" not in settings:
            raise ValueError("it names no num_layers")
    except (OSError, ValueError, TypeError) as error:
        seen = f"{file} does not describe a FLUX.1 transformer: {error}."
        raise ModelError(seen, "Name the folder `transformer` of a model in diffusers' layout.") from error
    return dict(settings)


def load_transformer(base: Base, dtype: torch.dtype, device: torch.device, prepare: Prepare | None = None) -> nn.Module:
    """diffusers' `FluxTransformer2DModel`, frozen, in `dtype` on `device`.

    `prepare(name, module)` is called for every block (`transformer_blocks.3`) and every end (`x_embedder`) as soon as
    its tensors are on the device and before the next one's are read. Raises `ModelError`.
    """
    transformer = empty_transformer(base)
    with open_weights(base.transformer, device) as weights:
        weights.refuse({name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()})
        wanted = [f"{name}.{leaf}" for name, module in blocks(transformer) for leaf, _ in module.named_parameters()]
        with closing(weights.stream(wanted)) as tensors:
            for name, module in blocks(transformer):
                PULSE.tick()
                fill(module, tensors, dtype)
                if prepare is not None:
                    prepare(name, module)
    # The blocks hold no dropout; some diffusers releases checkpoint only a module that is in training mode.
    return transformer.train()


def blocks(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every block and every end that has weights, by name, in the order in which they compute."""
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{number}", block) for number, block in enumerate(child))
        elif next(child.parameters(), None) is not None:
            yield name, child


def fill(module: nn.Module, tensors: Iterator[Tensor], dtype: torch.dtype) -> None:
    """Give a module without weights its own, frozen: the next ones, in the order of its parameters."""
    for name, _ in list(module.named_parameters()):
        put_tensor(module, name, next(tensors).to(dtype))


def put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def fingerprint(place: Path) -> str:
    """Who the weights of a folder or of a single file are: sizes, names, and pages spread over every file.

    Hashing 10 GB at every start would take longer than what the cache saves; two trainings of one
    architecture differ in nearly every page.
    """
    import hashlib

    digest = hashlib.sha256()
    for file in [place] if place.is_file() else sorted(place.glob("*")):
        if file.suffix not in (".safetensors", ".json", ".txt", ".model"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= 1 << 20:
                digest.update(stream.read())
                continue
            for step in range(64):
                stream.seek(step * (size - 4096) // 63)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:32]


class Inputs:
    """What diffusers' own forward does not hand on whole: t before it is rounded, and which text tokens are padding.

    It rounds t to the model's format before the embedding. A mask given by `joint_attention_kwargs` is left out by
    diffusers 0.32 under gradient checkpointing, and by every release's ControlNet. Hooks put both where they belong.
    """

    def __init__(self, net: nn.Module) -> None:
        self.t: Tensor | None = None
        self.mask: Tensor | None = None
        """(B, 1, 1, L + N), True where a token is attended to. Kept until the next forward: checkpointing computes
        a block again in the backward pass."""
        module: Any = net
        module.time_text_embed.register_forward_pre_hook(self._exact_time)
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for block in getattr(module, name):
                block.attn.register_forward_pre_hook(self._masked, with_kwargs=True)

    def take(self, t: Tensor, mask: Tensor | None, image_tokens: int) -> None:
        """For one forward pass: t (B,), mask (B, L) of the text's tokens."""
        self.t = t.float()
        self.mask = None
        if mask is not None:
            image = torch.ones(len(mask), image_tokens, dtype=torch.bool, device=mask.device)
            self.mask = torch.cat([mask.bool(), image], dim=1)[:, None, None]

    def _exact_time(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.t is not None
        return (self.t * 1000, *args[1:])

    def _masked(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return None if self.mask is None else (args, {**kwargs, "attention_mask": self.mask})


class Velocity(nn.Module):
    """The transformer as this trainer calls it: tokens in, velocity out, and t untouched on its way."""

    transformer: Any

    def __init__(self, transformer: nn.Module, *, guidance: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.guidance = guidance
        self.fast: Callable[..., Tensor] | None = None
        """What computes the transformer instead of diffusers' forward, see `fast`."""
        self._inputs = Inputs(transformer)

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
        residuals: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, N, 4C) velocity for tokens x_t at times t (B,), text (B, L, D), pooled (B, P).

        `mask` (B, L) is True at the text's tokens and False at its padding. `residuals` (B, N, H) of a ControlNet are
        added after the double blocks, in turn. A `condition` is for a ControlNet: the transformer alone ignores it.
        """
        dtype = self.transformer.x_embedder.weight.dtype
        self._inputs.take(t, mask, x_t.shape[1])
        guidances = torch.full((len(t),), guidance, device=t.device) if self.guidance else None
        residuals = None if residuals is None else [each.to(dtype) for each in residuals]
        if self.fast is not None and mask is None:
            return self.fast(x_t.to(dtype), text.to(dtype), pooled.to(dtype), t, guidances, ids, text_ids, residuals)
        v: Tensor = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=t,
            guidance=guidances,
            encoder_hidden_states=text.to(dtype),
            pooled_projections=pooled.to(dtype),
            img_ids=ids,
            txt_ids=text_ids,
            controlnet_block_samples=residuals,
            controlnet_blocks_repeat=True,
            return_dict=False,
        )[0]
        return v


def steady_attention(device: torch.device) -> None:
    """Leave out cuDNN's attention: its backward pass died on this model on an H100, torch's flash never did."""
    if device.type == "cuda" and hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def quiet_libraries() -> None:
    """The libraries' warnings about attributes that nobody reads would bury the progress lines."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # diffusers' own ControlNet has it from the old place.
    warnings.filterwarnings("ignore", message=".*FluxPosEmbed", category=FutureWarning)
    # torch's own calls of its own deprecated functions, once for every checkpointed block.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
