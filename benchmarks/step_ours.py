"""The trainer's own loop, measured: made-up weights and made-up cache entries, and everything else as in a run.

Batches are read from files by the loop's reader, with their checksums; noise, loss, optimizer, the exchange among
ranks and the bookkeeping of a step are the loop's. What is left out is what a step does not contain: encoders,
held-out losses, samples, checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from children import GIB
from random_flux import batch, build, fill
from xflux_trainer import controlnet, entries, fast, model, modes, train
from xflux_trainer import run as trainer
from xflux_trainer.checkpoint import Progress
from xflux_trainer.config import TrainConfig
from xflux_trainer.digests import ID
from xflux_trainer.entries import KEY, Entries
from xflux_trainer.meter import WARM_UP, Meter
from xflux_trainer.order import Order
from xflux_trainer.ranks import Ranks
from xflux_trainer.signals import Stop
from xflux_trainer.spec import FluxSpec

SAMPLES = 8
"""Entries that are made up; the loop goes round them."""


class Enough(Exception):
    """The steps that were asked for are taken."""


class Clock:
    """Stands where the loop reports its steps: takes the time from one step to the next, and ends the loop.

    On a GPU by events in its stream: right as well for a loop that runs ahead of the device.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps, self._cuda = steps, device.type == "cuda"
        self._marks: list[Any] = [self._mark()]
        self.losses: list[float] = []
        self.waits: list[float] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._marks.append(self._mark())
        self.losses.append(values["loss"])
        self.waits.append(values["data_wait"])
        if len(self.losses) == self._steps:
            raise Enough

    def seconds(self) -> list[float]:
        """Of every step."""
        if not self._cuda:
            return [end - start for start, end in pairwise(self._marks)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(self._marks)]


def config_of(keys: Mapping[str, Any], pixels: int, size: int, output: Path) -> TrainConfig:
    """The run's config: these keys, and no work that is not a step's."""
    precision = "bf16" if torch.cuda.is_available() else "no"
    # Far more steps than are taken: the last one would be followed by a checkpoint.
    base = {"max_train_steps": 10**6, "checkpointing_steps": 10**6, "sample_every": 0, "heldout_samples": 0}
    fixed = {"img_size": pixels, "train_batch_size": size, "output_dir": str(output), "disable_sampling": True}
    return TrainConfig("none", **{**base, "report_to": "none", "mixed_precision": precision, **keys, **fixed})


Shape = tuple[int, int]
"""Width and height of the images in pixels."""


def assemble(config: TrainConfig, spec: FluxSpec, ranks: Ranks, shape: Shape | None = None) -> trainer.Run:
    """A run that can take its first step, of a model without files. `shape`: of the images, where not a square."""
    model.quiet_libraries()
    model.steady_attention(ranks.device)
    gauge = Meter(ranks.device)
    gauge.start()
    accumulation = config.gradient_accumulation_steps
    with gauge.phase("load"):
        prepare, cut = trainer._block_preparer(config, spec, ranks)
        dtype = model.DTYPES[config.mixed_precision]
        transformer = build(spec, dtype, ranks.device, prepare)
        nowhere: Any = None  # the base model's files, which nothing asks for before the end of a run
        if config.mode == "controlnet":
            trainee, notes = _controlnet(config, spec, transformer, dtype, ranks)
        else:
            trainee, notes = modes.build(config, nowhere, spec, transformer, dtype, ranks, cut=cut)
    with gauge.phase("train"):
        stepper = trainer._stepper(trainee.module, trainee.trained, config, ranks, accumulation)
    trained = sum(math.prod(shape) for shape in stepper.shapes().values())
    made = make_entries(config, spec, shape)
    return trainer.Run(
        config, ranks, gauge, nowhere, spec, trainee, stepper, made, heldout=[], prompts=[], captions=[],
        shared_caption=[], order=Order.of(made.buckets, config), accumulation=accumulation, total=10**6,
        progress=Progress(), trained=trained, notes=notes, digests={},
    )  # fmt: skip


def _controlnet(
    config: TrainConfig, spec: FluxSpec, transformer: Any, dtype: torch.dtype, ranks: Ranks
) -> tuple[modes.Trainee, list[str]]:
    """As `modes.build`'s, which would read from the base's files what a fresh ControlNet starts from."""
    net: Any = controlnet.empty(spec, config.controlnet_depth)
    fill(net, dtype, ranks.device)
    trained = controlnet.parameters(net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in trained)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        net.enable_gradient_checkpointing()
    module = controlnet.ControlVelocity(net.train(), transformer, guidance=spec.guidance_embeds)
    module.velocity.fast, notes = fast.build(transformer, config, ranks.device)
    return modes.Trainee(module, trained, lambda output, weights: [], "the ControlNet"), notes


def resized(run: trainer.Run, config: TrainConfig, shape: Shape | None = None) -> trainer.Run:
    """The same model and stepper with images and batches of another size."""
    made = make_entries(config, run.spec, shape)
    return dataclasses.replace(
        run, config=config, entries=made, order=Order.of(made.buckets, config), progress=Progress()
    )


def make_entries(config: TrainConfig, spec: FluxSpec, shape: Shape | None = None) -> Entries:
    """Cache entries of made-up numbers in the run's folder, each image with a caption of its own."""
    folder = config.cache_path
    folder.mkdir(parents=True, exist_ok=True)
    width, height = shape or (config.img_size, config.img_size)
    keys = [f"{width}x{height}:{k}".encode().ljust(ID, b"\0") for k in range(SAMPLES)]
    conditioned = config.mode == "controlnet"
    for k, key in enumerate(keys):
        one = batch(spec, (width, height), 1, k, condition=conditioned)
        entries.write(entries.place(folder, "image", key), {"latents": one.latents[0]})
        entries.write(entries.place(folder, "text", key), {"text": one.text[0], "pooled": one.pooled[0]})
        if one.condition is not None:
            entries.write(entries.place(folder, "condition", key), {"condition": one.condition[0]})
    latents = np.frombuffer(b"".join(keys), KEY).reshape(-1, 1)
    count = np.arange(SAMPLES, dtype=np.int32)
    shapes, conditions = [tuple(one.latents[0].shape)], latents[:, 0] if conditioned else None
    return Entries(folder, latents, keys, count, shapes, np.zeros_like(count), conditions=conditions)


def take_steps(run: trainer.Run, steps: int) -> dict[str, Any]:
    """Take the warm-up's steps and as many more in the trainer's loop; seconds are those after the warm-up."""
    clock: Any = Clock(WARM_UP + steps, run.ranks.device)
    run.meter.device_peaks.clear()
    if run.ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.ranks.device)
    with contextlib.suppress(Enough):
        train._loop(run, clock, Stop())
    seconds = clock.seconds()[WARM_UP:]
    peak = run.meter.peaks()["device"].get("overall", {"allocated": 0, "reserved": 0})
    return {
        "seconds": seconds,
        "notes": run.notes,
        "allocated_gib": peak["allocated"] / GIB,
        "reserved_gib": peak["reserved"] / GIB,
        "loss_first": clock.losses[0],
        "loss_last": clock.losses[-1],
        "data_wait": sum(clock.waits[WARM_UP:]) / steps,
    }
