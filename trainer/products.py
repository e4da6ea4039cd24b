"""Linear layers that read one input, forward and backward by hand: one matrix product for all of them where it can be.

A layer of a block is `nn.Linear` or a `FrozenLinear` of any format, bare or in an adapter. `Group` computes layers
that share their input side by side into one buffer. Weights that lie one below the other in memory (`pack`) are one
matrix; others are multiplied in turn. Nothing is kept here but the adapters' narrow products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer.frozen import FrozenLinear
from xflux_trainer.lora import AdapterLinear, FusedAdapter, FusedAdapterLinear

Grads = dict[nn.Parameter, Tensor]
"""What a backward pass found, by parameter."""


@dataclass
class Low:
    """One adapter of a group: its place among the group's narrow columns and among its outputs."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float
    narrow: slice
    columns: slice
    up16: Tensor = field(init=False)
    """`up` in the format of the activations."""


class Group:
    """Layers of one input (M, K) whose outputs lie side by side, (M, N of all together)."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.bases: list[Any] = [_base(layer) for layer in layers]
        ends = list(accumulate((base.out_features for base in self.bases), initial=0))
        self.columns = [slice(start, end) for start, end in pairwise(ends)]
        self.width = ends[-1]
        self.lows = _lows(layers, self.columns)
        self.rank = self.lows[-1].narrow.stop if self.lows else 0
        self._down16: Tensor | None = None
        trained = [p for base in self.bases for p in base.parameters(recurse=False) if p.requires_grad]
        self.trained_bases = bool(trained)
        self.parameters: list[nn.Parameter] = [*trained, *(p for low in self.lows for p in (low.down, low.up))]

    def cast(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Pairs (copy in `dtype`, parameter) that are to be filled before each forward pass."""
        if not self.lows:
            return []
        place = self.lows[0].down.device
        if self._down16 is None or self._down16.dtype != dtype or self._down16.device != place:
            self._down16 = torch.empty(self.rank, self.bases[0].in_features, dtype=dtype, device=place)
            for low in self.lows:
                low.up16 = torch.empty_like(low.up, dtype=dtype, requires_grad=False)
        downs = [(self._down16[low.narrow], low.down) for low in self.lows]
        return downs + [(low.up16, low.up) for low in self.lows]

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B, L, K), to `out` (B, L, N), a view of rows or columns of a wider buffer too; and the narrow products
        (B L, R) of the adapters."""
        if out is None:
            out = x.new_empty(*x.shape[:-1], self.width)
        low = self.narrow(x)
        start = 0
        for rows, to in _rows(x, out):
            self._multiply(rows, to)
            end = start + len(rows)
            for each in self.lows:
                assert low is not None
                to[:, each.columns].addmm_(low[start:end, each.narrow], each.up16.t(), alpha=each.scale)
            start = end
        return out, low

    def narrow(self, x: Tensor) -> Tensor | None:
        """The adapters' narrow products of x (B, L, K) alone, (B L, R): of a result that nobody needs again."""
        return x.flatten(0, -2) @ self._down16.t() if self._down16 is not None else None

    def backward(
        self, dy: Tensor, x: Callable[[], Tensor], low: Tensor | None, grads: Grads, dx: Tensor | None = None,
        *, need_dx: bool = True,
    ) -> Tensor | None:  # fmt: skip
        """The gradient of the input, into `dx` (B, L, K) where that is given, from dy (B, L, N). `x` makes the input
        again, where something is trained here."""
        rows = dy.reshape(-1, self.width)
        into = dx.flatten(0, -2) if dx is not None and dx.is_contiguous() else None
        found = self._multiply_back(rows, into) if need_dx else None
        if self.lows:
            assert low is not None and self._down16 is not None
            dlow = torch.empty_like(low)
            for each in self.lows:
                part = rows[:, each.columns]
                torch.mm(part, each.up16, out=dlow[:, each.narrow])
                up = part.t() @ low[:, each.narrow]
                grads[each.up] = _as(up if each.scale == 1 else up * each.scale, each.up)
                if each.scale != 1:
                    dlow[:, each.narrow] *= each.scale
            down = dlow.t() @ x().flatten(0, -2)
            for each in self.lows:
                grads[each.down] = _as(down[each.narrow], each.down)
            if found is not None:
                found.addmm_(dlow, self._down16)
        if self.trained_bases:
            self._weights_grads(rows, x().flatten(0, -2), grads)
        if found is None:
            return None
        shaped = found.view(*dy.shape[:-1], -1)
        if dx is None:
            return shaped
        return dx if into is not None else dx.copy_(shaped)

    def _weights_grads(self, rows: Tensor, x: Tensor, grads: Grads) -> None:
        for base, columns in zip(self.bases, self.columns):  # noqa: B905
            part = rows[:, columns]
            own = base._parameters
            if own.get("weight") is not None and own["weight"].requires_grad:
                grads[own["weight"]] = _as(part.t() @ x, own["weight"])
            if own.get("bias") is not None and own["bias"].requires_grad:
                grads[own["bias"]] = _as(part.sum(0, dtype=torch.float32), own["bias"])

    def _multiply(self, x: Tensor, out: Tensor) -> None:
        for weight, bias, columns in self._matrices(x.dtype):
            into = out[:, columns]
            if bias is None:
                torch.mm(x, weight.t(), out=into)
            else:
                torch.addmm(bias, x, weight.t(), out=into)

    def _multiply_back(self, dy: Tensor, out: Tensor | None) -> Tensor:
        found = out
        for number, (weight, _, columns) in enumerate(self._matrices(dy.dtype, backward=True)):
            if number:
                assert found is not None
                found.addmm_(dy[:, columns], weight)
            elif found is None:
                found = dy[:, columns] @ weight
            else:
                torch.mm(dy[:, columns], weight, out=found)
        assert found is not None
        return found

    def _matrices(self, dtype: torch.dtype, *, backward: bool = False) -> Any:
        """(weight (N, K), bias or None, columns) for each product: one for all layers whose weights lie together.

        A weight that is made or fetched for its product is let go before the next one is made.
        """
        frozen = [base for base in self.bases if isinstance(base, FrozenLinear)]
        if not frozen or (len(frozen) == len(self.bases) and all(base.as_stored for base in frozen)):
            whole = stacked([base.dense(dtype) for base in frozen] or [base.weight for base in self.bases])
            biases = [base.bias for base in self.bases]
            if whole is not None and (all(bias is None for bias in biases) or all(bias is not None for bias in biases)):
                yield whole.to(dtype), _joined(biases, dtype), slice(0, self.width)
                return
        order = zip(self.bases, self.columns)  # noqa: B905
        for base, columns in reversed(list(order)) if backward else order:
            weight = base.dense(dtype) if isinstance(base, FrozenLinear) else base.weight.detach().to(dtype)
            yield weight, None if base.bias is None else base.bias.detach().to(dtype), columns


