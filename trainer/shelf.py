"""What checkpointed blocks begin with, kept in the host's pinned memory between the forward and the backward pass.

A block's tokens leave while the next block computes, and come back while the one behind it is gone through backward: on
the device there are three of them at a time instead of one for each block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from xflux_trainer.stream import pinned


class Shelf:
    """One place for each block, on one device; without CUDA plain copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: dict[tuple[int, tuple[torch.Size, ...]], list[Tensor]] = {}
        """Never given back: a recorded step writes to them at every replay."""
        self._leaving: tuple[Any, list[Tensor]] | None = None
        self._coming: dict[int, tuple[Any, list[Tensor]]] = {}
        self._shapes: dict[int, tuple[torch.Size, ...]] = {}

    @property
    def host_bytes(self) -> int:
        return sum(place.numel() * place.element_size() for places in self._places.values() for place in places)

    def put(self, block: int, tokens: list[Tensor]) -> None:
        """Send a block's tokens to the host. They are held here until they have left: the next `put` waits for that."""
        self.settle()
        shapes = self._shapes[block] = tuple(each.shape for each in tokens)
        if (block, shapes) not in self._places:
            self._places[block, shapes] = [_room(each) for each in tokens]
        self._leaving = self._copy(self._places[block, shapes], tokens), tokens

    def settle(self) -> None:
        """Wait, on the device, until what is leaving has left."""
        if self._leaving is not None:
            self._wait(self._leaving[0])
            self._leaving = None

    def ask(self, block: int) -> None:
        """Let a block's tokens come back, if they are here and not on their way."""
        if block not in self._shapes or block in self._coming:
            return
        places = self._places[block, self._shapes[block]]
        tokens = [torch.empty(place.shape, dtype=place.dtype, device=self._device) for place in places]
        self._coming[block] = self._copy(tokens, places), tokens

    def take(self, block: int) -> list[Tensor]:
        """A block's tokens, on the device again."""
        self.ask(block)
        event, tokens = self._coming.pop(block)
        self._wait(event)
        return tokens

    def _copy(self, to: list[Tensor], tokens: list[Tensor]) -> Any:
        if self._stream is None:
            for place, value in zip(to, tokens):  # noqa: B905 (of one length)
                place.copy_(value)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for place, value in zip(to, tokens):  # noqa: B905
                place.copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def _room(tensor: Tensor) -> Tensor:
    """Pinned memory for a tensor of that shape."""
    size = tensor.numel() * tensor.element_size()
    return pinned(size, tensor.device).view(tensor.dtype).view(tensor.shape)
