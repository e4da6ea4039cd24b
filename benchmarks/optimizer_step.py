"""The optimizer's part of a full fine-tune's step: fused kernels beside the library's own step on fp32 copies.

    python benchmarks/optimizer_step.py [--width 3072] [--optimizers adafactor,adamw8bit] [--repeats 5] [--torchao]

A double and a single block's weights of FLUX.1 in bf16, rounded stochastically, are stepped one after the other, norm
included, as the backward pass does it; a step of the model is 19 times the one and 38 times the other. Bytes are those
that the fused kernels must move for a parameter: Adafactor reads the gradient three times and the weight once and
writes that; AdamW in 8 bits reads the gradient twice and the weight and both moments once and writes those. The share
is of what a copy moves on the same device. Peak memory is what a step takes besides weights, gradients and moments.
Under a minute on a GPU; on the CPU the width is 128 and there are no fused rows.
Writes benchmarks/results/optimizer_step-DEVICE-DATE.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer import meter, optimizers, slots
from xflux_trainer.config import TrainConfig

RESULTS = Path(__file__).resolve().parent / "results"
BYTES = {"adafactor": 10, "adamw8bit": 12}
Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, cols: int) -> Shapes:
    return {f"{name}.weight": (rows, cols), f"{name}.bias": (rows,)}


def double(width: int) -> Shapes:
    """Shapes of a double block's parameters."""
    found: Shapes = {}
    for stream in ("", "_context"):
        found |= linear(f"norm1{stream}", 6 * width, width)
        found |= linear(f"ff{stream}.up", 4 * width, width) | linear(f"ff{stream}.down", width, 4 * width)
        for part in ("q", "k", "v", "out"):
            found |= linear(f"attn{stream}.{part}", width, width)
        found |= {f"attn{stream}.norm_{part}": (128,) for part in "qk"}
    return found


def single(width: int) -> Shapes:
    found = linear("norm", 3 * width, width) | linear("up", 4 * width, width) | linear("down", width, 5 * width)
    for part in "qkv":
        found |= linear(part, width, width)
    return found | {f"norm_{part}": (128,) for part in "qk"}


BLOCKS = ((19, double), (38, single))


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_speed(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        sync(device)
        start = time.perf_counter()
        target.copy_(source)
        sync(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def drawn(shapes: Shapes, device: torch.device) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    weights = {name: nn.Parameter(_normal(shape, device).mul_(0.02)) for name, shape in shapes.items()}
    return weights, {name: _normal(shape, device).mul_(1e-4) for name, shape in shapes.items()}


def _normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()


def measure(name: str, fused: bool, shapes: Shapes, device: torch.device, repeats: int) -> dict[str, float] | None:
    """Seconds of a block's step, of its launches alone, of its first; bytes besides. None where nothing is fused."""
    config = TrainConfig(img_dir="none", mode="finetune", optimizer=name, weight_update="stochastic")
    weights, grads = drawn(shapes, device)
    taken, made = slots.make(weights, config, device, together=False)
    if not fused:
        for slot in taken:
            slot._fused = False
    elif not all(slot._fused for slot in taken):
        return None
    for optimizer in made:
        optimizers.set_rate(optimizer, 1e-5)

    def step(number: int) -> tuple[float, float]:
        sync(device)
        start = time.perf_counter()
        for slot in taken:
            grad = grads[slot.name]
            slot.measure(grad)
            slot.step(grad, 0.5, number)
        launched = time.perf_counter() - start
        sync(device)
        return time.perf_counter() - start, launched

    first = step(1)[0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    whole, launched = min(step(2 + k) for k in range(repeats))
    besides = torch.cuda.max_memory_allocated() - held if device.type == "cuda" else 0
    return {"seconds": whole, "launches": launched, "first": first, "besides": float(besides)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="of the model: FLUX.1's 3072 on a GPU, 128 elsewhere")
    parser.add_argument("--optimizers", default="adafactor,adamw8bit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--torchao", action="store_true", help="torchao's own step on a GPU too: it compiles for minutes"
    )
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = asked.width or (3072 if device.type == "cuda" else 128)
    speed = copy_speed(device)
    parameters = sum(count * sum(torch.Size(s).numel() for s in make(width).values()) for count, make in BLOCKS)
    card = meter.device_name(device)
    print(f"{card}, width {width}, {parameters / 1e9:.2f} B parameters, copy {speed / 1e9:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    for name in asked.optimizers.split(","):
        for fused in (False, True):
            if name == "adamw8bit" and device.type == "cuda" and not fused and not asked.torchao:
                continue
            found = [measure(name, fused, make(width), device, asked.repeats if fused else 2) for _, make in BLOCKS]
            parts = [part for part in found if part]
            if len(parts) < len(BLOCKS):
                print(f"{name:10} fused    not on this device")
                continue
            whole = {key: sum(count * part[key] for (count, _), part in zip(BLOCKS, parts, strict=True))
                     for key in ("seconds", "launches")}  # fmt: skip
            moved = BYTES[name] * parameters / whole["seconds"]
            row = {"optimizer": name, "fused": fused, **whole, "first": sum(part["first"] for part in parts),
                   "besides": max(part["besides"] for part in parts), "share_of_copy": moved / speed}  # fmt: skip
            rows.append(row)
            print(f"{name:10} {'fused' if fused else 'library':8} {row['seconds']:7.3f} s/step, launches "
                  f"{row['launches']:6.3f} s, first of two blocks {row['first']:6.1f} s, {moved / 1e9:6.0f} GB/s "
                  f"({row['share_of_copy']:4.0%} of a copy), {row['besides'] / 2**20:7.1f} MiB besides",
                  flush=True)  # fmt: skip
    path = RESULTS / f"optimizer_step-{card.replace(' ', '-')}-{datetime.date.today():%Y-%m-%d}.json"
    result = {"device": card, "versions": meter.versions(), "width": width, "parameters": parameters,
              "copy_bytes_per_s": speed, "rows": rows}  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