def pack(layers: list[nn.Module]) -> None:
    """Move the weights and biases of linear layers one below the other, so that `Group` takes them as one matrix."""
    bases = [_base(layer) for layer in layers]
    if any(type(base) is not nn.Linear or base.weight.dtype != bases[0].weight.dtype for base in bases):
        return
    for leaf in ("weight", "bias"):
        own = [getattr(base, leaf) for base in bases]
        if any(each is None for each in own) or stacked(own) is not None:
            continue
        whole = torch.cat([each.detach() for each in own])
        for each, part in zip(own, whole.split([len(each) for each in own])):  # noqa: B905
            each.data = part


def stacked(parts: list[Tensor]) -> Tensor | None:
    """The matrix or vector that these are the rows of, where they follow each other in memory without a gap."""
    first = parts[0]
    if len(parts) == 1:
        return first.detach()
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous() or part.dtype != first.dtype:
            return None
        end += part.numel() * part.element_size()
    if any(part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for part in parts):
        return None
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())


def _joined(parts: list[Any], dtype: torch.dtype) -> Tensor | None:
    if parts[0] is None:
        return None
    whole = stacked(parts)
    return (torch.cat([part.detach() for part in parts]) if whole is None else whole).to(dtype)


def _base(layer: Any) -> Any:
    return layer.base_layer if isinstance(layer, AdapterLinear | FusedAdapterLinear) else layer


def _lows(layers: list[nn.Module], columns: list[slice]) -> list[Low]:
    """The adapters of a group. One that several layers share has their columns, which follow each other."""
    found: list[Low] = []
    seen: dict[int, Low] = {}
    start = 0
    for layer, place in zip(layers, columns):  # noqa: B905
        adapter: Any
        if isinstance(layer, AdapterLinear):
            adapter = layer
        elif isinstance(layer, FusedAdapterLinear):
            adapter = layer._adapter[0]
            if id(adapter) in seen:
                seen[id(adapter)].columns = slice(seen[id(adapter)].columns.start, place.stop)
                continue
        else:
            continue
        down, up = adapter.lora_A.weight, adapter.lora_B.weight
        low = Low(down, up, adapter.scale, slice(start, start + len(down)), place)
        start += len(down)
        found.append(low)
        if isinstance(adapter, FusedAdapter):
            seen[id(adapter)] = low
    return found


def _rows(x: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(M, K) and (M, N) views of both: one where the rows of `out` are evenly spaced, else one for each image."""
    if len(x) == 1 or out.stride(0) == out.shape[1] * out.stride(1):
        return [(x.flatten(0, -2), out.flatten(0, -2) if len(x) > 1 else out[0])]
    return list(zip(x, out))  # noqa: B905


def _as(grad: Tensor, parameter: Tensor) -> Tensor:
    return grad.to(parameter.dtype)
