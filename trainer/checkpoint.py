"""Checkpoints: trained weights, optimizer, averages, position and random state, in a folder that is whole or not there.

No frozen weights, no pickles. The pieces are written as they come, one parameter after the other, so that no rank ever
holds all of them; the manifest holds every file's hash, and is compared before anything is loaded.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from xflux_trainer import config as train_config
from xflux_trainer import files, shards
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import CheckpointError, UserError
from xflux_trainer.optim import Piece, Stepper
from xflux_trainer.pulse import PULSE
from xflux_trainer.ranks import Ranks

FORMAT = 2
MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")
STEMS = {"weight": "weights", "ema": "ema"}
"""Files of a piece's tensors; the others' are called `optimizer`. They start with these, and a number follows."""
KEYS = 6
"""More tensors than any optimizer keeps of one parameter: 8-bit AdamW has two codes, two scales and a compensation."""


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
    """What a checkpoint folder holds; tensors are mapped into memory, and read when they are looked at."""

    folder: Path
    manifest: dict[str, Any]
    progress: Progress
    _readers: dict[str, shards.Reader] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> dict[str, Any]:
        """The train config that it was trained with."""
        return dict(self.manifest["config"])

    @property
    def scalars(self) -> dict[str, float]:
        return dict(self.manifest["scalars"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the trained parameters, in their order."""
        return {name: tuple(shape) for name, shape in self.manifest["shapes"].items()}

    @property
    def averaged(self) -> bool:
        """Whether it holds an average of the weights."""
        return any(True for _ in self._readers["ema"])

    def read(self, name: str) -> Piece:
        """One parameter's piece. Raises `CheckpointError` where there is none."""
        piece = {key: reader[name] for key in STEMS if name in (reader := self._readers[STEMS[key]])}
        if "weight" not in piece:
            raise CheckpointError(f"{self.folder} holds no {name}.", "Start afresh, or name another checkpoint.")
        optimizer = self._readers["optimizer"]
        keys = self.manifest["tensors"].get(name, [])
        return piece | {key: optimizer[f"{name}.{key}"] for key in keys if key not in STEMS}

    def weights(self, *, averaged: bool = False) -> Iterator[tuple[str, Tensor]]:
        """What was trained, one parameter after the other; where it is asked for and kept, its average."""
        reader = self._readers["ema" if averaged and self.averaged else "weights"]
        for name in self.shapes:
            yield name, reader[name]


def save(
    output: Path,
    stepper: Stepper,
    progress: Progress,
    config: TrainConfig,
    ranks: Ranks,
    versions: dict[str, str],
    digests: dict[str, str],
    accumulation: int | None = None,
) -> Path:
    """Write `checkpoint-N`, then remove the oldest beyond the limit. Every rank calls it; rank 0 writes.

    `digests` name what the run is made of (`data`, `base`, `model`): a resume compares them. `accumulation` is the
    number of forward passes of a step, where the launcher says otherwise than the config.
    """
    folder = output / f"checkpoint-{progress.step}"
    randoms = [_from_bytes(state) for state in ranks.gather(_to_bytes(_random_state()))]
    scalars, pieces = stepper.scalars(), stepper.pieces()
    problem: UserError | None = None
    if ranks.main:
        manifest = {
            "format": FORMAT,
            "progress": vars(progress),
            "strategy": stepper.strategy,
            "world_size": ranks.world_size,
            "accumulation": accumulation or config.gradient_accumulation_steps,
            "scalars": scalars,
            "shapes": {name: list(shape) for name, shape in stepper.shapes().items()},
            "config": train_config.to_dict(config),
            "versions": versions,
            "digests": digests,
        }
        try:
            _write(folder, pieces, manifest, randoms)
        except UserError as error:
            problem = error
    for _ in pieces:  # making them is work of all ranks, so a full disk ends it on none of them alone
        PULSE.tick()
    ranks.agree(problem)
    if ranks.main:
        thin_out(output, config.checkpoints_total_limit, folder)
    return folder


def thin_out(output: Path, limit: int | None, newest: Path) -> None:
    """Remove the oldest checkpoints beyond the limit; never `newest`, even where another run left later ones there."""
    if limit is not None:
        others = [path for path in list_checkpoints(output) if path != newest]
        for old in others[: max(0, len(others) + 1 - limit)]:
            _remove(old)


def _write(
    folder: Path, pieces: Iterator[tuple[str, Piece]], manifest: dict[str, Any], randoms: list[dict[str, Tensor]]
) -> None:
    names = list(manifest["shapes"])
    rooms = {"weights": shards.room_for(names), "ema": shards.room_for(names)}
    rooms["optimizer"] = shards.room_for([f"{name}.{'x' * 24}" for name in names for _ in range(KEYS)])
    with files.new_folder(folder) as place, ExitStack() as cleanup:
        writers = {stem: shards.Writer(place, stem, room) for stem, room in rooms.items()}
        for writer in writers.values():
            cleanup.callback(writer.abandon)
        tensors = {}
        for name, piece in pieces:
            PULSE.tick()
            tensors[name] = list(piece)
            for key in piece:
                stem = STEMS.get(key, "optimizer")
                writers[stem].add(name if key in STEMS else f"{name}.{key}", piece[key])
            del piece  # before the next one is made
        entries: dict[str, Any] = {}
        for rank, state in enumerate(randoms):
            path = place / f"random-rank{rank}.safetensors"
            files.write_bytes(path, to_bytes(state))
            entries[path.name] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for writer in writers.values():
            entries |= writer.close()
        files.write_json(place / MANIFEST, {**manifest, "tensors": tensors, "files": entries})


def _remove(folder: Path) -> None:
    """Take the name away first, so that a removal cut short does not leave a checkpoint without its files.

    Where it cannot be taken away (a network disk keeps files that somebody reads), the next save tries again: rank 0
    is alone here, and an old checkpoint too many is no reason to end a run.
    """
    doomed = folder.with_name(f"{files.TEMPORARY}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(OSError):
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
    """The folder's contents, after comparing its files with the manifest; restores this rank's random state.

    Rank 0 compares the hashes, a megabyte at a time; the others, who read the same files, only that they are there.
    """
    manifest = _manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        whole = path.is_file() and path.stat().st_size == entry["bytes"]
        if not whole or ((ranks is None or ranks.main) and files.sha256(path) != entry["sha256"]):
            hint = "Remove that folder to resume from the one before it."
            raise CheckpointError(f"{path} is not as it was written.", hint)
    readers = {
        stem: shards.Reader(sorted(folder / name for name in manifest["files"] if name.startswith(f"{stem}-")))
        for stem in (*STEMS.values(), "optimizer")
    }
    if ranks is not None and (place := folder / f"random-rank{ranks.rank}.safetensors").is_file():
        try:
            _restore_random(load_file(place), ranks.device)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{place} cannot be read: {error}.", "Remove that folder.") from error
    return Checkpoint(folder, manifest, Progress(**manifest["progress"]), readers)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            seen = f"{folder} has the format {manifest['format']}; this release reads and writes {FORMAT}."
            hint = "Finish that run with the release that began it, or start afresh (lora_init takes its adapter file)."
            raise CheckpointError(seen, hint)
        Progress(**manifest["progress"])
        _ = [manifest[key].items() for key in ("files", "config", "scalars", "shapes", "digests", "tensors")]
        _ = [int(manifest[key]) for key in ("world_size", "accumulation")]
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
        curves = [output / "metrics.jsonl", output / "heldout.jsonl"] if after is None else []
        for path in (*old, *curves):
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
