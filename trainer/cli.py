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
from xflux_trainer.config import load_with_notes
from xflux_trainer.errors import CheckpointError, Interrupted, UserError, tell
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


@commands.command()
@CONFIG
def train(path: Path) -> None:
    """Encode the images and captions, train, and save the result."""
    stop = Stop()
    stop.install()
    config, notes = load_with_notes(path)
    from xflux_trainer.train import train as run

    run(config, notes, stop)


@commands.command()
@CONFIG
def cache(path: Path) -> None:
    """Only encode the images and captions."""
    Stop().install()
    config, _ = load_with_notes(path)
    from xflux_trainer.commands import fill_cache

    fill_cache(config)


@commands.command()
@click.option("--config", "path", type=click.Path(path_type=Path), help="Take the newest checkpoint of this run.")
@click.option("--checkpoint", "folder", type=click.Path(path_type=Path), help="The checkpoint folder.")
@click.option("--lora", type=click.Path(path_type=Path), help="An adapter file of any of the formats.")
@click.option("--format", "form", type=click.Choice(list(FILES)), default="diffusers", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="The file to write. [default: beside what is read]")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
def convert(
    path: Path | None, folder: Path | None, lora: Path | None, form: str, output: Path | None, dtype: str
) -> None:
    """Write the adapter of a checkpoint, or of another file, for diffusers, kohya (ComfyUI) or X-Flux (xlabs)."""
    if not (path or folder or lora) or (lora and (path or folder)):
        raise click.UsageError("Name a --checkpoint, the --config of the run, or a --lora file.")
    for given, kind, other in ((folder, Path.is_file, "--lora"), (lora, Path.is_dir, "--checkpoint")):
        if given and kind(given):
            raise click.UsageError(f"{given} is for {other}.")
    Stop().install()
    config = load_with_notes(path)[0] if path else None
    from xflux_trainer.convert import convert as run
    from xflux_trainer.convert import newest

    source = folder or lora or (newest(config) if config else None)
    assert source is not None
    written, notes = run(source, output, form, dtype)
    for note in notes:
        click.echo(f"note: {note}")
    click.echo(f"the adapter is in {written}")


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
