"""`pointwise` as Triton kernels: every function of it, by the same names and with the same meaning, at memory speed.

A tensor is read once and written once: where a whole row is needed (the norms) it stays in registers. Sums over tokens
are written in parts, one for each program, and added by torch in a fixed order: no atomics, the same bits every time.
Tensors lie on the current device. Row lengths are compiled in, so each model compiles its own kernels, once.
"""

import functools  # no annotations of the future: the interpreter of Triton 3.0 reads them as they stand

import torch
import triton
import triton.language as tl
from torch import Tensor
from xflux_trainer import pointwise
from xflux_trainer.kernels_copy import Scatter
from xflux_trainer.kernels_gelu import gelu, gelu_backward, join, laid, pieces_of
from xflux_trainer.kernels_lora import lora_add, lora_down_grad, lora_narrow_backward, lora_up_grad
from xflux_trainer.kernels_rope import qk_rope, qk_rope_backward

__all__ = [
    "Scatter", "add_gated", "add_modulate", "gated", "gelu", "gelu_backward", "join", "lora_add", "lora_down_grad",
    "lora_narrow_backward", "lora_up_grad", "modulate", "modulate_backward", "qk_rope", "qk_rope_backward",
]  # fmt: skip

_EPS = tl.constexpr(pointwise.EPS)
_WALKERS = 256
"""Programs that share the rows where column sums are kept: two for each multiprocessor of an H100, rounded down."""
_STEP, _STEPS = 8, 4
"""Rows that a program of `_gated_sums` takes at once, and how many times."""


