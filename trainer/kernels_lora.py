"""The narrow products of a group's adapters as Triton kernels: all adapters of a group in one launch, at memory speed.

Of what is as wide as the activations, each kernel reads every element once, or once for each 64 of a rank. Adapters of
one width and scale whose columns follow each other evenly are a run, and one launch; others take one each. Sums over
tokens are split over programs, and their parts are added in a fixed order: the same bits every time.
"""

import functools  # no annotations of the future: the interpreter of Triton 3.0 reads them as they stand
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from xflux_trainer.pointwise import Part, Parts

_FILL = 264
"""Programs that keep a large card busy: two for each multiprocessor of an H100 or H200."""


class _Run(NamedTuple):
    """`count` adapters like `first`, `step` columns apart; the first one's factor begins at `row`."""

    first: Part
    count: int
    step: int
    row: int


@functools.cache
def _runs(parts: Parts) -> tuple[_Run, ...]:
    found: list[_Run] = []
    row = 0
    for part in parts:
        if found and part == _next(found[-1], part.column):
            first, count, step, start = found[-1]
            found[-1] = _Run(first, count + 1, step or part.column - first.column, start)
        else:
            found.append(_Run(part, 1, 0, row))
        row += part.width
    return tuple(found)


def _next(run: _Run, column: int) -> Part:
    """The adapter that would go on with a run; the second of it, at `column`, sets the step."""
    first, count, step, _ = run
    place = first.column + count * step if step else column
    return first._replace(column=place, narrow=first.narrow + count * first.rank)


def _own(whole: Tensor, run: _Run) -> tuple[Tensor, int, int]:
    """A run's factors, which `whole` (N', r) has from here on, and their strides by width and rank."""
    return whole[run.row :] if run.row else whole, whole.stride(0), whole.stride(1)


def _laid(x: Tensor) -> Tensor:
    """The channels side by side: a gradient comes in any layout."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _from(x: Tensor, column: int) -> Tensor:
    return x[:, column:] if column else x


@functools.cache
def _tile(rank: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, columns and narrow columns that a program takes at once: fp32 has no tensor cores here, and less room."""
    if dtype == torch.float32:
        return 32, 64, 16
    return 64, 128, min(max(triton.next_power_of_2(rank), 16), 64)


