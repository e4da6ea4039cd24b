"""How fast the trainer's Triton kernels run on this GPU at FLUX's sizes, and how far they are from their meaning.

    python benchmarks/pointwise_kernels.py [--tokens 4608 1536] [--batch 1] [--json FILE]

A line for each kernel: microseconds on the device (a CUDA graph over several sets of tensors, more than any cache
holds), GB/s of the bytes that must move, their share of what a copy on this device moves, microseconds that the call
takes on the host, times faster than the same in plain torch, and the largest difference from it in places of bf16.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from xflux_trainer import fastops, pointwise

WIDTH, HIDDEN, CHANNELS, TEXT = 3072, 12288, 128, 512
CACHE = 400e6
"""Bytes that pass before a tensor is used again: several times the L2 cache of any card."""

Call = Callable[[ModuleType], Any]


@dataclass(frozen=True)
class Line:
    kernel: str
    tokens: int
    batch: int
    microseconds: float
    gigabytes_per_second: float
    of_copy: float
    host_microseconds: float
    times_torch: float
    places: float


class Tensors:
    """One set of what the blocks have at hand, in the layouts of the trainer."""

    def __init__(self, batch: int, tokens: int) -> None:
        def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, dtype=dtype, device="cuda")

        self.x, self.y, self.dx = (random(batch, tokens, WIDTH) for _ in range(3))
        self.h = random(batch, tokens, HIDDEN)
        self.wide = random(batch, tokens, 3 * WIDTH + HIDDEN)
        self.qk, self.mlp = self.wide[..., : 2 * WIDTH], self.wide[..., 3 * WIDTH :]
        self.made = torch.empty_like(self.wide)
        self.shift, self.scale, self.gate, *_ = random(batch, 6 * WIDTH).chunk(6, dim=-1)
        self.dq, self.dk = (random(batch, tokens, WIDTH // CHANNELS, CHANNELS) for _ in range(2))
        self.norms = tuple(1 + random(CHANNELS) / 4 for _ in range(4))
        angles = 6 * torch.rand((tokens, CHANNELS // 2), device="cuda").repeat_interleave(2, 1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def calls(self) -> dict[str, tuple[float, Call]]:
        """Bytes that must move, and the call, by name. What is written into `made` is returned as well."""
        t, row, wide, turn = self, self.x.nbytes, self.h.nbytes, 2 * self.cos.nbytes
        mlp, qk = t.made[..., 3 * WIDTH :], t.made[..., : 2 * WIDTH]

        def backward(m: ModuleType, dx: Tensor | None, sums: bool) -> Any:
            return m.modulate_backward(t.y, t.x, t.scale, dx, sums=sums)

        def rope(m: ModuleType, sums: bool) -> Any:
            return qk, m.qk_rope_backward(t.dq, t.dk, t.qk, t.norms, t.cos, t.sin, TEXT, qk, sums=sums)

        return {
            "modulate": (2 * row, lambda m: m.modulate(t.x, t.shift, t.scale)),
            "add_gated": (3 * row, lambda m: m.add_gated(t.x, t.y, t.gate)),
            "add_modulate": (4 * row, lambda m: m.add_modulate(t.x, t.y, t.gate, t.shift, t.scale)),
            "modulate_backward": (3 * row, lambda m: backward(m, None, False)),
            "modulate_backward +dx": (4 * row, lambda m: backward(m, t.dx, False)),
            "modulate_backward +dx sums": (4 * row, lambda m: backward(m, t.dx, True)),
            "gated": (2 * row, lambda m: m.gated(t.dx, t.gate)),
            "gated sums": (3 * row, lambda m: m.gated(t.dx, t.gate, t.y)),
            "gelu": (2 * wide, lambda m: m.gelu(t.h, mlp)),
            "gelu_backward": (3 * wide, lambda m: m.gelu_backward(t.mlp, t.h, mlp)),
            "qk_rope": (4 * row + turn, lambda m: m.qk_rope(t.qk, t.norms, t.cos, t.sin, TEXT)),
            "qk_rope_backward": (6 * row + turn, lambda m: rope(m, False)),
            "qk_rope_backward sums": (6 * row + turn, lambda m: rope(m, True)),
        }


def device_seconds(calls: list[Callable[[], Any]]) -> float:
    """Of one call, from the fastest of several replays of all of them as one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until all are recorded: each call writes to memory of its own.
        kept = [call() for call in calls]
    found = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000 / len(calls))
    del kept, graph
    return min(found)


