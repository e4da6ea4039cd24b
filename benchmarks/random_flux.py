"""A FLUX.1 transformer with made-up weights, built on the device block by block: no file, no download, no host copy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer import cache
from xflux_trainer.lora import generator
from xflux_trainer.spec import FLUX_DEV, FluxSpec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "demo"))

import flux_layout

SPREAD = 0.02
"""Standard deviation of matrices: activations stay finite in bf16 through all 57 blocks."""
Prepare = Callable[[str, nn.Module], None]


def spec_of(layers: tuple[int, int], heads: int) -> FluxSpec:
    """FLUX.1-dev, or one with fewer blocks and heads."""
    return FluxSpec(
        "random", *layers, heads, FLUX_DEV.head_dim, FLUX_DEV.in_channels, FLUX_DEV.text_dim, FLUX_DEV.pooled_dim
    )


def build(spec: FluxSpec, dtype: torch.dtype, device: torch.device, prepare: Prepare | None = None) -> Any:
    """diffusers' transformer of that size, frozen, as the trainer's loader leaves it."""
    from diffusers import FluxTransformer2DModel

    sizes = {
        "num_layers": spec.double_blocks,
        "num_single_layers": spec.single_blocks,
        "num_attention_heads": spec.heads,
    }
    with torch.device("meta"):
        transformer: Any = FluxTransformer2DModel.from_config({**flux_layout.TRANSFORMER, **sizes})
    for name, module in parts(transformer):
        fill(module, dtype, device)
        if prepare is not None:
            prepare(name, module)
    return transformer.requires_grad_(False).train()


def parts(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Blocks and ends by name."""
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{number}", block) for number, block in enumerate(child))
        else:
            yield name, child


def fill(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give a module without weights some: matrices random, biases 0, norms 1."""
    for name, parameter in list(module.named_parameters()):
        path, _, leaf = name.rpartition(".")
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() > 1:
            value.normal_(0, SPREAD)
        else:
            value.fill_(0.0 if leaf == "bias" else 1.0)
        module.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def batch(
    spec: FluxSpec, pixels: int | tuple[int, int], size: int, number: int, *, condition: bool = False
) -> cache.Batch:
    """A batch as the cache gives it, with made-up values that depend on its number alone.

    `pixels` of a square's side, or the width and the height.
    """
    dice = generator("benchmark", number)
    width, height = (pixels, pixels) if isinstance(pixels, int) else pixels
    values: dict[str, Tensor] = {
        "latents": torch.randn(size, spec.in_channels // 4, height // 8, width // 8, generator=dice),
        "text": torch.randn(size, 512, spec.text_dim, generator=dice).mul_(0.1).bfloat16(),
        "pooled": torch.randn(size, spec.pooled_dim, generator=dice).bfloat16(),
    }
    if condition:
        values["condition"] = torch.randint(0, 256, (size, 3, height, width), generator=dice, dtype=torch.uint8)
    return cache.Batch(**values)
