"""WE: the model's files, before the trainer looks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.gather.folders import local_model

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_GATED = ("black-forest-labs/FLUX.1-dev",)


@check("WE101", "the model folder is complete", needs=("train",))
def folder_complete(case: Case) -> Iterator[Finding]:
    """A local diffusers folder has every part, and every shard that an index names, none of them empty."""
    assert case.job.train is not None
    folder = local_model(case.job.train.base_model)
    if folder is None:
        raise SkipCheck(f"{case.job.train.base_model} is a hub id (see WE102)")
    if not folder.is_dir():
        yield error(
            f"There is no model folder at {folder}.",
            "No weights can be loaded.",
            "Correct pretrained_model, or download FLUX.1 there in the diffusers layout.",
        )
        return
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        yield error(
            f"{folder} lacks {', '.join(missing)}.",
            "It is not a whole FLUX.1 pipeline in the diffusers layout.",
            "Download it again; the single-file layout is another one.",
        )
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        if part not in missing:
            yield from _config(folder / part / "config.json")
            yield from _weights(folder / part)
    if "scheduler" not in missing:
        yield from _config(folder / "scheduler" / "scheduler_config.json")
    for part in ("tokenizer", "tokenizer_2"):
        if part not in missing and not any((folder / part).iterdir()):
            yield error(f"{folder / part} is empty.", "Captions cannot be read.", "Download it again.")


def _config(path: Path) -> Iterator[Finding]:
    try:
        whole = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except FileNotFoundError:
        yield error(f"{path} is missing.", "The model cannot be made without it.", "Download it again.")
        return
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        yield error(f"{path} is not a JSON object.", "The model cannot be made from it.", "Download it again.")


def _weights(part: Path) -> Iterator[Finding]:
    names: set[str] = set()
    for index in part.glob("*.index.json"):
        try:
            names |= {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            yield error(f"{index} cannot be read.", "The shards cannot be found.", "Download this file again.")
            return
    names = names or {path.name for path in part.glob("*.safetensors")}
    if not names:
        yield error(f"{part} holds no .safetensors file.", "There are no weights to load.", "Download it again.")
    for name in sorted(names):
        path = part / name
        size = path.stat().st_size if path.exists() else 0
        declared = _declared_size(path) if size else 0
        if size == 0:
            yield error(f"{path} is {'empty' if path.exists() else 'missing'}.", "Loading stops.", "Download it again.")
        elif declared is None:
            yield error(f"{path} is not a safetensors file.", "Loading stops.", "Download it again.")
        elif size != declared:
            yield error(
                f"{path} holds {size} bytes and its header declares {declared}.",
                "A download that broke off: loading stops.",
                "Download it again.",
            )


def _declared_size(path: Path) -> int | None:
    """Bytes that the header of a safetensors file promises; None when it has no such header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= 100_000_000:
                return None
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return 8 + length + max(ends, default=0)


@check("WE102", "the hub will give the model", needs=("train",))
def hub_access(case: Case) -> Iterator[Finding]:
    """A gated repository needs a token, unless its files are in the cache already. No socket is opened."""
    assert case.job.train is not None
    name = case.job.train.base_model
    if local_model(name) is not None:
        raise SkipCheck("the model is a local folder (see WE101)")
    cached = _cached(case, name)
    variable = case.facts.environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if cached:
        return
    if variable or case.job.offline:
        yield error(
            f"{'HF_HUB_OFFLINE is set' if variable else '--offline was given'} and {name} is not in the hub cache.",
            "Nothing can be downloaded.",
            "Unset it, or set pretrained_model to a local folder.",
        )
    elif name in _GATED and not case.facts.hub_token:
        yield error(
            f"{name} is gated and no hub token was found.",
            "The download ends in 401: 'Access to model is restricted'.",
            "Accept its licence on the hub's page and log in, or set pretrained_model to a local folder.",
            commands=("hf auth login",),
            docs=f"https://huggingface.co/{name}",
        )
    else:
        yield warning(
            f"{name} is not in the hub cache.",
            "About 34 GB will be downloaded before the first step.",
            "Download it beforehand to see its failures early.",
            commands=(f"hf download {name}",),
        )


def _cached(case: Case, name: str) -> bool:
    environment = case.facts.environment
    home = Path(environment.get("HF_HOME", Path(environment.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"))
    hub = Path(environment.get("HF_HUB_CACHE", home / "hub")).expanduser()
    snapshots = hub / f"models--{name.replace('/', '--')}" / "snapshots"
    return any(all((snapshot / part).is_dir() for part in PARTS) for snapshot in snapshots.glob("*"))
