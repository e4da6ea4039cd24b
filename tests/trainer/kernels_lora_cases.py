"""The adapters' Triton kernels beside their meaning in plain torch: one line of JSON a case.

    python kernels_lora_cases.py cpu|cuda     (cpu: with TRITON_INTERPRET=1 from the start)

Lines and layouts are those of `kernels_cases`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from kernels_cases import FORMATS, Case, Layouts, untouched, wrong
from torch import Tensor
from xflux_trainer import kernels, pointwise
from xflux_trainer.pointwise import Copy, Part, Parts

GROUPS: dict[str, tuple[int, int, int, Parts]] = {
    # rows, columns of y, inputs
    "qkv": (37, 96, 48, (Part(0, 32, 0, 4), Part(32, 32, 4, 4), Part(64, 32, 8, 4))),
    "scaled": (70, 288, 72, (Part(0, 96, 0, 16, 0.5), Part(96, 96, 16, 16, 0.5), Part(192, 96, 32, 16, 0.5))),
    "one": (37, 96, 48, (Part(0, 96, 0, 1, 2.0),)),
    "fused": (130, 200, 40, (Part(0, 200, 0, 20),)),
    "wide": (65, 144, 264, (Part(0, 144, 0, 64),)),
    "deep": (17, 136, 32, (Part(0, 136, 0, 150, 0.25),)),
    "gap": (33, 160, 48, (Part(16, 32, 0, 8), Part(64, 32, 8, 8), Part(112, 32, 16, 8))),
    "mixed": (300, 180, 56, (Part(0, 32, 0, 4), Part(32, 32, 4, 4), Part(64, 80, 8, 4), Part(144, 36, 12, 4, 0.5))),
    "scales": (19, 128, 48, (Part(0, 64, 0, 16, 0.5), Part(64, 64, 16, 16, 2.0))),
}
MLP = ((2, 7, 96, 384), (1, 3, 32, 72), (1, 2, 512, 2048), (3, 2, 40, 200))
"""Batch, tokens, D, M."""


def added(y: Tensor, low: Tensor, up: Tensor, parts: Parts) -> Tensor:
    """The plain formula, rounded once at its end: cuBLAS rounds a bf16 product that it scales before it adds it."""
    return pointwise.lora_add(y.float(), low.float(), up.float(), parts).to(y.dtype)


def adapters(device: str, dtype: torch.dtype, name: str) -> Iterator[Case]:
    rows, width, inputs, parts = GROUPS[name]
    lay = Layouts(device, dtype)
    rank, root = sum(part.rank for part in parts), rows**0.5  # a sum over rows, and its error, grows with the root
    y, x = lay.wide(1, rows, width)[0], lay.wide(1, rows, inputs)[0]
    low = lay.parts(rows, rank, 1)[0]
    up = lay.parts(sum(part.width for part in parts), parts[0].rank, 1)[0]

    def lora_add() -> list[str]:
        made, meant = lay.empty(1, rows, width).copy_(y[None]), y.clone()
        assert kernels.lora_add(made[0], low, up, parts).data_ptr() == made.data_ptr()
        found = [wrong("y", made[0], added(meant, low, up, parts)), untouched(made)]
        # The gradient of the input: the narrow factors, turned on their side, are the wide factor of one part.
        down = lay.parts(rank, inputs, 1)[0]
        one = (Part(0, inputs, 0, rank),)
        made, meant = lay.empty(1, rows, inputs).copy_(x[None]), x.clone()
        kernels.lora_add(made[0], low, down.t(), one)
        return [*found, wrong("dx", made[0], added(meant, low, down.t(), one)), untouched(made)]

    def lora_narrow_backward() -> list[str]:
        made, meant = (module.lora_narrow_backward(y, up, parts) for module in (kernels, pointwise))
        place = lay.empty(1, rows, rank)
        assert kernels.lora_narrow_backward(y, up, parts, place[0]).data_ptr() == place.data_ptr()
        return [wrong("dlow", made, meant), wrong("place", place[0], meant), untouched(place)]

    def lora_up_grad() -> list[str]:
        out, meant = (torch.full_like(up, torch.nan, dtype=torch.float32) for _ in range(2))
        assert kernels.lora_up_grad(y, low, parts, out) is out
        return [wrong("up", out / root, pointwise.lora_up_grad(y, low, parts, meant) / root)]

    def lora_down_grad() -> list[str]:
        out, meant = (torch.full((rank, inputs), torch.nan, device=device) for _ in range(2))
        assert kernels.lora_down_grad(low, x, out) is out
        return [wrong("down", out / root, pointwise.lora_down_grad(low, x, meant) / root)]

    for case in (lora_add, lora_narrow_backward, lora_up_grad, lora_down_grad):
        yield case.__name__, case


def mlp(device: str, dtype: torch.dtype, batch: int, tokens: int, first: int, second: int) -> Iterator[Case]:
    lay = Layouts(device, dtype)
    o, h = lay.wide(batch, tokens, first), 3 * lay.wide(batch, tokens, second)

    def join() -> list[str]:
        meant, place = pointwise.join(o, h), lay.empty(batch, tokens, first + second)
        assert kernels.join(o, h, place) is place
        return [wrong("cat", kernels.join(o, h), meant), wrong("place", place, meant), untouched(place)]

    yield "join", join


def copies(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Matrices of many sizes, one larger than what a program takes."""
    sizes = ((4, 96, 1.0), (130, 3, 0.5), (1, 1, 2.0), (70, 48, 1.0), (3000, 4, 0.3))

    def scatter() -> list[str]:
        lay, made = Layouts(device, dtype), kernels.Scatter()
        places = [lay.empty(1, rows, width) for rows, width, _ in sizes]
        owns = [torch.empty((rows, width), device=device) for rows, width, _ in sizes]
        todo = [Copy(to[0], of, scale) for to, of, (*_, scale) in zip(places, owns, sizes, strict=True)]
        found = []
        for _ in range(2):  # the second time by the table of the first
            for own in owns:
                own.copy_(torch.randn(own.shape, generator=lay.random))
            made(todo)
            for to, of, scale in todo:
                found.append(wrong("copy", to, (of * scale).to(dtype)))
            found += [untouched(place) for place in places]
        return found

    yield "scatter", scatter


def widen_products() -> None:
    """Triton's interpreter (up to 3.7) multiplies bf16 as the integers that it keeps them in: give it fp32 instead."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, *(_widened(x, interpreter) for x in (a, b)), *rest)

    builder.create_dot = create_dot


def _widened(x: Any, interpreter: Any) -> Any:
    tl = interpreter.tl
    if x.dtype.scalar != tl.bfloat16:
        return x
    values = torch.from_numpy(x.data.view("int16")).view(torch.bfloat16).float().numpy()
    return interpreter.TensorHandle(values, tl.float32)


def main(device: str) -> None:
    # What torch.empty gives is NaN from here on.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if device == "cpu":
        widen_products()
    for dtype in FORMATS:
        cases = [(name, made) for name in GROUPS for made in adapters(device, dtype, name)]
        cases += [("x".join(map(str, shape)), made) for shape in MLP for made in mlp(device, dtype, *shape)]
        cases += [("", case) for case in copies(device, dtype)]
        for size, (name, case) in cases:
            try:
                found = [fault for fault in case() if fault]
            except Exception:  # noqa: BLE001 (a case that breaks is a fault found, and the others run)
                found = [traceback.format_exc(limit=-3)]
            print(json.dumps([f"{name} {str(dtype).removeprefix('torch.')} {size}", found]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
