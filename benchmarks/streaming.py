"""What a LoRA step costs when FLUX.1's weights wait in the host's memory: full size, made-up weights, one GPU.

    python benchmarks/streaming.py [--budget-gib 12] [--blocks 0,19] [--steps 5] [--size 1024]

Measures how fast the link from pinned memory to the device is, then the trainer's own step (rank 16, batch 1, every
block checkpointed) with everything resident, with `stream_blocks` of each number in `--blocks`, with the modulation
kept and streamed, and with as many streamed blocks as bring the whole run inside the budget. The learning rate is 0,
so every row's losses must be the resident row's, but for the rounding of other matrix products. That no weight is read
before it has arrived, and none overwritten while it is read, is looked at on units of known values first.
Writes benchmarks/results/streaming-GPU-DATE.json and prints a table. Exit 1 when a weight was wrong.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import children
import full_size

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from children import GIB
from random_flux import batch, spec_of
from xflux_trainer import evaluate, flow, model, savings
from xflux_trainer.config import TrainConfig
from xflux_trainer.frozen import FrozenLinear
from xflux_trainer.lora import generator
from xflux_trainer.optim import PlainStepper
from xflux_trainer.ranks import Launch, Ranks
from xflux_trainer.stream import Streamer, pinned

WARM_UP = 3
COPY = 128 << 20
"""Bytes of one copy when the link is measured: a part of a block has about as many."""


def link(device: torch.device, copies: int = 32) -> float:
    """Bytes per second from pinned memory to the device, one copy after the other; 0 without a GPU."""
    if device.type != "cuda":
        return 0.0
    host, room = pinned(COPY, device), torch.empty(COPY, dtype=torch.uint8, device=device)
    room.copy_(host, non_blocking=True)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(copies):
        room.copy_(host, non_blocking=True)
    end.record()
    end.synchronize()
    return copies * COPY / (start.elapsed_time(end) / 1000)


def wrong_weights(device: torch.device, side: int, units: int = 12, rounds: int = 4) -> int:
    """Weights, of (side, side) each, that were not what they should be when a kernel read them, out of all rounds.

    Now the kernels are quicker than the copies, now they fall behind the host by many units.
    """
    streamer = Streamer(device)
    layers = []
    for number in range(units):
        linear = torch.nn.Linear(side, side, bias=False, device=device, dtype=torch.bfloat16)
        torch.nn.init.constant_(linear.weight, number + 1)
        layers.append(FrozenLinear(linear.requires_grad_(False)))
        streamer.take([layers[-1:]])
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    work = torch.zeros(side, side, dtype=torch.bfloat16, device=device)
    for turn in range(rounds):
        for number in (*range(units), *reversed(range(units))):
            weight = layers[number].dense(torch.bfloat16)
            for _ in range((turn + number // 3) % 3 * 8):
                torch.mm(work, work, out=work)
            wrong += (weight != number + 1).any()
    return int(wrong)


def streamer_of(module: torch.nn.Module) -> Streamer | None:
    """The streamer that the layers of a module ask; None: all its weights are on the device."""
    tickets: Any = (layer.streamed for layer in module.modules() if isinstance(layer, FrozenLinear) and layer.streamed)
    return next((ticket.streamer for ticket in tickets), None)


def measure(config: TrainConfig, spec: Any, ranks: Ranks, options: argparse.Namespace) -> dict[str, Any]:
    """Build the model, take the steps, and say what they cost."""
    cuda = ranks.device.type == "cuda"
    torch.manual_seed(0)  # the same weights in every row
    started = time.perf_counter()
    module, trained, found = full_size.assemble(config, spec, ranks.device)
    stepper = PlainStepper(module, trained, config, ranks, 1)
    streamer = streamer_of(module)
    found["load_seconds"] = time.perf_counter() - started
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, norms, copied, missed = [], [], [], [], []
    for number in range(WARM_UP + options.steps):
        data = batch(spec, config.img_size, 1, number)
        dice = generator("benchmark noise", number)
        x_0 = flow.pack(data.latents)
        t = flow.sample_t(1, flow.training_mu(config, spec, x_0.shape[1]), config.timestep_sampling, dice)
        eps = torch.randn(x_0.shape, generator=dice)
        started = time.perf_counter()
        stepper.begin(0.0)
        with stepper.micro(last=True):
            loss = evaluate.velocity_loss(stepper, config, data, eps, t, ranks.device).mean()
            stepper.backward(loss)
        losses.append(float(loss.detach()))
        norms.append(stepper.step())
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        copied.append(streamer.copied if streamer else 0)
        missed.append(streamer.missed if streamer else 0)
    allocated, reserved = full_size.peak(cuda)
    held = savings.held(config, spec, 2 if cuda else 4)
    steady = seconds[WARM_UP:]
    return found | {
        "seconds_per_step": statistics.median(steady), "seconds_min": min(steady), "seconds_max": max(steady),
        "allocated_gib": allocated, "reserved_gib": reserved, "held_gib": held.device / GIB,
        "slots_gib": held.slots / GIB, "copied_per_step": copied[-1] - copied[-2], "traffic_foreseen": held.traffic,
        "missed_per_step": missed[-1] - missed[-2], "losses": losses, "norms": norms,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], bandwidth: float) -> str:
    """The rows beside the first, which is the resident one. GB copied are 10^9 bytes, as the link's speed."""
    lines = [
        "| modulation | blocks | s/step | x resident | allocated GiB | base GiB | pinned GiB | GB copied | link used "
        "| missed | losses off by | norms off by |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = rows[0]
    for row in rows:
        used = row["copied_per_step"] / bandwidth / row["seconds_per_step"] if bandwidth else 0.0
        off = [max(abs(a / b - 1) for a, b in zip(row[key], first[key])) for key in ("losses", "norms")]  # noqa: B905
        lines.append(
            f"| {row['modulation']} | {row['stream_blocks']} | {row['seconds_per_step']:.3f} "
            f"| {row['seconds_per_step'] / first['seconds_per_step']:.2f} | {row['allocated_gib']:.2f} "
            f"| {row['held_gib']:.2f} | {row['pinned_gib']:.2f} | {row['copied_per_step'] / 1e9:.1f} | {used:.0%} "
            f"| {row['missed_per_step']} | {off[0]:.1e} | {off[1]:.1e} |"
        )
    return "\n".join(lines)


def save(options: argparse.Namespace, bandwidth: float, rows: list[dict[str, Any]]) -> Path:
    settings = {key: value for key, value in vars(options).items() if key != "results"}
    body = {"settings": settings, "warm_up": WARM_UP, "link_bytes_per_second": bandwidth, "rows": rows}
    return children.save(options.results, "streaming", "streaming.py", body)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--budget-gib", type=float, default=12.0, help="what the run with the fewest blocks must fit in"
    )
    parser.add_argument("--blocks", type=children.numbers, default=(0, 19), help="numbers of streamed blocks")
    parser.add_argument("--size", type=int, default=1024, help="pixels of the image's sides")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after three that are not")
    parser.add_argument(
        "--layers", type=children.numbers, default=(19, 38), metavar="D,S", help="double, single blocks"
    )
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 each")
    parser.add_argument("--results", type=Path, default=children.RESULTS, help="folder of the result")
    options = parser.parse_args()
    spec = spec_of(options.layers, options.heads)
    ranks = Ranks(Launch())
    ranks.join()
    cuda = ranks.device.type == "cuda"
    model.quiet_libraries()
    model.steady_attention(ranks.device)
    base = TrainConfig("none", img_size=options.size, mixed_precision="bf16" if cuda else "no")
    bandwidth = link(ranks.device)
    print(f"link from pinned memory: {bandwidth / 1e9:.1f} GB/s", flush=True)
    wrong = wrong_weights(ranks.device, 8192 if cuda else 32)
    print(f"weights that were wrong when they were read: {wrong}", flush=True)
    rows: list[dict[str, Any]] = []

    def row(config: TrainConfig) -> None:
        head = {"modulation": config.modulation, "stream_blocks": config.stream_blocks}
        rows.append(head | measure(config, spec, ranks, options))
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()

    gc.collect()
    row(base)
    configs = [
        replace(base, stream_blocks=count, modulation=how) for how in ("keep", "stream") for count in options.blocks
    ]
    # All but the base is the same whatever is streamed; a hundredth is left to how the allocator cuts its memory.
    room = 0.99 * options.budget_gib - rows[0]["allocated_gib"] + rows[0]["held_gib"]
    for how in ("keep", "stream"):
        config = replace(base, modulation=how)
        count = savings.blocks_to_stream(config, spec, int(room * GIB), 2 if cuda else 4)
        if count is None:
            print(f"modulation {how}: no number of streamed blocks fits into {options.budget_gib:g} GiB")
        else:
            configs.append(replace(config, stream_blocks=count))
    for config in dict.fromkeys(configs):
        if config != base:
            row(config)
    print(table(rows, bandwidth))
    print(f"\nwritten to {save(options, bandwidth, rows)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
