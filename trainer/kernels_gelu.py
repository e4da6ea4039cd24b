"""GELU, its gradient, and GELU beside what stands before it in a row; and how rows of numbers are cut up."""

import functools  # no annotations of the future: the interpreter of Triton 3.0 reads them as they stand

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = 2048
"""Elements of a row that one program takes."""


@functools.cache
def pieces_of(width: int, most: int) -> tuple[int, int]:
    """A block that a row is cut into, and how many there are: an exact cut where it wastes no thread."""
    exact = width & -width
    block = min(exact, most) if exact >= 256 else min(triton.next_power_of_2(width), most)
    return block, triton.cdiv(width, block)


def laid(x: Tensor) -> Tensor:
    """The channels side by side: a gradient comes in any layout."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _gate(x):
    """What tanh-GELU multiplies x by: (1 + tanh u) / 2 is the logistic function of 2 u, for one exponential and no loss
    of digits at small values."""
    return 1.0 / (1.0 + tl.exp(x * (-1.5957691216057308 - 0.07135481627260025 * x * x)))


@triton.jit
def _gelu(
    dy, h, out, dy_b, dy_l, h_b, h_l, out_b, out_l, D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    token, batch = (tl.program_id(0) // PIECES).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = (tl.program_id(0) % PIECES) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    x = tl.load(h + batch * h_b + token * h_l + cols, mask=mask).to(tl.float32)
    gate = _gate(x)
    if BACKWARD:
        up = tl.load(dy + batch * dy_b + token * dy_l + cols, mask=mask).to(tl.float32)
        slope = gate + x * gate * (1.0 - gate) * (1.5957691216057308 + 0.21406444881780076 * x * x)
        made = up * slope
    else:
        made = x * gate
    tl.store(out + batch * out_b + token * out_l + cols, made.to(out.dtype.element_ty), mask=mask)


def gelu(h: Tensor, out: Tensor) -> Tensor:
    batch, tokens, width = h.shape
    block, pieces = pieces_of(width, _MOST)
    h_b, h_l, _ = h.stride()
    _gelu[(tokens * pieces, batch)](
        h, h, out, h_b, h_l, h_b, h_l, out.stride(0), out.stride(1), width, block, pieces, False
    )
    return out


def gelu_backward(dy: Tensor, h: Tensor, out: Tensor) -> Tensor:
    batch, tokens, width = h.shape
    dy = laid(dy)
    block, pieces = pieces_of(width, _MOST)
    _gelu[(tokens * pieces, batch)](
        dy, h, out, dy.stride(0), dy.stride(1), h.stride(0), h.stride(1), out.stride(0), out.stride(1), width, block,
        pieces, True,
    )  # fmt: skip
    return out


@triton.jit
def _join(
    o, h, out, o_b, o_l, h_b, h_l, out_b, out_l, D: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    token, batch = (tl.program_id(0) // PIECES).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = (tl.program_id(0) % PIECES) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D + M
    x = tl.load(h + batch * h_b + token * h_l + cols - D, mask=inside & (cols >= D), other=0.0).to(tl.float32)
    same = tl.load(o + batch * o_b + token * o_l + cols, mask=cols < D, other=0.0)
    made = tl.where(cols < D, same, (x * _gate(x)).to(out.dtype.element_ty))
    tl.store(out + batch * out_b + token * out_l + cols, made, mask=inside)


def join(o: Tensor, h: Tensor, out: Tensor | None = None) -> Tensor:
    batch, tokens, first = o.shape
    second = h.shape[-1]
    if out is None:
        out = torch.empty((batch, tokens, first + second), dtype=o.dtype, device=o.device)
    block, pieces = pieces_of(first + second, _MOST)
    _join[(tokens * pieces, batch)](
        o, h, out, o.stride(0), o.stride(1), h.stride(0), h.stride(1), out.stride(0), out.stride(1), first, second,
        block, pieces,
    )  # fmt: skip
    return out
