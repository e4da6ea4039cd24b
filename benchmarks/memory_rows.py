"""The configurations whose memory is measured: a list, and draws from the whole space. Torch-free."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from xflux_trainer.buckets import area_buckets
from xflux_trainer.config import TrainConfig
from xflux_trainer.memory import GIB, Bill, forecast
from xflux_trainer.memory_diffusers import Norms
from xflux_trainer.rules import between
from xflux_trainer.spec import FLUX_DEV, FluxSpec, image_tokens

Keys = dict[str, Any]
SIZES = ("img_size", "train_batch_size", "bucket_by")
"""Keys that one model can be trained with other values of."""
FIXED: Keys = {
    "max_train_steps": 10**6, "checkpointing_steps": 10**6, "sample_every": 0, "heldout_samples": 0,
    "disable_sampling": True, "report_to": "none", "lora_targets": "diffusers", "img_size": 1024,
}  # fmt: skip
"""What a row's keys are laid over: nothing but steps, and no encoder or VAE beside them."""
MOST_WORK = 4 * 4608
"""Tokens of a drawn step: more would only take longer."""


@dataclass(frozen=True)
class Row:
    """One configuration: the train config's keys beside `FIXED`, and the images' width and height if not a square."""

    name: str
    keys: Keys
    shape: tuple[int, int] | None = None

    def config(self, precision: str = "bf16") -> TrainConfig:
        return TrainConfig("none", **{"mixed_precision": precision, **FIXED, **self.keys})

    @property
    def base(self) -> str:
        """Rows with the same can share one model: all but the images' sizes and their number."""
        return repr(sorted((key, value) for key, value in self.keys.items() if key not in SIZES))


def spec_of(layers: tuple[int, int], heads: int) -> FluxSpec:
    """FLUX.1-dev, or one with fewer blocks and heads."""
    return replace(FLUX_DEV, double_blocks=layers[0], single_blocks=layers[1], heads=heads)


def bill(
    row: Row, spec: FluxSpec, device: Any, *, triton: bool, precision: str = "bf16", norms: Norms = "fused"
) -> Bill:
    """The forecast, as the doctor asks for it. Of images that are no squares it knows the area alone."""
    config = row.config(precision)
    return forecast(config, spec, world_size=1, strategy="single", device=device, triton=triton, norms=norms)


# The list ------------------------------------------------------------------------------------------------

KEPT: Keys = {"gradient_checkpointing": False}
DIFFUSERS: Keys = {"kernels": "diffusers"}
BACKWARD: Keys = {"mode": "finetune", "step_in_backward": True}
ADAFACTOR: Keys = {**BACKWARD, "optimizer": "adafactor"}
ADAM8: Keys = {**BACKWARD, "optimizer": "adamw8bit"}
CONTROL: Keys = {"mode": "controlnet"}
DYNAMIC: Keys = {"quantization": "fp8-dynamic"}
QUANTIZE: Keys = {"modulation": "quantize"}


def tier(count: int) -> Keys:
    return {"checkpointed_blocks": count}


def size(pixels: int, batch: int = 1) -> Keys:
    return {"img_size": pixels, "train_batch_size": batch}


def lora(rank: int, targets: Any) -> Keys:
    return {"rank": rank, "lora_targets": targets}


def form(name: str) -> Keys:
    return {"quantization": name}


def area(name: str, width: int, height: int, pixels: int, keys: Keys) -> Row:
    """Images of one bucket of the area `pixels` squared."""
    return Row(name, {**keys, "img_size": pixels, "bucket_by": "area"}, (width, height))


