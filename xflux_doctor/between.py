"""Signals that come while no training runs: between two attempts, while a log is read, while machines meet."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType


class Stopped(BaseException):
    """SIGINT or SIGTERM; not an `Exception`, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


class Between:
    """While it is entered, a SIGINT or SIGTERM is noted, and interrupts only what runs inside `open`: between those a
    training is started, or its end is written down. SIGHUP ends nothing: `hung_up` is called."""

    def __init__(self, hung_up: Callable[[], None] = lambda: None) -> None:
        self._hung_up, self._interrupts = hung_up, False
        self._old: dict[int, object] = {}
        self._count = 0
        self.number: int | None = None
        """The first signal that asked for the end."""

    def __enter__(self) -> Between:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """What may take its time: a signal ends it by `Stopped`, also one that came before."""
        try:
            self._interrupts = True
            self.check()
            yield
        finally:
            self._interrupts = False

    def check(self) -> None:
        """Raises Stopped where a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._hung_up()
            return
        self.number, self._count = self.number or number, self._count + 1
        if self._count > 2:  # a disk that does not answer: a person who insists is right, and `guard.py` ends the rest
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._interrupts:
            self._interrupts = False  # one is enough: what cleans up is not interrupted by a second
            raise Stopped(self.number)
