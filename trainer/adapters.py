"""A group's adapters as the blocks multiply with them: stacked, and copied into the format of the activations.

Parameters are fp32 and lie apart; what multiplies is A of all below one another, and B as well, filled once a step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer.lora import AdapterLinear, FusedAdapterLinear
from xflux_trainer.pointwise import Copy, Part

Grads = dict[nn.Parameter, Tensor]
"""What a backward pass found, by parameter."""


@dataclass
class Adapters:
    """A group's adapters, stacked: what multiplies is A of all (R, K), and B of all, one below the other (N', r).

    `downs` and `ups` are the parameters; where ranks differ the smaller ones are filled up with zeros.
    """

    downs: list[nn.Parameter]
    ups: list[nn.Parameter]
    parts: tuple[Part, ...]
    down: Tensor | None = None
    up: Tensor | None = None
    """Both in the format of the activations, see `cast`."""
    beside: Tensor | None = None
    """B again, beside the weights (N, R): times the scale, each in its own columns, and zero elsewhere."""
    places: tuple[Tensor, Tensor] | None = None
    """Where the gradients of A (R, K) and B (N', r) are written in fp32, if not into tensors of their own."""

    @property
    def rank(self) -> int:
        return self.parts[0].rank

    def cast(self, dtype: torch.dtype) -> list[Copy]:
        """What is to be filled before each forward pass, in `dtype`."""
        first = self.downs[0]

        def fits(copy: Tensor | None) -> bool:
            return copy is not None and copy.dtype == dtype and copy.device == first.device

        if not fits(self.down):
            self.down = torch.zeros(self.depth, self.width, dtype=dtype, device=first.device)
            self.beside = None
        if not fits(self.up):
            self.up = torch.zeros(self.height, self.rank, dtype=dtype, device=first.device)
        assert self.down is not None and self.up is not None
        copies = [Copy(copy, own) for own, copy in self.split(self.down, self.up).items()]
        if self.beside is not None:
            for own, part in zip(self.ups, self.parts):  # noqa: B905 (of one length)
                place = self.beside[part.column : part.column + part.width, part.narrow :]
                copies.append(Copy(place[:, : own.shape[1]], own, part.scale))
        return copies

    @property
    def height(self) -> int:
        """N', the rows of B."""
        return sum(part.width for part in self.parts)

    @property
    def reaches(self) -> int:
        """The last of the group's columns that has an adapter, plus 1."""
        return max(part.column + part.width for part in self.parts)

    @property
    def depth(self) -> int:
        """R, the rows of A."""
        return len(self.downs) * self.rank

    @property
    def width(self) -> int:
        """K."""
        return self.downs[0].shape[1]

    def room(self) -> tuple[Tensor, Tensor]:
        """Where gradients are written: (R, K) and (N', r) fp32."""
        if self.places is not None:
            return self.places
        empty = functools.partial(torch.empty, dtype=torch.float32, device=self.downs[0].device)
        return empty(self.depth, self.width), empty(self.height, self.rank)

    def share(self, down: Tensor, up: Tensor, grads: Grads) -> None:
        """Hand gradients over to whom they belong, unless they lie where they are looked for."""
        if self.places is None:
            grads |= {parameter: grad.to(parameter.dtype) for parameter, grad in self.split(down, up).items()}

    def split(self, down: Tensor, up: Tensor) -> dict[nn.Parameter, Tensor]:
        """Each parameter's part of the stacked matrices."""
        downs = [down[part.narrow : part.narrow + len(own)] for own, part in zip(self.downs, self.parts)]  # noqa: B905
        tall = up.split([part.width for part in self.parts])
        ups = [rows[:, : own.shape[1]] for own, rows in zip(self.ups, tall)]  # noqa: B905
        return dict(zip([*self.downs, *self.ups], [*downs, *ups]))  # noqa: B905 (of one length)


def stacked_adapters(layers: list[nn.Module], columns: list[slice]) -> Adapters | None:
    """The adapters of a group. One that several layers share has their columns, which follow each other."""
    found: dict[int, Any] = {}
    places: dict[int, slice] = {}
    for layer, place in zip(layers, columns):  # noqa: B905 (of one length)
        if isinstance(layer, AdapterLinear | FusedAdapterLinear):
            own: Any = layer if isinstance(layer, AdapterLinear) else layer._adapter[0]
            found[id(own)] = own
            places[id(own)] = slice(places.get(id(own), place).start, place.stop)
    if not found:
        return None
    downs = [own.lora_A.weight for own in found.values()]
    ups = [own.lora_B.weight for own in found.values()]
    rank = max(len(down) for down in downs)
    parts = tuple(
        Part(place.start, place.stop - place.start, number * rank, rank, own.scale)
        for number, (place, own) in enumerate(zip(places.values(), found.values()))  # noqa: B905 (of one length)
    )
    return Adapters(downs, ups, parts)
