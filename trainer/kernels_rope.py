"""The QK norms and the rotary embedding of `pointwise` as Triton kernels: a token's heads are one program's work."""

import functools  # no annotations of the future: the interpreter of Triton 3.0 reads them as they stand

import torch
import triton
import triton.language as tl
from torch import Tensor
from xflux_trainer import pointwise

_EPS = tl.constexpr(pointwise.EPS)
_WALK = 4
"""Tokens that one program walks over where the norms' weights are trained."""


@functools.cache
def _tile(heads: int, channels: int) -> tuple[int, int, int]:
    """Heads that are taken at once, how many times, and the power of two that holds a head's channels.

    1024 elements a tile: 16 bytes of bf16 for each thread of four warps.
    """
    block = triton.next_power_of_2(channels)
    at_once = max(1, min(triton.next_power_of_2(heads), 1024 // block))
    return at_once, triton.cdiv(heads, at_once), block


@triton.jit
def _turned(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Each pair of channels a quarter turn on: (a, b) to (-b, a)."""
    a, b = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
    return tl.reshape(tl.join(-b, a), (ROWS, BLOCK))


@triton.jit
def _columns(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The channels of each head of a tile, (ROWS, BLOCK).

    What all heads share is loaded for each of them, out of the cache: as one row it would change hands between threads.
    """
    return tl.zeros((ROWS, 1), tl.int32) + tl.arange(0, BLOCK)[None]


@triton.jit
def _weight(text, image, of_text, cols, C: tl.constexpr):
    """The weights of this token's norm, as wide as `cols`: the others are not read."""
    first = tl.load(text + cols, mask=(cols < C) & of_text, other=0.0).to(tl.float32)
    return first + tl.load(image + cols, mask=(cols < C) & (of_text == 0), other=0.0).to(tl.float32)


@triton.jit
def _forward(
    x, out, weight, turn, across, H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's queries, or keys."""
    cols = tl.arange(0, BLOCK)[None]
    for time in tl.static_range(TIMES):
        heads = time * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (heads < H) & (cols < C)
        a = tl.load(x + heads * C + cols, mask=mask, other=0.0).to(tl.float32)
        n = a * (1.0 / tl.sqrt(tl.sum(a * a, 1) / C + _EPS))[:, None] * weight
        made = n * turn + _turned(n, ROWS, BLOCK) * across
        tl.store(out + heads * C + cols, made.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _qk_rope(
    qk, text_q, text_k, image_q, image_k, cos, sin, q, k, qk_b, qk_l, text, H: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, TIMES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = _columns(ROWS, BLOCK)
    turn = tl.load(cos + token * C + cols, mask=cols < C, other=0.0)
    across = tl.load(sin + token * C + cols, mask=cols < C, other=0.0)
    x = qk + batch * qk_b + token * qk_l
    row = (batch * tl.num_programs(0) + token) * (H * C)
    weight = _weight(text_q, image_q, token < text, cols, C)
    _forward(x, q + row, weight, turn, across, H, C, ROWS, TIMES, BLOCK)
    weight = _weight(text_k, image_k, token < text, cols, C)
    _forward(x + H * C, k + row, weight, turn, across, H, C, ROWS, TIMES, BLOCK)


def qk_rope(qk: Tensor, norms: pointwise.Norms, cos: Tensor, sin: Tensor, text: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qk.shape
    channels = cos.shape[1]
    heads = width // 2 // channels
    q = torch.empty((batch, tokens, heads, channels), dtype=qk.dtype, device=qk.device)
    k = torch.empty_like(q)
    rows, times, block = _tile(heads, channels)
    _qk_rope[(tokens, batch)](
        qk, *norms, cos.contiguous(), sin.contiguous(), q, k, qk.stride(0), qk.stride(1), text, heads, channels, rows,
        times, block,
    )  # fmt: skip
    return q, k


@triton.jit
def _backward(
    dy, x, out, weight, turn, across, total, dy_h, H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    TIMES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's queries, or keys; `total` with what it adds to the gradient of the norm's weights."""
    cols = tl.arange(0, BLOCK)[None]
    for time in tl.static_range(TIMES):
        heads = time * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (heads < H) & (cols < C)
        up = tl.load(dy + heads * dy_h + cols, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(x + heads * C + cols, mask=mask, other=0.0).to(tl.float32)
        dn = up * turn - _turned(up * across, ROWS, BLOCK)
        rstd = (1.0 / tl.sqrt(tl.sum(a * a, 1) / C + _EPS))[:, None]
        n = a * rstd
        total += dn * n
        dn = dn * weight
        made = (dn - n * (tl.sum(dn * n, 1) / C)[:, None]) * rstd
        tl.store(out + heads * C + cols, made.to(out.dtype.element_ty), mask=mask)
    return total


@triton.jit
def _qk_rope_backward(
    dq, dk, qk, text_q, text_k, image_q, image_k, cos, sin, out, sums, dq_b, dq_l, dq_h, dk_b, dk_l, dk_h, qk_b, qk_l,
    out_b, out_l, tokens, text, texts, H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr,
    BLOCK: tl.constexpr, WALK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    # The first `texts` programs walk over text alone and the others over images alone: one weight, one sum for each.
    place, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    of_text = place < texts
    first = tl.where(of_text, place * WALK, text + (place - texts) * WALK)
    last = tl.minimum(first + WALK, tl.where(of_text, text, tokens))
    cols = _columns(ROWS, BLOCK)
    by_q = _weight(text_q, image_q, of_text, cols, C)
    by_k = _weight(text_k, image_k, of_text, cols, C)
    sum_q = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_k = tl.zeros((ROWS, BLOCK), tl.float32)
    for token in range(first, last):
        turn = tl.load(cos + token * C + cols, mask=cols < C, other=0.0)
        across = tl.load(sin + token * C + cols, mask=cols < C, other=0.0)
        x = qk + batch * qk_b + token * qk_l
        made = out + batch * out_b + token * out_l
        dy = dq + batch * dq_b + token * dq_l
        sum_q = _backward(dy, x, made, by_q, turn, across, sum_q, dq_h, H, C, ROWS, TIMES, BLOCK)
        dy = dk + batch * dk_b + token * dk_l
        sum_k = _backward(dy, x + H * C, made + H * C, by_k, turn, across, sum_k, dk_h, H, C, ROWS, TIMES, BLOCK)
    if SUMS:
        part = sums + (place * tl.num_programs(1) + batch) * (2 * C) + tl.arange(0, BLOCK)
        tl.store(part, tl.sum(sum_q, 0), mask=tl.arange(0, BLOCK) < C)
        tl.store(part + C, tl.sum(sum_k, 0), mask=tl.arange(0, BLOCK) < C)


def qk_rope_backward(
    dq: Tensor, dk: Tensor, qk: Tensor, norms: pointwise.Norms, cos: Tensor, sin: Tensor, text: int, out: Tensor,
    *, sums: bool = False,
) -> pointwise.Norms | None:  # fmt: skip
    batch, tokens, heads, channels = dq.shape
    dq = dq if dq.stride(-1) == 1 else dq.contiguous()
    dk = dk if dk.stride(-1) == 1 else dk.contiguous()
    rows, times, block = _tile(heads, channels)
    walk = _WALK if sums else 1
    texts, images = triton.cdiv(text, walk), triton.cdiv(tokens - text, walk)
    parts = out
    if sums:
        parts = torch.empty((texts + images, batch, 2, channels), dtype=torch.float32, device=qk.device)
    _qk_rope_backward[(texts + images, batch)](
        dq, dk, qk, *norms, cos.contiguous(), sin.contiguous(), out, parts, *dq.stride()[:3], *dk.stride()[:3],
        qk.stride(0), qk.stride(1), out.stride(0), out.stride(1), tokens, text, texts, heads, channels, rows, times,
        block, walk, sums,
    )  # fmt: skip
    if not sums:
        return None
    of_text, of_images = parts[:texts].sum((0, 1)), parts[texts:].sum((0, 1))
    return of_text[0], of_text[1], of_images[0], of_images[1]
