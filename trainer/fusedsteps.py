"""One parameter's optimizer step in a few Triton kernels, where there is a GPU: no fp32 copy, no wait for the device.

The optimizer stays the owner of its options and its state, in the same form, so that checkpoints do not show by which
way a step was taken. On the CPU, without Triton, and for what the kernels do not cover, `slots` lets the optimizer
itself step on an fp32 copy. Random bits come from a counter and a seed, so a resumed run throws the same dice; they are
not those of the CPU's generator.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from xflux_trainer import fastops, optimizers

ROWS, COLS, PROGRAMS = 32, 512, 512
"""Rows of a strip, or a multiple of them; columns of a tile; programs that a large matrix is cut up for."""
_LINE, _DEEP = 64, 64  # moments that one program makes, and the partial sums that it takes at a time
_VECTOR, _SIZE, _BLOCKS, _WARPS = 4096, 1024, 8, 8


class Place(NamedTuple):
    """Where a new value goes: how (`slots.weight_update`), the weight, and the compensation or the master."""

    update: str
    weight: Tensor
    other: Tensor | None


class Squares(NamedTuple):
    """Partial sums of a gradient's squares: over the rows of each tile (tiles, m), the columns of each strip."""

    rows: Tensor
    cols: Tensor
    span: int

    def norm(self) -> Tensor:
        return self.rows.sum().sqrt()


def usable(optimizer: torch.optim.Optimizer, weight: Tensor) -> bool:
    """Whether `step` can take this parameter's steps: where Triton's kernels work, for the optimizers that it knows."""
    if type(optimizer).__name__ not in ("Adafactor", "AdamW", "AdamW8bit") or not weight.is_contiguous():
        return False
    if type(optimizer).__name__ == "Adafactor" and weight.dim() not in (1, 2):
        return False
    return not fastops.why_not(weight.device)


def factored(optimizer: torch.optim.Optimizer, grad: Tensor) -> bool:
    """Whether this gradient's step begins with `measure`."""
    return type(optimizer).__name__ == "Adafactor" and grad.dim() == 2 and grad.is_contiguous()


