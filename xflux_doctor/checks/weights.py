"""WE: the model's files, before the trainer looks for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from xflux_trainer import bfl_spec
from xflux_trainer.find import TEXT_REPOS, VAE_REPO
from xflux_trainer.layout import TRANSFORMER_FILES, VAE_FILE, VAE_VARIABLE, VARIABLES, parts_in

from xflux_doctor.bill import model_place
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.room import GIB, offline, to_download
from xflux_doctor.facts import HubAccess, HubCache
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.gather.hub_cache import PARTS, WEIGHTS, repository_folder

_GATED = ("black-forest-labs/FLUX.1-dev",)
_LOG_IN = ("hf auth login",)
_SHOWN = 4


@check("WE101", "the model's files are complete", needs=("train",))
def folder_complete(case: Case) -> Iterator[Finding]:
    """A local model has every part and every shard that an index names, none of them broken off.

    It is a folder in diffusers' layout, or Black Forest Labs' single file, whose VAE and text encoders may come from
    the hub (trainer/find.py).
    """
    assert case.job.train is not None
    place = model_place(case)
    variables = _variables(case)
    vae = variables.get(VAE_VARIABLE)
    if vae is not None and not vae.is_file():
        yield _no_file(VAE_VARIABLE, vae)
        return
    if place is None:
        raise SkipCheck(f"{case.job.train.base_model} is a hub id (see WE102)")
    variable = VARIABLES[case.job.train.model_name]
    if variable in variables and not place.is_file():
        yield _no_file(variable, place)
    elif not place.exists():
        yield error(
            f"There is no model folder at {place}.",
            "No weights can be loaded.",
            "Correct pretrained_model, or download FLUX.1 there in the diffusers layout.",
        )
    elif place.is_file() and variable not in variables and place.suffix not in (".safetensors", ".sft"):
        yield error(f"{place} is not a safetensors file.", "No weights can be loaded.", "Name flux1-dev.safetensors, "
                    "or a folder.")  # fmt: skip
    else:
        yield from _parts(case, place, variables)


def _variables(case: Case) -> dict[str, Path]:
    """X-Flux's variables that count: those of the transformer and the VAE, where pretrained_model is null."""
    assert case.job.train is not None
    if case.job.train.pretrained_model:
        return {}
    named = {
        name: case.facts.environment.get(name, "") for name in (VARIABLES[case.job.train.model_name], VAE_VARIABLE)
    }
    return {name: Path(os.path.expanduser(value)) for name, value in named.items() if value}  # noqa: PTH111


def _no_file(variable: str, path: Path) -> Finding:
    seen = f"The environment variable {variable} names {path}, which is not a file."
    return error(seen, "The trainer stops.", f"Correct {variable}, or unset it to take the hub's file.")


def _parts(case: Case, place: Path, variables: dict[str, Path]) -> Iterator[Finding]:
    parts = parts_in(place)
    if VAE_VARIABLE in variables:
        parts["vae"] = variables[VAE_VARIABLE]
    single = "transformer" in parts and parts["transformer"].is_file()
    # The scheduler's folder only tells of a shift, and may be absent.
    missing = [part for part in PARTS if part not in parts and part != "scheduler"]
    files = [name for name in TRANSFORMER_FILES.values() if (place / name).is_file()]
    if "transformer" in missing and len(files) > 1:
        yield error(f"{place} holds {' and '.join(files)}.", "The trainer does not choose between them.",
                    "Set pretrained_model to one of the files.")  # fmt: skip
    elif missing and not single:
        yield error(
            f"{place} lacks {', '.join(missing)}.",
            "It is not a whole FLUX.1 pipeline in the diffusers layout.",
            "Download it again, or point pretrained_model at its flux1-dev.safetensors.",
        )
    elif missing:
        yield from _beside(case, parts["transformer"], missing)
    for part in WEIGHTS:
        if part in parts and parts[part].is_file():
            yield from _file(parts[part])
        elif part in parts and parts[part].is_dir():
            yield from _config(parts[part] / "config.json")
            yield from _weights(parts[part])
    if single and not any(_file(parts["transformer"])):
        try:
            bfl_spec.read_single_file(parts["transformer"])
        except (OSError, ValueError) as problem:
            yield error(f"{parts['transformer']}: {problem}.", "It is not FLUX.1's transformer: loading stops.",
                        "Name flux1-dev.safetensors or flux1-schnell.safetensors.")  # fmt: skip
    if "scheduler" in parts:
        yield from _config(parts["scheduler"] / "scheduler_config.json")
    for part in ("tokenizer", "tokenizer_2"):
        if part in parts and not any(parts[part].iterdir()):
            yield error(f"{parts[part]} is empty.", "Captions cannot be read.", "Download it again.")


