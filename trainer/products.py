"""Linear layers that read one input, forward and backward by hand: one matrix product for all of them where it can be.

A layer of a block is `nn.Linear` or a `FrozenLinear` of any format, bare or in an adapter. `Group` computes layers
that share their input side by side into one buffer. Weights that lie one below the other in memory (`pack`) are one
matrix; others are multiplied in turn. Nothing is kept here but the adapters' narrow products.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from xflux_trainer import fp8
from xflux_trainer.adapters import Grads, stacked_adapters
from xflux_trainer.extended import Extended, extend, spread
from xflux_trainer.frozen import FrozenLinear
from xflux_trainer.lora import AdapterLinear, FusedAdapterLinear
from xflux_trainer.pointwise import Part
from xflux_trainer.side import Side


class Group:
    """Layers of one input (M, K) whose outputs lie side by side, (M, N of all together)."""

    def __init__(self, layers: list[nn.Module], ops: Any, side: Side, *, beside: bool = True) -> None:
        """`beside`: the input can be written into `input_room`."""
        self.ops, self.side = ops, side
        self.bases: list[Any] = [_base(layer) for layer in layers]
        ends = list(accumulate((base.out_features for base in self.bases), initial=0))
        self.columns = [slice(start, end) for start, end in pairwise(ends)]
        self.width = ends[-1]
        self.adapters = stacked_adapters(layers, self.columns)
        trained = [p for base in self.bases for p in base.parameters(recurse=False) if p.requires_grad]
        self.trained_bases = bool(trained)
        own = [*self.adapters.downs, *self.adapters.ups] if self.adapters else []
        self.parameters: list[nn.Parameter] = trained + own
        self.held = _hold(self.bases)
        self.inputs = int(self.bases[0].in_features)
        self._extended: Extended | None = None
        if self.adapters is not None and not trained:
            whole = self._extended = extend(self.bases, self.adapters.depth, beside=beside)
            if whole is not None:
                self.adapters.down, self.adapters.beside = whole.down[: self.adapters.depth], whole.up

    def extended(self) -> Extended | None:
        """The matrix of weights and adapters, if there is one that can be used now."""
        own = self._extended
        return own if own is not None and self.adapters and own.holds(self.bases, self.adapters.down) else None

    def moved(self) -> list[Tensor]:
        """What the layers' weights were laid together in, of any kind."""
        own = self.extended()
        return [own.forward] if own is not None else [*self.held[:2]] if self.held is not None else []

    def room(self, like: Tensor) -> Tensor:
        """Not yet filled: (B, L, N) for the gradient of as many tokens as `like` (B, L, …) has, and behind its columns
        what `backward` needs for one product with weights and adapters."""
        own = self.extended()
        return like.new_empty(*like.shape[:-1], self.width) if own is None else spread(like, self.width + own.extra)

    def input_room(self, like: Tensor) -> Tensor:
        """The same for the input (B, L, K) and `forward`."""
        own = self.extended()
        if own is None or not own.beside:
            return like.new_empty(*like.shape[:-1], self.inputs)
        return spread(like, self.inputs + own.extra)

    def forward(self, x: Tensor | None, out: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor | None]:
        """x (B, L, K), or an `input_room` whose first K columns are filled, to `out` (B, L, N), a view of rows or
        columns of a wider buffer too; and the narrow products (B L, R) of the adapters. With weights that are `held` in
        fp8, x may come as `rows`, for the adapters too."""
        if x is not None and x.shape[-1] > self.inputs:
            return self._forward_extended(x.flatten(0, -2), out)
        low = None
        if self.adapters is not None:
            with self.side.fork():
                low = self.narrow(x)
        if self.held is not None and rows is None:
            assert x is not None
            rows = Rows(*fp8.quantize_rows(x))
        values = None if x is None else x.flatten(0, -2)
        start = 0
        for to in _matrices_of(out):
            part = slice(start, start + len(to))
            if rows is not None:
                self._multiply_rows(rows.q[part], rows.s[part], to)
            else:
                assert values is not None
                self._multiply(values[part], to)
            if self.adapters is not None and low is not None:
                self.side.join()
                self.ops.lora_add(to, low[part], self.adapters.up, self.adapters.parts)
            start = part.stop
        return out, low

    def _forward_extended(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        whole, own = self._extended, self.adapters
        assert whole is not None and own is not None
        low = torch.mm(x[:, : self.inputs], whole.down.t(), out=x[:, self.inputs :])
        with self.side.fork():
            # Apart from x, which is let go.
            low = low[:, : own.depth].clone(memory_format=torch.contiguous_format)
        bias = _joined([base.bias for base in self.bases], x.dtype)
        start = 0
        for to in _matrices_of(out):
            _product(x[start : start + len(to)], whole.forward, bias, to)
            start += len(to)
        self.side.join()
        return out, low

    def _multiply_rows(self, q: Tensor, s: Tensor, out: Tensor) -> None:
        assert self.held is not None
        bias = _joined([base.bias for base in self.bases], out.dtype)
        if out.is_contiguous():
            fp8.product(q, s, self.held.data, self.held.scale, bias, out)
        else:
            out.copy_(fp8.product(q, s, self.held.data, self.held.scale, bias))

    def narrow(self, x: Tensor | None) -> Tensor | None:
        """The adapters' narrow products of x (B, L, K) alone, (B L, R): of a result that nobody needs again."""
        if self.adapters is None:
            return None
        assert x is not None and self.adapters.down is not None, "cast comes before the first product"
        return x.flatten(0, -2) @ self.adapters.down.t()

    def backward(
        self, dy: Tensor, x: Callable[[], Tensor], low: Tensor | None, grads: Grads, dx: Tensor | None = None,
        *, need_dx: bool = True, quantised: Rows | None = None,
    ) -> Tensor | None:  # fmt: skip
        """The gradient of the input, into `dx` (B, L, K) where that is given, from dy (B, L, N). `x` makes the input
        again, where something is trained here. With weights that are `held` in fp8, dy times their scales may come
        `quantised`; dy itself is then read for its columns that have adapters, and may have no others. A dy that is the
        first N columns of a whole `room` is handed over with it: the others are written here."""
        whole = dy.reshape(-1, dy.shape[-1])
        extended = self._extended if dy.shape[-1] > self.width else None
        rows = whole if extended is None else whole[:, : self.width]
        into = None if dx is None else self._place(dx)
        own = self.adapters
        dlow = None
        if own is not None:
            assert low is not None and own.up is not None
            down, up = own.room()
            dlow = None if extended is None else whole[:, self.width : self.width + own.depth]
            dlow = self.ops.lora_narrow_backward(rows, own.up, own.parts, dlow)
            with self.side.fork():
                self.ops.lora_up_grad(rows, low, own.parts, up)
                self.ops.lora_down_grad(dlow, x().flatten(0, -2), down)
            own.share(down, up, grads)
        if not need_dx:
            found = None
        elif extended is None:
            found = self._multiply_back(rows, into, quantised)
        else:
            assert own is not None
            whole[:, self.width + own.depth :].zero_()
            found = torch.mm(whole, extended.backward, out=into)
        if own is not None and found is not None and extended is None:
            assert own.down is not None and dlow is not None
            # The narrow product the other way round: one adapter of all of K's columns.
            self.ops.lora_add(found, dlow, own.down.t(), (Part(0, own.width, 0, own.depth),))
        if own is not None:
            self.side.join()
        if self.trained_bases:
            self._weights_grads(rows, x().flatten(0, -2), grads)
        if found is None:
            return None
        shaped = found.view(*dy.shape[:-1], -1)
        if dx is None:
            return shaped
        return dx if into is not None else dx.copy_(shaped)

    def _place(self, dx: Tensor) -> Tensor | None:
        """(M, K) of dx (B, L, K), if a product can write there."""
        places = _matrices_of(dx)
        return places[0] if len(places) == 1 and (self.held is None or dx.is_contiguous()) else None

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
            _product(x, weight, bias, out[:, columns])

    def _multiply_back(self, dy: Tensor, out: Tensor | None, rows: Rows | None) -> Tensor:
        if self.held is not None:
            rows = rows or Rows(*fp8.quantize_rows(dy, self.held.columns))
            return fp8.backward(rows.q, rows.s, self.held.data, out)
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


class Rows(NamedTuple):
    """A matrix in fp8: q (M, K) e4m3 and its rows' scales s (M, 1) fp32."""

    q: Tensor
    s: Tensor


class Held(NamedTuple):
    """A group's weights in fp8: data (N, K) e4m3, the scales of its rows (N, 1) fp32."""

    data: Tensor
    scale: Tensor
    columns: Tensor
    """The scales again, for the columns of dy, in the format that is read fastest."""


def _hold(bases: list[Any]) -> Held | None:
    """Lay weights in `fp8`'s own format next to each other. None for weights in any other, and for streamed ones."""
    frozen = [base for base in bases if isinstance(base, FrozenLinear) and base.store is not None]
    if len(frozen) < len(bases) or any(base.opener is not fp8.open_held for base in frozen):
        return None
    parts = [base.views(base.store) for base in bases]
    data, scale = (torch.cat([part[name] for part in parts]) for name in ("data", "scale"))
    sizes = [base.out_features for base in bases]
    for base, own, scales in zip(bases, data.split(sizes), scale.split(sizes)):  # noqa: B905 (of one length)
        base.lie({"data": own, "scale": scales})
    return Held(data, scale, scale.bfloat16())


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
    """The matrix or vector that these are the rows of, where they follow each other in memory at even distances."""
    first = parts[0]
    if len(parts) == 1:
        return first.detach()
    end = first.data_ptr()
    for part in parts:
        even = part.stride() == first.stride() and part.stride(-1) == 1
        if part.data_ptr() != end or not even or part.dtype != first.dtype:
            return None
        end += len(part) * part.stride(0) * part.element_size()
    if any(part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for part in parts):
        return None
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _joined(parts: list[Any], dtype: torch.dtype) -> Tensor | None:
    if parts[0] is None:
        return None
    whole = stacked(parts)
    return (torch.cat([part.detach() for part in parts]) if whole is None else whole).to(dtype)


def _base(layer: Any) -> Any:
    return layer.base_layer if isinstance(layer, AdapterLinear | FusedAdapterLinear) else layer


def _matrices_of(out: Tensor) -> list[Tensor]:
    """(M, N) views of (B, L, N): one where its rows are evenly spaced, else one for each image."""
    if len(out) == 1:
        return [out[0]]
    return [out.flatten(0, -2)] if out.stride(0) == out.shape[1] * out.stride(1) else list(out)


def _as(grad: Tensor, parameter: Tensor) -> Tensor:
    return grad.to(parameter.dtype)
