"""Find the base model: a folder, Black Forest Labs' single files, what X-Flux's variables name, or the hub's files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import ModelError, first_line
from xflux_trainer.layout import PARTS, TRANSFORMER_FILES, VAE_FILE, VAE_VARIABLE, VARIABLES, Base, parts_in
from xflux_trainer.pulse import PULSE

CLIP_REPO, T5_REPO = "openai/clip-vit-large-patch14", "xlabs-ai/xflux_text_encoders"
"""Where X-Flux has its text encoders from: one folder each, for the weights and the tokenizer."""
TEXT_REPOS = {"text_encoder": CLIP_REPO, "tokenizer": CLIP_REPO, "text_encoder_2": T5_REPO, "tokenizer_2": T5_REPO}
TEXT_FILES = {
    CLIP_REPO: ["config.json", "model.safetensors", "merges.txt", "vocab.json", "*token*.json"],
    T5_REPO: ["*.json", "*.safetensors", "*.model"],
}
VAE_REPO = "black-forest-labs/FLUX.1-dev"
OFFLINE = "Connect to the network for the first run, or set pretrained_model to a local folder."
LOGIN = "Log in with `huggingface-cli login`, or set pretrained_model to a local folder."


def locate(config: TrainConfig) -> tuple[Base, tuple[str, ...]]:
    """The base model of a train config, and notes on where its files come from.

    Where `pretrained_model` is null, X-Flux's variables FLUX_DEV or FLUX_SCHNELL, and AE, name files that come before
    the hub's. Raises `ModelError`.
    """
    if config.pretrained_model:
        return resolve(config.pretrained_model), ()
    variable = VARIABLES[config.model_name]
    named = {name: path for name in (variable, VAE_VARIABLE) if (path := _named_file(name))}
    notes = tuple(f"{name} is {path}: read in place of the hub's file, as in X-Flux." for name, path in named.items())
    vae = {"vae": named[VAE_VARIABLE]} if VAE_VARIABLE in named else {}
    if variable in named:
        return _complete({**parts_in(named[variable]), **vae}, named[variable]), notes
    base = resolve(config.base_model)
    if base.transformer.is_file():
        notes += (f"the transformer is the hub's {base.transformer.name}, which X-Flux left in the cache.",)
    return replace(base, **vae), notes


def resolve(name: str) -> Base:
    """The parts of a base model, after downloading what is missing.

    `name` is a folder in diffusers' or Black Forest Labs' layout, a transformer's single file, or a hub id.
    Raises `ModelError`.
    """
    place = Path(name).expanduser()
    if place.is_dir() or (place.is_file() and place.suffix in (".safetensors", ".sft")):
        return _complete(parts_in(place), place)
    if place.is_file():
        raise ModelError(f"{place} is not a safetensors file.", "Name flux1-dev.safetensors, or a folder.")
    if place.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"The folder {name} does not exist.", "Correct pretrained_model in the train config.")
    cached = _cached_single(name)
    if cached is not None:
        return _complete(parts_in(cached), cached)
    folder = _snapshot(name, [f"{part}/*" for part in PARTS] + ["model_index.json"])
    return _complete(parts_in(folder), folder)


def _named_file(variable: str) -> Path | None:
    value = os.environ.get(variable)
    if not value:
        return None
    path = Path(value).expanduser()
    if not path.is_file():
        hint = f"Correct {variable}, or unset it to take the hub's file."
        raise ModelError(f"The environment variable {variable} names {value}, which is not a file.", hint)
    return path


def _complete(parts: dict[str, Path], place: Path) -> Base:
    """The base of these parts. Beside a single file, what is missing is had from where X-Flux has it."""
    parts = dict(parts)
    single = "transformer" in parts and parts["transformer"].is_file()
    missing = [part for part in PARTS if part not in parts and part != "scheduler"]
    if missing and not single:
        files = [place / name for name in TRANSFORMER_FILES.values() if (place / name).is_file()]
        if "transformer" in missing and len(files) > 1:
            seen = f"{place} holds {' and '.join(file.name for file in files)}."
            raise ModelError(seen, "Set pretrained_model to one of the files.")
        seen = f"{place} is not a FLUX.1 pipeline in diffusers' layout: it has no {', '.join(missing)}."
        hint = "Point pretrained_model at a folder such as a download of FLUX.1-dev, or at its flux1-dev.safetensors."
        raise ModelError(seen, hint)
    if "vae" in missing:
        parts["vae"] = _hub_vae(parts["transformer"])
    for part in missing:
        if part in TEXT_REPOS:
            parts[part] = _snapshot(TEXT_REPOS[part], TEXT_FILES[TEXT_REPOS[part]])
    for part in ("tokenizer", "tokenizer_2"):  # transformers makes a tokenizer of no words out of nothing
        if not any(parts[part].iterdir()):
            raise ModelError(f"{parts[part]} is empty.", "Download the model again.")
    parts.setdefault("scheduler", parts["transformer"].parent / "scheduler")
    return Base(**parts)


def _cached_single(name: str) -> Path | None:
    """The single file that X-Flux downloaded, where the hub's cache has it and not diffusers' folder."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "transformer/config.json"), str):
        return None
    found = [try_to_load_from_cache(name, file) for file in TRANSFORMER_FILES.values()]
    files = [Path(path) for path in found if isinstance(path, str)]
    return files[0] if len(files) == 1 else None


def _hub_vae(transformer: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with _hub(VAE_REPO), PULSE.during("download"):
            return Path(hf_hub_download(VAE_REPO, VAE_FILE))
    except ModelError as error:
        seen = f"{transformer} has no {VAE_FILE} beside it. {error.seen}"
        raise ModelError(seen, f"Put {VAE_FILE} beside it, from the same place as the transformer.") from error


def _snapshot(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _hub(name), PULSE.during("download"):
        return Path(snapshot_download(name, allow_patterns=patterns))


@contextmanager
def _hub(name: str) -> Iterator[None]:
    """Turn what the hub's client says into a sentence and a next step."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: this account has not been let in.",
            f"Accept its licence at https://huggingface.co/{name}, then log in with `huggingface-cli login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"The hub has no model {name}, or it is private.", LOGIN) from error
    except LocalEntryNotFoundError as error:
        why = "may not be asked (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "cannot be reached"
        raise ModelError(f"{name} is not on this machine and the hub {why}.", OFFLINE) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{name} could not be downloaded: {first_line(error)}.", LOGIN) from error