def _beside(case: Case, transformer: Path, missing: list[str]) -> Iterator[Finding]:
    """What a single file has not beside it comes from where X-Flux has it."""
    hub = (case.facts.folders or {}).get("hub")
    repositories = dict.fromkeys(VAE_REPO if part == "vae" else TEXT_REPOS[part] for part in missing)
    if hub is None or hub.error:
        return
    absent = [
        name for name in repositories if not _is_cached(Path(hub.path), name, VAE_FILE if name == VAE_REPO else "")
    ]
    if absent and offline(case):
        yield error(f"{transformer} has no {', '.join(missing)} beside it, and {' and '.join(absent)} "
                    f"{'are' if len(absent) > 1 else 'is'} not in the hub cache.",
                    f"{_why_offline(case)}: nothing can be downloaded.",
                    f"Unset it, or put {VAE_FILE} and the text encoders' folders beside the file.")  # fmt: skip
    elif absent:
        yield warning(f"{transformer} has no {', '.join(missing)} beside it.",
                      f"{' and '.join(absent)} will be downloaded before the first step.",
                      "Download it beforehand to see its failures early.",
                      commands=tuple(f"hf download {name}{f' {VAE_FILE}' if name == VAE_REPO else ''}"
                                     for name in absent))  # fmt: skip


def _is_cached(hub: Path, repository: str, file: str) -> bool:
    return any(folder.is_dir() and (not file or (folder / file).is_file())
               for folder in repository_folder(hub, repository).glob("snapshots/*"))  # fmt: skip


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
        yield from _file(part / name)


def _file(path: Path) -> Iterator[Finding]:
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


def _to_fetch(case: Case) -> HubCache:
    """What the hub's cache holds of a model that is no local folder; every other job skips."""
    assert case.job.train is not None
    if model_place(case) is not None:
        raise SkipCheck("the model lies on this machine (see WE101)")
    if case.facts.hub_cache is None:
        raise SkipCheck("these facts do not say what the hub cache holds")
    return case.facts.hub_cache


def _why_offline(case: Case) -> str:
    if case.job.offline:
        return "--offline was given"
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return f"{next(name for name in names if case.facts.environment.get(name))} is set"


@check("WE102", "the hub will give the model", needs=("train",))
def hub_access(case: Case) -> Iterator[Finding]:
    """A gated repository needs a token, unless its files are in the cache already. No socket is opened."""
    cache = _to_fetch(case)
    name = cache.repository
    if cache.complete:
        return
    if offline(case):
        if not cache.snapshot:
            yield error(
                f"{_why_offline(case)} and {name} is not in the hub cache.",
                "Nothing can be downloaded.",
                "Unset it, or set pretrained_model to a local folder.",
            )
    elif name in _GATED and not case.facts.hub_token and not _gives(case.facts.hub):
        yield error(
            f"{name} is gated and no hub token was found.",
            "The download ends in 401: 'Access to model is restricted'.",
            "Accept its licence on the hub's page and log in, or set pretrained_model to a local folder.",
            commands=_LOG_IN,
            docs=f"https://huggingface.co/{name}",
        )
    elif not cache.snapshot:
        yield warning(
            f"{name} is not in the hub cache.",
            f"About {to_download(case) / 1e9:.0f} GB will be downloaded before the first step.",
            "Download it beforehand to see its failures early.",
            commands=(_download(name),),
        )


def _gives(hub: HubAccess | None) -> bool:
    """Whether the endpoint was asked and gave the file: a mirror may do so without a token."""
    return hub is not None and hub.status is not None and hub.status < 400


def _download(name: str) -> str:
    """Only what is read: the repository holds the same weights once more as single files."""
    return f"hf download {name} --exclude 'flux1-*.safetensors' 'ae.safetensors'"


