"""Who leads the run in a folder, and how it ended: what `run --attach` looks at."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

from xflux_doctor.files import write_atomic

NAME = "run.json"


class RunState(msgspec.Struct, frozen=True):
    """The doctor that leads a run."""

    pid: int
    started: int
    """Ticks from the machine's start to the process's: a number may be given to another process."""
    host: str
    log: str
    """The newest log."""
    exit_code: int | None = None
    """None while it runs."""

    @classmethod
    def own(cls, log: Path, exit_code: int | None = None) -> RunState:
        return cls(os.getpid(), _started(os.getpid()) or 0, socket.gethostname(), str(log), exit_code)

    @property
    def here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether that doctor still runs; of another machine as it says itself."""
        if self.exit_code is not None:
            return False
        return not self.here or _started(self.pid) == self.started

    def log_in(self, folder: Path) -> Path:
        """The newest log, in a run folder that the other machine may have under another path."""
        log, beside = Path(self.log), folder / "logs" / Path(self.log).name
        return beside if not self.here and beside.is_file() else log


def write(folder: Path, state: RunState) -> None:
    """Raises DoctorError."""
    write_atomic(folder / NAME, msgspec.json.format(msgspec.json.encode(state), indent=2).decode() + "\n")


def touch(folder: Path) -> None:
    """Show whoever looks at this folder from another machine that the doctor goes on. Raises OSError."""
    os.utime(folder / NAME)


def read(folder: Path) -> RunState | None:
    """None where no run was led, or its record is none."""
    try:
        return msgspec.json.decode((folder / NAME).read_bytes(), type=RunState)
    except (OSError, msgspec.DecodeError):
        return None


def _started(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    words = text.rpartition(")")[2].split()
    return None if words[0] == "Z" else int(words[19])
