"""What a run that died does when it may go on (`run --retries N`): from its last checkpoint, never the same way twice.

Out of the card's memory, the next plan that needs clearly less computes the same steps. What came from outside (a rank,
a machine or a network that was lost) may pass: once for each cause. What would only happen again is left to the user.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from xflux_doctor.commands.fix import edited
from xflux_doctor.commands.lighter import Lighter, after
from xflux_doctor.files import write_atomic
from xflux_doctor.finding import Change, Edit

FROM_OUTSIDE = frozenset({
    "peer-rank-died", "nccl-timeout", "collective-timeout", "nccl-connection-refused", "nccl-ib-link",
    "nccl-unhandled-cuda-error", "rendezvous-timeout", "segfault", "nccl-segfault", "gpu-peermem", "sigterm",
    "port-in-use", "host-oom-kill", "rank-stopped", "rank-lost", "loader-stuck", "storage-stuck", "rank-stuck",
    "collective-stuck", "unknown",
})  # fmt: skip
"""Causes that a second start may not meet. A SIGKILL is taken for the host's memory, and can be anybody's."""
RESUME = Edit("train", ("resume_from_checkpoint",), "latest", "go on from the last checkpoint")


@dataclass(frozen=True)
class Attempt:
    """The next start: what changes in the run folder's files, in words, and what tells it from all others."""

    edits: tuple[Change, ...]
    words: str
    mark: str


def following(folder: Path, cause: str, tried: set[str]) -> Attempt | None:
    """The attempt after a run that ended by that cause; None where it would only fail again. `tried`: the marks of
    those before."""
    if cause.startswith("cuda-oom"):
        found = after(folder)
        attempt = _lighter(cause, found) if found is not None else None
    elif cause in FROM_OUTSIDE:
        attempt = Attempt((RESUME,), f"{cause}: the same once more, from the last checkpoint", cause)
    else:
        attempt = None
    return None if attempt is None or attempt.mark in tried else attempt


def _lighter(cause: str, found: Lighter) -> Attempt | None:
    if found.next is None:
        return None
    words = f"{cause}: by a plan that needs less, {found.next.label}, from the last checkpoint"
    return Attempt((*found.edits, RESUME), words, json.dumps(found.next.changes, sort_keys=True, default=str))


def write(attempt: Attempt, files: dict[str, Path]) -> None:
    """Make the attempt's edits in the run folder's own files, by the names that edits have for them."""
    for name, path in files.items():
        mine = tuple(edit for edit in attempt.edits if edit.file == name)
        if mine:
            write_atomic(path, edited(path, path.read_text(encoding="utf-8"), mine))