@check("WE103", "the model in the hub cache is whole", needs=("train",))
def snapshot_complete(case: Case) -> Iterator[Finding]:
    """Offline, the library returns a half-downloaded snapshot without a word (snapshot_download, 0.24 and 1.x)."""
    cache = _to_fetch(case)
    if not cache.snapshot:
        raise SkipCheck(f"{cache.repository} is not in the hub cache (see WE102)")
    if cache.complete:
        return
    shown = ", ".join(cache.missing[:_SHOWN])
    more = f" and {len(cache.missing) - _SHOWN} more" if len(cache.missing) > _SHOWN else ""
    seen = f"{cache.snapshot} lacks {shown}{more}."
    if offline(case):
        yield error(
            seen,
            f"{_why_offline(case)}: loading stops at the first missing file.",
            "Finish the download while online.",
            commands=(_download(cache.repository),),
        )
    else:
        size = to_download(case)
        yield warning(
            seen,
            f"{f'About {size / 1e9:.0f} GB' if size > GIB else 'The rest'} will be downloaded before the first step.",
            "Finish the download beforehand to see its failures early.",
            commands=(_download(cache.repository),),
        )


@check("WE104", "the hub answers and lets this account in", needs=("train", "hub"))
def hub_answers(case: Case) -> Iterator[Finding]:
    """It is asked for model_index.json with the account's token, as the download will be (status and X-Error-Code)."""
    hub, token = case.facts.hub, case.facts.hub_token
    assert hub is not None
    if _gives(hub):
        return
    seen = f"{hub.endpoint} answered {hub.status} for {hub.repository}{f' ({hub.detail})' if hub.detail else ''}."
    page = f"{hub.endpoint}/{hub.repository}"
    restricted = "GatedRepo" in hub.detail
    if hub.status is None:
        yield from _no_answer(hub)
    elif hub.status == 401 and not token and hub.repository in _GATED:
        raise SkipCheck("there is no token (see WE102)")
    elif hub.status == 401 and token and not restricted:
        yield error(
            seen, "The token is not valid any more, or was copied in part.", "Make a new one.", commands=_LOG_IN
        )
    elif hub.status == 401 and not token:
        because = "The repository is gated, private, or not there: without a token the hub tells no more."
        yield error(seen, because, "Log in, or correct pretrained_model.", commands=_LOG_IN)
    elif hub.status in (401, 403):
        because = "This account has not been let in, or its token may not read gated repositories."
        hint = "Accept the licence on the page of the repository, and give the token the right to read it."
        yield error(seen, because, hint, docs=page)
    elif hub.status == 404:
        because = "There is no such repository, or it is not a pipeline in diffusers' layout."
        yield error(seen, because, "Correct pretrained_model.", docs=page)
    elif hub.status == 407:
        yield error(seen, "The proxy asks for a login.", "Put user and password into HTTPS_PROXY, or ask who runs it.")
    elif hub.status == 429:
        yield warning(seen, "Too many requests came from this address.", "Wait some minutes, or log in.")
    elif hub.status >= 500:
        yield warning(seen, "The hub or a proxy has trouble; the download may fail.", "Try again in some minutes.")
    else:
        yield warning(seen, "The download may fail in the same way.", "Try it by hand.", commands=(f"curl -sI {page}",))


def _no_answer(hub: HubAccess) -> Iterator[Finding]:
    """By the kind that the probe gives before the colon."""
    kind, _, words = hub.detail.partition(": ")
    seen = f"{hub.endpoint} could not be asked for {hub.repository}: {words or hub.detail}."
    local = "Mend it, set HF_ENDPOINT to a mirror, or set pretrained_model to a local folder."
    if kind == "timeout":
        yield warning(seen, "The network is slow or drops packets; the download may hang.", f"Try again. {local}")
    elif kind == "tls":
        clock = "A clock that is wrong makes every certificate invalid (see ST111); "
        because = f"{clock}a proxy that looks into TLS wants its own in REQUESTS_CA_BUNDLE."
        yield error(seen, because, local, commands=("date", f"curl -vI {hub.endpoint}"))
    elif kind == "proxy":
        yield error(
            seen, "The proxy of HTTPS_PROXY refuses the connection.", "Correct it, or add the host to NO_PROXY."
        )
    elif kind == "token":
        yield error(seen, "The token was not copied as it is.", "Log in again.", commands=_LOG_IN)
    elif kind == "probe":
        raise SkipCheck(f"the question to the hub {words}")
    else:
        yield error(seen, "The weights are not on this machine and cannot be downloaded.", local)
