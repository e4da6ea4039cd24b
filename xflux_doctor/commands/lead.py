"""The training itself: start it, show it, start it again while that may help, and note who leads it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xflux_doctor import runstate
from xflux_doctor.between import Between, Stopped
from xflux_doctor.commands import again, runfolder
from xflux_doctor.commands.again import Attempt
from xflux_doctor.commands.lighter import Lighter
from xflux_doctor.commands.rejoin import Fellows, Word
from xflux_doctor.errors import DoctorError
from xflux_doctor.launch import Launch
from xflux_doctor.progress import Display, lose
from xflux_doctor.runstate import RunState
from xflux_doctor.supervise import End, Watching
from xflux_doctor.supervise import run as supervise

if TYPE_CHECKING:  # a start need not compile the rules
    from xflux_doctor.explain.diagnosis import Diagnosis


@dataclass(frozen=True)
class How:
    """What the user says of a run's supervision."""

    retries: int = 0
    hang_after: float | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Led:
    """How the last attempt ended, its log, and the cause that this shows."""

    end: End
    log: Path
    diagnosis: Diagnosis | None = None
    lighter: Lighter | None = None
    """The plan after it, where that was out of the card's memory."""


@dataclass(frozen=True)
class _Next:
    """The next start, decided on."""

    attempt: Attempt
    machine: int | None
    """Whose cause it is, of several."""
    cause: dict[str, Any]
    log: Path


def lead(
    launch: Launch, folder: Path, files: dict[str, Path], log: Path, how: How, *, cards: tuple[str, ...],
    next_log: Callable[[int], Path], fellows: Fellows | None = None,
) -> Led:  # fmt: skip
    """Lead it to its last end. `files` are the run folder's own, which the next attempt changes. Of several machines
    that may start again, each leads its part, and they start again together."""
    leader = _Leader(folder, files, how, next_log, fellows)
    end = End(0, None, None, interrupted=False, seconds=0.0)  # of nothing yet
    with Between(_hung_up) as between:
        while True:
            try:
                end = _attempt(launch, folder, log, how, cards, fellows, between)
                if end.exit_code:  # what is done is done
                    between.check()
            except Stopped as stop:
                end = _stopped(end, stop.number)
            led = Led(end, log)
            if not end.exit_code or end.interrupted:
                break
            leader.tells(end)
            try:
                with between.open():
                    led = dataclasses.replace(led, diagnosis=_explain().of_file(log))
                    found = leader.next(led)
                    if found is None:
                        led = dataclasses.replace(led, lighter=_explain().next_plan(led.diagnosis, log))
            except Stopped as stop:
                led = dataclasses.replace(led, end=_stopped(end, stop.number))
                break
            if found is None:
                break
            log = found.log
        leader.parts(led.end)
    return led


class _Leader:
    """Decides on each next start."""

    def __init__(
        self, folder: Path, files: dict[str, Path], how: How, next_log: Callable[[int], Path], fellows: Fellows | None
    ) -> None:
        self._folder, self._files, self._how = folder, files, how
        self._next_log, self._fellows = next_log, fellows
        self._tried: set[str] = set()
        self._made = 0

    def next(self, led: Led) -> _Next | None:
        """The start after that end, with its files made; None where there is none."""
        if self._made >= self._how.retries:
            return None
        found = self._alone(led) if self._fellows is None else self._together(led, self._fellows)
        if found is None:
            return None
        self._made += 1
        _say(f"\nretry {self._made} of {self._how.retries} after {led.end.seconds:.0f} s: {found.attempt.words}\n")
        runfolder.retried(self._folder, self._made, found.attempt, found.cause, led.end.exit_code, led.end.seconds,
                          led.log, machine=found.machine)  # fmt: skip
        return found

    def tells(self, end: End) -> None:
        """Tell the others that the part here has ended, before its log is read."""
        if self._fellows is not None:
            self._fellows.tell(end.exit_code)

    def parts(self, end: End) -> None:
        """Tell the others that no further start follows here."""
        if self._fellows is None:
            return
        if end.interrupted:
            why = f"was told to end by signal {end.signal}"
        else:
            why = f"ended with {end.exit_code} for the last time" if end.exit_code else "is done"
        self._fellows.tell(end.exit_code, why)
        self._fellows.leave()
        self._fellows.close()

    def _alone(self, led: Led) -> _Next | None:
        attempt = self._following(_name(led.diagnosis))
        if attempt is None:
            return None
        log = self._prepare(attempt)
        return _Next(attempt, None, _explain().as_dict(led.diagnosis), log)

    def _together(self, led: Led, fellows: Fellows) -> _Next | None:
        outcome = fellows.meet(Word.of(led.diagnosis, led.end.exit_code, led.end.seconds), self._following)
        decision, attempt, why = outcome.decision, outcome.attempt, outcome.words
        log: Path | None = None
        if attempt is not None:
            try:
                log = self._prepare(attempt)
            except DoctorError as error:
                _say(f"{error.seen} {error.hint}")
            why = fellows.start(log is not None)
        if decision is None or attempt is None or log is None or why:
            _say(f"\nno retry: {why}\n")
            runfolder.stayed(self._folder, why)
            return None
        return _Next(attempt, decision.machine, {"cause": decision.cause, "code": decision.code}, log)

    def _following(self, cause: str) -> Attempt | None:
        return again.following(self._folder, cause, self._tried)

    def _prepare(self, attempt: Attempt) -> Path:
        """Make the attempt's files; raises DoctorError."""
        self._tried.add(attempt.mark)
        again.write(attempt, {name: path for name, path in self._files.items() if path.is_file()})
        return self._next_log(self._made + 1)


def _attempt(
    launch: Launch, folder: Path, log: Path, how: How, cards: tuple[str, ...], fellows: Fellows | None, between: Between
) -> End:  # fmt: skip
    """Raises Stopped where a signal has come before anything was started."""
    note(folder, RunState.own(log))
    display = Display(raw=how.verbose)
    watching = Watching(folder, how.hang_after, cards, display.hang_up, begin=between.check)
    if fellows is not None:
        watching = dataclasses.replace(watching, elsewhere=fellows.elsewhere)
    try:
        return supervise(launch, log, display, watching)
    finally:
        display.close()


def _stopped(end: End, number: int) -> End:
    """A signal came when no training ran, after that one, and none is started any more."""
    return dataclasses.replace(end, exit_code=128 + number, signal=number, interrupted=True)


def _hung_up() -> None:
    """The terminal is gone between two attempts; the run goes on."""
    if sys.stdout.isatty():
        lose(1)


def _say(text: str) -> None:
    """A terminal that is gone is no reason to end a run."""
    with contextlib.suppress(OSError):
        click.echo(text)


def _explain() -> Any:
    return importlib.import_module("xflux_doctor.commands.explain")  # not for every start of the doctor


def _name(diagnosis: Diagnosis | None) -> str:
    return "none" if diagnosis is None else diagnosis.cause


def note(folder: Path, state: RunState) -> None:
    """Without it the run cannot be attached to; that is no reason to end it."""
    with contextlib.suppress(DoctorError):
        runstate.write(folder, state)
