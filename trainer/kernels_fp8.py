"""What `fp8` does beside its products, in Triton: each row is read once, and written in one byte a value.

A program holds a whole row, up to 32,768 values wide, in registers: its largest value must be known before the first
can be written. NaN and infinities come out as NaN, so that a broken gradient stays seen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-30)
_EPS = tl.constexpr(1e-6)
_TWICE = tl.constexpr(2 * 0.7978845608028654)
_GELU_CUBE = tl.constexpr(0.044715)


def quantize_rows(x: Tensor, colscale: Tensor | None) -> tuple[Tensor, Tensor]:
    q, s, _ = _rows(x, None, colscale, keep=False)
    return q, s


def gated_fp8(dx: Tensor, gate: Tensor, colscale: Tensor | None, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    return _rows(dx, gate, colscale, keep=keep)


def _rows(
    x: Tensor, gate: Tensor | None, colscale: Tensor | None, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = _laid(x if x.dim() == 3 else x[None])
    width = x.shape[2]
    q, s, kept = _out(x, width, keep)
    block = triton.next_power_of_2(width)
    _rows_kernel[(len(q),)](
        x, gate, colscale, q, s, kept, x.shape[1], width, x.stride(0), x.stride(1), _stride(gate), block,
        num_warps=_warps(block),
    )  # fmt: skip
    return q, s, kept


@triton.jit
def _rows_kernel(
    x, gate, colscale, q, s, kept, tokens, width, x_batch, x_token, gate_batch, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    y = tl.load(x + batch * x_batch + token * x_token + cols, mask=mask, other=0.0).to(tl.float32)
    if gate is not None:
        y *= tl.load(gate + batch * gate_batch + cols, mask=mask, other=0.0).to(tl.float32)
    if kept is not None:
        tl.store(kept + row * width + cols, y.to(kept.dtype.element_ty), mask=mask)
    if colscale is not None:
        y *= tl.load(colscale + cols, mask=mask, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.abs(y), 0))
    tl.store(s + row, scale)
    tl.store(q + row * width + cols, (y * (1 / scale)).to(tl.float8e4nv), mask=mask)


@triton.jit
def _scale(largest):
    """At which a row's largest value is the largest number of e4m3; never 0."""
    return tl.maximum(largest, _TINY) / _LARGEST


def modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    x = _laid(x)
    q, s, kept = _out(x, x.shape[2], keep)
    _modulate(x, None, None, shift, scale, None, q, s, kept)
    return q, s, kept


