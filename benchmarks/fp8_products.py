"""The parts of a LoRA step on an fp8 base, one by one, at FLUX.1's sizes: products, transpositions, quantising kernels.

    python benchmarks/fp8_products.py        under a minute on one GPU; without one tiny, to show that it runs

Writes benchmarks/results/fp8_products-GPU-DATE.json and prints tables. Every time is a median with cold caches; "a
step's products" are all of one step in a row, so that the card's clock falls as it does in training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from xflux_trainer import fp8
from xflux_trainer.frozen import FrozenLinear

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH, IMAGE, TEXT = 3072, 4096, 512
SINGLES, DOUBLES = 38, 19
E4M3 = torch.float8_e4m3fn
Row = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One product of a step, forward and backward."""

    name: str
    tokens: int
    out: int
    inputs: int
    times: int

    @property
    def flop(self) -> float:
        return 2.0 * self.tokens * self.out * self.inputs


def layers(shrink: int) -> list[Layer]:
    d = WIDTH // shrink
    image, text = IMAGE // shrink, TEXT // shrink
    made = [
        Layer("single qkv + mlp", image + text, 7 * d, d, SINGLES),
        Layer("single proj_out", image + text, d, 5 * d, SINGLES),
    ]
    for tokens, name in ((image, "image"), (text, "text")):
        made += [
            Layer(f"{name} qkv", tokens, 3 * d, d, DOUBLES),
            Layer(f"{name} out", tokens, d, d, DOUBLES),
            Layer(f"{name} ff in", tokens, 4 * d, d, DOUBLES),
            Layer(f"{name} ff out", tokens, d, 4 * d, DOUBLES),
        ]
    return made


class Clock:
    """Milliseconds of a call: the median of some, each with caches that hold something else."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self._other = torch.empty(1 << 28, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def __call__(self, call: Callable[[], Any]) -> float:
        for _ in range(2):
            call()
        return statistics.median(self._once(call) for _ in range(self.repeats))

    def _once(self, call: Callable[[], Any]) -> float:
        if self._other is None:
            begun = time.perf_counter()
            call()
            return (time.perf_counter() - begun) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


@dataclass
class Operands:
    """Of one layer: the same values in bf16 and in fp8."""

    x: Tensor
    dy: Tensor
    dense: Tensor
    bias: Tensor
    data: Tensor
    wscale: Tensor
    rows: tuple[Tensor, Tensor]
    grads: tuple[Tensor, Tensor]
    turned: Tensor


def operands(layer: Layer, device: torch.device) -> Operands:
    """Activations with a few large channels, gradients whose tokens differ by powers of ten, weights of 0.02."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device)

    x = (normal(layer.tokens, layer.inputs) * torch.exp(normal(layer.inputs))).bfloat16()
    sizes = 10 ** (torch.rand(layer.tokens, 1, device=device) * 4 - 8)
    dy = (normal(layer.tokens, layer.out) * torch.exp(normal(layer.tokens, layer.out)) * sizes).bfloat16()
    data, wscale = fp8.quantize_rows((normal(layer.out, layer.inputs) * 0.02).bfloat16())
    return Operands(
        x, dy, (data.float() * wscale).bfloat16(), normal(layer.out).bfloat16(), data, wscale,
        fp8.quantize_rows(x), fp8.quantize_rows(dy, wscale), fp8.transpose(data, data.new_empty(data.shape[::-1])),
    )  # fmt: skip


def tensorwise(a: Tensor, b: Tensor, one: Tensor, bias: Tensor | None) -> Tensor:
    """The product with a single scale, which some libraries have a faster kernel for."""
    made: Tensor = torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return made


def measure_product(layer: Layer, clock: Clock) -> Row:
    o = operands(layer, clock.device)
    (xq, xs), (dq, ds) = o.rows, o.grads
    calls: dict[str, Callable[[], Any]] = {
        "bf16": lambda: F.linear(o.x, o.dense, o.bias),
        "rows": lambda: fp8.product(xq, xs, o.data, o.wscale, o.bias),
        "rows, slow sums": lambda: fp8.product(xq, xs, o.data, o.wscale, o.bias, fast=False),
        "back bf16": lambda: o.dy @ o.dense,
        "back rows": lambda: fp8.backward(dq, ds, o.data, transposed=o.turned),
        "back rows, slow sums": lambda: fp8.backward(dq, ds, o.data, transposed=o.turned, fast=False),
    }
    if clock.device.type == "cuda":
        one = torch.ones((), device=clock.device)
        calls["one scale"] = lambda: tensorwise(xq, o.data, one, o.bias)
        calls["back one scale"] = lambda: tensorwise(dq, o.turned, one, None)
    row: Row = {"layer": layer.name, "m": layer.tokens, "n": layer.out, "k": layer.inputs, "times": layer.times}
    row["ms"] = {name: clock(call) for name, call in calls.items()}
    row["tflops"] = {name: layer.flop / ms / 1e9 for name, ms in row["ms"].items()}
    row["transpose_ms"] = clock(lambda: fp8.transpose(o.data))
    row["transpose_gbs"] = 2 * o.data.numel() / row["transpose_ms"] / 1e6
    row["errors"] = errors(o)
    return row


