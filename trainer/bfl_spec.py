"""The sizes of a FLUX.1 model in Black Forest Labs' single file, by its header alone. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from xflux_trainer.bfl import COMFY
from xflux_trainer.layout import parts_in
from xflux_trainer.spec import FLUX_DEV, FluxSpec, read_folder, safetensors_header


def read_single_file(path: str | Path) -> FluxSpec:
    """The spec of a transformer in BFL's layout. Raises OSError or ValueError when the file is not one."""
    path = Path(path)
    shapes = {
        name.removeprefix(COMFY): tuple(entry["shape"])
        for name, entry in safetensors_header(path).items()
        if name != "__metadata__"
    }
    try:
        hidden, channels = shapes["img_in.weight"]
        (head_dim,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
        text_dim, pooled_dim = shapes["txt_in.weight"][1], shapes["vector_in.in_layer.weight"][1]
        out_channels = shapes["final_layer.linear.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError("its tensors are not those of Black Forest Labs' layout") from error
    if out_channels != channels:
        raise ValueError(f"it takes {channels} channels and gives {out_channels}, as FLUX.1's Fill does")
    guidance = "guidance_in.in_layer.weight" in shapes
    return replace(
        FLUX_DEV,
        name=path.stem,
        double_blocks=_count(shapes, "double_blocks"),
        single_blocks=_count(shapes, "single_blocks"),
        heads=hidden // head_dim,
        head_dim=head_dim,
        in_channels=channels,
        text_dim=text_dim,
        pooled_dim=pooled_dim,
        guidance_embeds=guidance,
        dynamic_shift=guidance,
    )


def transformer_config(spec: FluxSpec) -> dict[str, Any]:
    """The `config.json` that diffusers would have beside such a transformer."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": spec.head_dim,
        "axes_dims_rope": list(axes(spec.head_dim)),
        "guidance_embeds": spec.guidance_embeds,
        "in_channels": spec.in_channels,
        "joint_attention_dim": spec.text_dim,
        "num_attention_heads": spec.heads,
        "num_layers": spec.double_blocks,
        "num_single_layers": spec.single_blocks,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": spec.pooled_dim,
    }


def axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with the index, the row and the column; FLUX.1's 128 are 16, 56 and 56."""
    side = 2 * (head_dim * 7 // 32)
    return head_dim - 2 * side, side, side


def read_local(place: Path) -> FluxSpec:
    """The spec of a local base model in either layout. Raises OSError or ValueError when it is not one."""
    parts = parts_in(place)
    transformer = parts.get("transformer")
    if transformer is None:
        raise ValueError("it has no transformer")
    spec = read_single_file(transformer) if transformer.is_file() else read_folder(transformer.parent)
    return count_parts(spec, parts)


def count_parts(spec: FluxSpec, parts: Mapping[str, Path]) -> FluxSpec:
    """The spec with the parameters of the models around the transformer, as far as their files are there.

    Raises OSError or ValueError for a broken file.
    """
    counts = {}
    if "text_encoder_2" in parts:
        counts["t5_parameters"] = _parameters(parts["text_encoder_2"])
    if clip := parts.get("text_encoder"):
        # OpenAI's own repository has CLIP's image half in the same file.
        counts["clip_parameters"] = _parameters(clip, "text_model.") or _parameters(clip)
    if vae := parts.get("vae"):
        counts["vae_parameters"] = _parameters(vae)
    known: dict[str, Any] = {key: count for key, count in counts.items() if count}
    return replace(spec, **known)


def _parameters(part: Path, prefix: str = "") -> int:
    files = [part] if part.is_file() else sorted(part.glob("*.safetensors"))
    headers = [safetensors_header(file) for file in files]
    return sum(
        math.prod(entry["shape"])
        for header in headers
        for name, entry in header.items()
        if name != "__metadata__" and name.startswith(prefix)
    )


def _count(shapes: dict[str, tuple[int, ...]], kind: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")})
