"""Train adapters for FLUX.1. Read `train` from its top to its end: that is the whole run."""

from __future__ import annotations

import math
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from xflux_trainer import cache, checkpoint, evaluate, files, flow, lora, meter, model, optim, sample
from xflux_trainer import config as train_config
from xflux_trainer.cache import Entry
from xflux_trainer.checkpoint import Progress
from xflux_trainer.config import TrainConfig
from xflux_trainer.data import Order, list_samples
from xflux_trainer.encoders import free
from xflux_trainer.errors import Interrupted, UserError
from xflux_trainer.meter import Meter
from xflux_trainer.model import Velocity
from xflux_trainer.optim import Stepper
from xflux_trainer.ranks import Launch, Ranks
from xflux_trainer.sample import Prompt
from xflux_trainer.samples import Sample
from xflux_trainer.signals import Stop
from xflux_trainer.spec import FluxSpec
from xflux_trainer.track import Lines, Terminal, Tracker


@dataclass
class Run:
    """What one run consists of once everything is loaded."""

    config: TrainConfig
    ranks: Ranks
    meter: Meter
    base: Path
    spec: FluxSpec
    velocity: Velocity
    stepper: Stepper
    entries: list[Entry]
    heldout: list[Entry]
    prompts: list[Path]
    order: Order
    accumulation: int
    total: int
    progress: Progress
    trained: int
    notes: list[str]

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)


def train(config: TrainConfig, notes: tuple[str, ...], stop: Stop) -> None:
    """Train as the config says. Raises `UserError` for what a user can mend, `Interrupted` after a signal."""
    ranks = Ranks(Launch.read(os.environ))
    gauge = Meter(ranks.device)
    gauge.start()
    ranks.join()
    run: Run | None = None
    try:
        run = _prepare(config, notes, ranks, gauge)
        _announce(run)
        stop.defer()
        _loop(run, stop)
        if stop.signum:
            _write_metrics(run, "interrupted")
            raise Interrupted(stop.signum)
        _finish(run)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model, see below
        raise
    finally:
        gauge.host.stop()
        # DDP goes before the process group that it talks through: the other way round, torch 2.13 waits for ever.
        run = None
        free()
        ranks.leave()


def fill_cache(config: TrainConfig) -> None:
    """Encode the captions and images of a run, and nothing else."""
    ranks = Ranks(Launch.read(os.environ))
    ranks.join()
    try:
        sets, _, _ = _samples(config)
        base = model.resolve(config.base_model)
        model.read_spec(base)
        model.quiet_libraries()
        entries, _ = cache.fill(config, base, ranks, sets, _prompts(config, sets))
        total = sum(len(part) for part in entries.values())
        ranks.say(f"{total} images and their captions are in {config.cache_path}")
    finally:
        ranks.leave()


def _prepare(config: TrainConfig, notes: tuple[str, ...], ranks: Ranks, gauge: Meter) -> Run:
    """From files to a run that can take its first step."""
    said = list(notes)
    problem: UserError | None = None
    output = Path(config.output_dir)
    try:  # what only one rank may find is told to all: the others must not wait for it
        sets, heldout_dir, ignored = _samples(config)
        said += ignored
        files.make_folder(output)
        if ranks.main:
            files.remove_leftovers(output)
        base = model.resolve(config.base_model)
        spec = model.read_spec(base)
        resume = checkpoint.find(config)
    except UserError as error:
        problem = error
    ranks.agree(problem)
    accumulation, note = ranks.accumulation(config)
    said += [note] if note else []
    model.quiet_libraries()
    model.steady_attention(ranks.device)

    with gauge.phase("cache"):
        sets_entries, prompts = cache.fill(config, base, ranks, sets, _prompts(config, sets))
    entries = sets_entries[config.img_dir]
    heldout = sets_entries[heldout_dir][: config.heldout_samples]
    with gauge.phase("load"):
        transformer = model.load_transformer(base, model.DTYPES[config.mixed_precision], ranks.device)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    adapters = lora.attach(transformer, config)
    velocity = Velocity(transformer, guidance=spec.guidance_embeds)

    order = Order([entry.shape for entry in entries], config.train_batch_size, ranks.world_size, config.seed)
    per_step = ranks.world_size * accumulation
    total = config.max_train_steps or math.ceil((config.num_train_epochs or 1) * order.per_epoch / per_step)
    with gauge.phase("train"):
        stepper = optim.prepare(velocity, adapters, config, ranks, accumulation)
    progress, resumed = _resume(resume, stepper, ranks, output)
    trained = sum(parameter.numel() for parameter in adapters.values())
    return Run(
        config, ranks, gauge, base, spec, velocity, stepper, entries, heldout, prompts, order, accumulation,
        total, progress, trained, said + resumed,
    )  # fmt: skip