def errors(o: Operands) -> dict[str, float]:
    """Relative, the mean of up to 256 rows: of the sums alone, and of everything but the weights' own rounding.

    Fast sums are kept some 14 bits wide and cut off at every step, so that their error grows with the length of the
    sum. It matters where it comes near that of everything.
    """
    (xq, xs), (dq, ds) = (tuple(part[:256] for part in pair) for pair in (o.rows, o.grads))
    dense = o.data.double() * o.wscale
    y, dx = o.x[:256].double() @ dense.t(), o.dy[:256].double() @ dense
    y_rows, dx_rows = (xq.double() * xs) @ dense.t(), (dq.double() * ds) @ o.data.double()
    found = {}
    for name, fast in (("", True), (" slow", False)):
        product = fp8.product(xq, xs, o.data, o.wscale, None, fast=fast)
        back = fp8.backward(dq, ds, o.data, transposed=o.turned, fast=fast)
        found |= {f"sums{name}": off(product, y_rows), f"back sums{name}": off(back, dx_rows)}
        found |= {f"slope{name}": slope(product, y_rows), f"back slope{name}": slope(back, dx_rows)}
        found |= {f"all{name}": off(product, y), f"back all{name}": off(back, dx)}
    wide = o.dy[:256].float() * o.wscale.t()
    e5m2 = 57344 / wide.abs().amax(1, keepdim=True)
    found["back all e5m2"] = off((wide * e5m2).to(torch.float8_e5m2).double() / e5m2 @ o.data.double(), dx)
    return found


def slope(found: Tensor, wanted: Tensor) -> float:
    """How much larger the whole is than wanted: sums that are cut off, not rounded, come out smaller all alike."""
    unit = wanted.norm(dim=1, keepdim=True)
    return float(((found.double() / unit) * (wanted / unit)).sum(1).mean() - 1)


def off(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).mean())


def measure_kernels(shrink: int, clock: Clock) -> list[Row]:
    """What a block does beside its products and attention, with the bytes that it must move."""
    d, tokens = WIDTH // shrink, (IMAGE + TEXT) // shrink
    both, image = IMAGE // shrink + TEXT // shrink, IMAGE // shrink

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=clock.device).bfloat16()

    x, y, wide = normal(1, tokens, d), normal(1, tokens, d), normal(1, tokens, 7 * d)
    qkv, h, dcat = wide[..., : 3 * d], wide[..., 3 * d :], normal(1, tokens, 5 * d)
    parts = normal(1, 3 * d).chunk(3, dim=1)
    gate, shift, scale = parts
    columns = torch.rand(7 * d, 1, device=clock.device)
    half = columns.bfloat16()
    double, hidden = x[:, :image], h[:, :image]
    embedding = normal(1, d)
    modulation = [
        FrozenLinear(torch.nn.Linear(d, widths * d, device=clock.device, dtype=x.dtype), fp8.hold) for widths in (3, 6)
    ]
    # name, call, bytes a token and width, times in a step; text is an eighth of the image, and counted by its tokens
    text = 1 + TEXT / IMAGE
    plan: list[tuple[str, Callable[[], Any], float, float]] = [
        ("single modulate", lambda: fp8.modulate_fp8(x, shift, scale), 3 * both, SINGLES),
        ("single modulate, bf16 kept", lambda: fp8.modulate_fp8(x, shift, scale, keep=True), 5 * both, 0),
        ("single o and gelu", lambda: fp8.gelu_fp8(x, h), 15 * both, SINGLES),
        ("single gate backward", lambda: fp8.gated_fp8(x, gate, half[:d]), 3 * both, SINGLES),
        ("single gelu backward", lambda: fp8.gelu_backward_fp8(qkv, dcat[..., d:], h, half), 29 * both, SINGLES),
        ("  with fp32 columns", lambda: fp8.gelu_backward_fp8(qkv, dcat[..., d:], h, columns), 29 * both, 0),
        ("rows of 7 widths", lambda: fp8.quantize_rows(wide, half), 21 * both, 0),
        ("  with fp32 columns", lambda: fp8.quantize_rows(wide, columns), 21 * both, 0),
        ("double modulate", lambda: fp8.modulate_fp8(double, shift, scale), 3 * image, DOUBLES * text),
        ("double rows of o", lambda: fp8.quantize_rows(double), 3 * image, DOUBLES * text),
        (
            "double add + modulate",
            lambda: fp8.add_modulate_fp8(double, y[:, :image], gate, shift, scale),
            7 * image,
            DOUBLES * text,
        ),
        ("double gelu", lambda: fp8.gelu_fp8(None, hidden), 12 * image, DOUBLES * text),
        ("double gate backward", lambda: fp8.gated_fp8(double, gate, half[:d]), 3 * image, 2 * DOUBLES * text),
        (
            "double gelu backward",
            lambda: fp8.gelu_backward_fp8(None, dcat[:, :image, d:], hidden, half[: 4 * d]),
            20 * image,
            DOUBLES * text,
        ),
        ("single modulation layer", lambda: modulation[0](embedding), 3 * d, SINGLES),
        ("double modulation layer", lambda: modulation[1](embedding), 6 * d, 2 * DOUBLES),
        ("double rows of dqkv", lambda: fp8.quantize_rows(qkv[:, :image], half[: 3 * d]), 9 * image, DOUBLES * text),
    ]
    rows = []
    for name, call, size, times in plan:
        ms = clock(call)
        rows.append({"kernel": name, "us": ms * 1e3, "gbs": size * d / ms / 1e6, "step_ms": ms * times})
    return rows


