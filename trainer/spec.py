"""What a FLUX.1 model is: sizes as values, and the parameters, tokens and FLOPs that follow from them.

Checked against diffusers' `FluxTransformer2DModel` on the meta device; FLUX.1-dev has 11,901,408,320 parameters.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from xflux_trainer.targets import LORA_TARGETS, Adapter, adapters_of, count_blocks, is_target, unmatched

__all__ = [
    "FLUX_DEV", "FLUX_SCHNELL", "LORA_TARGETS", "PATCH", "SPECS", "TIME_CHANNELS", "Adapter", "FluxSpec", "Linear",
    "adapters_of", "count_blocks", "count_parameters", "image_tokens", "is_target", "read_folder",
    "safetensors_header", "shift_mu", "unmatched",
]  # fmt: skip

PATCH = 16
"""Pixels on a side of one image token."""
TIME_CHANNELS = 256
"""Width of the sinusoidal embedding of t and of the guidance."""


class Linear(NamedTuple):
    """One linear layer: where it hangs in diffusers' transformer, and its sizes."""

    name: str
    inputs: int
    outputs: int
    per_token: bool = True
    """False for the layers that see one vector per image: modulation and the time embedding."""

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs


@dataclass(frozen=True)
class FluxSpec:
    """The numbers of `transformer/config.json`, and the sizes of the models around the transformer."""

    name: str
    double_blocks: int = 19
    single_blocks: int = 38
    heads: int = 24
    head_dim: int = 128
    in_channels: int = 64
    text_dim: int = 4096
    pooled_dim: int = 768
    guidance_embeds: bool = True
    dynamic_shift: bool = True
    """Whether the model samples with a shift that depends on the number of image tokens (dev: yes)."""
    t5_parameters: int = 4_762_310_656
    clip_parameters: int = 123_060_480
    vae_parameters: int = 83_819_683

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Kept: a plan's search asks for what follows from one spec ten thousand times. Of the numbers alone, whose
        hash is the same in every process, so that a pickled spec may bring it along."""
        return hash(astuple(self)[1:])

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def mlp(self) -> int:
        return 4 * self.hidden

    def parameters(self) -> dict[str, int]:
        """Parameters of each part of the transformer; their sum is the whole."""
        norms = {"double": 4 * self.head_dim, "single": 2 * self.head_dim}
        embeds = [linear for linear in self._ends() if linear.name.startswith("time_text_embed.")]
        ends = {linear.name.split(".")[0]: linear.parameters for linear in self._ends() if linear not in embeds}
        return {
            "double_blocks": self.double_blocks * (_sum(self._double()) + norms["double"]),
            "single_blocks": self.single_blocks * (_sum(self._single()) + norms["single"]),
            "time_text_embed": _sum(embeds),
            **ends,
        }

    @functools.cached_property
    def transformer_parameters(self) -> int:
        return sum(self.parameters().values())

    @functools.cached_property
    def largest_tensor(self) -> int:
        """Elements of the largest weight: what a loader that goes tensor by tensor holds twice."""
        kinds = (
            *self._ends(),
            *(self._double() if self.double_blocks else ()),
            *(self._single() if self.single_blocks else ()),
        )
        return max(linear.inputs * linear.outputs for linear in kinds)

    def kinds(self) -> tuple[tuple[str, int, list[Linear]], ...]:
        """The two kinds of blocks: where they hang, how many there are, and the linear layers of one; all are alike."""
        return (
            ("transformer_blocks", self.double_blocks, self._double()),
            ("single_transformer_blocks", self.single_blocks, self._single()),
        )

    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer of the transformer, by its diffusers name."""
        return _linears(self)

    def _double(self) -> list[Linear]:
        h, mlp = self.hidden, self.mlp
        attention = (
            "to_q",
            "to_k",
            "to_v",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_out.0",
            "to_add_out",
        )
        return [
            Linear("norm1.linear", h, 6 * h, per_token=False),
            Linear("norm1_context.linear", h, 6 * h, per_token=False),
            *(Linear(f"attn.{name}", h, h) for name in attention),
            *(Linear(f"{ff}.net.0.proj", h, mlp) for ff in ("ff", "ff_context")),
            *(Linear(f"{ff}.net.2", mlp, h) for ff in ("ff", "ff_context")),
        ]

    def _single(self) -> list[Linear]:
        h, mlp = self.hidden, self.mlp
        return [
            Linear("norm.linear", h, 3 * h, per_token=False),
            *(Linear(f"attn.{name}", h, h) for name in ("to_q", "to_k", "to_v")),
            Linear("proj_mlp", h, mlp),
            Linear("proj_out", h + mlp, h),
        ]

    def _ends(self) -> list[Linear]:
        h = self.hidden
        inputs = {"timestep_embedder": TIME_CHANNELS, "text_embedder": self.pooled_dim}
        if self.guidance_embeds:
            inputs["guidance_embedder"] = TIME_CHANNELS
        return [
            *(Linear(f"time_text_embed.{n}.linear_1", size, h, per_token=False) for n, size in inputs.items()),
            *(Linear(f"time_text_embed.{name}.linear_2", h, h, per_token=False) for name in inputs),
            Linear("context_embedder", self.text_dim, h),
            Linear("x_embedder", self.in_channels, h),
            Linear("norm_out.linear", h, 2 * h, per_token=False),
            Linear("proj_out", h, self.in_channels),
        ]

    def forward_flops(self, image_tokens: int, text_tokens: int = 512) -> float:
        """FLOPs of one forward pass of one image; a multiply and an add are two."""
        return _forward_flops(self, image_tokens, text_tokens)

    def step_flops(self, image_tokens: int, text_tokens: int = 512, *, checkpointing: bool) -> float:
        """FLOPs that one adapter step executes: forward, input gradients, attention's backward (2.5 forwards)."""
        tokens = image_tokens + text_tokens
        forward = self.forward_flops(image_tokens, text_tokens)
        attention = (self.double_blocks + self.single_blocks) * 4 * tokens**2 * self.hidden
        return forward * (2 if checkpointing else 1) + (forward - attention) + 2.5 * attention