def _samples(config: TrainConfig) -> tuple[dict[str, list[Sample]], str, list[str]]:
    """Samples by their folder, the folder of the held-out ones, and notes."""
    samples, note = list_samples(config.img_dir, config.caption_type)
    sets, notes = {config.img_dir: samples}, [note]
    heldout_dir = config.heldout_dir or config.img_dir
    if heldout_dir not in sets:
        heldout, note = list_samples(heldout_dir, config.caption_type)
        sets[heldout_dir] = heldout[: config.heldout_samples]
        notes.append(note)
    return sets, heldout_dir, [note for note in notes if note]


def _prompts(config: TrainConfig, sets: dict[str, list[Sample]]) -> list[str]:
    if config.disable_sampling:
        return []
    return list(config.sample_prompts) or [sets[config.img_dir][0].caption]


def _resume(found: Path | None, stepper: Stepper, ranks: Ranks, output: Path) -> tuple[Progress, list[str]]:
    """Load the checkpoint, or clear the way for a run from the start."""
    if found is None:
        place = checkpoint.set_aside(output) if ranks.main else None
        ranks.barrier()
        return Progress(), [f"an earlier run's checkpoints were moved to {place}."] if place else []
    problem: UserError | None = None
    try:
        loaded = checkpoint.load(found, ranks)
        _compare(loaded.state, stepper, found)
    except UserError as error:
        problem = error
    ranks.agree(problem)
    stepper.load(loaded.state)
    return loaded.progress, [f"resumed from {found} at step {loaded.progress.step}."]


def _compare(state: optim.State, stepper: Stepper, found: Path) -> None:
    lora.compare(stepper.shapes(), {name: tuple(value.shape) for name, value in state.weights.items()}, found)


def _announce(run: Run) -> None:
    """Say what will happen, once, with the numbers that are really used."""
    config, ranks = run.config, run.ranks
    batch = config.train_batch_size * ranks.world_size * run.accumulation
    ranks.say(
        f"{run.spec.name}: {run.trained:,} of {run.spec.transformer_parameters:,} parameters are trained "
        f"on {len(run.entries)} images; {run.stepper.strategy}, {ranks.world_size} x {meter.device_name(ranks.device)}"
    )
    ranks.say(
        f"batch {batch} = {config.train_batch_size} images x {ranks.world_size} ranks x {run.accumulation} "
        f"accumulated; {run.total} steps, {run.total * batch / len(run.entries):.1f} passes over the images"
    )
    for note in run.notes:
        ranks.say(f"note: {note}")
    if ranks.main:
        files.write_bytes(run.output / "config.yaml", train_config.to_yaml(config).encode())


