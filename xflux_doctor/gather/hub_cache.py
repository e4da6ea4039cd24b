"""What the hub library's cache holds of one repository: the snapshot that an offline start takes, and what it lacks.

The library returns a half-downloaded snapshot without a word when it is offline ("we can't check if all the files are
actually there": huggingface/huggingface_hub, _snapshot_download.py), so the files are looked at one by one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xflux_trainer.layout import TRANSFORMER_FILES, VAE_FILE

from xflux_doctor.facts import HubCache

WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
"""Parts that hold weights, each beside a config.json."""
PARTS = (*WEIGHTS, "tokenizer", "tokenizer_2", "scheduler")
"""What the trainer downloads and reads of a repository in diffusers' layout."""
_TOKENIZERS = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}
"""Either set of files makes the tokenizer (transformers' CLIPTokenizer and T5TokenizerFast)."""
_SHARD = r"(.+)-\d{5}-of-\d{5}\.safetensors"


def repository_folder(hub: Path, repository: str) -> Path:
    return hub / f"models--{repository.replace('/', '--')}"


def hub_cache(hub: Path, repository: str) -> HubCache:
    """The state of the snapshot that `refs/main` names. May wait for ever on a mount that is dead."""
    base = repository_folder(hub, repository)
    snapshots = base / "snapshots"
    try:
        commit = (base / "refs/main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = ""
    folder = snapshots / commit if commit else _newest(snapshots)
    unfinished = sum(size for name, size in blobs(base) if name.endswith(".incomplete"))
    if folder is None or not folder.is_dir():
        return HubCache(repository, present=unfinished)
    if (single := _single_file(folder)) is not None:
        lacks, more = _beside(hub, folder)
        return HubCache(repository, str(folder), lacks, unfinished + _bytes(single) + more)
    missing = tuple(dict.fromkeys([*_missing(folder), *([] if commit else ["refs/main"])]))
    return HubCache(repository, str(folder), missing, unfinished + _size(folder))


def _single_file(folder: Path) -> Path | None:
    """The transformer that X-Flux downloaded, where diffusers' folder is not there: the trainer takes it
    (trainer/find.py, `_cached_single`)."""
    if _is_whole(folder / "transformer/config.json"):
        return None
    files = [path for name in TRANSFORMER_FILES.values() if _is_whole(path := folder / name)]
    return files[0] if len(files) == 1 else None


def _beside(hub: Path, folder: Path) -> tuple[tuple[str, ...], int]:
    """What is not cached of that which goes with such a file, and the bytes of what is."""
    find: Any = importlib.import_module("xflux_trainer.find")  # 6 ms that only a single file is worth
    vae = [path for path in (folder / VAE_FILE, *repository_folder(hub, find.VAE_REPO).glob(f"snapshots/*/{VAE_FILE}"))
           if _is_whole(path)]  # fmt: skip
    missing, present = ([] if vae else [VAE_FILE]), (_bytes(vae[0]) if vae else 0)
    for repository in dict.fromkeys(find.TEXT_REPOS.values()):
        found = _newest(repository_folder(hub, repository) / "snapshots")
        if found is None:
            missing.append(repository)
        else:
            present += sum(_bytes(path) for path in found.glob("*.safetensors"))
    return tuple(missing), present


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _newest(snapshots: Path) -> Path | None:
    try:
        found = [(entry.stat().st_mtime, entry.path) for entry in os.scandir(snapshots) if entry.is_dir()]
    except OSError:
        return None
    return Path(max(found)[1]) if found else None


def blobs(base: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of what lies in a repository's blob folder."""
    try:
        entries = list(os.scandir(base / "blobs"))
    except OSError:
        return
    for entry in entries:
        try:
            yield entry.name, entry.stat().st_size
        except OSError:
            continue


def _missing(folder: Path) -> Iterator[str]:
    """Files that are not there, or are links whose blob is gone, or are empty."""
    for part in WEIGHTS:
        yield from (
            f"{part}/{name}"
            for name in ("config.json", *_weights(folder / part))
            if not _is_whole(folder / part / name)
        )
    if not _is_whole(folder / "scheduler/scheduler_config.json"):
        yield "scheduler/scheduler_config.json"
    for part, choices in _TOKENIZERS.items():
        if not any(all(_is_whole(folder / part / name) for name in names) for names in choices):
            yield f"{part}/{choices[-1][0]}"


def _weights(part: Path) -> list[str]:
    """The files that hold a part's weights: by its index; else the one file; else a name that is not there."""
    try:
        names = sorted(entry.name for entry in os.scandir(part))
    except OSError:
        names = []
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    for index in indexes:
        try:
            return sorted({str(n) for n in json.loads((part / index).read_text("utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [index]
    files = [name for name in names if name.endswith(".safetensors")]
    shard = next((match for name in files if (match := re.fullmatch(_SHARD, name))), None)
    if shard:  # shards without the index that tells how they go together
        return [f"{shard[1]}.safetensors.index.json"]
    return files or ["*.safetensors"]


def _is_whole(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _size(folder: Path) -> int:
    """Bytes of the parts' files, links followed."""
    total = 0
    for part in PARTS:
        try:
            total += sum(entry.stat().st_size for entry in os.scandir(folder / part) if entry.is_file())
        except OSError:
            continue
    return total
