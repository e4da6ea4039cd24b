"""What a quantised base does to the prediction and to the loss, for each format and each choice for the modulation.

FLUX.1's weights may not be handed out, and a model of pure noise has no loss worth comparing. So a model of FLUX.1's
architecture, of some millions of parameters, is first trained on images that follow from their captions: waves whose
direction and length stand in the text. Then every choice is applied to a copy of it, the held-out loss is measured,
adapters are trained on waves of another kind (the same seed and batches for every choice), and it is measured again.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from random_flux import parts, spec_of
from torch import Tensor, nn
from xflux_trainer import cache, evaluate, flow, lora, model, quantize, savings
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import UserError
from xflux_trainer.lora import generator
from xflux_trainer.optim import PlainStepper
from xflux_trainer.ranks import Launch, Ranks

SIDE, TEXT, BATCH = 16, 4, 16
"""Latents of a side, text tokens, images in a batch."""
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
CHOICES = [("none", "keep")] + [
    (name, modulation)
    for name in ("int8", "fp8", "torchao-int8", "torchao-fp8", "int4", "nf4")
    for modulation in ("keep", "quantize")
]


def measure(steps: int, *, layers: tuple[int, int] = (4, 8), heads: int = 2) -> list[dict[str, Any]]:
    """One row for every choice; `steps` hundreds of steps of training before, `steps` tens of adapter steps."""
    ranks = Ranks(Launch())
    ranks.join()
    model.quiet_libraries()
    model.steady_attention(ranks.device)
    spec = spec_of(layers, heads)
    base = _start(spec, ranks.device)
    _train(model.Velocity(base, guidance=True), list(base.parameters()), steps * 100, "waves", ranks.device)
    base.requires_grad_(False).to(torch.bfloat16)
    rows = []
    for name, modulation in CHOICES:
        try:
            rows.append(_choice(base, spec, name, modulation, steps * 10, ranks))
        except UserError as error:
            rows.append({"row": f"{name}/{modulation}", "outcome": "not there", "why": str(error)})
        if rows[-1]["outcome"] == "measured":
            _relate(rows[-1], rows[0])
        print(table(rows).splitlines()[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| base | modulation | base's bytes | prediction | held-out loss | after adapters |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name, modulation = row["row"].split("/")
        if row["outcome"] != "measured":
            lines.append(f"| {name} | {modulation} | {row['outcome']} | – | – | – |")
            continue
        cells = [f"{row['bytes'] / row['bytes_bf16']:.1%}", f"{row['prediction']:.2%}"]
        cells += [f"{row[key]:.4f} ({row[f'{key}_relative']:+.2%})" for key in ("before", "after")]
        lines.append(f"| {name} | {modulation} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _choice(base: Any, spec: Any, name: str, modulation: str, steps: int, ranks: Ranks) -> dict[str, Any]:
    config = TrainConfig(
        "none", quantization=name, modulation=modulation, rank=4, lora_targets="diffusers", learning_rate=1e-3
    )
    transformer = copy.deepcopy(base)
    prepare = quantize.preparer(config, ranks.device, (spec.double_blocks, spec.single_blocks))
    for path, module in parts(transformer) if prepare else ():
        assert prepare is not None
        prepare(path, module)
    velocity = model.Velocity(transformer, guidance=True)
    exact = _predictions(model.Velocity(copy.deepcopy(base), guidance=True), ranks.device)
    off = float((_predictions(velocity, ranks.device) - exact).norm() / exact.norm())
    before = _heldout(velocity, config, "waves", ranks.device)
    adapters = lora.attach(transformer, config)
    stepper = PlainStepper(velocity, adapters, config, ranks, 1)
    started = time.perf_counter()
    for number in range(steps):
        stepper.begin(config.learning_rate)
        with stepper.micro(last=True):
            stepper.backward(_loss(stepper, config, "rings", number, ranks.device).mean())
        stepper.step()
    return {
        "row": f"{name}/{modulation}", "outcome": "measured", "prediction": off, "before": before,
        "after": _heldout(velocity, config, "rings", ranks.device), "adapter_steps": steps,
        "bytes": savings.held(config, spec).device, "bytes_bf16": spec.transformer_parameters * 2,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _relate(row: dict[str, Any], plain: dict[str, Any]) -> None:
    for key in ("before", "after"):
        row[f"{key}_relative"] = row[key] / plain[key] - 1


def _start(spec: Any, device: torch.device) -> Any:
    """The architecture with weights that training can start from, the same on every device."""
    from diffusers import FluxTransformer2DModel

    transformer: Any = FluxTransformer2DModel(
        num_layers=spec.double_blocks, num_single_layers=spec.single_blocks, num_attention_heads=spec.heads,
        attention_head_dim=spec.head_dim, joint_attention_dim=spec.text_dim, pooled_projection_dim=spec.pooled_dim,
        guidance_embeds=True, in_channels=spec.in_channels,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator("effect", name))
                parameter.copy_(values / parameter.shape[1] ** 0.5 * (0.1 if "norm" in name else 1))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return transformer.to(device).train()


def _train(velocity: nn.Module, weights: list[nn.Parameter], steps: int, kind: str, device: torch.device) -> None:
    """Train all weights in fp32, with a rate that rises and falls."""
    config = TrainConfig("none", mixed_precision="no")
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(2, steps))
    for number in range(steps):
        loss = _loss(velocity, config, kind, number, device).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if number % 100 == 0 or number == steps - 1:
            print(f"training the base: step {number}, loss {float(loss.detach()):.4f}", flush=True)


def _loss(module: Any, config: TrainConfig, kind: str, number: int, device: torch.device) -> Tensor:
    dice = generator("effect", kind, number)
    batch = _batch(kind, dice)
    t = flow.sample_t(BATCH, 0.0, "uniform", dice)
    eps = torch.randn(flow.pack(batch.latents).shape, generator=dice)
    return evaluate.velocity_loss(module, config, batch, eps, t, device)


@torch.no_grad()
def _heldout(velocity: nn.Module, config: TrainConfig, kind: str, device: torch.device) -> float:
    """The mean loss on images that were never trained on, at fixed times with fixed noise."""
    total = 0.0
    for number, time_ in enumerate(TIMES):
        dice = generator("effect held-out", kind, number)
        batch = _batch(kind, dice)
        eps = torch.randn(flow.pack(batch.latents).shape, generator=dice)
        losses = evaluate.velocity_loss(velocity, config, batch, eps, torch.full((BATCH,), time_), device)
        total += float(losses.mean())
    return total / len(TIMES)


@torch.no_grad()
def _predictions(velocity: nn.Module, device: torch.device) -> Tensor:
    """The model's own answers on held-out inputs."""
    kept: list[Tensor] = []

    def listen(*args: Any) -> Tensor:
        kept.append(velocity(*args).float())
        return kept[-1]

    config = TrainConfig("none")
    for number in range(len(TIMES)):
        dice = generator("effect predictions", number)
        batch = _batch("waves", dice)
        eps = torch.randn(flow.pack(batch.latents).shape, generator=dice)
        evaluate.velocity_loss(listen, config, batch, eps, torch.full((BATCH,), TIMES[number]), device)
    return torch.cat(kept)


def _batch(kind: str, dice: torch.Generator) -> cache.Batch:
    """Images (waves, or rings round the middle) with their direction, length and phase written into the text."""
    angle, length, phase = torch.rand(3, BATCH, generator=dice)
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
    turn = (angle * torch.pi).view(-1, 1, 1)
    way = x * turn.cos() + y * turn.sin() if kind == "waves" else (x * x + y * y).sqrt().expand(BATCH, -1, -1)
    wave = (way * (2 + 6 * length).view(-1, 1, 1) + (6.3 * phase).view(-1, 1, 1)).sin()  # (B, h, w)
    colors = torch.linspace(-1, 1, 16).view(1, 16, 1, 1)
    told = torch.stack([angle, length, phase], 1) * 2 - 1  # (B, 3)
    text = torch.zeros(BATCH, TEXT, 4096)
    text[:, :, :96] = told.repeat_interleave(32, 1)[:, None]
    pooled = torch.zeros(BATCH, 768)
    pooled[:, :96] = told.repeat_interleave(32, 1)
    return cache.Batch(wave[:, None] * colors, text.bfloat16(), pooled.bfloat16())
