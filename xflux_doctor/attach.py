"""Show a run again whose terminal is gone: follow its log until the doctor that leads it ends."""

from __future__ import annotations

import time
from pathlib import Path

import click
from xflux_trainer import config as train_config

from xflux_doctor import runstate
from xflux_doctor.errors import DoctorError
from xflux_doctor.lifesigns import SILENCE, Signs
from xflux_doctor.progress import Display
from xflux_doctor.runstate import RunState

_BEFORE = 4096
"""Bytes of the log that are shown of what was before."""
_LOOK = 0.2


def folder_of(named: str, config: str | None) -> Path:
    """The run folder that is named, or else the output_dir of the training file."""
    if named:
        return Path(named)
    path = Path(config or "train.yaml")
    if not path.is_file():
        raise DoctorError(f"There is no training file at {path}.", "Name the run's folder, or give --config.", code=2)
    try:
        return Path(train_config.load_with_notes(path)[0].output_dir)
    except train_config.ConfigError as error:
        raise DoctorError(str(error), "Mend it, or name the run's folder.", code=2) from error


def attach(folder: Path, *, raw: bool = False, silence: float = SILENCE) -> int:
    """Follow the run in this folder. Returns its exit code; 0 for whoever detaches with Ctrl-C, 1 where the doctor that
    led it was killed, or where it ran elsewhere and nothing in the folder has changed for `silence` seconds."""
    state = runstate.read(folder)
    if state is None:
        seen = f"{folder} holds no run that was started by `xflux-doctor run`."
        raise DoctorError(seen, "Name the run's folder, its output_dir.", code=2)
    which, how = ("The run", " Ctrl-C detaches.") if state.alive else ("The last run", "")
    click.echo(f"{which} in {folder}, led by process {state.pid} on {state.host}.{how}")
    display, signs = Display(raw=raw), Signs(folder, silence)
    if state.alive and not state.here:
        click.echo("That process cannot be looked up from this machine: it counts as gone when nothing in the folder "
                   f"changes for {silence:.0f} s.")  # fmt: skip
    try:
        state = _follow(folder, state, display, signs)
    except KeyboardInterrupt:
        display.close()
        click.echo("\nDetached; the run goes on. To end it with a checkpoint: "
                   f"kill -INT {state.pid}{'' if state.here else f' on {state.host}'}")  # fmt: skip
        return 0
    display.close()
    if state.exit_code is None:
        click.echo("The doctor that led the run was killed, and the run with it. Resume from its last checkpoint."
                   if state.here else _gone(folder, state, signs))  # fmt: skip
        return 1
    click.echo(f"The run ended with {state.exit_code}. `xflux-doctor explain {folder}` says why." if state.exit_code
               else "The run is done.")  # fmt: skip
    return state.exit_code


def _follow(folder: Path, state: RunState, display: Display, signs: Signs) -> RunState:
    """Show what comes, of one log after the other; how the run stood at its end, or when its signs of life did."""
    log, place, told = state.log_in(folder), None, False
    while True:
        alive = state.alive
        place = _show(log, place, display)
        if state.log_in(folder) != log:  # the next attempt has its own
            log, place = state.log_in(folder), 0
            continue
        if not alive:
            return runstate.read(folder) or state
        if not state.here:
            signs.look(state)
            if signs.silent:
                return state
            if signs.orphaned and not told:
                told = True
                words = f"no sign of the doctor on {state.host} for {signs.limit:.0f} s, but the training there"
                display(f"xflux-doctor: {words} goes on writing its metrics, and is followed\n".encode())
        time.sleep(min(_LOOK, signs.limit / 4))
        state = runstate.read(folder) or state


def _gone(folder: Path, state: RunState, signs: Signs) -> str:
    """What was seen, what it means and what to do, of a run whose folder has gone silent."""
    newest = signs.newest(state)
    if signs.since is not None:
        since = f"since {_clock(signs.since)}"
    else:
        dated = f"; its newest file is of {_clock(newest)}, by the clock of its disk" if newest else ""
        since = f"for the {signs.limit:.0f} s that it was looked at{dated}"
    return (
        f"Nothing in {folder} has changed {since}.\n"
        f"  The doctor that led the run on {state.host}, the machine itself, or its way to this disk is gone. With the "
        "doctor its ranks end too; where only the disk went, they may still run there.\n"
        f"  Look there what is left (`ps -fp {state.pid}`, `pgrep -af xflux_trainer`), end it with `kill -INT`, then "
        "start the same command again with resume_from_checkpoint: latest. If it only paused, attach again."
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _show(log: Path, place: int | None, display: Display) -> int:
    """Show the log from that place on, from a little before its end without one. Returns where it ends."""
    try:
        with log.open("rb") as file:
            if place is None:
                place = max(0, file.seek(0, 2) - _BEFORE)
                file.seek(place)
                place += len(file.readline()) if place else 0
            file.seek(place)
            while piece := file.read(65536):
                whole = piece[: piece.rfind(b"\n") + 1]
                if not whole:
                    break
                display(whole)
                place += len(whole)
                file.seek(place)
    except OSError:
        return place or 0
    return place
