"""What a run has learned, shown and written: the held-out loss, drawn images, and the files at its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from xflux_trainer import card, evaluate, optim, report, sample, sheet
from xflux_trainer.errors import UserError
from xflux_trainer.pulse import PULSE
from xflux_trainer.report import write_metrics
from xflux_trainer.run import Run
from xflux_trainer.sample import Prompt
from xflux_trainer.signals import Stop
from xflux_trainer.watch import Watch


def finish(run: Run, watch: Watch | None, stop: Stop) -> tuple[int, list[Path]]:
    """After the last step: the result, the held-out loss, the samples, the metrics, the plot and the card.

    Returns a signal, or 0, and the files that are the run's result.
    """
    ranks = run.ranks
    with PULSE.during("checkpoint"):
        paths = _write(run)
    ranks.say(f"{run.trainee.result} is in {' and '.join(map(str, paths))}")
    after = measure(run, watch) if run.heldout else None
    if after and run.progress.heldout_before:
        before = run.progress.heldout_before["mean"]
        ranks.say(f"held-out loss {before:.4f} before, {after['mean']:.4f} after ({after['mean'] / before - 1:+.1%})")
    if signum := stop.first(ranks.total(stop.flags())):
        return signum, []  # all that matters is saved
    ranks.together(lambda: sheet.set_aside_ends(run.output, len(run.prompts)) if watch else None)
    if not run.config.disable_sampling:
        draw(run, "final", watch)
    ranks.together(lambda: write_metrics(run, "finished", after))
    ranks.together(lambda: _last_files(run, watch, paths) if watch else None)
    return 0, paths


def _write(run: Run) -> list[Path]:
    """Rank 0 writes what was trained, its average where there is one; every rank takes part in gathering it."""
    pieces = run.stepper.pieces(result=True)
    weights = _told((name, value) for name, piece in pieces for value in piece.values())
    paths: list[Path] = []
    problem: UserError | None = None
    if run.ranks.main:
        try:
            paths = run.trainee.write(run.output, weights)
        except UserError as error:
            problem = error
    for _ in weights:  # what nobody took, so that no rank waits for another in the middle of it
        pass
    run.ranks.agree(problem)
    return paths


def _told(pieces: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same; whoever watches sees that it goes on."""
    for piece in pieces:
        PULSE.tick()
        yield piece


def _last_files(run: Run, watch: Watch, results: list[Path]) -> None:
    watch.plot()
    card.write(run.output, run.config, report.read(run.output / report.METRICS), results, run.shared_caption)


def measure(run: Run, watch: Watch | None) -> dict[str, Any]:
    """The held-out loss: measured by all ranks with the average where there is one, written by rank 0."""
    sharded = run.stepper.strategy in evaluate.SHARDED
    with run.meter.phase("train"), PULSE.during("heldout"), run.stepper.averaged():
        found = evaluate.heldout_loss(run.trainee.module, run.config, run.heldout, run.ranks, sharded=sharded)
    run.ranks.together(lambda: watch.heldout(run.progress.step, found) if watch else None)
    return found


def draw(run: Run, stem: str, watch: Watch | None) -> None:
    """Draw the prompts, with the average where there is one."""
    folder, config = run.output / "samples", run.config
    prompts = [
        # A ControlNet is shown the first images' conditions, one a prompt.
        Prompt(k, text, folder / f"{stem}-{k}.png", run.captions[k],
               run.entries[k % len(run.entries)] if config.mode == "controlnet" else None)
        for k, text in enumerate(run.prompts)
    ]  # fmt: skip
    sharded = run.stepper.strategy in evaluate.SHARDED
    optim.release(run.stepper)  # the VAE wants more than what a step leaves
    with run.meter.phase("sample"), run.stepper.averaged():
        sample.draw(run.trainee.module, run.spec, config, run.base, run.ranks, prompts, sharded=sharded)
    paths, final = [prompt.image for prompt in prompts], stem == "final"
    run.ranks.together(lambda: watch.images(run.progress.step, paths, final=final) if watch else None)
    run.ranks.say(f"sample images: {', '.join(map(str, paths))}")