def host_seconds(call: Callable[[], Any], count: int = 100) -> float:
    """What a call costs the thread that makes it, with the device left behind."""
    call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
    seconds = (time.perf_counter() - started) / count
    torch.cuda.synchronize()
    return seconds


def tensors_of(made: Any) -> list[Tensor]:
    if isinstance(made, Tensor):
        return [made.clone()]
    return [x for part in made or () for x in tensors_of(part)]


def places(made: Any, meant: list[Tensor]) -> float:
    """The largest difference, in places of bf16 at the size of the value and of its tensor's values."""
    worst = 0.0
    for a, b in zip(tensors_of(made), meant, strict=True):
        a, b = a.float(), b.float()
        off = (a - b).abs() / (torch.finfo(torch.bfloat16).eps * (b.abs() + b.square().mean().sqrt()))
        worst = max(worst, float(off.nan_to_num(torch.inf).max()))
    return worst


def copy_speed() -> float:
    """Bytes a second that a copy from device memory to device memory reads and writes."""
    pairs = [torch.empty((2, 1 << 28), dtype=torch.uint8, device="cuda") for _ in range(4)]
    return 2 * (1 << 28) / device_seconds([lambda p=p: p[0].copy_(p[1]) for p in pairs])


def measured(batch: int, tokens: int, ceiling: float) -> list[Line]:
    kernels = fastops.ops(torch.device("cuda"))
    sets = [Tensors(batch, tokens).calls() for _ in range(2 + int(CACHE / (batch * tokens * WIDTH * 8)))]
    lines = []
    for name, (size, call) in sets[0].items():
        count = min(len(sets), 2 + int(CACHE / size))
        same = [lambda call=one[name][1]: call(kernels) for one in sets[:count]]
        seconds = device_seconds(same)
        plain = device_seconds([lambda call=call: call(pointwise)])
        meant = tensors_of(call(pointwise))
        lines.append(
            Line(name, tokens, batch, seconds * 1e6, size / seconds / 1e9, size / seconds / ceiling,
                 host_seconds(same[0]) * 1e6, plain / seconds, places(call(kernels), meant))
        )  # fmt: skip
    return lines


def opened() -> float | None:
    """Bytes per second that a copy moves on this GPU; None, with the reason printed, where nothing can be measured."""
    if not torch.cuda.is_available():
        print("No GPU is seen here: kernels are measured on one.")
        return None
    if why := fastops.why_not(torch.device("cuda")):
        print(f"The kernels do not run on this GPU: {why}")
        return None
    ceiling = copy_speed()
    print(f"{torch.cuda.get_device_name()}: a copy moves {ceiling / 1e9:.0f} GB/s")
    return ceiling


def finish(started: float, file: Path | None, ceiling: float, lines: Sequence[Any]) -> int:
    """Say how long it took, write the lines where they are wanted; the exit code."""
    print(f"{time.perf_counter() - started:.0f} s")
    if file is None:
        return 0
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_second": ceiling}
    file.write_text(json.dumps({**about, "lines": [asdict(line) for line in lines]}, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4608, 1536])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    if (ceiling := opened()) is None:
        return 2
    print(f"{'kernel':28}{'tokens':>7}{'us':>8}{'GB/s':>7}{'of copy':>9}{'host us':>9}{'x torch':>9}{'places':>8}")
    lines = []
    for tokens in args.tokens:
        for line in measured(args.batch, tokens, ceiling):
            print(
                f"{line.kernel:28}{tokens:7}{line.microseconds:8.1f}{line.gigabytes_per_second:7.0f}"
                f"{line.of_copy:9.0%}{line.host_microseconds:9.1f}{line.times_torch:9.1f}{line.places:8.2f}"
            )
            lines.append(line)
    return finish(started, args.json, ceiling, lines)


if __name__ == "__main__":
    raise SystemExit(main())
