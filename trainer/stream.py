"""Frozen weights that wait in the host's pinned memory and are copied to the device when their turn comes.

What is trained is never among them, so nothing is ever copied back. Two slots on the device take turns: while one
unit's layers compute, the next unit's bytes arrive on a stream of their own. Which unit is the next one is learned
from the order in which layers asked last time; a wrong guess costs time and nothing else.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer.frozen import FrozenLinear
from xflux_trainer.savings import SLOTS


@dataclass(eq=False)
class Unit:
    """The layers that travel together, and their bytes in the host's memory."""

    host: Tensor


@dataclass(eq=False)
class _Slot:
    """Room on the device for one unit."""

    room: Tensor
    unit: Unit | None = None
    ready: Any = field(default=None)
    """The CUDA event after which the unit's bytes are there."""


class Streamer:
    """Brings units to one device. Every layer asks it for its bytes, in the forward and in the backward pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copied = 0
        """Bytes that were copied to the device so far."""
        self.missed = 0
        """Units whose layers had to wait because nobody had foreseen their turn."""
        self._units: list[Unit] = []
        self._slots: list[_Slot] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._recent: tuple[Unit | None, Unit | None] = (None, None)
        self._following: dict[tuple[Unit | None, Unit | None], Unit] = {}

    @property
    def host_bytes(self) -> int:
        """Pinned memory that all units take."""
        return sum(unit.host.numel() for unit in self._units)

    def take(self, layers: list[FrozenLinear]) -> None:
        """Move the layers' bytes into the host's memory, as one unit."""
        assert not self._slots, "the slots have the size of the largest unit: take all before the first is used"
        unit = Unit(pinned(sum(layer.size for layer in layers), self.device))
        start = 0
        for layer in layers:
            assert layer.store is not None
            unit.host[start : start + layer.size].copy_(layer.store)
            layer.stream(_Ticket(self, unit, start, layer.size))
            start += layer.size
        self._units.append(unit)

    def fetch(self, unit: Unit) -> tuple[int, Tensor]:
        """The number of the slot that the unit lies in, and its bytes there; what is queued next may read them."""
        if self._recent[1] is not unit:
            self._turn_to(unit)
        number = next(number for number, slot in enumerate(self._slots) if slot.unit is unit)
        return number, self._slots[number].room

    def _turn_to(self, unit: Unit) -> None:
        before, last = self._recent
        if last is not None:
            self._following[before, last] = unit
        if not self._slots:
            size = max(unit.host.numel() for unit in self._units)
            count = min(SLOTS, len(self._units))
            self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=self.device)) for _ in range(count)]
        slot = next((slot for slot in self._slots if slot.unit is unit), None)
        if slot is None:
            self.missed += 1
            # Not into the slot of the unit that computed last: its kernels have hardly begun.
            slot = next((slot for slot in self._slots if slot.unit is not last), self._slots[0])
            self._bring(unit, slot)
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        self._recent = (last, unit)
        following = self._following.get(self._recent)
        if following is not None and all(slot.unit is not following for slot in self._slots):
            self._bring(following, next(slot for slot in self._slots if slot.unit is not unit))

    def _bring(self, unit: Unit, slot: _Slot) -> None:
        """Queue the copy. The kernels that read the slot's old bytes are all queued already: it waits for them."""
        slot.unit = unit
        self.copied += unit.host.numel()
        room = slot.room[: unit.host.numel()]
        if self._side is None:
            room.copy_(unit.host)
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            room.copy_(unit.host, non_blocking=True)
            slot.ready = slot.ready or torch.cuda.Event()
            slot.ready.record(self._side)


@dataclass(eq=False)
class _Ticket:
    """Where a layer's bytes lie in its unit; called, it brings them."""

    streamer: Streamer
    unit: Unit
    start: int
    size: int

    def __call__(self) -> tuple[int, Tensor]:
        number, room = self.streamer.fetch(self.unit)
        return number, room[self.start : self.start + self.size]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ticket:
        return self  # the host's copy is read only: a copied model shares it


def pinned(size: int, device: torch.device) -> Tensor:
    """(size,) bytes of the host's memory from which the device can copy by itself.

    torch's own pinned memory is rounded up to a power of two, which would make 680 MB a GiB; so ordinary memory is
    registered, as torch does for the checkpoints of its distributed models.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    store = torch.empty(size, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(store.data_ptr(), size, 0)) != 0:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    # The process's end needs no unregistering, and CUDA may be gone by then.
    weakref.finalize(store, runtime.cudaHostUnregister, store.data_ptr()).atexit = False
    return store


def remember(norm: nn.Module, layer: FrozenLinear) -> None:
    """Let the recompute of a block take the modulation of its forward pass: those weights travel once a step.

    `norm` is diffusers' AdaLayerNormZero or AdaLayerNormZeroSingle and `layer` the linear layer in it.
    """
    layer.memo = memo = _Memo()
    norm.register_forward_pre_hook(memo.notice, with_kwargs=True)


class _Memo:
    """A layer's last result, taken again only for the very tensor, unchanged, that it was made of."""

    def __init__(self) -> None:
        self._coming: Tensor | None = None
        self._made_of: tuple[Tensor, int] | None = None
        self._y: Tensor | None = None

    def notice(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The embedding (B, hidden) that the norm is called with: checkpointing calls it again with the same one."""
        self._coming = kwargs.get("emb")

    def __call__(self, layer: FrozenLinear, x: Tensor) -> Tensor:
        emb, self._coming = self._coming, None
        if emb is None or x.requires_grad:
            self._made_of = self._y = None
            return layer.product(x)
        if self._made_of is None or self._made_of[0] is not emb or self._made_of[1] != emb._version:
            self._made_of, self._y = (emb, emb._version), layer.product(x)
        assert self._y is not None
        return self._y