@functools.lru_cache(maxsize=64)
def _forward_flops(spec: FluxSpec, image_tokens: int, text_tokens: int) -> float:
    tokens, blocks = image_tokens + text_tokens, spec.double_blocks + spec.single_blocks
    # A double block sends every token through one of its two streams, so it costs what a single one costs.
    per_block = 2 * tokens * (4 * spec.hidden**2 + 2 * spec.hidden * spec.mlp)
    attention = 4 * tokens**2 * spec.hidden
    ends = 2 * spec.hidden * (text_tokens * spec.text_dim + 2 * image_tokens * spec.in_channels)
    # Some layers see one vector of an image.
    vectors = 2 * sum(linear.inputs * linear.outputs for linear in spec.linears() if not linear.per_token)
    return float(blocks * (per_block + attention) + ends + vectors)


@functools.lru_cache(maxsize=16)
def _linears(spec: FluxSpec) -> tuple[Linear, ...]:
    """Kept: a plan asks for them hundreds of times."""
    found = spec._ends()
    for kind, count, layers in spec.kinds():
        for index in range(count):
            found += [Linear(f"{kind}.{index}.{name}", *sizes) for name, *sizes in layers]
    return tuple(found)


FLUX_DEV = FluxSpec("flux-dev")
FLUX_SCHNELL = replace(FLUX_DEV, name="flux-schnell", guidance_embeds=False, dynamic_shift=False)
SPECS = {spec.name: spec for spec in (FLUX_DEV, FLUX_SCHNELL)}


def image_tokens(width: int, height: int) -> int:
    """Tokens of an image of that many pixels."""
    return (width // PATCH) * (height // PATCH)


def shift_mu(tokens: int) -> float:
    """FLUX's shift for a number of image tokens: the line through (256, 0.5) and (4096, 1.15)."""
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def read_folder(folder: str | Path) -> FluxSpec:
    """The spec of a pipeline folder in diffusers' layout. Raises OSError or ValueError when it is not one."""
    folder = Path(folder)
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "num_layers" not in config:
        raise ValueError(f"{folder / 'transformer' / 'config.json'} does not describe a Flux transformer")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    dynamic = (
        json.loads(scheduler.read_text(encoding="utf-8")).get("use_dynamic_shifting") if scheduler.exists() else None
    )
    spec = replace(
        FLUX_DEV,
        name=folder.name,
        double_blocks=int(config["num_layers"]),
        single_blocks=int(config["num_single_layers"]),
        heads=int(config["num_attention_heads"]),
        head_dim=int(config["attention_head_dim"]),
        in_channels=int(config["in_channels"]),
        text_dim=int(config["joint_attention_dim"]),
        pooled_dim=int(config["pooled_projection_dim"]),
        guidance_embeds=bool(config["guidance_embeds"]),
        dynamic_shift=bool(config["guidance_embeds"]) if dynamic is None else bool(dynamic),
    )
    return replace(
        spec,
        t5_parameters=_known(count_parameters(folder / "text_encoder_2"), spec.t5_parameters),
        clip_parameters=_known(count_parameters(folder / "text_encoder"), spec.clip_parameters),
        vae_parameters=_known(count_parameters(folder / "vae"), spec.vae_parameters),
    )


def count_parameters(folder: Path) -> int | None:
    """Parameters in a folder's safetensors files, by their headers alone; None when it has none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    total = 0
    for file in files:
        for name, entry in safetensors_header(file).items():
            if name != "__metadata__":
                total += math.prod(entry["shape"])
    return total


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: tensor name to dtype, shape and offsets. Raises ValueError when broken."""
    with file.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= 100_000_000:
            raise ValueError(f"{file} is not a safetensors file")
        raw = stream.read(size)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{file} has a broken safetensors header") from error
    if len(raw) < size or not isinstance(header, dict):
        raise ValueError(f"{file} is cut short")
    return header


def _known(value: int | None, default: int) -> int:
    return default if value is None else value


def _sum(linears: list[Linear]) -> int:
    return sum(linear.parameters for linear in linears)
