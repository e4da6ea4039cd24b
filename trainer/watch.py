"""What rank 0 shows and writes of a run while it goes: terminal, files of lines, tracker, contact sheet and plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xflux_trainer import plots, sheet
from xflux_trainer.track import Lines, Smooth, Terminal
from xflux_trainer.trackers import Tracker

if TYPE_CHECKING:
    from xflux_trainer.run import Run

REMEMBERED = 500
"""Losses before a resume that the smoothed one starts from: older ones weigh less than a thousandth."""


class Watch:
    """Rank 0's. `WriteError` is raised where the run's own files cannot be written; a tracker never raises."""

    def __init__(self, run: Run) -> None:
        self._run: Run | None = run
        step = run.progress.step
        sheet.set_aside(run.output, step or None)
        self._lines = Lines(run.output / "metrics.jsonl", step)
        self._heldout = Lines(run.output / "heldout.jsonl", step) if run.heldout else None
        self._smooth = Smooth()
        for loss in self._lines.losses[-REMEMBERED:]:
            self._smooth.add(loss)
        self._terminal = Terminal(run.total)
        self._tracker = Tracker(run.config, step, self._note)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step that is done: its line of metrics.jsonl."""
        assert self._run
        gauge, smooth = self._run.meter, self._smooth.add(values["loss"])
        share, memory = gauge.peak_share(), gauge.memory()
        self._terminal.step(step, values, smooth, gauge.rates(), peak_share=share, memory=memory)
        self._lines.write({"step": step, **values})
        self._tracker.log({**values, "loss_smooth": smooth}, step)

    def heldout(self, step: int, found: Mapping[str, Any]) -> None:
        """A held-out loss, as `evaluate.heldout_loss` gives it."""
        if self._heldout:
            self._heldout.write({"step": step, **found})
        by_time = {f"heldout/t={t}": value for t, value in found["by_time"].items()}
        self._tracker.log({"heldout/mean": found["mean"], **by_time}, step)

    def images(self, step: int, paths: list[Path], *, final: bool) -> None:
        """Sample images that were drawn at this step: the contact sheet is made anew."""
        assert self._run
        sheet.write(self._run.output / "samples", final=final)
        self._tracker.images({f"samples/{k}": path for k, path in enumerate(paths)}, step)

    def plot(self) -> None:
        """loss.svg."""
        assert self._run
        plots.write(self._run.output)

    def close(self) -> None:
        """Nothing is held on to after this: the model goes before the process group."""
        self._lines.close()
        if self._heldout:
            self._heldout.close()
        self._tracker.close()
        self._run = None

    def _note(self, text: str) -> None:
        if self._run:
            self._run.ranks.say(f"note: {text}")
            self._run.notes.append(text)
