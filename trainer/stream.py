"""Frozen weights that wait in the host's pinned memory and are copied to the device when their turn comes.

What is trained is never among them, so nothing is ever copied back. What travels together is a unit: the part of a
block that is used at one time. Equal slots on the device take the units in: while the layers of one compute, the next
ones arrive on a stream of their own, as many as there are slots. Which ones come next is learned from the order in
which layers asked before; a wrong guess costs time and nothing else.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer.frozen import FrozenLinear
from xflux_trainer.savings import SLOTS

CONTEXT = 6
"""Units by which a place in the order is known. A checkpointed block's, at most five, are asked for in the same order
in the forward pass and when it is recomputed: the one before them tells the two apart."""


@dataclass(eq=False)
class Unit:
    """The layers that travel together: their bytes in the host's memory, and where these lie on the device now."""

    number: int
    host: Tensor
    slot: _Slot | None = None


@dataclass(eq=False)
class _Slot:
    """Room on the device for one unit."""

    number: int
    room: Tensor
    ready: Any
    """The CUDA event after which the unit's bytes are there; None without CUDA, as the next."""
    read: Any
    """The CUDA event after which nothing reads the bytes of the unit that was used last in it."""
    unit: Unit | None = None
    turn: int = 0
    """When a unit was used last in it."""


class Streamer:
    """Brings units to one device. Every layer asks it for its bytes, in the forward and in the backward pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copied = 0
        """Bytes that were copied to the device so far."""
        self.missed = 0
        """Units whose layers had to wait because nobody had foreseen their turn."""
        self._units: list[Unit] = []
        self._hosts: list[Tensor] = []
        self._slots: list[_Slot] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._current: Unit | None = None
        self._turns = 0
        self._context = (-1,) * CONTEXT
        self._following: dict[tuple[int, ...], Unit] = {}

    @property
    def host_bytes(self) -> int:
        """Pinned memory that all units take."""
        return sum(host.numel() for host in self._hosts)

    @property
    def slot_bytes(self) -> int:
        """Memory of the device that the slots take."""
        return sum(slot.room.numel() for slot in self._slots)

    def take(self, parts: list[list[FrozenLinear]]) -> None:
        """Move the layers' bytes into the host's memory: each part is a unit, its layers one after the other."""
        assert not self._slots, "the slots have the size of the largest unit: take all before the first is used"
        host = pinned(sum(layer.size for part in parts for layer in part), self.device)
        self._hosts.append(host)  # the registered memory itself: it lives as long as its views
        end = 0
        for part in parts:
            start, end = end, end + sum(layer.size for layer in part)
            unit = Unit(len(self._units), host[start:end])
            self._units.append(unit)
            place = 0
            for layer in part:
                assert layer.store is not None
                unit.host[place : place + layer.size].copy_(layer.store)
                layer.stream(_Ticket(self, unit, place, layer.size))
                place += layer.size

    def fetch(self, unit: Unit) -> tuple[int, Tensor]:
        """The number of the slot that the unit lies in, and its bytes there.

        What is queued until another unit is asked for may read them.
        """
        if self._current is not unit:
            self._turn_to(unit)
        assert unit.slot is not None
        return unit.slot.number, unit.slot.room

    def _turn_to(self, unit: Unit) -> None:
        stream = torch.cuda.current_stream(self.device) if self._side is not None else None
        if not self._slots:
            self._make_room(stream)
        if stream is not None and self._current is not None and self._current.slot is not None:
            self._current.slot.read.record(stream)
        self._following[self._context] = unit
        self._context = (*self._context[1:], unit.number)
        self.missed += unit.slot is None
        coming = self._foresee(unit)
        # The slot that was used longest ago comes first: kernels that read the others may still wait in the queue.
        free = sorted((slot for slot in self._slots if slot.unit not in coming), key=lambda slot: slot.turn)
        for slot, absent in zip(free, [wanted for wanted in coming if wanted.slot is None]):  # noqa: B905
            self._bring(absent, slot)
        assert unit.slot is not None
        if stream is not None:
            stream.wait_event(unit.slot.ready)
        self._turns += 1
        unit.slot.turn = self._turns
        self._current = unit

    def _make_room(self, stream: Any) -> None:
        """All slots in one piece, so that no more is allocated than was foreseen."""
        size = max(unit.host.numel() for unit in self._units)
        count = min(SLOTS, len(self._units))
        rooms = torch.empty(count, size, dtype=torch.uint8, device=self.device)
        for number, room in enumerate(rooms):
            ready, read = (None, None) if stream is None else (torch.cuda.Event(), torch.cuda.Event())
            if read is not None:
                read.record(stream)  # whatever used this memory before
            self._slots.append(_Slot(number, room, ready, read))

    def _foresee(self, unit: Unit) -> list[Unit]:
        """This unit and those that follow it in the order as it was learned: as many as there are slots."""
        coming, context = [unit], self._context
        for _ in range(4 * len(self._slots)):  # some are asked for more than once
            following = self._following.get(context)
            if following is None or len(coming) == len(self._slots):
                break
            if following not in coming:
                coming.append(following)
            context = (*context[1:], following.number)
        return coming

    def _bring(self, unit: Unit, slot: _Slot) -> None:
        """Queue the copy. It waits for the kernels that read the slot's old bytes, and for no others."""
        if slot.unit is not None:
            slot.unit.slot = None
        slot.unit, unit.slot = unit, slot
        self.copied += unit.host.numel()
        room = slot.room[: unit.host.numel()]
        if self._side is None:
            room.copy_(unit.host)
            return
        self._side.wait_event(slot.read)
        with torch.cuda.stream(self._side):
            room.copy_(unit.host, non_blocking=True)
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
