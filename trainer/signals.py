"""SIGINT and SIGTERM: at once while nothing is at stake, at the end of the step while training. SIGUSR1: save."""

from __future__ import annotations

import signal
from types import FrameType

from xflux_trainer.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE = signal.SIGUSR1


class Stop:
    """The first signal that came. Outside `deferred` it raises `Interrupted`; inside, it is only noted.

    Once one is noted, later ones change nothing: after a Ctrl-C the launcher sends its workers another signal
    while they are saving. Ctrl-\\ (SIGQUIT) still ends the program at once.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._deferred = False
        self._save = False

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._receive)
        signal.signal(SAVE, self._note_save)

    def defer(self) -> None:
        """From here on signals are only noted: the caller looks at `signum` between its steps."""
        self._deferred = True

    def flags(self) -> list[float]:
        """One number for each signal, and one for the wish to save, to be summed over the ranks. The wish is told
        once."""
        save, self._save = self._save, False
        return [*(float(self.signum == number) for number in SIGNALS), float(save)]

    @staticmethod
    def first(flags: list[float]) -> int:
        """The signal that the sums name, or 0. A Ctrl-C reaches some ranks as the SIGTERM of their launcher."""
        return next((int(number) for number, count in zip(SIGNALS, flags) if count), 0)  # noqa: B905 (one more flag)

    @staticmethod
    def save(flags: list[float]) -> bool:
        """Whether the sums say that a rank was asked for a checkpoint."""
        return flags[len(SIGNALS)] > 0

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            return
        self.signum = signum
        if not self._deferred:
            raise Interrupted(signum)

    def _note_save(self, signum: int, frame: FrameType | None) -> None:
        self._save = True


def ignore() -> None:
    """For a process that has nothing left to do but to end."""
    for number in (*SIGNALS, SAVE):
        signal.signal(number, signal.SIG_IGN)