ROWS = [
    # Tiers and sizes, of one set of adapters.
    Row("lora-kept", KEPT),
    Row("lora-kept-512", {**KEPT, **size(512)}),
    Row("lora-kept-512-batch4", {**KEPT, **size(512, 4)}),
    Row("lora-kept-256-batch8", {**KEPT, **size(256, 8)}),
    Row("lora-kept-1024-batch2", {**KEPT, **size(1024, 2)}),
    Row("lora-kept-1536", {**KEPT, **size(1536)}),
    area("lora-kept-1152x896", 1152, 896, 1024, KEPT),
    area("lora-kept-448x576-batch3", 448, 576, 512, {**KEPT, "train_batch_size": 3}),
    Row("lora-checkpointed", {}),
    Row("lora-checkpointed-256", size(256)),
    Row("lora-checkpointed-512-batch8", size(512, 8)),
    Row("lora-checkpointed-1024-batch4", size(1024, 4)),
    Row("lora-checkpointed-1536-batch2", size(1536, 2)),
    area("lora-checkpointed-832x1216", 832, 1216, 1024, {}),
    area("lora-checkpointed-1792x1280", 1792, 1280, 1536, {}),
    Row("lora-tier10", tier(10)),
    Row("lora-tier28", tier(28)),
    Row("lora-tier28-768-batch2", {**tier(28), **size(768, 2)}),
    Row("lora-tier45", tier(45)),
    Row("lora-tier45-1536", {**tier(45), **size(1536)}),
    area("lora-tier45-896x640-batch4", 896, 640, 768, {**tier(45), "train_batch_size": 4}),
    # Ranks and targets.
    Row("lora-4-xflux", lora(4, "xflux")),
    Row("lora-4-attn-kept-512", {**lora(4, "attn"), **KEPT, **size(512)}),
    Row("lora-16-xflux-kept", {**lora(16, "xflux"), **KEPT}),
    Row("lora-16-all-kept", {**lora(16, "all-linear"), **KEPT}),
    Row("lora-64-attn-tier28", {**lora(64, "attn"), **tier(28)}),
    Row("lora-64-all", lora(64, "all-linear")),
    Row("lora-128-diffusers-kept-512", {**lora(128, "diffusers"), **KEPT, **size(512)}),
    Row("lora-128-xflux-batch2", {**lora(128, "xflux"), **size(1024, 2)}),
    Row("lora-128-all-512", {**lora(128, "all-linear"), **size(512)}),
    Row("lora-last-single-kept", {**KEPT, "single_blocks": (37,), "double_blocks": ()}),
    Row("lora-doubles-tier10-512", {**tier(10), **size(512), "single_blocks": ()}),
    Row("lora-modulation-kept-768", {**lora(16, ("norm.linear", "norm1.linear", "attn.to_q")), **KEPT, **size(768)}),
    # What a step does beside.
    Row("lora-launched-kept", {**KEPT, "cuda_graphs": False}),
    Row("lora-accumulation2-kept-512", {**KEPT, **size(512), "gradient_accumulation_steps": 2}),
    Row("lora-accumulation2-launched", {"gradient_accumulation_steps": 2, "cuda_graphs": False}),
    Row("lora-ema-64", {**lora(64, "diffusers"), "ema_decay": 0.99}),
    Row("lora-adafactor", {"optimizer": "adafactor"}),
    Row("lora-adamw8bit-64", {**lora(64, "all-linear"), "optimizer": "adamw8bit"}),
    Row("lora-backward-128", {**lora(128, "diffusers"), "step_in_backward": True}),
    Row("lora-fp16-kept-512", {**KEPT, **size(512), "mixed_precision": "fp16"}),
    Row("lora-fp32-512", {**size(512), "mixed_precision": "no"}),
    # diffusers' own blocks.
    Row("diffusers-checkpointed", DIFFUSERS),
    Row("diffusers-checkpointed-512-batch4", {**DIFFUSERS, **size(512, 4)}),
    Row("diffusers-kept", {**DIFFUSERS, **KEPT}),
    Row("diffusers-kept-512", {**DIFFUSERS, **KEPT, **size(512)}),
    Row("diffusers-all-64-kept-512", {**DIFFUSERS, **KEPT, **lora(64, "all-linear"), **size(512)}),
    Row("diffusers-xflux-kept", {**DIFFUSERS, **KEPT, **lora(16, "xflux")}),
    Row("diffusers-int8", {**DIFFUSERS, **form("int8")}),
    Row("diffusers-finetune-adafactor", {**DIFFUSERS, **ADAFACTOR}),
    # Bases in fewer bytes.
    Row("dynamic-keep-kept", {**DYNAMIC, **KEPT}),
    Row("dynamic-kept", {**DYNAMIC, **QUANTIZE, **KEPT}),
    Row("dynamic-checkpointed-batch2", {**DYNAMIC, **QUANTIZE, **size(1024, 2)}),
    Row("dynamic-all-tier28-512", {**DYNAMIC, **QUANTIZE, **lora(64, "all-linear"), **tier(28), **size(512)}),
    Row("dynamic-stream8", {**DYNAMIC, **QUANTIZE, "stream_blocks": 8}),
    Row("fp8", {**form("fp8"), **QUANTIZE}),
    Row("fp8-kept-512", {**form("fp8"), **KEPT, **size(512)}),
    Row("int8-kept", {**form("int8"), **KEPT}),
    Row("int8-tier45", {**form("int8"), **QUANTIZE, **tier(45)}),
    Row("int4", {**form("int4"), **QUANTIZE}),
    Row("int4-kept-512", {**form("int4"), **QUANTIZE, **KEPT, **size(512)}),
    Row("torchao-int8", form("torchao-int8")),
    Row("torchao-fp8-512", {**form("torchao-fp8"), **QUANTIZE, **size(512)}),
    Row("nf4", {**form("nf4"), **QUANTIZE}),
    Row("nf4-stream-modulation-512", {**form("nf4"), "modulation": "stream", **size(512)}),
    # Weights that wait on the host.
    Row("modulation-stream-kept", {"modulation": "stream", **KEPT}),
    Row("stream19", {"stream_blocks": 19}),
    Row("stream28-modulation", {"stream_blocks": 28, "modulation": "stream"}),
    Row("stream57-512", {"stream_blocks": 57, **size(512)}),
    Row("int8-stream35", {**form("int8"), **QUANTIZE, "stream_blocks": 35}),
    # The model's own weights.
    Row("finetune-adafactor", ADAFACTOR),
    Row("finetune-adafactor-kept", {**ADAFACTOR, **KEPT}),
    Row("finetune-adafactor-tier28-512-batch4", {**ADAFACTOR, **tier(28), **size(512, 4)}),
    Row("finetune-adafactor-tier50-1536-batch2", {**ADAFACTOR, **tier(50), **size(1536, 2)}),
    Row("finetune-adamw8bit", ADAM8),
    Row("finetune-adamw8bit-kept-512", {**ADAM8, **KEPT, **size(512)}),
    Row("finetune-adamw8bit-kahan", {**ADAM8, "weight_update": "kahan"}),
    Row("finetune-adamw8bit-after-512", {"mode": "finetune", "optimizer": "adamw8bit", **size(512)}),
    Row("finetune-text-attention", {"mode": "finetune", "train_parameters": ("txt_attn",)}),
    Row("finetune-text-attention-kept-512",
        {**ADAM8, "train_parameters": ("txt_attn",), **KEPT, **size(512)}),
    Row("finetune-singles-adamw8bit-tier28", {**ADAM8, "train_parameters": ("single_transformer_blocks",), **tier(28)}),
    # A ControlNet beside it.
    Row("controlnet", CONTROL),
    Row("controlnet-kept-512", {**CONTROL, **KEPT, **size(512)}),
    Row("controlnet-4-adamw8bit-512", {**CONTROL, **ADAM8, **CONTROL, "controlnet_depth": 4, **size(512)}),
    Row("controlnet-int8-tier28-768", {**CONTROL, **form("int8"), **tier(28), **size(768)}),
    Row("controlnet-diffusers", {**CONTROL, **DIFFUSERS}),
]  # fmt: skip