@triton.jit(do_not_specialize=["rows"])
def _add(
    y, low, up, rows, width, step, y_m, low_m, up_n, up_r, scale, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(width, BN)
    part = tl.program_id(0) // pieces
    cols = (tl.program_id(0) % pieces) * BN + tl.arange(0, BN)
    row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    inside = (row < rows)[:, None]
    mask = inside & (cols < width)[None]
    to = y + part * step + row[:, None] * y_m + cols[None]
    was = tl.load(to, mask=mask)
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.static_range(0, R, BR):
        deep = start + tl.arange(0, BR)
        a = tl.load(low + part * R + row[:, None] * low_m + deep[None], mask=inside & (deep < R)[None], other=0.0)
        own = up + (part * width + cols)[None] * up_n + deep[:, None] * up_r
        b = tl.load(own, mask=(cols < width)[None] & (deep < R)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(to, (was.to(tl.float32) + scale * total).to(y.dtype.element_ty), mask=mask)


def lora_add(y: Tensor, low: Tensor, up: Tensor, parts: Parts) -> Tensor:
    rows = len(y)
    for run in _runs(parts):
        first = run.first
        factor, up_n, up_r = _own(up, run)
        bm, bn, br = _tile(first.rank, y.dtype)
        _add[(triton.cdiv(first.width, bn) * run.count, triton.cdiv(rows, bm))](
            _from(y, first.column), _from(low, first.narrow), factor, rows, first.width, run.step, y.stride(0),
            low.stride(0), up_n, up_r, first.scale, first.rank, bm, bn, br,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows"])
def _narrow(
    dy, up, out, rows, width, step, dy_m, out_m, up_n, up_r, scale, R: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    pieces: tl.constexpr = (R + BR - 1) // BR
    part = tl.program_id(0) // pieces
    deep = (tl.program_id(0) % pieces) * BR + tl.arange(0, BR)
    row = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    inside = (row < rows)[:, None]
    cols = tl.arange(0, BN)
    come = dy + part * step + row[:, None] * dy_m + cols[None]
    own = up + (part * width + cols)[:, None] * up_n + deep[None] * up_r
    total = tl.zeros((BM, BR), tl.float32)
    for start in range(0, width, BN):
        a = tl.load(come, mask=inside & (cols < width - start)[None], other=0.0)
        b = tl.load(own, mask=(cols < width - start)[:, None] & (deep < R)[None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        come += BN
        own += BN * up_n
    to = out + part * R + row[:, None] * out_m + deep[None]
    tl.store(to, (scale * total).to(out.dtype.element_ty), mask=inside & (deep < R)[None])


def lora_narrow_backward(dy: Tensor, up: Tensor, parts: Parts, out: Tensor | None = None) -> Tensor:
    rows, dy = len(dy), _laid(dy)
    if out is None:
        out = torch.empty((rows, sum(part.rank for part in parts)), dtype=dy.dtype, device=dy.device)
    for run in _runs(parts):
        first = run.first
        factor, up_n, up_r = _own(up, run)
        most, bn, br = _tile(first.rank, dy.dtype)
        across = triton.cdiv(first.rank, br) * run.count
        bm = _rows_at_once(rows, across, most)
        _narrow[(across, triton.cdiv(rows, bm))](
            _from(dy, first.column), factor, _from(out, first.narrow), rows, first.width, run.step, dy.stride(0),
            out.stride(0), up_n, up_r, first.scale, first.rank, bm, bn, br, num_stages=4,
        )  # fmt: skip
    return out


def _rows_at_once(rows: int, across: int, most: int) -> int:
    """As many as leave a program for most multiprocessors: each tile of rows reads all of the factor again."""
    while most > 16 and triton.cdiv(rows, most) * across < _FILL * 3 // 8:
        most //= 2
    return most


@triton.jit(do_not_specialize=["rows", "span"])
def _sums(
    dy, low, out, rows, span, width, step, dy_m, low_m, out_s, out_n, out_r, scale, R: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """scale dy^T low over `span` rows. The narrow side comes first: dy is multiplied as it lies in memory."""
    deeps: tl.constexpr = (R + BR - 1) // BR
    pieces = tl.cdiv(width, BN)
    deep = (tl.program_id(0) % deeps) * BR + tl.arange(0, BR)
    part = tl.program_id(0) // deeps // pieces
    cols = (tl.program_id(0) // deeps % pieces) * BN + tl.arange(0, BN)
    split = tl.program_id(1).to(tl.int64)
    dy += part * step
    low += part * R
    total = tl.zeros((BR, BN), tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, rows), BM):
        row = start + tl.arange(0, BM)
        inside = (row < rows)[:, None]
        a = tl.load(dy + row[:, None] * dy_m + cols[None], mask=inside & (cols < width)[None], other=0.0)
        b = tl.load(low + row[:, None] * low_m + deep[None], mask=inside & (deep < R)[None], other=0.0)
        total = tl.dot(tl.trans(b), a, total, input_precision="ieee")
    to = out + split * out_s + (part * width + cols)[None] * out_n + deep[:, None] * out_r
    tl.store(to, scale * total, mask=(cols < width)[None] & (deep < R)[:, None])


def _sum(dy: Tensor, low: Tensor, run: _Run, out: Tensor, out_n: int, out_r: int) -> None:
    """Into `out`, which the run's sums fill, with these strides by width and rank."""
    rows, first = len(dy), run.first
    bm, bn, br = _tile(first.rank, dy.dtype)
    across = triton.cdiv(first.width, bn) * triton.cdiv(first.rank, br) * run.count
    span = bm * max(triton.cdiv(rows * across, bm * _FILL), 4)
    splits = max(triton.cdiv(rows, span), 1)
    made = out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    _sums[(across, splits)](
        _from(dy, first.column), _from(low, first.narrow), made, rows, span, first.width, run.step, dy.stride(0),
        low.stride(0), out.numel(), out_n, out_r, first.scale, first.rank, bm, bn, br, num_stages=4,
    )  # fmt: skip
    if splits > 1:
        torch.sum(made, 0, out=out)


def lora_up_grad(dy: Tensor, low: Tensor, parts: Parts, out: Tensor) -> Tensor:
    dy = _laid(dy)
    for run in _runs(parts):
        _sum(dy, low, run, out[run.row : run.row + run.first.width * run.count], *out.stride())
    return out


def lora_down_grad(dlow: Tensor, x: Tensor, out: Tensor) -> Tensor:
    rank, width = out.shape
    _sum(_laid(x), dlow, _Run(Part(0, width, 0, rank), 1, 0, 0), out, 1, width)
    return out
