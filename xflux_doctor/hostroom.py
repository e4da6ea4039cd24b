"""What a plan holds of the host's memory: blocks that are streamed to the GPU lie there, pinned, once for each rank.

That is all in which plans of one job differ there. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from xflux_trainer import memory
from xflux_trainer.config import TrainConfig
from xflux_trainer.spec import FluxSpec

from xflux_doctor.bill import forecast_of
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.verdict import LAUNCHER, host_room


@dataclass(frozen=True)
class HostRoom:
    """What the ranks of this machine hold beside streamed blocks, in bytes, and what there is for them."""

    first: int
    """Of the first rank."""
    together: int
    """Of all ranks and their launcher."""
    ranks: int
    room: int
    """That they may hold; 0: not known."""
    hard: bool
    """A container's limit, beyond which the kernel kills. A machine's own memory may be more than it says: virtual ones
    grow as it is used."""

    def lacks(self, pinned: int) -> int:
        """Bytes that are missing for so many of each rank; none where there would be too few without them as well,
        which no plan mends."""
        if not pinned or not self.room or self.together > self.room:
            return 0
        return max(0, self.together + self.ranks * pinned - self.room)


def pinned(config: TrainConfig, model: FluxSpec) -> int:
    """Bytes of streamed weights in one rank's memory."""
    found: int = memory.pinned(config, model)
    return found


def host_room_of(case: Case, config: TrainConfig, model: FluxSpec) -> HostRoom | None:
    """Of a job on GPUs; None where there is no bill of its host. As full as it gets: with the cache as it is, and as if
    nothing was encoded."""
    ranks = case.job.local_processes
    try:
        bill, whole = (forecast_of(case, config, model, encoded=encoded) for encoded in (None, False))
    except (SkipCheck, OSError):
        return None
    own = pinned(config, model)
    together = max(one.host_together(ranks) for one in (bill, whole)) - ranks * own + LAUNCHER
    limit, used = host_room(case.facts.host) if case.facts.host else (0, 0)
    hard = case.facts.host is not None and limit == case.facts.host.memory_limit
    return HostRoom(bill.host_per_rank - own, together, ranks, max(0, limit - used) if limit else 0, hard)