def _loop(run: Run, stop: Stop) -> None:
    """All steps from where the run stands to its end, or to a signal."""
    config, ranks, gauge, progress = run.config, run.ranks, run.meter, run.progress
    tracker = Tracker(config) if ranks.main else None
    for note in tracker.notes if tracker else ():
        ranks.say(f"note: {note}")
        run.notes.append(note)
    lines = Lines(run.output / "metrics.jsonl", progress.step) if ranks.main else None
    terminal = Terminal(run.total)
    if run.heldout and progress.heldout_before is None:
        with gauge.phase("train"):
            progress.heldout_before = evaluate.heldout_loss(run.velocity, config, run.heldout, ranks)
    written = time.monotonic()
    reader = ThreadPoolExecutor(1)  # one batch is read while the one before it is trained on
    number = progress.batches + ranks.rank
    ahead = reader.submit(_read, run, number)
    try:
        while progress.step < run.total:
            rate = optim.learning_rate(config, progress.step, run.total)
            started = time.perf_counter()
            with gauge.phase("train"):
                run.stepper.begin(rate)
                loss = 0.0
                for k in range(run.accumulation):
                    batch, number = ahead.result(), number + ranks.world_size
                    ahead = reader.submit(_read, run, number)
                    with run.stepper.micro(last=k == run.accumulation - 1):
                        loss += _micro_step(run, batch, number - ranks.world_size)
                norm = run.stepper.step()
            # One exchange a step: the mean loss, and whether any rank was told to stop.
            loss_sum, signum = ranks.total([loss / run.accumulation, float(stop.signum)])
            loss = loss_sum / ranks.world_size
            gauge.step_seconds.append(time.perf_counter() - started)
            progress.step += 1
            progress.batches += run.accumulation * ranks.world_size
            progress.seconds += gauge.step_seconds[-1]
            _book(progress, loss)
            values = {"loss": loss, "learning_rate": rate, "grad_norm": norm, "seconds": gauge.step_seconds[-1]}
            if lines and tracker:
                terminal.step(progress.step, loss, rate, norm, gauge.seconds_per_step() or 0.0)
                lines.write({"step": progress.step, **values})
                tracker.log(values, progress.step)
            if not math.isfinite(loss):
                ranks.agree(_diverged(progress.step, loss))
            last = progress.step == run.total
            if signum:
                ranks.say(f"stopping after step {progress.step} of {run.total}: a checkpoint is being saved")
            if signum or last or progress.step % config.checkpointing_steps == 0:
                state = run.stepper.state()
                checkpoint.save_checkpoint(run.output, state, progress, config, ranks, meter.versions())
            if signum and not last:
                stop.signum = stop.signum or round(signum / ranks.world_size)
                return
            if config.sample_every and not last and progress.step % config.sample_every == 0:
                _draw(run, f"step-{progress.step:06d}")
            if time.monotonic() - written > 10:
                written = time.monotonic()
                _write_metrics(run, "running", together=False)
    finally:
        reader.shutdown(cancel_futures=True)
        if lines and tracker:
            lines.close()
            tracker.close()


def _read(run: Run, number: int) -> cache.Batch:
    return cache.read_batch([run.entries[image] for image in run.order[number]])


def _micro_step(run: Run, batch: cache.Batch, number: int) -> float:
    """Forward and backward of one batch; its noise depends on the batch's number, not on who trains on it."""
    config = run.config
    dice = lora.generator("train", config.seed, number)
    x_0 = flow.pack(batch.latents)
    t = flow.sample_t(len(x_0), flow.training_mu(config, run.spec, x_0.shape[1]), config.timestep_sampling, dice)
    eps = torch.randn(x_0.shape, generator=dice)
    loss = evaluate.velocity_loss(run.stepper, config, batch, eps, t, run.ranks.device).mean()
    run.stepper.backward(loss)
    return float(loss.detach())


def _book(progress: Progress, loss: float) -> None:
    if progress.first_loss is None:
        progress.first_loss = loss
    progress.last_loss = loss
    progress.loss_sum += loss


def _diverged(step: int, loss: float) -> UserError:
    return UserError(
        f"The loss of step {step} is {loss}.",
        "Lower learning_rate, and set mixed_precision to bf16 if it is fp16. The last checkpoint is unharmed.",
    )


