"""How fast the adapters' Triton kernels run on this GPU at FLUX's sizes, beside the torch calls that they replace.

    python benchmarks/lora_kernels.py [--rows 4608 4096 512] [--ranks 16 64] [--json FILE]

A line for each kernel, layer, rows and rank: microseconds on the device, GB/s of the bytes that must move, their share
of what a copy moves, microseconds that the call takes on the host, microseconds of the same in torch (one product for
each adapter, and the casts), and how far the result is from fp32 sums of the same values, relative, as a norm. Then
what both take in a step of LoRA at 1024 px with diffusers' 12 targets.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pointwise_kernels import device_seconds, finish, host_seconds, opened
from xflux_trainer import fastops, pointwise
from xflux_trainer.pointwise import Part

LAYERS = {"qkv": (3072, (3072,) * 3), "out": (3072, (3072,)), "up": (3072, (12288,)), "down": (12288, (3072,))}
"""Inputs, and the outputs of each adapter."""
STEP = {(4608, "qkv"): 38, **{(rows, layer): 19 for rows in (4096, 512) for layer in LAYERS}}
"""Groups with adapters in one step at 1024 px, by rows and layer."""
CACHE, SETS = 200e6, 24
"""Bytes that pass before a tensor is used again, and how many sets of tensors at most."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Line:
    kernel: str
    layer: str
    rows: int
    rank: int
    microseconds: float
    gigabytes_per_second: float
    of_copy: float
    host_microseconds: float
    torch_microseconds: float
    off: float


class Tensors:
    """One group: its input and output, gradients alike, and its adapters' factors."""

    def __init__(self, layer: str, rows: int, rank: int) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

        inputs, widths = LAYERS[layer]
        outputs, count = sum(widths), len(widths)
        self.parts = tuple(Part(place * widths[0], widths[0], place * rank, rank) for place in range(count))
        self.y, self.x = random(rows, outputs), random(rows, inputs)
        self.low, self.up, self.down = random(rows, count * rank), random(outputs, rank), random(count * rank, inputs)
        self.up_grad, self.down_grad = (torch.empty_like(x, dtype=torch.float32) for x in (self.up, self.down))

    def calls(self, ops: Any) -> dict[str, tuple[float, Call]]:
        """Bytes that must move, and the call, by name."""
        t, narrow = self, self.low.nbytes
        one = (Part(0, t.x.shape[1], 0, t.low.shape[1]),)
        return {
            "add": (2 * t.y.nbytes + narrow, lambda: ops.lora_add(t.y, t.low, t.up, t.parts)),
            "add dx": (2 * t.x.nbytes + narrow, lambda: ops.lora_add(t.x, t.low, t.down.t(), one)),
            "narrow backward": (t.y.nbytes + narrow, lambda: ops.lora_narrow_backward(t.y, t.up, t.parts)),
            "up grad": (t.y.nbytes + narrow, lambda: ops.lora_up_grad(t.y, t.low, t.parts, t.up_grad)),
            "down grad": (t.x.nbytes + narrow, lambda: ops.lora_down_grad(t.low, t.x, t.down_grad)),
        }

    def plain(self) -> dict[str, Call]:
        """The same by torch's products, each adapter for itself."""
        t = self
        own = [
            (t.y[:, c : c + w], t.low[:, n : n + r], factor)
            for (c, w, n, r, _), factor in zip(t.parts, pointwise.factors(t.up, t.parts), strict=True)
        ]

        def narrow_backward() -> None:
            dlow = torch.empty_like(t.low)
            for y, _, up in own:
                torch.mm(y, up, out=dlow[:, : up.shape[1]])

        return {
            "add": lambda: [y.addmm_(low, up.t()) for y, low, up in own],
            "add dx": lambda: t.x.addmm_(t.low, t.down),
            "narrow backward": narrow_backward,
            "up grad": lambda: [(y.t() @ low).float() for y, low, _ in own],
            "down grad": lambda: [part.float() for part in (t.low.t() @ t.x).chunk(len(own))],
        }


