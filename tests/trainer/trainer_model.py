"""A transformer of a few thousand parameters, the same on every stack, for tests that need no files."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from xflux_trainer.lora import generator
from xflux_trainer.spec import FluxSpec

torch.set_num_threads(1)  # sums of several threads may come in another order

TINY = FluxSpec("tiny", 2, 2, heads=2, head_dim=16, text_dim=24, pooled_dim=12)


def tiny_transformer(*, guidance: bool = True, single_blocks: int = 2) -> Any:
    """Weights by name from generators of our own, so that no release of a library changes them."""
    transformer = FluxTransformer2DModel(
        num_layers=TINY.double_blocks, num_single_layers=single_blocks, num_attention_heads=TINY.heads,
        attention_head_dim=TINY.head_dim, joint_attention_dim=TINY.text_dim, pooled_projection_dim=TINY.pooled_dim,
        guidance_embeds=guidance, in_channels=64, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(
                    1.0 if name.endswith("norm_q.weight") or ("norm" in name and name.endswith("weight")) else 0.0
                )
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator(name)) / parameter.shape[1] ** 0.5)
    return transformer.requires_grad_(False).train()
