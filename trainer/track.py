"""Where a run's numbers go while it runs: the terminal, metrics.jsonl, metrics.json, and a tracker."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from xflux_trainer import config as train_config
from xflux_trainer import files
from xflux_trainer.config import TrainConfig


class Lines:
    """metrics.jsonl: one line a step. A resumed run drops the lines of steps that it takes again."""

    def __init__(self, path: Path, from_step: int) -> None:
        kept = [line for line in _read_lines(path) if line.get("step", 0) <= from_step] if from_step else []
        files.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, float]) -> None:
        with files.sentences(self._path):
            self._file.write(json.dumps({key: finite(value) for key, value in values.items()}) + "\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # a disk that was full when the line was written was reported then
            self._file.close()


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity: null stands for them."""
    return value if value is None or math.isfinite(value) else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # the line that was being written when the run was killed
                continue
    return [line for line in lines if isinstance(line, dict)]


class Terminal:
    """One line a step: redrawn in place on a terminal, at most one a second elsewhere."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stdout
        self._tty = self._stream.isatty()
        self._last = 0.0

    def step(self, step: int, loss: float, rate: float, norm: float, seconds: float) -> None:
        now = time.monotonic()
        ends = step in (1, self._total)
        if not self._tty and not ends and now - self._last < 1:
            return
        self._last = now
        left = time.strftime("%H:%M:%S", time.gmtime(min((self._total - step) * seconds, 86399)))
        days = int((self._total - step) * seconds // 86400)
        text = (
            f"step {step}/{self._total}  loss {loss:.4f}  lr {rate:.2e}  grad {norm:.3f}  "
            f"{seconds:.2f} s/it  eta {f'{days}d ' if days else ''}{left}"
        )
        print(f"\r\x1b[K{text}" if self._tty else text, end="" if self._tty and not ends else "\n",
              file=self._stream, flush=True)  # fmt: skip


def _installed(name: str) -> bool:
    """Asked of the metadata: wandb's own log folder would pass for the package."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


class Tracker:
    """TensorBoard or wandb, or neither."""

    def __init__(self, config: TrainConfig) -> None:
        self.notes: list[str] = []
        self._board: Any = None
        self._wandb: Any = None
        self._folder = folder = Path(config.output_dir) / config.logging_dir
        if config.report_to == "none":
            return
        if config.report_to == "wandb" and self._start_wandb(config, folder):
            return
        if not _installed("tensorboard"):
            self.notes.append("tensorboard is not installed, so the curves are in metrics.jsonl only.")
            return
        from torch.utils.tensorboard import SummaryWriter

        files.make_folder(folder)
        self._board = SummaryWriter(str(folder))

    def _start_wandb(self, config: TrainConfig, folder: Path) -> bool:
        if not _installed("wandb"):
            self.notes.append("wandb is not installed, so the curves go to TensorBoard.")
            return False
        import wandb

        files.make_folder(folder)
        try:
            self._wandb = wandb.init(
                project=config.tracker_project_name, dir=str(folder), config=train_config.to_dict(config)
            )
        except Exception as error:  # noqa: BLE001 (no account, no network: neither is a reason not to train)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.notes.append(f"wandb did not start ({reason}), so the curves go to TensorBoard.")
            return False
        return True

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._board is not None:
            with files.sentences(self._folder):
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
