"""What a run says of itself: a few lines at its start, and metrics.json."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xflux_trainer import config as train_config
from xflux_trainer import files, meter
from xflux_trainer.errors import Interrupted, UserError
from xflux_trainer.ranks import Ranks
from xflux_trainer.track import finite

if TYPE_CHECKING:
    from xflux_trainer.run import Run

METRICS = "metrics.json"


def take_over(output: Path, ranks: Ranks) -> None:
    """The folder is this run's from here on: metrics.json says `starting`, and no longer what an earlier run wrote.

    To be called as soon as the folder is there, by every rank; rank 0 writes. What the earlier run had written stays
    under `earlier` until the first step. Raises `WriteError`.
    """
    if ranks.main:
        files.write_json(output / METRICS, {**_start("starting", ranks), "earlier": _earlier(output / METRICS)})


def failed_early(output: Path, ranks: Ranks, error: BaseException) -> None:
    """The run ended before its first step, and had taken the folder over: say so, and why."""
    if not ranks.main or read(output / METRICS).get("status") != "starting":
        return
    seen = str(error) if isinstance(error, (UserError, Interrupted)) else type(error).__name__
    status = "interrupted" if isinstance(error, Interrupted) else "failed"
    told = {**_start(status, ranks), "error": seen, "earlier": read(output / METRICS).get("earlier")}
    files.write_json(output / METRICS, told)


def _start(status: str, ranks: Ranks) -> dict[str, Any]:
    return {
        "status": status,
        "steps": 0,
        "world_size": ranks.world_size,
        "device": meter.device_name(ranks.device),
        "versions": meter.versions(),
    }


def _earlier(path: Path) -> dict[str, Any] | None:
    found = read(path)
    if found.get("status") in ("starting", "failed", "interrupted") and "earlier" in found:
        return found["earlier"]  # a start that came to nothing had kept it
    return found or None


def read(path: Path) -> dict[str, Any]:
    """metrics.json; nothing where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def announce(run: Run) -> None:
    """Say what will happen, once, with the numbers that are really used."""
    config, ranks = run.config, run.ranks
    batch = config.train_batch_size * ranks.world_size * run.accumulation
    ranks.say(
        f"{run.spec.name}: {run.trained:,} of {run.spec.transformer_parameters:,} parameters are trained "
        f"on {run.images} images; {run.stepper.strategy}, {ranks.world_size} x {meter.device_name(ranks.device)}"
    )
    passes = run.total * ranks.world_size * run.accumulation / run.order.per_epoch
    ranks.say(
        f"batch {batch} = {config.train_batch_size} images x {ranks.world_size} ranks x {run.accumulation} "
        f"accumulated; {run.total} steps, {passes:.1f} passes over the images"
    )
    for note in run.notes:
        ranks.say(f"note: {note}")
    ranks.together(lambda: _first_files(run))


def _first_files(run: Run) -> None:
    if run.ranks.main:
        files.write_bytes(run.output / "config.yaml", train_config.to_yaml(run.config).encode())
        write_metrics(run, "running", together=False)  # what an earlier run left there is not this run's


def write_metrics(run: Run, status: str, after: dict[str, Any] | None = None, *, together: bool = True) -> None:
    """metrics.json by rank 0; with the peaks of all ranks when they come `together`, else with its own."""
    own = run.meter.peaks()
    every = run.ranks.gather(own) if together else [own]
    if not run.ranks.main:
        return
    progress, peaks, rates = run.progress, meter.merge_peaks(every), run.meter.rates()
    heldout = None
    if run.heldout:
        heldout = {
            "before": (progress.heldout_before or {}).get("mean"),
            "after": after["mean"] if after else None,
            "before_by_time": (progress.heldout_before or {}).get("by_time"),
            "after_by_time": after["by_time"] if after else None,
            "images": len(run.heldout),
            "of": run.config.heldout_dir or "the training images",
        }
    files.write_json(
        run.output / METRICS,
        {
            "status": status,
            "steps": progress.step,
            "max_steps": run.total,
            "world_size": run.ranks.world_size,
            "strategy": run.stepper.strategy,
            "device": meter.device_name(run.ranks.device),
            "train_batch_size": run.config.train_batch_size,
            "gradient_accumulation_steps": run.accumulation,
            "images": run.images,
            "trained_parameters": run.trained,
            "loss": {
                "first": finite(progress.first_loss),
                "last": finite(progress.last_loss),
                "mean": finite(progress.loss_sum / progress.step) if progress.step else None,
            },
            "heldout_loss": heldout,
            "seconds_per_step": run.meter.seconds_per_step(),
            "samples_per_second": rates.samples,
            "tflops": rates.tflops,
            "peak_share": run.meter.peak_share(),
            "data_wait": rates.waiting,
            "seconds_training": progress.seconds,
            "start": run.meter.start_line(),
            "seconds_total": time.monotonic() - run.meter.started,
            "peak_device_bytes": peaks["device"],
            "peak_host_bytes": peaks["host"],
            "per_rank": every,
            "versions": meter.versions(),
            "notes": run.notes,
        },
    )
