"""The nodes of a launch bring their reports together in a folder that all share; node 0 reads them.

Node 0 writes a call with a fresh word into the folder, and every node puts its report into the folder of that word:
what an earlier launch left there, or a report that comes too late, is never taken for one of this launch. A node that
sees the call of an earlier launch first answers it too, and answers again when the word changes. Who does not answer in
time is known by its number.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from xflux_doctor.errors import DoctorError
from xflux_doctor.facts import Clock
from xflux_doctor.files import replace

CALL = "call.json"
_TICK = 0.2
_GRAIN = 0.02
"""Seconds by which a file's time may lag on a healthy disk."""
Say = Callable[[str], None]
Document = dict[str, Any]


@dataclass(frozen=True)
class Seat:
    """This node among those of the launch."""

    number: int
    count: int
    seconds: float
    """How long to wait for the others when the own report is made."""


def host(folder: Path, seat: Seat, make: Callable[[], Document], say: Say) -> tuple[Path, tuple[int, ...]]:
    """Node 0: call, wait, and say where the reports lie and which numbers did not come."""
    word = secrets.token_hex(6)
    place = folder / word
    try:
        place.mkdir(parents=True)
        replace(folder / CALL, json.dumps({"word": word, "nodes": seat.count}).encode())
        own = make()  # while the others make theirs
        put(place, 0, own)
        until, spoken = time.monotonic() + seat.seconds, 0.0
        while (missing := _missing(place, seat.count)) and (now := time.monotonic()) < until:
            if now - spoken > 10:
                say(f"waiting for the reports of {len(missing)} of {seat.count} nodes, {until - now:.0f} s")
                spoken = now
            time.sleep(_TICK)
        replace(place / "done", b"")
    except OSError as error:
        raise _unwritable(folder, error) from error
    return place, missing


def send(folder: Path, seat: Seat, document: Document) -> None:
    """The others: answer every new call until one is done. Raises DoctorError where there is none in time."""
    until, answered, mine = time.monotonic() + seat.seconds, "", False
    while time.monotonic() < until:
        word = _word(folder)
        if word and word != answered and not (folder / word / "done").exists():
            try:
                put(folder / word, seat.number, document)
            except OSError as error:
                raise _unwritable(folder, error) from error
            answered, mine = word, True
        if mine and (folder / answered / "done").exists():
            return
        time.sleep(_TICK)
    if not mine:
        raise DoctorError(
            f"Node {seat.number} saw no call of node 0 in {folder} within {seat.seconds:.0f} s.",
            "Give --shared a folder that all nodes share, such as one on NFS or Lustre, and see whether node 0 runs.",
        )


def put(place: Path, number: int, document: Document) -> None:
    """One node's report, with its clock held against the folder's."""
    facts = document.get("facts")
    if isinstance(facts, dict):
        facts["clock"] = msgspec.to_builtins(clock_of(place, number))
    replace(place / f"node{number:05d}.json", msgspec.json.encode(document))


def clock_of(place: Path, number: int) -> Clock:
    """This host's clock against the times that the folder's server gives to files. Where a file system takes the
    writer's own time (Lustre) all clocks look alike: nobody is blamed."""
    file = place / f".clock{number:05d}"
    before = time.time()
    with file.open("wb") as written:
        written.write(b".")
        written.flush()
        os.fsync(written.fileno())
    after = time.time()
    stamp = file.stat().st_mtime
    file.unlink()
    coarse = 1.0 if stamp == int(stamp) else 0.0
    return Clock((before + after) / 2 - stamp, (after - before) / 2 + _GRAIN + coarse, "the shared folder")


def failed(node: str, why: str) -> Document:
    """What a node sends that could not make a report."""
    return {"schema": 1, "node": node, "failed": why}


def _missing(place: Path, count: int) -> tuple[int, ...]:
    here = {entry.name for entry in os.scandir(place)}
    return tuple(number for number in range(count) if f"node{number:05d}.json" not in here)


def _word(folder: Path) -> str:
    try:
        word = json.loads((folder / CALL).read_bytes())["word"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return word if isinstance(word, str) and word.isalnum() and (folder / word).is_dir() else ""


def _unwritable(folder: Path, error: OSError) -> DoctorError:
    return DoctorError(
        f"No report can be put into {folder}: {error.strerror or error}.",
        "Give --shared a folder that all nodes share and may write to.",
    )
