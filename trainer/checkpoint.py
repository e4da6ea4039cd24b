"""Checkpoints: adapters, optimizer, position and random state, in one folder that is whole or not there at all.

No frozen weights, no pickles. The manifest holds every file's hash, and is compared before anything is loaded.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from xflux_trainer import config as train_config
from xflux_trainer import files
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import CheckpointError, WriteError
from xflux_trainer.optim import MOMENTS, State
from xflux_trainer.ranks import Ranks

FORMAT = 1
MANIFEST = "manifest.json"
ADAPTERS = "adapters.safetensors"
OPTIMIZER = "optimizer.safetensors"
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Progress:
    """How far a run has come, and what it has seen on the way."""

    step: int = 0
    batches: int = 0
    """Batches that all ranks together have trained on: the position in the order of the images."""
    first_loss: float | None = None
    last_loss: float | None = None
    loss_sum: float = 0.0
    heldout_before: dict[str, Any] | None = None
    seconds: float = 0.0


@dataclass
class Checkpoint:
    """What a checkpoint folder holds."""

    folder: Path
    state: State
    progress: Progress
    config: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    output: Path, state: State, progress: Progress, config: TrainConfig, ranks: Ranks, versions: dict[str, str]
) -> Path:
    """Write `checkpoint-N`, then remove the oldest beyond the limit. Every rank calls it; rank 0 writes."""
    folder = output / f"checkpoint-{progress.step}"
    randoms = [_from_bytes(state) for state in ranks.gather(_to_bytes(_random_state()))]
    problem: WriteError | None = None
    if ranks.main:
        try:
            _write(folder, state, progress, config, randoms, versions)
        except WriteError as error:
            problem = error
    ranks.agree(problem)
    if ranks.main and config.checkpoints_total_limit is not None:
        # Never the one just written, even where another run left later ones beside it.
        others = [path for path in list_checkpoints(output) if path != folder]
        for old in others[: max(0, len(others) + 1 - config.checkpoints_total_limit)]:
            _remove(old)
    return folder


def _write(
    folder: Path,
    state: State,
    progress: Progress,
    config: TrainConfig,
    randoms: list[dict[str, Tensor]],
    versions: dict[str, str],
) -> None:
    moments = {f"{name}.{key}": held[key] for name, held in state.moments.items() for key in MOMENTS}
    contents = {ADAPTERS: state.weights, OPTIMIZER: moments}
    contents |= {f"random-rank{rank}.safetensors": tensors for rank, tensors in enumerate(randoms)}
    with files.new_folder(folder) as place:
        for name, tensors in contents.items():
            files.write_bytes(place / name, save({key: value.contiguous() for key, value in tensors.items()}))
        manifest = {
            "format": FORMAT,
            "progress": vars(progress),
            "optimizer_steps": state.steps,
            "loss_scale": state.scale,
            "world_size": len(randoms),
            "config": train_config.to_dict(config),
            "versions": versions,
            "files": {
                name: {"bytes": (place / name).stat().st_size, "sha256": files.sha256(place / name)}
                for name in contents
            },
        }
        files.write_json(place / MANIFEST, manifest)


def _remove(folder: Path) -> None:
    """Take the name away first, so that a removal cut short does not leave a checkpoint without its files."""
    doomed = folder.with_name(f"{files.TEMPORARY}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def list_checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return [path for _, path in _numbered(output)]


def _numbered(output: Path) -> list[tuple[int, Path]]:
    return sorted(
        (int(match[1]), path)
        for path in output.glob("checkpoint-*")
        if (match := NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    )


def find(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, as the config asks."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    output = Path(config.output_dir)
    if wanted == "latest":
        found = list_checkpoints(output)
        return found[-1] if found else None
    # X-Flux takes a name inside output_dir; a path from here is as clear.
    for folder in (Path(wanted), output / wanted):
        if (folder / MANIFEST).is_file():
            return folder
    listed = ", ".join(path.name for path in list_checkpoints(output)) or "none"
    hint = f"Set resume_from_checkpoint to latest, or to one of those in {output}: {listed}."
    raise CheckpointError(f"{wanted} is not a checkpoint of this trainer.", hint)


def load(folder: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Everything in the folder, after comparing it with the manifest; restores this rank's random state."""
    manifest = _manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or files.sha256(path) != entry["sha256"]:
            hint = "Remove that folder to resume from the one before it."
            raise CheckpointError(f"{path} is not as it was written.", hint)
    try:
        weights = load_file(folder / ADAPTERS)
        flat = load_file(folder / OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}.", "Remove that folder.") from error
    moments = {name: {key: flat[f"{name}.{key}"] for key in MOMENTS} for name in weights} if flat else {}
    if ranks is not None and (folder / f"random-rank{ranks.rank}.safetensors").is_file():
        _restore_random(load_file(folder / f"random-rank{ranks.rank}.safetensors"), ranks.device)
    state = State(weights, moments, int(manifest["optimizer_steps"]), manifest.get("loss_scale"))
    return Checkpoint(folder, state, Progress(**manifest["progress"]), manifest["config"])


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has the format {manifest['format']}, not {FORMAT}.", "Start afresh.")
        Progress(**manifest["progress"])
        _ = manifest["files"].items(), manifest["optimizer_steps"], manifest["config"]
    except OSError as error:
        raise CheckpointError(f"{folder} is not a checkpoint folder: {error.strerror}.", "Name another.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is broken: {error}.", "Remove that folder.") from error
    return dict(manifest)


def set_aside(output: Path, after: int | None = None) -> Path | None:
    """Move checkpoints out of the way of a run that does not go on from them; nothing is deleted.

    Without `after` they are all of an earlier run, and so is its curve. With it they are those of later steps:
    a run that resumes before them leaves that branch, and shares the curve up to where it resumes.
    """
    old = [path for step, path in _numbered(output) if after is None or step > after]
    if not old:
        return None
    number = 1 + max((int(p.name.split("-")[1]) for p in output.glob("previous-*") if p.name[9:].isdigit()), default=0)
    place = output / f"previous-{number}"
    with files.sentences(place):
        place.mkdir()
        for path in (*old, output / "metrics.jsonl") if after is None else old:
            if path.exists():
                path.rename(place / path.name)
    return place


def _random_state() -> dict[str, Tensor]:
    """Nothing here draws from torch's global generators; a library that does is resumed exactly as well."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _to_bytes(state: dict[str, Tensor]) -> dict[str, bytes]:
    """Sent as bytes: torch unpickles tensors by a function that warns of itself."""
    return {name: bytes(tensor.numpy()) for name, tensor in state.items()}


def _from_bytes(state: dict[str, bytes]) -> dict[str, Tensor]:
    return {name: torch.frombuffer(bytearray(raw), dtype=torch.uint8) for name, raw in state.items()}


def _restore_random(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
