"""What `fp8` does beside its products, in Triton: each row is read from memory once, and written in one byte a value.

A row's scale must be known before its first value can be written. Rows as wide as the model, up to 32,768 values, wait
in registers meanwhile; the MLP's are looked at twice. NaN and infinities come out as NaN, so that a broken gradient
stays seen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from xflux_trainer import fp8

_LARGEST = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-30)
_EPS = tl.constexpr(1e-6)
_EXPONENT = tl.constexpr(-2 * 0.7978845608028654 * 1.4426950408889634)
_EXPONENT_CUBE = tl.constexpr(-2 * 0.7978845608028654 * 1.4426950408889634 * 0.044715)
"""exp2's argument in GELU's gate, x (a + b x^2)."""
_SLOPE = tl.constexpr(2 * 0.7978845608028654)
_SLOPE_CUBE = tl.constexpr(2 * 0.7978845608028654 * 3 * 0.044715)
_DIP, _STEEPEST = tl.constexpr(fp8.DIP), tl.constexpr(fp8.STEEPEST)
_CHUNK = 2048
"""Values of a row that a program has in hand at once, eight a thread."""


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
    chunk = min(triton.next_power_of_2(second), _CHUNK)
    _pair_kernel[(len(q),)](
        left, h, dy, colscale, q, s, kept, h.shape[1], *left_strides, h.stride(0), h.stride(1), *dy_strides,
        first, second, chunk, num_warps=max(chunk // 256, 4),
    )  # fmt: skip
    return q, s, kept


@triton.jit
def _gate(x, square):
    """What tanh-GELU multiplies x by, (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)), in the fewest instructions."""
    root = tl.rsqrt(1 + tl.exp2(x * (square * _EXPONENT_CUBE + _EXPONENT)))
    return root * root


@triton.jit
def _pair_kernel(
    left, h, dy, colscale, q, s, kept, tokens, left_batch, left_token, h_batch, h_token, dy_batch, dy_token,
    FIRST: tl.constexpr, SECOND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The row [left | GELU(h)], or with dy [left | dy GELU'(h)], in one scale.

    What the values can be at most is known without them, from h or from dy: a first look finds that, a second makes
    each value and writes it. Nothing waits in registers, and the second look finds in the caches what the first read.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    h += batch * h_batch + token * h_token
    q += row * (FIRST + SECOND)
    cols = tl.arange(0, CHUNK)
    most = tl.zeros((CHUNK,), tl.float32)
    if dy is None:
        for start in tl.static_range(0, SECOND, CHUNK):
            x = tl.load(h + start + cols, mask=start + cols < SECOND, other=0.0).to(tl.float32)
            most = tl.maximum(most, x)
        top = tl.max(most, 0)
        largest = tl.maximum(top * _gate(top, top * top), _DIP)
        most = tl.zeros((CHUNK,), tl.float32)
    else:
        dy += batch * dy_batch + token * dy_token
        for start in tl.static_range(0, SECOND, CHUNK):
            mask = start + cols < SECOND
            up = tl.load(dy + start + cols, mask=mask, other=0.0).to(tl.float32)
            if colscale is not None:
                up *= tl.load(colscale + FIRST + start + cols, mask=mask, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(up))
        largest = tl.max(most, 0) * _STEEPEST
        most = tl.zeros((CHUNK,), tl.float32)
    if left is not None:
        left += batch * left_batch + token * left_token
        for start in tl.static_range(0, FIRST, CHUNK):
            mask = start + cols < FIRST
            z = tl.load(left + start + cols, mask=mask, other=0.0).to(tl.float32)
            if colscale is not None:
                z *= tl.load(colscale + start + cols, mask=mask, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(z))
        largest = tl.maximum(largest, tl.max(most, 0))
    scale = _scale(largest)
    tl.store(s + row, scale)
    unit = 1 / scale
    if kept is not None:
        kept += row * (FIRST + SECOND)
    for start in tl.static_range(0, SECOND, CHUNK):
        mask = start + cols < SECOND
        x = tl.load(h + start + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        square = x * x
        gate = _gate(x, square)
        if dy is None:
            y = x * gate
        else:
            up = tl.load(dy + start + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            y = (gate + x * (square * _SLOPE_CUBE + _SLOPE) * (gate - gate * gate)) * up
        if kept is not None:
            tl.store(kept + FIRST + start + cols, y.to(kept.dtype.element_ty), mask=mask)
        if colscale is not None:
            y *= tl.load(colscale + FIRST + start + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(q + FIRST + start + cols, (y * unit).to(tl.float8e4nv), mask=mask)
    if left is not None:
        for start in tl.static_range(0, FIRST, CHUNK):
            mask = start + cols < FIRST
            z = tl.load(left + start + cols, mask=mask, other=0.0, eviction_policy="evict_first")
            if kept is not None:
                tl.store(kept + start + cols, z, mask=mask)
            z = z.to(tl.float32)
            if colscale is not None:
                z *= tl.load(colscale + start + cols, mask=mask, other=0.0).to(tl.float32)
            tl.store(q + start + cols, (z * unit).to(tl.float8e4nv), mask=mask)


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
