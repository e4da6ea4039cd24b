"""Where a run's numbers go while it runs: the terminal, metrics.jsonl, heldout.jsonl, and a tracker."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from xflux_trainer import files
from xflux_trainer.speed import Rates
from xflux_trainer.trackers import Tracker

__all__ = ["Lines", "Smooth", "Terminal", "Tracker", "finite", "read_lines"]


class Lines:
    """metrics.jsonl: one line a step. A resumed run drops the lines of steps that it takes again.

    Other files of one line an event are kept in the same way: heldout.jsonl, {"step": …, "mean": …, "by_time": {…}}.
    """

    def __init__(self, path: Path, from_step: int) -> None:
        kept = [line for line in read_lines(path) if line.get("step", 0) <= from_step] if from_step else []
        self.losses: list[float] = [line["loss"] for line in kept if isinstance(line.get("loss"), (int, float))]
        """Of the steps before a resume."""
        files.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """One line, on the disk when this returns. Raises `WriteError`."""
        with files.sentences(self._path):
            self._file.write(json.dumps(_plain(values)) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # a disk that was full when the line was written was reported then
            self._file.close()


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity: null stands for them."""
    return value if value is None or math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return finite(value) if isinstance(value, float) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file, without those that are no JSON object; none where there is no file."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # the line that was being written when the run was killed
                continue
    return [line for line in lines if isinstance(line, dict)]


class Smooth:
    """A loss that can be watched: the exponential average of the newest hundred or so, without the start's bias.

    One step's loss says more about the times that it drew than about the model.
    """

    def __init__(self, decay: float = 0.98) -> None:
        self._decay = decay
        self._sum = self._weight = 0.0

    def add(self, loss: float) -> float:
        """The average with this loss in it. A loss that is not finite leaves it as it is."""
        if math.isfinite(loss):
            self._sum = self._decay * self._sum + (1 - self._decay) * loss
            self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight if self._weight else loss


class Terminal:
    """One line a step: redrawn in place on a terminal, at most one a second elsewhere."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stdout
        self._tty = self._stream.isatty()
        self._last = 0.0
        self._started: float | None = None
        self._steps, self._spent = 0, 0.0

    def step(
        self,
        step: int,
        values: Mapping[str, float],
        smooth: float,
        rates: Rates,
        *,
        peak_share: float | None = None,
        memory: tuple[int, int] | None = None,
    ) -> None:
        """`values` is the step's line of metrics.jsonl; `memory` the device's peak and total, in bytes."""
        now = time.monotonic()
        if self._started is None:
            self._started = now - values["seconds"]
        self._steps, self._spent = self._steps + 1, self._spent + values["seconds"]
        ends = step in (1, self._total)
        if not self._tty and not ends and now - self._last < 1:
            return
        self._last = now
        # What lies between steps (checkpoints, samples) comes again in the steps that are left.
        between = max(0.0, now - self._started - self._spent) / self._steps
        parts = _parts(values, smooth, rates, peak_share, memory)
        parts["eta"] = f"eta {_duration((self._total - step) * (rates.seconds + between))}"
        parts = {"step": f"step {step}/{self._total}", **parts}
        text = _joined(parts, shutil.get_terminal_size().columns - 1 if self._tty else None)
        print(f"\r\x1b[K{text}" if self._tty else text, end="" if self._tty and not ends else "\n",
              file=self._stream, flush=True)  # fmt: skip


DROPPED = ("lr", "memory", "grad", "samples", "data", "now", "speed", "eta", "seconds")
"""What a narrow terminal goes without, the first first: a line that wraps cannot be redrawn in place."""


def _parts(
    values: Mapping[str, float], smooth: float, rates: Rates, share: float | None, memory: tuple[int, int] | None
) -> dict[str, str]:
    parts = {
        "loss": f"loss {smooth:.4f}",
        "now": f"now {values['loss']:.4f}",
        "lr": f"lr {values['learning_rate']:.2e}",
        "grad": f"grad {values['grad_norm']:.3f}",
        "seconds": f"{rates.seconds:.2f} s/it",
        "samples": f"{rates.samples:.3g} samples/s",
        "speed": f"{rates.tflops:.3g} TFLOP/s" + (f" ({share:.0%} of peak)" if share is not None else ""),
    }
    if memory:
        parts["memory"] = f"{memory[0] / 2**30:.1f} of {memory[1] / 2**30:.1f} GiB"
    parts["data"] = f"data {rates.waiting:.0%}"
    return parts


def _joined(parts: dict[str, str], width: int | None) -> str:
    kept = dict(parts)
    for name in DROPPED:
        if width is None or len("  ".join(kept.values())) <= width:
            break
        kept.pop(name, None)
    return "  ".join(kept.values())[:width]


def _duration(seconds: float) -> str:
    days, rest = divmod(int(min(seconds, 1e9)), 86400)
    return f"{f'{days}d ' if days else ''}{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
