"""Train adapters for FLUX.1. Read `train` from its top to its end: that is the whole run."""

from __future__ import annotations

import math
import os
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from xflux_trainer import (
    cache,
    checkpoint,
    deterministic,
    evaluate,
    flow,
    hub,
    meter,
    modes,
    optim,
    report,
    speed,
)
from xflux_trainer.ahead import Ahead
from xflux_trainer.checkpoint import Progress
from xflux_trainer.config import TrainConfig
from xflux_trainer.encoders import free
from xflux_trainer.errors import Interrupted, UserError
from xflux_trainer.meter import Meter
from xflux_trainer.outcome import draw, finish, measure
from xflux_trainer.pulse import PULSE
from xflux_trainer.ranks import Launch, Ranks
from xflux_trainer.report import announce, write_metrics
from xflux_trainer.run import Run, prepare
from xflux_trainer.signals import Stop
from xflux_trainer.watch import Watch


def train(config: TrainConfig, notes: tuple[str, ...], stop: Stop) -> None:
    """Train as the config says. Raises `UserError` for what a user can mend, `Interrupted` after a signal."""
    with deterministic.kernels(config):
        main, results = _train(config, notes, stop)
    # The other ranks have gone: nobody waits for an upload in a collective.
    if config.push_to_hub and main:
        with PULSE.during("publish"):
            pushed = hub.push(Path(config.output_dir), config, results)
        print(pushed.text if pushed.done else f"note: {pushed.text}", flush=True)


def _train(config: TrainConfig, notes: tuple[str, ...], stop: Stop) -> tuple[bool, list[Path]]:
    """All but the upload. Returns whether this is rank 0, and the files that are the run's result."""
    ranks = Ranks(Launch.read(os.environ))
    gauge = Meter(ranks.device)
    gauge.start()
    ranks.join()
    ranks.keep_within(config.gpu_limit_gib)
    run: Run | None = None
    watch: Watch | None = None
    results: list[Path] = []
    alone = False
    try:
        run = prepare(config, notes, ranks, gauge)
        announce(run)
        stop.defer()
        watch = _watch(run)
        signum = _loop(run, watch, stop)
        if not signum:
            signum, results = finish(run, watch, stop)
        if signum:
            _tell_interrupted(run)
            raise Interrupted(signum)
    except BaseException as error:
        alone = not isinstance(error, Interrupted) and not getattr(error, "everywhere", False)
        if run and ranks.main and not isinstance(error, Interrupted):
            with suppress(UserError):
                write_metrics(run, "failed", together=False)
        elif not run:
            with suppress(UserError):
                report.failed_early(Path(config.output_dir), ranks, error)
        traceback.clear_frames(error.__traceback__)  # they hold the model, see below
        raise
    finally:
        PULSE.at("end")
        gauge.host.stop()
        if watch:
            watch.close()
        # DDP goes before the process group that it talks through: the other way round, torch 2.13 waits for ever.
        run = watch = None
        free()
        # A rank with an error of its own goes at once, and the launcher ends the others: taking the group down
        # while they are inside a collective would make both wait for ever under NCCL.
        if not alone:
            ranks.leave()
            PULSE.at("done")
    return ranks.main, results


def _tell_interrupted(run: Run) -> None:
    """In metrics.json. A function of its own, because the caller's frame must not hold the model at the end."""
    run.ranks.together(lambda: write_metrics(run, "interrupted"))


def _watch(run: Run) -> Watch | None:
    """Rank 0's; what it cannot write ends all ranks."""
    made: list[Watch] = []
    run.ranks.together(lambda: made.append(Watch(run)) if run.ranks.main else None)
    return made[0] if made else None


