"""Two ranks, started by torchrun: every strategy trains the tiny transformer, and takes up every other's checkpoint.

    torchrun … scale_child.py FOLDER CASE…      CASE is STRATEGY[-offload][-bf16][-8bit][-kahan]:KIND

such as zero3-bf16:lora or fsdp-bf16-8bit-stochastic:full.

Writes FOLDER/results.json with what came out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainer_model import TINY, tiny_transformer
from xflux_trainer import evaluate, flow, fsdp, lora
from xflux_trainer.cache import Batch
from xflux_trainer.config import TrainConfig
from xflux_trainer.encoders import free
from xflux_trainer.model import DTYPES, Velocity
from xflux_trainer.optim import PlainStepper
from xflux_trainer.ranks import Launch, Ranks

CONFIG = TrainConfig(
    img_dir="x",
    rank=4,
    lora_targets="xflux",
    learning_rate=1e-2,
    mixed_precision="no",
    ema_decay=0.5,
    max_grad_norm=0.5,
)
STEPS = 3
"""Steps before the checkpoint; one more follows it."""
KINDS = ("lora", "full")


def config_of(case: str) -> TrainConfig:
    strategy, kind = case.split(":")
    precision: Any = next((name for name in ("bf16", "fp16") if name in strategy), "no")
    rounded: Any = next((name for name in ("stochastic", "kahan", "nearest") if name in strategy), "auto")
    optimizer: Any = "adamw8bit" if "8bit" in strategy else "adamw"
    mode: Any = "lora" if kind == "lora" else "finetune"
    return replace(CONFIG, mixed_precision=precision, mode=mode, weight_update=rounded, optimizer=optimizer)


def batch_loss(model: Any, step: int, k: int) -> Tensor:
    """The loss of one image; what it is follows from its number."""
    dice = lora.generator("batch", step, k)
    batch = Batch(
        torch.randn(1, 16, 8, 8, generator=dice), torch.randn(1, 5, TINY.text_dim, generator=dice),
        torch.randn(1, TINY.pooled_dim, generator=dice),
    )  # fmt: skip
    t, eps = flow.sample_t(1, 0.63, "uniform", dice), torch.randn(1, 16, 64, generator=dice)
    return evaluate.velocity_loss(model, CONFIG, batch, eps, t, torch.device("cpu")).mean()


def make(
    config: TrainConfig, prepare: Callable[[str, nn.Module], None] | None = None
) -> tuple[Velocity, dict[str, nn.Parameter]]:
    """The tiny model in the config's format, and what is trained of it: adapters, or everything."""
    transformer = tiny_transformer().to(DTYPES[config.mixed_precision])
    transformer.enable_gradient_checkpointing()
    if prepare:
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for number, block in enumerate(getattr(transformer, name)):
                prepare(f"{name}.{number}", block)
        for name in ("x_embedder", "proj_out"):
            prepare(name, getattr(transformer, name))
    if config.mode == "lora":
        trained = lora.attach(transformer, config)
        for name, value in trained.items():  # B starts at zero, which would leave A without a gradient
            value.data += 0.1 * torch.randn(value.shape, generator=lora.generator(name))
    else:
        trained = dict(transformer.requires_grad_(True).named_parameters())
    return Velocity(transformer, guidance=True), trained


