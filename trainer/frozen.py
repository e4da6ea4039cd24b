"""A linear layer that is never trained: its weight is bytes in some format and place, made dense for each product.

The bytes are neither parameter nor buffer: DDP and DeepSpeed would send them around (buffers at every step),
`module.to(torch.bfloat16)` would round the scales among them, and `requires_grad_` would stumble over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT = 256
"""Bytes at whose multiples a tensor begins: what cuBLAS wants for its fastest kernels."""

Parts = dict[str, Tensor]
"""A weight as the plain tensors that it is stored in."""
Opener = Callable[[Parts], Callable[[], Tensor]]
"""From the stored tensors to a function that makes the dense weight (out, in) of them.

It may have an attribute `few`, a function of x and the bias: their product without a dense weight, or None where that
is no gain, because there are too many rows, say.
"""
Format = Callable[[Tensor], tuple[Parts, Opener]]
"""From a dense weight (out, in) to what is stored of it, and to how it is opened again."""


def plain(weight: Tensor) -> tuple[Parts, Opener]:
    """The weight as it is."""
    return {"weight": weight}, _open_plain


def _open_plain(parts: Parts) -> Callable[[], Tensor]:
    weight = parts["weight"]
    return lambda: weight


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies among a layer's bytes."""

    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class FrozenLinear(nn.Linear):
    """`nn.Linear` by its name, its sizes and its results; only `bias` is a parameter.

    Autograd keeps nothing of it: the backward pass asks for the dense weight again. A dense copy that lives for one
    product is all that a quantised layer costs, and a streamed layer's bytes may be elsewhere in between.
    """

    _eager: ClassVar[Any] = None
    """`_forward` outside of compiled graphs; made when it is first needed, because that imports the compiler."""

    def __init__(self, linear: nn.Linear, form: Format = plain) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.dtype = linear.weight.dtype
        with torch.no_grad():
            parts, self.opener = form(linear.weight.detach())
            """From stored tensors to what makes the weight of them: who knows it knows the format."""
        self._places, self.size = _lay_out(parts)
        store = torch.zeros(self.size, dtype=torch.uint8, device=linear.weight.device)
        for name, view in self.views(store).items():
            view.copy_(parts[name])
        self.streamed: Callable[[], tuple[int, Tensor]] | None = None
        self.memo: Callable[[FrozenLinear, Tensor], Tensor] | None = None
        """What may know the result already."""
        self._slots: dict[int, Callable[[], Tensor]] = {}
        self.keep(store)

    def keep(self, store: Tensor) -> None:
        """Hold these bytes (size,) from now on."""
        self.store: Tensor | None = store
        self._open = self.opener(self.views(store))

    def lie(self, parts: Parts) -> None:
        """Hold these stored tensors from now on, which lie among those of other layers."""
        self.store, self._open = None, self.opener(parts)

    def stream(self, source: Callable[[], tuple[int, Tensor]]) -> None:
        """Hold no bytes from now on: `source` gives the number of a slot and the bytes that lie there.

        torch.compile leaves such a layer alone: it would take one slot's bytes for the layer's own.
        """
        self.store, self.streamed, self._open = None, source, self._nothing
        if FrozenLinear._eager is None:
            FrozenLinear._eager = torch.compiler.disable(FrozenLinear._forward)

    def views(self, store: Tensor) -> Parts:
        """The stored tensors, as views of these bytes."""
        return {
            name: store[place.start : place.start + place.size].view(place.dtype).view(place.shape)
            for name, place in self._places.items()
        }

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`; in its own format and not quantised it is no copy: do not write to it.

        A streamed layer's is there for what is queued until a layer of another unit is asked for its own.
        """
        return self._opened()().to(dtype)

    def _opened(self) -> Callable[[], Tensor]:
        if self.streamed is None:
            return self._open
        slot, store = self.streamed()
        if slot not in self._slots:  # the slots stay where they are, so the views of each are made once
            self._slots[slot] = self.opener(self.views(store))
        return self._slots[slot]

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, (…, out) of x (…, in), past autograd."""
        opened = self._opened()
        few = getattr(opened, "few", None)
        y: Tensor | None = None if few is None else few(x, bias)
        return F.linear(x, opened().to(x.dtype), bias) if y is None else y

    @property
    def as_stored(self) -> bool:
        """Whether `dense` gives the bytes as they lie there, side by side with the next layer's in their unit."""
        return self.opener is _open_plain

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, made on the spot: for reading its format, its place or its values, not for writing."""
        return self.dense(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.streamed is not None:
            assert self._eager is not None
            return self._eager(x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        return self.product(x) if self.memo is None else self.memo(self, x)

    def product(self, x: Tensor) -> Tensor:
        """(…, out) of x (…, in)."""
        y: Tensor = _Product.apply(x, self.bias, self)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Bytes go along to another device; no format that floating numbers are moved to means them."""
        super()._apply(fn, recurse)
        if self.store is not None:
            moved = fn(self.store)
            if moved is not self.store:
                self.keep(moved)
        return self

    def extra_repr(self) -> str:
        place = "streamed" if self.store is None else str(self.store.device)
        return f"{super().extra_repr()}, bytes={self.size:,}, {place}"

    def _nothing(self) -> Tensor:
        raise AssertionError("a streamed layer has no weight of its own")


class _Product(torch.autograd.Function):
    """x W^T + b with a frozen W that is fetched in each direction and saved in none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        rows = dy.reshape(-1, dy.shape[-1])  # as nn.Linear's backward: one product, whatever the strides
        dx = (rows @ ctx.layer.dense(dy.dtype)).view(*dy.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        db = rows.sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None


def _lay_out(parts: Parts) -> tuple[dict[str, _Place], int]:
    """Tensors one after the other, each at a multiple of the alignment."""
    places, start = {}, 0
    for name, tensor in parts.items():
        size = prod(tensor.shape) * tensor.element_size()
        places[name] = _Place(start, size, tensor.dtype, tuple(tensor.shape))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return places, start