def off(made: Tensor, meant: Tensor) -> float:
    """Relative, as a norm: bf16 rounds by 0.0017."""
    return float((made.float() - meant.float()).norm() / meant.float().norm())


def measured(layer: str, rows: int, rank: int, ceiling: float) -> list[Line]:
    fast = fastops.ops(torch.device("cuda"))
    first = Tensors(layer, rows, rank)
    sets = [first] + [Tensors(layer, rows, rank) for _ in range(min(SETS, 1 + int(CACHE / first.x.nbytes)))]
    lines = []
    for name, (size, call) in first.calls(fast).items():
        y, x = first.y.clone(), first.x.clone()
        meant = first.calls(pointwise)[name][1]().clone()
        first.y.copy_(y)
        first.x.copy_(x)
        far = off(call(), meant)
        seconds = device_seconds([each.calls(fast)[name][1] for each in sets])
        plain = device_seconds([each.plain()[name] for each in sets])
        lines.append(
            Line(name, layer, rows, rank, seconds * 1e6, size / seconds / 1e9, size / seconds / ceiling,
                 host_seconds(call, 50) * 1e6, plain * 1e6, far)
        )  # fmt: skip
        first.y.copy_(y)
        first.x.copy_(x)
    return lines


def join(rows: int, ceiling: float) -> Line:
    """The input of a single block's last product: attention's output and GELU, side by side."""
    fast, sets = fastops.ops(torch.device("cuda")), []
    for _ in range(3):
        wide, o = (torch.randn((1, rows, w), dtype=torch.bfloat16, device="cuda") for w in (21504, 3072))
        sets.append((wide[..., 9216:], o, torch.empty((1, rows, 15360), dtype=o.dtype, device="cuda")))

    def plain(h: Tensor, o: Tensor, cat: Tensor) -> None:
        cat[..., :3072].copy_(o)
        fast.gelu(h, cat[..., 3072:])

    h, o, cat = sets[0]
    size = 2 * cat.nbytes
    far = off(fast.join(o, h), pointwise.join(o, h))
    seconds = device_seconds([lambda h=h, o=o: fast.join(o, h) for h, o, _ in sets])
    apart = device_seconds([lambda own=own: plain(*own) for own in sets])
    host = host_seconds(lambda: fast.join(o, h), 50)
    return Line("join", "mlp", rows, 0, seconds * 1e6, size / seconds / 1e9, size / seconds / ceiling, host * 1e6,
                apart * 1e6, far)  # fmt: skip


def show(line: Line) -> None:
    print(
        f"{line.kernel:17}{line.layer:6}{line.rows:6}{line.rank:5}{line.microseconds:8.1f}"
        f"{line.gigabytes_per_second:7.0f}{line.of_copy:9.0%}{line.host_microseconds:9.1f}"
        f"{line.torch_microseconds:10.1f}{line.off:10.1e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4608, 4096, 512])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    if (ceiling := opened()) is None:
        return 2
    print(
        f"{'kernel':17}{'layer':6}{'rows':>6}{'rank':>5}{'us':>8}{'GB/s':>7}{'of copy':>9}{'host us':>9}"
        f"{'torch us':>10}{'off':>10}"
    )
    lines = []
    for rank in args.ranks:
        for rows in args.rows:
            for layer in LAYERS:
                found = measured(layer, rows, rank, ceiling)
                for line in found:
                    show(line)
                lines += found
    lines.append(join(args.rows[0], ceiling))
    show(lines[-1])
    for rank in args.ranks:
        taken = [(line, STEP.get((line.rows, line.layer), 0)) for line in lines if line.rank == rank]
        if {(line.rows, line.layer) for line, count in taken if count} == set(STEP):
            ours, plain = (
                sum(getattr(line, key) * count for line, count in taken) / 1e3
                for key in ("microseconds", "torch_microseconds")
            )
            print(f"a step at 1024 px, rank {rank}, 12 targets: {ours:.1f} ms on the device, by torch {plain:.1f} ms")
    return finish(started, args.json, ceiling, lines)


if __name__ == "__main__":
    raise SystemExit(main())
