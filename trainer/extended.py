"""A group's frozen weights and the copies of its adapters in one matrix, so that one product computes both.

Of weights W (N, K) and adapters A (R, K) and B (N, R), which is zero outside of each adapter's own block:

    W  s B        y  = [x | low] [W | s B]^T, low = x A^T
    A   .         dx = [dy | dlow] [W; A],    dlow = s dy B

The narrow products are written beside the wide ones' operands, and cost the product a hundredth instead of one more
pass over what it makes.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import Tensor, nn

ALIGNED = 8
"""Elements at whose multiples rows of 16-bit matrices begin and end for the fastest products."""
BURST = 32
"""The same for rows that begin where the memory's bursts of 64 bytes do."""


class Extended:
    """The matrix, zero where nothing is. The layers' weights are views of it from now on.

    `beside`: with room for B too, for inputs that can be written with room beside them.
    """

    def __init__(self, bases: list[nn.Linear], rank: int, *, beside: bool) -> None:
        weights = [base.weight.detach() for base in bases]
        self.height, self.width = sum(map(len, weights)), weights[0].shape[1]
        self.extra = -(-rank // ALIGNED) * ALIGNED
        """R, filled up."""
        self.beside = beside
        rows, columns = self.height + self.extra, self.width + (self.extra if beside else 0)
        self._whole = spread(weights[0][:1].expand(rows, -1), columns).zero_()
        self._starts = list(accumulate(map(len, weights), initial=0))[:-1]
        for base, weight, start in zip(bases, weights, self._starts):  # noqa: B905 (of one length)
            place = self._whole[start : start + len(weight), : self.width]
            base.weight.data = place.copy_(weight)

    @property
    def forward(self) -> Tensor:
        """[W | s B] (N, K + R)."""
        return self._whole[: self.height]

    @property
    def backward(self) -> Tensor:
        """[W; A] (N + R, K)."""
        return self._whole[:, : self.width]

    @property
    def down(self) -> Tensor:
        """A (R, K)."""
        return self._whole[self.height :, : self.width]

    @property
    def up(self) -> Tensor | None:
        """s B (N, R), to be filled."""
        return self._whole[: self.height, self.width :] if self.beside else None

    def holds(self, bases: list[Any], down: Tensor | None) -> bool:
        """Whether these are still its own: a model that was moved, or that is computed in another format, left it."""
        places = [base.weight.data_ptr() for base in bases] + [0 if down is None else down.data_ptr()]
        size = self._whole.stride(0) * self._whole.element_size()
        starts = [*self._starts, self.height]
        return all(place == self._whole.data_ptr() + start * size for place, start in zip(places, starts))  # noqa: B905


def extend(bases: list[Any], rank: int, *, beside: bool) -> Extended | None:
    """None for weights that are no plain matrices of one format."""
    weights = [base.weight for base in bases if type(base) is nn.Linear]
    if len(weights) < len(bases) or any(weight.dtype != weights[0].dtype for weight in weights):
        return None
    return Extended(bases, rank, beside=beside)


def spread(like: Tensor, width: int) -> Tensor:
    """(…, width), not yet filled, with as many rows as `like` (…, any) has; each row begins where a burst does."""
    # On a CPU with AMX, oneDNN's products in 16 bits read up to 31 elements behind a row's end and multiply them by
    # zero: what is not finite there makes all of the result NaN (uxlfoundation/oneDNN#5717; torch 2.13, not 2.4).
    make = like.new_zeros if like.is_cpu else like.new_empty
    return make(*like.shape[:-1], -(-width // BURST) * BURST)[..., :width]
