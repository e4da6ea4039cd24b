"""The product of a few rows with a weight that is held in fp8, in Triton: as fast as the weight is read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW = 32, 256, 2, 3
"""Where few rows are multiplied: outputs of a program, inputs at once, warps, and tiles that are on their way."""


def few(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias (M, N) of up to 16 rows x (M, K), in their format; data (N, K) contiguous, scale (N, 1) fp32."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    y = torch.empty(rows, len(data), dtype=x.dtype, device=x.device)
    block, chunk, warps, stages = _FEW
    _few_kernel[(triton.cdiv(len(data), block),)](
        x, data, scale, bias, y, rows, len(data), x.stride(0), width, block, chunk, num_warps=warps, num_stages=stages
    )
    return y


@triton.jit
def _few_kernel(
    x, data, scale, bias, y, rows, outputs, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Each weight is read once, and exact in x's format; the tensor cores take 16 rows in the time of one."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.arange(0, 16)
    cols = tl.arange(0, CHUNK)
    inside, present = n < outputs, m < rows
    weights = data + n.to(tl.int64)[:, None] * WIDTH + cols[None]
    values = x + m[None] * x_row + cols[:, None]
    total = tl.zeros((BLOCK, 16), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        there = start + cols < WIDTH
        w = tl.load(weights + start, mask=inside[:, None] & there[None], other=0.0)
        v = tl.load(values + start, mask=present[None] & there[:, None], other=0.0)
        # By way of fp32, because e4m3 to bf16 at once becomes the slowest conversion that there is.
        total = tl.dot(w.to(tl.float32).to(x.dtype.element_ty), v, total)
    total *= tl.load(scale + n, mask=inside, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    to = y + m[None].to(tl.int64) * outputs + n[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=inside[:, None] & present[None])