def _loop(run: Run, watch: Watch | None, stop: Stop) -> int:
    """All steps from where the run stands to its end. Returns the signal that ended it before, or 0."""
    config, ranks, gauge, progress = run.config, run.ranks, run.meter, run.progress
    gauge.peak_tflops = speed.peak(meter.device_name(ranks.device), config.mixed_precision)
    cost = speed.costs(config, run.spec, run.stepper.shapes(), fused=modes.fused(run.trainee))
    images = config.train_batch_size * ranks.world_size * run.accumulation
    if run.heldout and progress.heldout_before is None:
        progress.heldout_before = measure(run, watch)
    written = time.monotonic()
    trouble: UserError | None = None
    draws = flow.Draws(config, run.spec, ranks.world_size * run.accumulation, progress.step, progress.batches)
    left = (run.total - progress.step) * run.accumulation * ranks.world_size
    numbers = range(progress.batches + ranks.rank, progress.batches + left, ranks.world_size)
    PULSE.at("train")
    # Batches are read, and their noise drawn, while those before them are trained on.
    ahead = Ahead(lambda number: _read(run, draws, number), iter(numbers), ranks.device)
    try:
        while progress.step < run.total:
            rate = optim.learning_rate(config, progress.step, run.total)
            started = time.perf_counter()
            waited = flops = 0.0
            with gauge.phase("train"):
                run.stepper.begin(rate)
                losses = []
                for k in range(run.accumulation):
                    asked = time.perf_counter()
                    PULSE.at("data")
                    batch, drawn = ahead.take()
                    waited += time.perf_counter() - asked
                    PULSE.at("forward")
                    with run.stepper.micro(last=k == run.accumulation - 1):
                        losses.append(_micro_step(run, batch, drawn))
                    size, tokens, _ = drawn.eps.shape
                    flops += size * cost(tokens, batch.text.shape[1])
                PULSE.at("step")
                norm = run.stepper.step()
                loss = sum(float(value) for value in losses)  # read at the end: each reading waits for the device
            # One exchange a step: the mean loss, whether a rank could not write, and whether one was told to stop.
            loss_sum, troubled, *told = ranks.total(
                [loss / run.accumulation, float(trouble is not None), *stop.flags()]
            )
            if troubled:
                ranks.agree(trouble)
            loss, signum = loss_sum / ranks.world_size, stop.first(told)
            line = gauge.book(time.perf_counter() - started, images, flops, waited)
            progress.step += 1
            progress.batches += run.accumulation * ranks.world_size
            progress.seconds += gauge.step_seconds[-1]
            _book(progress, loss)
            PULSE.stepped(progress.step, run.total, gauge.step_seconds[-1])
            if watch:
                try:
                    watch.step(progress.step, {"loss": loss, "learning_rate": rate, "grad_norm": norm, **line})
                    if time.monotonic() - written > 10:
                        written = time.monotonic()
                        write_metrics(run, "running", together=False)
                except UserError as error:  # the others learn of it in the next exchange
                    trouble = error
            # With fp16 an infinite gradient is part of the method: its step is left out and the scale is lowered.
            if not math.isfinite(loss) or not (math.isfinite(norm) or config.mixed_precision == "fp16"):
                ranks.agree(_diverged(progress.step, loss))
            last = progress.step == run.total
            asked_to_save = stop.save(told)
            if signum and not last:
                ranks.say(f"stopping after step {progress.step} of {run.total}: a checkpoint is being saved")
            elif asked_to_save and not last:
                ranks.say(f"step {progress.step} of {run.total}: a checkpoint is being saved, as asked for by a signal")
            if signum or asked_to_save or _due(config, progress.step, last=last):
                with PULSE.during("checkpoint"):
                    checkpoint.save(
                        run.output, run.stepper, progress, config, ranks, meter.versions(), run.digests,
                        run.accumulation,
                    )  # fmt: skip
                    ranks.together(lambda: watch.plot() if watch else None)
            if signum and not last:
                return signum
            if run.heldout and not last and progress.step % evaluate.interval(config, len(run.heldout), images) == 0:
                measure(run, watch)
            if config.sample_every and not last and progress.step % config.sample_every == 0:
                draw(run, f"step-{progress.step:06d}", watch)
        ranks.agree(trouble)
    finally:
        ahead.close()
    return 0


def _due(config: TrainConfig, step: int, *, last: bool) -> bool:
    """Whether a checkpoint is written after that step."""
    return config.final_checkpoint if last else step % config.checkpointing_steps == 0


class _Drawn(NamedTuple):
    eps: Tensor
    t: Tensor


def _read(run: Run, draws: flow.Draws, number: int) -> tuple[cache.Batch, _Drawn]:
    """The batch of that number, and its noise and times: in a reader's thread, while others are trained on."""
    batch = cache.read_batch([run.entries[image] for image in run.order[number]])
    b, c, h, w = batch.latents.shape
    eps, t = draws.draw(number, (b, h // 2 * (w // 2), 4 * c))
    if run.ranks.device.type == "cuda":
        return batch.pinned(), _Drawn(eps.pin_memory(), t.pin_memory())
    return batch, _Drawn(eps, t)


def _micro_step(run: Run, batch: cache.Batch, drawn: _Drawn) -> Tensor:
    """Forward and backward of one batch."""
    inputs = evaluate.inputs(batch, drawn.eps, drawn.t, run.ranks.device)
    return optim.learn(run.stepper, lambda *given: evaluate.losses(run.stepper, run.config, *given).mean(), inputs)


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
