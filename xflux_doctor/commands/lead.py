"""The training itself: start it, show it, start it again while that may help, and note who leads it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from xflux_doctor import runstate
from xflux_doctor.commands import runfolder
from xflux_doctor.errors import DoctorError
from xflux_doctor.launch import Launch
from xflux_doctor.progress import Display
from xflux_doctor.runstate import RunState
from xflux_doctor.supervise import End, Watching
from xflux_doctor.supervise import run as supervise


@dataclass(frozen=True)
class How:
    """What the user says of a run's supervision."""

    retries: int = 0
    hang_after: float | None = None
    verbose: bool = False


def lead(
    launch: Launch, folder: Path, files: dict[str, Path], log: Path, how: How, *, cards: tuple[str, ...],
    next_log: Callable[[int], Path],
) -> tuple[End, Path]:  # fmt: skip
    """How the last attempt ended, and its log. `files` are the run folder's own, which the next attempt changes."""
    tried = set[str]()
    end = _attempt(launch, folder, log, how, cards)
    while end.exit_code and not end.interrupted and len(tried) < how.retries:
        explain: Any = importlib.import_module("xflux_doctor.commands.explain")
        again: Any = importlib.import_module("xflux_doctor.commands.again")
        diagnosis = explain.of_file(log)
        attempt = again.following(folder, diagnosis, tried)
        if attempt is None:
            break
        tried.add(attempt.mark)
        again.write(attempt, {name: path for name, path in files.items() if path.is_file()})
        click.echo(f"\nretry {len(tried)} of {how.retries} after {end.seconds:.0f} s: {attempt.words}\n")
        runfolder.retried(folder, len(tried), attempt, explain.as_dict(diagnosis), end.exit_code, end.seconds, log)
        log = next_log(len(tried))
        end = _attempt(launch, folder, log, how, cards)
    return end, log


def _attempt(launch: Launch, folder: Path, log: Path, how: How, cards: tuple[str, ...]) -> End:
    note(folder, RunState.own(log))
    display = Display(raw=how.verbose)
    try:
        return supervise(launch, log, display, Watching(folder, how.hang_after, cards, display.hang_up))
    finally:
        display.close()


def note(folder: Path, state: RunState) -> None:
    """Without it the run cannot be attached to; that is no reason to end it."""
    with contextlib.suppress(DoctorError):
        runstate.write(folder, state)