def choose(strategy: str) -> None:
    """The environment that `accelerate launch` would leave."""
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = strategy[4] if strategy.startswith("zero") else ""
    for part in ("OPTIMIZER", "PARAM"):
        os.environ[f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE"] = "cpu" if "offload" in strategy else "none"
    os.environ["FSDP_OFFLOAD_PARAMS"] = str("offload" in strategy).lower()


def start(case: str, ranks: Ranks, accumulation: int = 1, seed: int = 0) -> tuple[Any, Velocity]:
    """The case's stepper with its model; an adapter's base is cut up as it is loaded, where the strategy does that."""
    config = replace(config_of(case), seed=seed)
    strategy = case.split(":")[0]
    choose(strategy)
    launch = replace(ranks.launch, deepspeed=strategy.startswith("zero"), fsdp=strategy.startswith("fsdp"))
    kind: Any = PlainStepper
    prepare = None
    asked = Ranks(launch)
    if launch.deepspeed:
        from xflux_trainer import zero

        kind, prepare = zero.ZeroStepper, zero.partitioner(config, asked)
    elif launch.fsdp:
        kind, prepare = fsdp.FsdpStepper, fsdp.sharder(config, asked)
    velocity, trained = make(config, prepare)
    share = held(velocity)
    stepper = kind(velocity, trained, config, asked, accumulation)
    stepper.share = share
    return stepper, velocity


def held(velocity: Velocity) -> float:
    """How much of the blocks' frozen weights this rank has, of 1."""
    here, everywhere = 0, 0
    for name, value in velocity.transformer.named_parameters():
        weight: Any = value
        if "transformer_blocks" in name and ".lora_" not in name:
            part = getattr(weight, "ds_tensor", weight.to_local() if hasattr(weight, "to_local") else weight)
            here += part.numel()
            everywhere += weight.ds_numel if hasattr(weight, "ds_numel") else weight.numel()
    return here / everywhere


def take(stepper: Any, ranks: Ranks, step: int, accumulation: int = 1) -> tuple[float, float]:
    """One step of both images; the loss is the mean over them, the norm that of the gradients."""
    stepper.begin(1e-2)
    losses = []
    for k in range(accumulation):
        with stepper.micro(k == accumulation - 1):
            loss = batch_loss(stepper, step, k * ranks.world_size + ranks.rank)
            stepper.backward(loss)
        losses.append(float(loss.detach()))
    norm = stepper.step()
    return ranks.total([sum(losses) / accumulation])[0] / ranks.world_size, norm


def run(folder: Path, case: str, ranks: Ranks, accumulation: int = 1) -> dict[str, Any]:
    stepper, velocity = start(case, ranks, accumulation)
    told: dict[str, Any] = {"strategy": stepper.strategy, "share": stepper.share}
    told["steps"] = [take(stepper, ranks, step, accumulation) for step in range(STEPS)]
    pieces: dict[str, Tensor] = {}
    for name, values in stepper.pieces():
        pieces |= {f"{name}|{key}": value.contiguous() for key, value in values.items()}
    for name, values in stepper.pieces(result=True):  # a result has the average where there is one, and no moments
        for key, value in values.items():
            assert key == "ema" or f"{name}|ema" not in pieces
            assert torch.equal(value, pieces[f"{name}|{key}"]) and len(values) == 1
    if ranks.main:
        save_file(pieces, folder / f"{case}.safetensors")
    told["scalars"] = stepper.scalars()
    ranks.barrier()
    told["next"] = take(stepper, ranks, STEPS, accumulation)
    with torch.no_grad(), stepper.averaged():
        told["average"] = float(batch_loss(velocity, 9, 0))
    with torch.no_grad():
        told["after"] = float(batch_loss(velocity, 9, 0))
    return told


def resume(folder: Path, case: str, source: str, scalars: dict[str, float], ranks: Ranks) -> dict[str, Any]:
    """Take up another's checkpoint; what follows must be what followed there."""
    stepper, velocity = start(case, ranks, seed=7)
    stored = load_file(folder / f"{source}.safetensors")

    def read(name: str) -> dict[str, Tensor]:
        return {key.split("|")[1]: value for key, value in stored.items() if key.split("|")[0] == name}

    stepper.load(read, scalars)
    told: dict[str, Any] = {"next": take(stepper, ranks, STEPS)}
    with torch.no_grad(), stepper.averaged():
        told["average"] = float(batch_loss(velocity, 9, 0))
    return told


def main() -> None:
    folder, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = Ranks(Launch.read({**os.environ, "ACCELERATE_USE_CPU": "true"}))
    ranks.join()
    place = Path(folder)
    results: dict[str, Any] = {case: run(place, case, ranks) for case in cases}
    # A loss scale, and DeepSpeed's rounded copies, are each one's own.
    sources = {case: case for case in cases if case.split(":")[0].endswith("16")}
    ways = {case: case.split(":")[0].removesuffix("-offload").partition("-")[2] for case in cases}
    for kind in KINDS:
        for way in dict.fromkeys(ways.values()):
            own = [case for case in cases if case.endswith(f":{kind}") and case not in sources and ways[case] == way]
            sources |= dict(zip(own, own[1:] + own[:1]))  # noqa: B905 (of one length)
    for case, source in sources.items():
        results[f"{case}<{source}"] = resume(place, case, source, results[source]["scalars"], ranks)
    if ranks.main:
        (place / "results.json").write_text(json.dumps(results), encoding="utf-8")
    free()  # as the trainer does: what talks through the process group goes before it
    ranks.barrier()
    ranks.leave()


if __name__ == "__main__":
    main()
