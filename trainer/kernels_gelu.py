"""GELU together with what comes beside it, in one pass."""

import functools  # no annotations of the future: the interpreter of Triton 3.0 reads them as they stand

import torch
import triton
import triton.language as tl
from torch import Tensor


@functools.cache
def _pieces(width: int) -> tuple[int, int]:
    """A block that a row is cut into, and how many there are: an exact cut where it wastes no thread."""
    exact = width & -width
    block = min(exact if exact >= 256 else triton.next_power_of_2(width), 2048)
    return block, triton.cdiv(width, block)


@triton.jit
def _gate(x):
    """What tanh-GELU multiplies x by: (1 + tanh u) / 2 is the logistic function of 2 u, for one exponential."""
    return 1.0 / (1.0 + tl.exp(x * (-1.5957691216057308 - 0.07135481627260025 * x * x)))


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
    block, pieces = _pieces(first + second)
    _join[(tokens * pieces, batch)](
        o, h, out, o.stride(0), o.stride(1), h.stride(0), h.stride(1), out.stride(0), out.stride(1), first, second,
        block, pieces,
    )  # fmt: skip
    return out