def measure_step(shrink: int, device: torch.device) -> Row:
    """All products of a step in a row, milliseconds; the blocks share weights, which no cache is large enough for."""
    made = [(layer, operands(layer, device)) for layer in layers(shrink)]

    def bf16(o: Operands) -> None:
        F.linear(o.x, o.dense, o.bias)
        o.dy @ o.dense

    def products(o: Operands) -> None:
        fp8.product(*o.rows, o.data, o.wscale, o.bias)
        fp8.backward(*o.grads, o.data, transposed=o.turned)

    def turning(o: Operands) -> None:
        fp8.product(*o.rows, o.data, o.wscale, o.bias)
        fp8.backward(*o.grads, o.data)

    clock, row = Clock(device, 1), {}
    clock.repeats = 5 if device.type == "cuda" else 1
    for name, one in (("bf16", bf16), ("fp8", products), ("fp8 and transpositions", turning)):
        row[name] = clock(lambda one=one: _run(made, one))
    row["tflop"] = sum(2 * layer.flop * layer.times for layer, _ in made) / 1e12
    return row


def _run(made: list[tuple[Layer, Operands]], one: Callable[[Operands], None]) -> None:
    for count in (SINGLES, DOUBLES):
        for _ in range(count):
            for layer, o in made:
                if layer.times == count:
                    one(o)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def report(result: Row) -> str:
    names = list(result["products"][0]["tflops"])
    first = table(
        ["layer", "M", "N × K", *names, "transposition GB/s"],
        [
            [row["layer"], str(row["m"]), f"{row['n']} × {row['k']}", *(f"{row['tflops'][name]:.0f}" for name in names),
             f"{row['transpose_gbs']:.0f}"]
            for row in result["products"]
        ],
    )  # fmt: skip
    kinds = list(result["products"][0]["errors"])
    second = table(
        ["layer", *kinds],
        [[row["layer"], *(f"{row['errors'][kind]:.2%}" for kind in kinds)] for row in result["products"]],
    )
    third = table(
        ["kernel", "µs", "GB/s", "ms a step"],
        [
            [row["kernel"], f"{row['us']:.0f}", f"{row['gbs']:.0f}", f"{row['step_ms']:.2f}"]
            for row in result["kernels"]
        ],
    )
    sums = {
        "products bf16": sum(row["times"] * (row["ms"]["bf16"] + row["ms"]["back bf16"]) for row in result["products"]),
        "products fp8": sum(row["times"] * (row["ms"]["rows"] + row["ms"]["back rows"]) for row in result["products"]),
        "transpositions": sum(row["times"] * row["transpose_ms"] for row in result["products"]),
        "kernels": sum(row["step_ms"] for row in result["kernels"]),
    }
    result["step_sums_ms"] = sums
    step = result["step"]
    lines = [f"{name}: {ms:.1f} ms" for name, ms in sums.items()]
    lines += [
        f"in a row, {name}: {step[name]:.1f} ms, {step['tflop'] / step[name] * 1e3:.0f} TFLOP/s"
        for name in ("bf16", "fp8", "fp8 and transpositions")
    ]
    return "\n\n".join(["TFLOP/s", first, "relative errors", second, third, "a step:\n" + "\n".join(lines)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="calls that a median is taken of")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda and (reason := fp8.supported(device)) is not None:
        print(reason, file=sys.stderr)
        return 1
    torch.manual_seed(0)
    shrink, repeats = (1, options.repeats) if cuda else (64, 1)
    begun, clock = time.perf_counter(), Clock(device, repeats)
    result: Row = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu, sizes divided by 64",
        "torch": torch.__version__,
        "products": [measure_product(layer, clock) for layer in layers(shrink)],
        "kernels": measure_kernels(shrink, clock),
        "step": measure_step(shrink, device),
    }
    print(f"{result['device']}, torch {result['torch']}\n\n{report(result)}")
    result["seconds"] = round(time.perf_counter() - begun, 1)
    if cuda:
        slug = result["device"].lower().replace(" ", "-")
        options.results.mkdir(parents=True, exist_ok=True)
        file = options.results / f"fp8_products-{slug}-{datetime.date.today()}.json"
        file.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        print(f"\n{result['seconds']} s, written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
