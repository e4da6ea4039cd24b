"""Several logs of one job: a file for each rank or machine, as torchrun's --log-dir, srun and Kubernetes leave them."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from xflux_doctor.explain.diagnosis import Diagnosis, diagnose_file
from xflux_doctor.explain.rule import LEVELS

_ENDINGS = re.compile(r"\.(?:log|out|err|txt)(?:\.\d+)?(?:\.(?:gz|bz2|xz))?$|(?:^|[-_.])std(?:out|err)$")
"""What logs are called, rotated and packed ones too."""
_RANK = re.compile(r"(?:rank|task|worker|proc(?:ess)?|local_rank)[-_.]?(\d{1,5})", re.IGNORECASE)
_MOST = 4096
"""Logs that are read."""


def logs_in(folder: Path) -> list[tuple[int | None, Path]]:
    """The logs in a folder and the folders in it, each with the rank that its name gives."""
    found = [path for path in sorted(folder.rglob("*")) if _ENDINGS.search(path.name) and path.is_file()]
    return [(rank_of(path.relative_to(folder)), path) for path in found[:_MOST]]


def rank_of(path: Path) -> int | None:
    """rank3.log, task_3.err; torchrun's attempt_0/3/stderr.log."""
    for part in reversed(path.parts):
        if found := _RANK.search(part):
            return int(found[1])
    folder = path.parts[-2] if len(path.parts) > 1 else ""
    return int(folder) if folder.isdigit() else None


def diagnose_folder(folder: Path) -> Diagnosis | None:
    """The cause nearest to the root of all that its logs show; with the log that it stands in, and the rank of that."""
    best: tuple[int, int, Diagnosis] | None = None
    for number, (rank, path) in enumerate(logs_in(folder)):
        found = diagnose_file(path)
        if found is None:
            continue
        told = msgspec.structs.replace(
            found, rank=found.rank if found.rank is not None else rank, file=str(path.relative_to(folder))
        )
        # What nobody knows says less than what others say about a lost rank.
        order = LEVELS.index(found.level) if found.cause != "unknown" else len(LEVELS)
        if best is None or order < best[0]:
            best = (order, number, told)
    return best[2] if best else None
