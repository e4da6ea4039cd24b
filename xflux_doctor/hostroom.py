"""Whether the host has the memory that a plan takes of it. Most of what plans differ in there are the blocks that are
streamed to the GPU: they lie in the host's memory, pinned, once for each rank.

What ME102 calls an error is what lacks something here. Pure.
"""

from __future__ import annotations

import msgspec
from xflux_trainer import memory
from xflux_trainer.config import TrainConfig
from xflux_trainer.spec import FluxSpec

from xflux_doctor.bill import forecast_of, surveyed
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.verdict import LAUNCHER, host_room


class HostRoom(msgspec.Struct, frozen=True):
    """What the job as it is takes of the host's memory, and what there is, in bytes."""

    together: int
    """Of all ranks of this machine and their launcher, as full as it gets: with nothing encoded."""
    unencoded: int
    """How much of that is for what the cache may have already."""
    pinned: int
    """Of each rank."""
    ranks: int
    room: int | None
    """That the ranks may hold; None: not known."""
    hard: bool
    """A container's limit, beyond which the kernel kills. A machine's own memory may be more than it says: virtual ones
    grow as it is used."""

    def holds(self, pinned: int) -> bool:
        """Whether there is room when each rank has pinned so much."""
        return self.room is None or self.together + self.ranks * (pinned - self.pinned) <= self.room

    def lacks(self, bill: memory.Bill) -> int:
        """Bytes that are missing for a plan, by the least that its forecast may mean."""
        if self.room is None:
            return 0
        together = bill.host_together(self.ranks) + self.unencoded + LAUNCHER
        return max(0, int(together * (1 - bill.host_error_bar)) - self.room)


def pinned(config: TrainConfig, model: FluxSpec) -> int:
    """Bytes of streamed weights in one rank's memory."""
    found: int = memory.pinned(config, model)
    return found


def host_bill(case: Case, config: TrainConfig, model: FluxSpec) -> memory.Bill | None:
    """The bill with the host's part; as if nothing was encoded where the images were not looked at: whoever asks for a
    plan after a death must not wait for a mount that is dead. None where there is none."""
    try:
        if surveyed(case):
            return forecast_of(case, config, model)
        return forecast_of(case, config, model, encoded=False, count=0)
    except (SkipCheck, OSError):
        return None


def host_room_of(case: Case, config: TrainConfig, model: FluxSpec, ranks: int) -> HostRoom | None:
    """Of the job as it is, on GPUs, with so many ranks on this machine; None where there is no bill of its host."""
    bill = host_bill(case, config, model)
    if bill is None:
        return None
    as_it_is = bill.host_together(ranks)
    most = max(as_it_is, forecast_of(case, config, model, encoded=False, count=0).host_together(ranks))
    host = case.facts.host  # which may be named as no concern
    limit, used = host_room(host) if host and "ME102" not in case.accepted else (0, 0)
    return HostRoom(
        most + LAUNCHER, most - as_it_is, pinned(config, model), ranks, max(0, limit - used) if limit else None,
        bool(host and limit == host.memory_limit),
    )  # fmt: skip
