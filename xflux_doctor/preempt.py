"""A machine that is about to be taken away: the trainer saves, `run` ends with the code that requeues, and goes on.

SIGUSR2 is that notice (Slurm: `#SBATCH --signal=B:USR2@120`; a watcher of a cloud's notice sends it by `kill -USR2`).
Slurm itself requeues a batch job that ends with a code of its RequeueExit; elsewhere `scontrol requeue` does.

Source: Slurm's sbatch manual (--signal, --requeue, SLURM_RESTART_COUNT) and slurm.conf manual (RequeueExit). 75 is
EX_TEMPFAIL of sysexits.h: the same may be tried again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

NOTICE = signal.SIGUSR2
CODE = 75
_ENDED = (128 + signal.SIGTERM, 128 + NOTICE)


class Requeue:
    """While it is open a notice is passed on as SIGTERM, which the trainer knows: it ends its step and saves.

    `code`: what to end with then. Where the user named one, a SIGTERM counts as a notice too: spot instances and
    Slurm's preemption send no other.
    """

    def __init__(self, code: int | None) -> None:
        self._code, self._also_term = CODE if code is None else code, code is not None
        self._came = False
        self._old: object = signal.SIG_DFL
        self._old_term: object = signal.SIG_DFL

    def __enter__(self) -> Requeue:
        self._old = signal.signal(NOTICE, self._notice)
        self._old_term = signal.signal(signal.SIGTERM, self._term)  # the training's own handler replaces it meanwhile
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(NOTICE, self._old)  # type: ignore[arg-type]
        signal.signal(signal.SIGTERM, self._old_term)  # type: ignore[arg-type]

    def exit_code(self, code: int) -> int:
        """What to end with after a training that ended with `code`: one that was done in time is done."""
        noticed = code != 0 and self._came
        return self._code if noticed or (self._also_term and code in _ENDED) else code

    def _term(self, _number: int, _frame: FrameType | None) -> None:
        """Before the training, between two attempts, or after it: end, and let the caller say by which code."""
        raise SystemExit(128 + signal.SIGTERM)

    def _notice(self, _number: int, _frame: FrameType | None) -> None:
        if not self._came:  # Slurm may send it to a process more than once; a second SIGTERM would be taken for haste
            self._came = True
            os.kill(os.getpid(), signal.SIGTERM)


def goes_on(environ: Mapping[str, str], output: Path) -> bool:
    """Whether this start is one of a requeued job whose first one left a whole checkpoint."""
    count = environ.get("SLURM_RESTART_COUNT", "")
    return count.isdigit() and int(count) > 0 and any(output.glob("checkpoint-*/manifest.json"))