# Draws ---------------------------------------------------------------------------------------------------


def drawn(count: int, seed: int, spec: FluxSpec, most: float = 130.0) -> list[Row]:
    """`count` configurations that the rules allow, from the seed; none that is forecast above `most` GiB."""
    dice = random.Random(f"memory:{seed}")
    rows: list[Row] = []
    while len(rows) < count:
        row = _draw(dice, spec, f"random-{seed}-{len(rows)}")
        config = row.config()
        width, height = row.shape or (config.img_size, config.img_size)
        tokens = (image_tokens(width, height) + config.max_text_tokens) * config.train_batch_size
        heavy = tokens * config.gradient_accumulation_steps > MOST_WORK
        if heavy or between(config) or bill(row, spec, "cuda", triton=True).gpu_phases["train"] > most * GIB:
            continue
        rows.append(row)
    return rows


def _draw(dice: random.Random, spec: FluxSpec, name: str) -> Row:
    """One configuration, whether it is allowed or not. Values at their defaults are not written down."""
    mode = dice.choices(("lora", "finetune", "controlnet"), (6, 2, 1))[0]
    keys: Keys = size(dice.randrange(256, 1537, 64), dice.choices((1, 2, 3, 4, 6, 8), (6, 3, 1, 2, 1, 1))[0])
    blocks = spec.double_blocks + spec.single_blocks
    which = dice.choice(("all", "some", "none"))
    keys |= KEPT if which == "none" else tier(dice.randrange(1, blocks)) if which == "some" else {}
    shape = None
    if dice.random() < 0.3:
        keys["bucket_by"] = "area"
        # A flatter bucket has up to a tenth fewer pixels than its area: the forecast is of those that matter.
        full = [each for each in area_buckets(keys["img_size"]) if each[0] * each[1] >= 0.97 * keys["img_size"] ** 2]
        shape = dice.choice(full)
    if mode == "lora":
        keys |= lora(dice.choice((1, 4, 8, 16, 32, 64, 96, 128, 256)),
                     dice.choice(("xflux", "attn", "diffusers", "all-linear")))  # fmt: skip
        if dice.random() < 0.2:
            keys["single_blocks"] = tuple(sorted(dice.sample(range(spec.single_blocks), spec.single_blocks // 3)))
    else:
        keys["mode"] = mode
        keys["optimizer"] = dice.choice(("adamw", "adamw8bit", "adafactor"))
        keys["step_in_backward"] = dice.random() < 0.7
    if mode == "finetune" and dice.random() < 0.5:
        parts = ("txt_attn", "single_transformer_blocks", "transformer_blocks", "attn")
        keys["train_parameters"] = (dice.choice(parts),)
    if mode == "controlnet":
        keys["controlnet_depth"] = dice.randint(1, min(4, spec.double_blocks))
    if mode != "finetune" and dice.random() < 0.5:
        keys |= form(dice.choice(("fp8-dynamic", "fp8", "int8", "int4", "nf4")))
        keys |= QUANTIZE if dice.random() < 0.6 else {}
    if mode != "finetune" and dice.random() < 0.25:
        keys["stream_blocks"] = dice.randint(1, blocks)
    if mode != "finetune" and "modulation" not in keys and dice.random() < 0.2:
        keys["modulation"] = "stream"
    keys |= DIFFUSERS if dice.random() < 0.2 else {}
    keys |= {"cuda_graphs": False} if dice.random() < 0.2 else {}
    keys |= {"gradient_accumulation_steps": 2} if dice.random() < 0.2 else {}
    keys |= {"ema_decay": 0.99} if dice.random() < 0.15 else {}
    return Row(name, keys, shape)