def measure(grad: Tensor) -> Squares:
    """What a matrix's step begins with. The same pass serves the norm of all gradients."""
    from xflux_trainer import stepkernels

    m, n = grad.shape
    tiles = math.ceil(n / COLS)
    span = ROWS * max(1, m * tiles // (ROWS * PROGRAMS))
    strips = math.ceil(m / span)
    rows = grad.new_empty((tiles, m), dtype=torch.float32)
    cols = grad.new_empty((strips, n), dtype=torch.float32)
    stepkernels.squares[(tiles, strips)](
        grad, rows, cols, m, n, span, ROWS=ROWS // 2, COLS=COLS, num_warps=_WARPS
    )  # fmt: skip
    return Squares(rows, cols, span)


@torch.no_grad()
def step(
    optimizer: torch.optim.Optimizer, held: nn.Parameter, place: Place, grad: Tensor, coefficient: float | Tensor,
    seed: int, squares: Squares | None = None,
) -> None:  # fmt: skip
    """A step of the parameter that `optimizer` knows as `held`, with `grad` times `coefficient`.

    `seed` (under 2^63) is of this step and parameter; `squares` are `measure`'s of this gradient, where they are known.
    """
    group, state = optimizer.param_groups[0], optimizer.state[held]
    factor, scale = (1.0, coefficient) if isinstance(coefficient, Tensor) else (coefficient, None)
    rate = float(group["lr"])
    ends = (factor, scale, rate, 1 - rate * group["weight_decay"])
    seed |= 1 << 62  # always of 64 bits, of which the kernels are compiled for one kind
    if type(optimizer).__name__ != "Adafactor":
        _adamw(optimizer, group, state, place, grad.contiguous(), ends, seed)
    else:
        _adafactor(group, state, place, grad.contiguous(), ends, seed, squares)


_Ends = tuple[float, "Tensor | None", float, float]


def _adafactor(
    group: dict[str, Any], state: dict[str, Any], place: Place, grad: Tensor, ends: _Ends, seed: int,
    squares: Squares | None,
) -> None:  # fmt: skip
    """transformers' Adafactor without a first moment, and with the learning rate as it is given."""
    from xflux_trainer import stepkernels

    if not state:
        shapes = {"exp_avg_sq": grad.shape}
        if grad.dim() == 2:
            shapes = {"exp_avg_sq_row": grad.shape[:1], "exp_avg_sq_col": grad.shape[1:]}
        state |= {"step": 0, "RMS": 0, **{key: _zeros(shape, grad) for key, shape in shapes.items()}}
    state["step"] += 1
    fresh = math.pow(state["step"], group["decay_rate"])
    factor, scale, rate, keep = ends
    eps, threshold = group["eps"][0], group["clip_threshold"]
    kind, weight, other = stepkernels.KINDS[place.update], place.weight, place.other
    if grad.dim() == 1:
        stepkernels.unfactored[(1,)](
            weight, other, grad, state["exp_avg_sq"], len(grad), factor, scale, rate, keep, 1 - fresh, fresh, eps,
            threshold, seed, KIND=kind, BLOCK=_VECTOR, num_warps=_WARPS,
        )  # fmt: skip
        return
    rows, cols, span = squares or measure(grad)
    (tiles, m), (strips, n) = rows.shape, cols.shape
    row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    row_programs = math.ceil(m / _LINE)
    row_sums, update_sums = rows.new_empty(row_programs), rows.new_empty(tiles * strips)
    stepkernels.moments[(row_programs + math.ceil(n / _LINE),)](
        rows, cols, row, col, row_sums, m, n, tiles, strips, factor, scale, 1 - fresh, fresh, eps,
        DEEP=_DEEP, WIDE=_LINE,
    )  # fmt: skip
    stepkernels.update_squares[(tiles, strips)](
        grad, row, col, row_sums, row_programs, update_sums, m, n, span, factor, scale, ROWS=ROWS // 2, COLS=COLS,
        num_warps=_WARPS,
    )  # fmt: skip
    stepkernels.factored[(tiles, strips)](
        weight, other, grad, row, col, row_sums, row_programs, update_sums, tiles * strips, m, n, span, float(m * n),
        factor, scale, rate, keep, threshold, seed, KIND=kind, ROWS=ROWS // 8, COLS=COLS, num_warps=_WARPS,
    )  # fmt: skip


def _adamw(
    optimizer: Any, group: dict[str, Any], state: dict[str, Any], place: Place, grad: Tensor, ends: _Ends, seed: int
) -> None:
    """torch's AdamW; and torchao's AdamW8bit, whose own step is compiled for every shape."""
    from xflux_trainer import adamkernels, stepkernels

    if not state:
        state["step"] = torch.tensor(0.0)
        if type(optimizer).__name__ == "AdamW":
            state |= {key: _zeros(grad.shape, grad) for key in optimizers.MOMENTS}
        else:
            # torchao takes a shape, a device and fp32 from what it is given, and no values.
            like = torch.empty((), dtype=torch.float32, device=grad.device).expand(grad.shape)
            state |= {key: optimizer._new_buffer(like, key == "exp_avg") for key in optimizers.MOMENTS}
    if state["step"].device.type != "cpu":  # torch's fused kernel counts there; here the host has to know
        state["step"] = state["step"].cpu()
    state["step"] += 1
    count = int(state["step"])
    beta1, beta2 = group["betas"]
    ways = (*ends, 1 - beta1, 1 - beta2, 1 / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count), group["eps"], seed)
    kind, weight, other = stepkernels.KINDS[place.update], place.weight, place.other
    first, second = state["exp_avg"], state["exp_avg_sq"]
    if hasattr(first, "codes"):
        blocks = grad.numel() // adamkernels.BLOCK
        adamkernels.adamw8[(math.ceil(blocks / (8 * _BLOCKS)),)](
            weight, other, grad, first.codes, first.scale, second.codes, second.scale, blocks, *ways,
            KIND=kind, ROWS=_BLOCKS, num_warps=_WARPS,
        )  # fmt: skip
    else:
        adamkernels.adamw32[(math.ceil(grad.numel() / (8 * _SIZE)),)](
            weight, other, grad, first, second, grad.numel(), *ways, KIND=kind, SIZE=_SIZE
        )  # fmt: skip


def _zeros(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=like.device)