@functools.cache
def _row(width: int, most: int) -> tuple[int, int]:
    """A block that holds a whole row, and its warps, with up to `most` elements for each thread."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // (32 * most), 1), 16)


@triton.jit
def _normed(x, mask, D: tl.constexpr):
    """LayerNorm without weights of one fp32 row, zero beyond its end, and 1 / deviation."""
    x = tl.where(mask, x - tl.sum(x, 0) / D, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + _EPS)
    return x * rstd, rstd


@triton.jit
def _modulate(x, shift, scale, out, x_b, x_l, shift_b, scale_b, out_b, out_l, D: tl.constexpr, BLOCK: tl.constexpr):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    out += batch * out_b + token * out_l
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    up = tl.load(scale + batch * scale_b + cols, mask=mask, other=0.0)
    on = tl.load(shift + batch * shift_b + cols, mask=mask, other=0.0)
    n, _ = _normed(tl.load(x + batch * x_b + token * x_l + cols, mask=mask, other=0.0).to(tl.float32), mask, D)
    tl.store(out + cols, (n * (1 + up.to(tl.float32)) + on.to(tl.float32)).to(out.dtype.element_ty), mask=mask)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    batch, tokens, width = x.shape
    if out is None:
        out = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    block, warps = _row(width, 32)
    _modulate[(tokens, batch)](
        x, shift, scale, out, x.stride(0), x.stride(1), shift.stride(0), scale.stride(0), out.stride(0), out.stride(1),
        width, block, num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit
def _add_modulate(
    x, y, gate, shift, scale, added, out, x_b, x_l, y_b, y_l, gate_b, shift_b, scale_b, out_b, out_l, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = (batch * tl.num_programs(0) + token) * D
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    by = tl.load(gate + batch * gate_b + cols, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(x + batch * x_b + token * x_l + cols, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(y + batch * y_b + token * y_l + cols, mask=mask, other=0.0).to(tl.float32)
    both = (a + by * b).to(added.dtype.element_ty)
    tl.store(added + row + cols, both, mask=mask)
    out += batch * out_b + token * out_l
    up = tl.load(scale + batch * scale_b + cols, mask=mask, other=0.0)
    on = tl.load(shift + batch * shift_b + cols, mask=mask, other=0.0)
    n, _ = _normed(both.to(tl.float32), mask, D)
    tl.store(out + cols, (n * (1 + up.to(tl.float32)) + on.to(tl.float32)).to(out.dtype.element_ty), mask=mask)


def add_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = x.shape
    added = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    out = torch.empty_like(added) if out is None else out
    block, warps = _row(width, 16)
    _add_modulate[(tokens, batch)](
        x, y, gate, shift, scale, added, out, x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0),
        shift.stride(0), scale.stride(0), out.stride(0), out.stride(1), width, block, num_warps=warps,
    )  # fmt: skip
    return added, out


@triton.jit
def _row_backward(dy, x, scale, dx, out, cols, mask, D: tl.constexpr, DX: tl.constexpr):
    """One row of `modulate_backward`; its gradient and its norm for the sums. All is read first, and widened late."""
    up = tl.load(dy + cols, mask=mask, other=0.0)
    a = tl.load(x + cols, mask=mask, other=0.0)
    by = tl.load(scale + cols, mask=mask, other=0.0)
    if DX:
        more = tl.load(dx + cols, mask=mask, other=0.0)
    n, rstd = _normed(a.to(tl.float32), mask, D)
    inner = up.to(tl.float32) * (1 + by.to(tl.float32))
    inner = (inner - tl.sum(inner, 0) / D - n * (tl.sum(inner * n, 0) / D)) * rstd
    if DX:
        inner += more.to(tl.float32)
    tl.store(out + cols, inner.to(out.dtype.element_ty), mask=mask)
    return up.to(tl.float32), n


@triton.jit
def _modulate_backward(
    dy, x, scale, dx, out, sums, dy_b, dy_l, x_b, x_l, scale_b, dx_b, dx_l, tokens, D: tl.constexpr,
    BLOCK: tl.constexpr, DX: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    first, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    dy, x, dx, scale, out = (
        dy + batch * dy_b, x + batch * x_b, dx + batch * dx_b, scale + batch * scale_b, out + batch * tokens * D,
    )  # fmt: skip
    if SUMS:
        dshift = tl.zeros((BLOCK,), tl.float32)
        dscale = tl.zeros((BLOCK,), tl.float32)
        walkers = tl.num_programs(0)
        for token in range(first, tokens, walkers):
            up, n = _row_backward(
                dy + token * dy_l, x + token * x_l, scale, dx + token * dx_l, out + token * D, cols, mask, D, DX
            )
            dshift += up
            dscale += up * n
        part = sums + (first * tl.num_programs(1) + batch) * D + cols
        tl.store(part, dshift, mask=mask)
        tl.store(part + walkers * tl.num_programs(1) * D, dscale, mask=mask)
    else:
        _row_backward(dy + first * dy_l, x + first * x_l, scale, dx + first * dx_l, out + first * D, cols, mask, D, DX)


def modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, dx: Tensor | None, *, sums: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch, tokens, width = x.shape
    dy, more = laid(dy), x if dx is None else laid(dx)
    out = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    walkers, parts = tokens, out
    if sums:
        walkers = triton.cdiv(tokens, triton.cdiv(tokens * batch, _WALKERS)) if batch * tokens else 0
        parts = torch.empty((2, walkers, batch, width), dtype=torch.float32, device=x.device)
    block, warps = _row(width, 16)
    _modulate_backward[(walkers, batch)](
        dy, x, scale, more, out, parts, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), scale.stride(0),
        more.stride(0), more.stride(1), tokens, width, block, dx is not None, sums, num_warps=warps,
    )  # fmt: skip
    if not sums:
        return out, None, None
    dshift, dscale = parts.sum(1)
    return out, dshift, dscale


@triton.jit
def _scaled(
    x, y, gate, out, x_b, x_l, y_b, y_l, gate_b, out_b, out_l, D: tl.constexpr, BLOCK: tl.constexpr,
    PIECES: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """gate y, and with ADD x + gate y."""
    token, batch = (tl.program_id(0) // PIECES).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = (tl.program_id(0) % PIECES) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    by = tl.load(gate + batch * gate_b + cols, mask=mask).to(tl.float32)
    b = tl.load(y + batch * y_b + token * y_l + cols, mask=mask).to(tl.float32)
    if ADD:
        made = tl.load(x + batch * x_b + token * x_l + cols, mask=mask).to(tl.float32) + by * b
    else:
        made = by * b
    tl.store(out + batch * out_b + token * out_l + cols, made.to(out.dtype.element_ty), mask=mask)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    out = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    block, pieces = pieces_of(width, 1024)
    _scaled[(tokens * pieces, batch)](
        x, y, gate, out, x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0), out.stride(0),
        out.stride(1), width, block, pieces, True,
    )  # fmt: skip
    return out


@triton.jit
def _gated_sums(
    dx, gate, y, out, sums, dx_b, dx_l, gate_b, y_b, y_l, out_b, out_l, tokens, D: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    first, batch = tl.program_id(1) * (STEP * STEPS), tl.program_id(2).to(tl.int64)
    cols = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None]
    inside = cols < D
    by = tl.load(gate + batch * gate_b + cols, mask=inside).to(tl.float32)
    total = tl.zeros((STEP, BLOCK), tl.float32)
    for step in tl.static_range(STEPS):
        rows = (first + step * STEP + tl.arange(0, STEP)).to(tl.int64)[:, None]
        mask = (rows < tokens) & inside
        up = tl.load(dx + batch * dx_b + rows * dx_l + cols, mask=mask, other=0.0).to(tl.float32)
        total += up * tl.load(y + batch * y_b + rows * y_l + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + batch * out_b + rows * out_l + cols, (by * up).to(out.dtype.element_ty), mask=mask)
    part = (tl.program_id(1) * tl.num_programs(2) + batch) * D
    tl.store(sums + part + cols, tl.sum(total, 0)[None], mask=inside)


def gated(dx: Tensor, gate: Tensor, y: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    batch, tokens, width = dx.shape
    dx = laid(dx)
    if out is None:
        out = torch.empty((batch, tokens, width), dtype=dx.dtype, device=dx.device)
    (dx_b, dx_l, _), (out_b, out_l, _) = dx.stride(), out.stride()
    if y is None:
        block, pieces = pieces_of(width, 1024)
        _scaled[(tokens * pieces, batch)](
            dx, dx, gate, out, dx_b, dx_l, dx_b, dx_l, gate.stride(0), out_b, out_l, width, block, pieces, False
        )
        return out, None
    block, pieces = pieces_of(width, 256)
    parts = triton.cdiv(tokens, _STEP * _STEPS)
    sums = torch.empty((parts, batch, width), dtype=torch.float32, device=dx.device)
    _gated_sums[(pieces, parts, batch)](
        dx, gate, y, out, sums, dx_b, dx_l, gate.stride(0), y.stride(0), y.stride(1), out_b, out_l, tokens, width,
        block, _STEP, _STEPS,
    )  # fmt: skip
    return out, sums.sum(0)
