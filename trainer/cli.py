"""The command line: `python -m xflux_trainer train|cache|convert|sample`, and the one place where errors end.

Exit codes: 0 done; 1 something about the config, the data or the weights; 2 usage; 128 + N after signal N.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import click
from xflux_trainer import allocator, heap, kernelcache
from xflux_trainer.config import load_with_notes
from xflux_trainer.errors import CheckpointError, Interrupted, UserError, tell
from xflux_trainer.pulse import PULSE
from xflux_trainer.signals import Stop, ignore
from xflux_trainer.targets import FILES

CONFIG = click.option(
    "--config", "path", required=True, type=click.Path(path_type=Path), help="The train config, a YAML file."
)

_A_MOMENT = 2.0
"""Seconds in which the process that speaks for all has read the same config and said the same error."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Train FLUX.1: adapters, the model itself or a ControlNet, from a YAML file that X-Flux would also read."""
    allocator.prefer(os.environ)


@commands.command()
@CONFIG
def train(path: Path) -> None:
    """Encode the images and captions, train, and save the result."""
    stop = Stop()
    stop.install()
    PULSE.begin(os.environ)
    config, notes = load_with_notes(path)
    kernelcache.persist(os.environ)
    heap.give_back()
    from xflux_trainer.train import train as run

    run(config, notes, stop)


@commands.command()
@CONFIG
def cache(path: Path) -> None:
    """Only encode the images and captions."""
    Stop().install()
    config, _ = load_with_notes(path)
    heap.give_back()
    from xflux_trainer.commands import fill_cache

    fill_cache(config)


@commands.command()
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="Take the newest checkpoint of this run; beside --checkpoint it says where the base model lies.",
)
@click.option("--checkpoint", "folder", type=click.Path(path_type=Path), help="The checkpoint folder, of any mode.")
@click.option("--lora", type=click.Path(path_type=Path), help="An adapter file of any of the formats.")
@click.option("--transformer", type=click.Path(path_type=Path), help="A transformer's folder in diffusers' layout.")
@click.option(
    "--format",
    "form",
    type=click.Choice([*FILES, "bfl"]),
    help="bfl: one file of a whole transformer. [default: diffusers; bfl for --transformer]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The file to write; for diffusers' transformer and for a ControlNet the folder to write it into. "
    "[default: beside what is read, or inside the checkpoint]",
)
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="[default: fp32 for adapters, the run's for models]")
def convert(
    path: Path | None,
    folder: Path | None,
    lora: Path | None,
    transformer: Path | None,
    form: str | None,
    output: Path | None,
    dtype: str | None,
) -> None:
    """Write what a checkpoint or another file holds: adapters for diffusers, kohya (ComfyUI) or X-Flux (xlabs), a
    fine-tuned transformer for diffusers or as one file (bfl), a ControlNet for X-Flux and diffusers."""
    _one_source(path, folder, lora, transformer)
    if transformer and form not in (None, "bfl"):
        raise click.UsageError(f"--transformer is in diffusers' layout, and is written as bfl, not as {form}.")
    Stop().install()
    config = load_with_notes(path)[0] if path else None
    from xflux_trainer import convert as to

    if transformer:
        done = to.transformer(transformer, output, dtype)
    else:
        source = folder or lora or (to.newest(config) if config else None)
        assert source is not None
        done = to.convert(source, output, form or "diffusers", dtype, config)
    for note in done.notes:
        click.echo(f"note: {note}")
    click.echo(f"{done.what} is in {' and '.join(map(str, done.paths))}")


def _one_source(path: Path | None, folder: Path | None, lora: Path | None, transformer: Path | None) -> None:
    """Raise `UsageError` unless one thing is to be converted, and it is of the kind that its option says."""
    if sum(map(bool, (folder or path, lora, transformer))) != 1:
        raise click.UsageError("Name a --checkpoint, the --config of the run, a --lora file or a --transformer folder.")
    for given, wrong, other in (
        (folder, Path.is_file, "--lora"), (lora, Path.is_dir, "--checkpoint or --transformer"),
        (transformer, Path.is_file, "--lora"),
    ):  # fmt: skip
        if given and wrong(given):
            raise click.UsageError(f"{given} is for {other}.")


@commands.command()
@CONFIG
@click.option(
    "--lora",
    type=click.Path(path_type=Path),
    help="What was trained: an adapter, a ControlNet or a transformer. [default: the one in output_dir]",
)
@click.option("--no-lora", is_flag=True, help="Draw with the base model alone.")
@click.option("--prompt", help="Draw this. [default: the config's sample_prompts]")
@click.option("--output", type=click.Path(path_type=Path), help="The PNG. [default: inside output_dir/samples]")
def sample(path: Path, lora: Path | None, no_lora: bool, prompt: str | None, output: Path | None) -> None:
    """Draw images with what was trained."""
    if lora and no_lora:
        raise click.UsageError("--lora and --no-lora contradict each other.")
    Stop().install()
    config, _ = load_with_notes(path)
    results = {"lora": FILES[config.formats[0]], "finetune": "transformer", "controlnet": "controlnet.safetensors"}
    trained = None if no_lora else lora or Path(config.output_dir) / results[config.mode]
    if trained and not trained.exists():
        what = {"lora": "adapter file", "finetune": "trained transformer", "controlnet": "ControlNet"}[config.mode]
        raise CheckpointError(f"The {what} {trained} does not exist.", "Train first, or name one with --lora.")
    if config.mode == "controlnet" and trained is None:
        config = dataclasses.replace(config, mode="lora")  # the base model alone
    kernelcache.persist(os.environ)
    from xflux_trainer.commands import draw_samples

    draw_samples(config, trained, output, prompt)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; every expected error becomes a sentence and an exit code here."""
    try:
        commands.main(arguments, prog_name="python -m xflux_trainer", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except Interrupted as stopped:
        # While Python takes itself down it lets signals kill it again, and the exit code would be another.
        ignore()
        if _speaks():
            print(f"stopped by signal {stopped.signum}", file=sys.stderr, flush=True)
        return stopped.code
    except UserError as error:
        _print(error)
        return error.code
    except Exception as error:
        # Matched by name, so that reporting a wrong config does not need torch.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"error: {_out_of_memory(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


def _print(error: UserError) -> None:
    if error.everywhere and not _speaks():
        # A launcher ends the others as soon as one has left: not before the one that speaks has done so.
        time.sleep(0 if error.said else _A_MOMENT)
        return
    tell(error)


def _speaks() -> bool:
    """Whether this is the one process of its host that says what all of them know."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _out_of_memory(error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    return (
        f"{first} Set gradient_checkpointing to true, lower img_size or train_batch_size, "
        "or end what else runs on this GPU."
    )