def _finish(run: Run) -> None:
    """After the last step: the held-out loss, the adapter, the samples, the metrics."""
    ranks = run.ranks
    after = None
    if run.heldout:
        with run.meter.phase("train"):
            after = evaluate.heldout_loss(run.velocity, run.config, run.heldout, ranks)
    weights = run.stepper.state().weights
    path = run.output / lora.ADAPTER_FILE
    problem: UserError | None = None
    if ranks.main:
        try:
            lora.write(path, weights, run.config)
        except UserError as error:
            problem = error
    ranks.agree(problem)
    ranks.say(f"the adapter is in {path}")
    if after and run.progress.heldout_before:
        before = run.progress.heldout_before["mean"]
        ranks.say(f"held-out loss {before:.4f} before, {after['mean']:.4f} after ({after['mean'] / before - 1:+.1%})")
    if not run.config.disable_sampling:
        _draw(run, "final")
    _write_metrics(run, "finished", after)


def _draw(run: Run, stem: str) -> None:
    folder = run.output / "samples"
    prompts = [Prompt(k, text, folder / f"{stem}-{k}.png") for k, text in enumerate(run.prompts)]
    with run.meter.phase("sample"):
        sample.draw(run.velocity, run.spec, run.config, run.base, run.ranks, prompts)
    run.ranks.say(f"sample images: {', '.join(str(prompt.image) for prompt in prompts)}")


def _write_metrics(run: Run, status: str, after: dict[str, Any] | None = None, *, together: bool = True) -> None:
    """metrics.json by rank 0; with the peaks of all ranks when they come `together`, else with its own."""
    own = run.meter.peaks()
    every = run.ranks.gather(own) if together else [own]
    if not run.ranks.main:
        return
    progress, peaks = run.progress, meter.merge_peaks(every)
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
        run.output / "metrics.json",
        {
            "status": status,
            "steps": progress.step,
            "max_steps": run.total,
            "world_size": run.ranks.world_size,
            "strategy": run.stepper.strategy,
            "device": meter.device_name(run.ranks.device),
            "train_batch_size": run.config.train_batch_size,
            "gradient_accumulation_steps": run.accumulation,
            "images": len(run.entries),
            "trained_parameters": run.trained,
            "loss": {
                "first": progress.first_loss,
                "last": progress.last_loss,
                "mean": progress.loss_sum / progress.step if progress.step else None,
            },
            "heldout_loss": heldout,
            "seconds_per_step": run.meter.seconds_per_step(),
            "seconds_training": progress.seconds,
            "seconds_total": time.monotonic() - run.meter.started,
            "peak_device_bytes": peaks["device"],
            "peak_host_bytes": peaks["host"],
            "per_rank": every,
            "versions": meter.versions(),
            "notes": run.notes,
        },
    )


def draw_samples(config: TrainConfig, adapter: Path | None, image: Path | None, prompt: str | None) -> None:
    """Draw the sample prompts with a trained adapter, or without one."""
    ranks = Ranks(Launch.read(os.environ))
    ranks.join()
    try:
        prompts = [prompt] if prompt else list(config.sample_prompts)
        if not prompts:
            sets, _, _ = _samples(config)
            prompts = _prompts(replace(config, disable_sampling=False), sets)
        base = model.resolve(config.base_model)
        spec = model.read_spec(base)
        model.quiet_libraries()
        model.steady_attention(ranks.device)
        _, texts = cache.fill(config, base, ranks, {}, prompts)
        transformer = model.load_transformer(base, model.DTYPES[config.mixed_precision], ranks.device)
        if adapter:
            lora.attach_file(transformer, adapter)
        places = [_place(config, image, number, len(texts)) for number in range(len(texts))]
        work = [Prompt(k, text, place) for k, (text, place) in enumerate(zip(texts, places))]  # noqa: B905
        sample.draw(Velocity(transformer, guidance=spec.guidance_embeds), spec, config, base, ranks, work)
        ranks.say(f"sample images: {', '.join(str(place) for place in places)}")
    finally:
        ranks.leave()


def _place(config: TrainConfig, image: Path | None, number: int, count: int) -> Path:
    if image is None:
        return Path(config.output_dir) / "samples" / f"sample-{number}.png"
    return image if count == 1 else image.with_name(f"{image.stem}-{number}{image.suffix}")