def add_modulate_fp8(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x, y = _laid(x), _laid(y)
    q, s, kept = _out(x, x.shape[2], keep)
    added = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _modulate(x, y, gate, shift, scale, added, q, s, kept)
    return added, q, s, kept


def _modulate(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, added: Tensor | None,
    q: Tensor, s: Tensor, kept: Tensor | None,
) -> None:  # fmt: skip
    width = x.shape[2]
    block = triton.next_power_of_2(width)
    y_strides = (0, 0) if y is None else (y.stride(0), y.stride(1))
    _modulate_kernel[(len(q),)](
        x, y, gate, shift, scale, added, q, s, kept, x.shape[1], width, x.stride(0), x.stride(1), *y_strides,
        _stride(gate), _stride(shift), _stride(scale), block, num_warps=_warps(block),
    )  # fmt: skip


@triton.jit
def _modulate_kernel(
    x, y, gate, shift, scale, added, q, s, kept, tokens, width, x_batch, x_token, y_batch, y_token,
    gate_batch, shift_batch, scale_batch, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    up = tl.load(scale + batch * scale_batch + cols, mask=mask, other=0.0)  # all is read before the first is needed
    on = tl.load(shift + batch * shift_batch + cols, mask=mask, other=0.0)
    v = tl.load(x + batch * x_batch + token * x_token + cols, mask=mask, other=0.0).to(tl.float32)
    if y is not None:
        g = tl.load(gate + batch * gate_batch + cols, mask=mask, other=0.0).to(tl.float32)
        v += g * tl.load(y + batch * y_batch + token * y_token + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = v.to(added.dtype.element_ty)  # the norm is that of what is saved for the backward pass
        tl.store(added + row * width + cols, rounded, mask=mask)
        v = rounded.to(tl.float32)
    v = tl.where(mask, v - tl.sum(v, 0) / width, 0.0)
    v *= tl.rsqrt(tl.sum(v * v, 0) / width + _EPS)
    v = v * (1 + up.to(tl.float32)) + on.to(tl.float32)
    if kept is not None:
        tl.store(kept + row * width + cols, v.to(kept.dtype.element_ty), mask=mask)
    unit = _scale(tl.max(tl.abs(v), 0))
    tl.store(s + row, unit)
    tl.store(q + row * width + cols, (v * (1 / unit)).to(tl.float8e4nv), mask=mask)


def gelu_fp8(o: Tensor | None, h: Tensor, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    return _pair(o, h, None, None, keep=keep)


def gelu_backward_fp8(
    d: Tensor | None, dy: Tensor, h: Tensor, colscale: Tensor | None, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    return _pair(d, h, dy, colscale, keep=keep)


def _pair(
    left: Tensor | None, h: Tensor, dy: Tensor | None, colscale: Tensor | None, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    left, h, dy = (None if part is None else _laid(part) for part in (left, h, dy))
    first, second = 0 if left is None else left.shape[2], h.shape[2]
    q, s, kept = _out(h, first + second, keep)
    left_strides = (0, 0) if left is None else (left.stride(0), left.stride(1))
    dy_strides = (0, 0) if dy is None else (dy.stride(0), dy.stride(1))
    left_block, block = triton.next_power_of_2(max(first, 1)), triton.next_power_of_2(second)
    warps = _warps(max(block, left_block))
    _pair_kernel[(len(q),)](
        left, h, dy, colscale, q, s, kept, h.shape[1], first, second, *left_strides, h.stride(0), h.stride(1),
        *dy_strides, left_block, block, num_warps=warps, maxnreg=64 if warps == 16 else None,
    )  # fmt: skip
    return q, s, kept


@triton.jit
def _pair_kernel(
    left, h, dy, colscale, q, s, kept, tokens, first, second, left_batch, left_token, h_batch, h_token,
    dy_batch, dy_token, LEFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row [left | GELU(h)], or with dy [left | dy GELU'(h)], in one scale.

    All is read before the first is needed. What waits for the scale waits in the tensors' own format, and registers
    are rationed: a row of 21,504 would leave a multiprocessor no room for a second one, to read while it writes.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    start = row * (first + second)
    cols = tl.arange(0, BLOCK)
    mask = cols < second
    x = tl.load(h + batch * h_batch + token * h_token + cols, mask=mask, other=0.0)
    if dy is not None:
        up = tl.load(dy + batch * dy_batch + token * dy_token + cols, mask=mask, other=0.0)
    if left is not None:
        left_cols = tl.arange(0, LEFT)
        left_mask = left_cols < first
        z = tl.load(left + batch * left_batch + token * left_token + left_cols, mask=left_mask, other=0.0)
        if kept is not None:
            tl.store(kept + start + left_cols, z, mask=left_mask)
        if colscale is not None:
            by = tl.load(colscale + left_cols, mask=left_mask, other=0.0).to(tl.float32)
            z = (z.to(tl.float32) * by).to(h.dtype.element_ty)
    y = x.to(tl.float32)
    square = y * y
    bell = 1 / (1 + tl.exp(y * (1 + square * _GELU_CUBE) * _TWICE * -1))  # (1 + tanh) / 2
    if dy is None:
        y *= bell
    else:
        slope = bell + y * bell * (1 - bell) * (1 + square * _GELU_CUBE * 3) * _TWICE
        y = slope * up.to(tl.float32)
    if kept is not None:
        tl.store(kept + start + first + cols, y.to(kept.dtype.element_ty), mask=mask)
    if colscale is not None:
        y *= tl.load(colscale + first + cols, mask=mask, other=0.0).to(tl.float32)
    y = y.to(h.dtype.element_ty)
    largest = tl.max(tl.abs(y.to(tl.float32)), 0)
    if left is not None:
        largest = tl.maximum(largest, tl.max(tl.abs(z.to(tl.float32)), 0))
    scale = _scale(largest)
    tl.store(s + row, scale)
    tl.store(q + start + first + cols, (y.to(tl.float32) * (1 / scale)).to(tl.float8e4nv), mask=mask)
    if left is not None:
        tl.store(q + start + left_cols, (z.to(tl.float32) * (1 / scale)).to(tl.float8e4nv), mask=left_mask)


def transpose(data: Tensor, out: Tensor) -> None:
    """data (N, K) into out (K, N), both of one byte a value and contiguous; N and K are multiples of 4."""
    rows, cols = data.shape[0] // 4, data.shape[1] // 4
    grid = (triton.cdiv(rows, _TILE), triton.cdiv(cols, _TILE))
    _transpose_kernel[grid](data.view(torch.int32), out.view(torch.int32), rows, cols, _TILE, num_warps=4)


_TILE = 32
"""Words of four bytes a side: a tile of 128 × 128 bytes, whose every row is one line of the cache."""


@triton.jit
def _transpose_kernel(data, out, rows, cols, TILE: tl.constexpr):
    """In words of four bytes, because shared memory moves those best: four rows of a word each are transposed in
    registers by shifts, and the words' own places by `tl.trans`."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)  # words along N
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)  # words along K
    load_at = (4 * i.to(tl.int64) * cols)[:, None] + j[None, :]
    load_mask = (i < rows)[:, None] & (j < cols)[None, :]
    a = tl.load(data + load_at, mask=load_mask, other=0)
    b = tl.load(data + load_at + cols, mask=load_mask, other=0)
    c = tl.load(data + load_at + 2 * cols, mask=load_mask, other=0)
    d = tl.load(data + load_at + 3 * cols, mask=load_mask, other=0)
    store_at = (4 * j.to(tl.int64) * rows)[:, None] + i[None, :]
    store_mask = (j < cols)[:, None] & (i < rows)[None, :]
    for byte in tl.static_range(4):
        low = (a >> (8 * byte)) & 255 | ((b >> (8 * byte)) & 255) << 8
        word = low | ((c >> (8 * byte)) & 255) << 16 | (d >> (8 * byte)) << 24
        tl.store(out + store_at + byte * rows, tl.trans(word), mask=store_mask)


def _out(x: Tensor, width: int, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, s and what is kept, of the rows of x (B, L, …)."""
    rows = x.shape[0] * x.shape[1]
    q = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    s = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    kept = torch.empty(*x.shape[:2], width, dtype=x.dtype, device=x.device) if keep else None
    return q, s, kept


def _laid(x: Tensor) -> Tensor:
    """The channels side by side: a gradient comes in any layout."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _stride(part: Tensor | None) -> int:
    return 0 if part is None else part.stride(0)


def _warps(block: int) -> int:
    """About 32 values a thread, so that a row stays in registers."""
    return min(max(block // 1024, 4), 16)
