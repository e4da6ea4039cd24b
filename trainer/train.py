"""Train adapters for FLUX.1. Read `train` from its top to its end: that is the whole run."""

from __future__ import annotations

import math
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from xflux_trainer import cache, checkpoint, evaluate, flow, lora, lora_files, meter, optim, sample
from xflux_trainer.checkpoint import Progress
from xflux_trainer.config import TrainConfig
from xflux_trainer.encoders import free
from xflux_trainer.errors import Interrupted, UserError
from xflux_trainer.meter import Meter
from xflux_trainer.ranks import Launch, Ranks
from xflux_trainer.report import announce, write_metrics
from xflux_trainer.run import Run, prepare
from xflux_trainer.sample import Prompt
from xflux_trainer.signals import Stop
from xflux_trainer.track import Lines, Terminal, Tracker


def train(config: TrainConfig, notes: tuple[str, ...], stop: Stop) -> None:
    """Train as the config says. Raises `UserError` for what a user can mend, `Interrupted` after a signal."""
    ranks = Ranks(Launch.read(os.environ))
    gauge = Meter(ranks.device)
    gauge.start()
    ranks.join()
    run: Run | None = None
    alone = False
    try:
        run = prepare(config, notes, ranks, gauge)
        announce(run)
        stop.defer()
        signum = _loop(run, stop)
        if not signum:
            signum = _finish(run, stop)
        if signum:
            write_metrics(run, "interrupted")
            raise Interrupted(signum)
    except BaseException as error:
        alone = not isinstance(error, Interrupted) and not getattr(error, "everywhere", False)
        if run and ranks.main and not isinstance(error, Interrupted):
            with suppress(UserError):
                write_metrics(run, "failed", together=False)
        traceback.clear_frames(error.__traceback__)  # they hold the model, see below
        raise
    finally:
        gauge.host.stop()
        # DDP goes before the process group that it talks through: the other way round, torch 2.13 waits for ever.
        run = None
        free()
        # A rank with an error of its own goes at once, and the launcher ends the others: taking the group down
        # while they are inside a collective would make both wait for ever under NCCL.
        if not alone:
            ranks.leave()


def _loop(run: Run, stop: Stop) -> int:
    """All steps from where the run stands to its end. Returns the signal that ended it before, or 0."""
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
    trouble: UserError | None = None
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
            # One exchange a step: the mean loss, whether a rank could not write, and whether one was told to stop.
            loss_sum, troubled, *told = ranks.total(
                [loss / run.accumulation, float(trouble is not None), *stop.flags()]
            )
            if troubled:
                ranks.agree(trouble)
            loss, signum = loss_sum / ranks.world_size, stop.first(told)
            gauge.step_seconds.append(time.perf_counter() - started)
            progress.step += 1
            progress.batches += run.accumulation * ranks.world_size
            progress.seconds += gauge.step_seconds[-1]
            _book(progress, loss)
            values = {"loss": loss, "learning_rate": rate, "grad_norm": norm, "seconds": gauge.step_seconds[-1]}
            if lines and tracker:
                terminal.step(progress.step, loss, rate, norm, gauge.seconds_per_step() or 0.0)
                try:
                    lines.write({"step": progress.step, **values})
                    tracker.log(values, progress.step)
                    if time.monotonic() - written > 10:
                        written = time.monotonic()
                        write_metrics(run, "running", together=False)
                except UserError as error:  # the others learn of it in the next exchange
                    trouble = error
            # With fp16 an infinite gradient is part of the method: its step is left out and the scale is lowered.
            if not math.isfinite(loss) or not (math.isfinite(norm) or config.mixed_precision == "fp16"):
                ranks.agree(_diverged(progress.step, loss))
            last = progress.step == run.total
            if signum and not last:
                ranks.say(f"stopping after step {progress.step} of {run.total}: a checkpoint is being saved")
            if signum or last or progress.step % config.checkpointing_steps == 0:
                state = run.stepper.state()
                checkpoint.save_checkpoint(run.output, state, progress, config, ranks, meter.versions())
            if signum and not last:
                return signum
            if config.sample_every and not last and progress.step % config.sample_every == 0:
                _draw(run, f"step-{progress.step:06d}")
        ranks.agree(trouble)
    finally:
        reader.shutdown(cancel_futures=True)
        if lines and tracker:
            lines.close()
            tracker.close()
    return 0


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
        f"The loss of step {step} is {loss}, or its gradient is not finite.",
        "Lower learning_rate, and set mixed_precision to bf16 if it is fp16. The last checkpoint is unharmed.",
    )


def _finish(run: Run, stop: Stop) -> int:
    """After the last step: the adapter, the held-out loss, the samples, the metrics. Returns a signal, or 0."""
    ranks = run.ranks
    weights = run.stepper.state().weights
    paths: list[Path] = []
    problem: UserError | None = None
    if ranks.main:
        try:
            paths = lora_files.write_all(run.output, weights, run.config)
        except UserError as error:
            problem = error
    ranks.agree(problem)
    ranks.say(f"the adapter is in {' and '.join(map(str, paths))}")
    after = None
    if run.heldout:
        with run.meter.phase("train"):
            after = evaluate.heldout_loss(run.velocity, run.config, run.heldout, ranks)
    if after and run.progress.heldout_before:
        before = run.progress.heldout_before["mean"]
        ranks.say(f"held-out loss {before:.4f} before, {after['mean']:.4f} after ({after['mean'] / before - 1:+.1%})")
    if signum := stop.first(ranks.total(stop.flags())):
        return signum  # all that matters is saved
    if not run.config.disable_sampling:
        _draw(run, "final")
    write_metrics(run, "finished", after)
    return 0


def _draw(run: Run, stem: str) -> None:
    folder = run.output / "samples"
    prompts = [Prompt(k, text, folder / f"{stem}-{k}.png") for k, text in enumerate(run.prompts)]
    with run.meter.phase("sample"):
        sample.draw(run.velocity, run.spec, run.config, run.base, run.ranks, prompts)
    run.ranks.say(f"sample images: {', '.join(str(prompt.image) for prompt in prompts)}")
