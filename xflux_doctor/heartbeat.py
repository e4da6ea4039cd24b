"""What the ranks of this machine are doing, as each keeps writing it into a folder that the doctor named.

The folder is a temporary one of this machine and no part of the run folder: a beat must neither wait for a network disk
nor be lost on one. The trainer's side is `trainer/pulse.py`; no code is shared, the record is the contract.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

RECORD = 384
"""Bytes of a record."""


class Beat(msgspec.Struct, frozen=True):
    """One rank's record."""

    rank: int
    world: int
    pid: int
    host: str
    phase: str
    """start, join, download, list, cache, load, train, data, forward, step, checkpoint, heldout, sample, between, end,
    done (it has left the others), publish."""
    collective: bool
    """It waits for the others."""
    step: int
    """Steps done."""
    total: int
    seconds: float
    """Of the last step."""
    beat: int
    """Grows with every record."""
    monotonic: float
    """The machine's clock since its start, in seconds."""
    time: float


def beats(folder: Path) -> dict[int, Beat]:
    """The newest record of each rank that has one."""
    found = {}
    for path in folder.glob("rank*.json"):
        try:
            with path.open("rb") as file:
                beat = msgspec.json.decode(os.pread(file.fileno(), RECORD, 0), type=Beat)
        except (OSError, msgspec.DecodeError):  # just made, and empty yet
            continue
        found[beat.rank] = beat
    return found


def state(pid: int) -> str:
    """The kernel's letter for what a process does (R, S, D, T, t, Z); empty for one that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]
