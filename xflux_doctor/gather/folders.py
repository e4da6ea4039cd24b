"""The places that the job reads and writes, each with the mount under it: kind, room, rights, what is left over.

Every place is looked at in a thread of its own, and all have one short deadline: a dead network mount costs that
long and is reported by name.
"""

from __future__ import annotations

import errno
import functools
import getpass
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
from xflux_trainer.config import TrainConfig
from xflux_trainer.layout import VARIABLES

from xflux_doctor.facts import Facts, Folder, HubCache
from xflux_doctor.gather.deadline import within
from xflux_doctor.gather.environment import hf_home
from xflux_doctor.gather.hub_cache import hub_cache, repository_folder
from xflux_doctor.gather.mounts import Mount, mounts, under

SECONDS = 1.5
_VOLUME_SECONDS = 0.3
_OLD = 3600.0
"""Seconds after which a part of a write counts as left over: nobody is writing it any more."""
_CHECKPOINT = r"checkpoint-\d+"
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
TEMPORARY = ".xflux-tmp-"
"""How the trainer calls what it is still writing (xflux_trainer.files)."""


def with_folders(
    facts: Facts,
    train: TrainConfig | None,
    environ: Mapping[str, str],
    *,
    root: Path = Path("/"),
    seconds: float = SECONDS,
) -> Facts:
    """The facts with `folders` and `hub_cache`. Ends within `seconds` and a little."""
    started = time.perf_counter()
    table = mounts(root)
    paths = places(train, environ)
    hub = paths["hub"]
    calls: dict[str, Callable[[], Folder | HubCache | None]] = {
        purpose: functools.partial(_look, purpose, path, table, train) for purpose, path in paths.items()
    }
    if train is not None:
        calls["model"] = functools.partial(_model, train, environ, table)
        calls["hub cache"] = functools.partial(hub_cache, hub, train.base_model)
    answers = within(seconds, calls)
    cache = answers.pop("hub cache", None)
    folders = {purpose: found for purpose, found in answers.items() if isinstance(found, Folder)}
    if train is not None and "model" not in answers:  # a dead mount: only the name can tell whether it is local
        named = "" if train.pretrained_model else environ.get(VARIABLES[train.model_name], "")
        if named or train.base_model.startswith((".", "/", "~")):
            paths["model"] = _expand(named or train.base_model)
    for purpose, path in paths.items():
        if purpose not in folders:
            folders[purpose] = _silent(path, table, f"did not answer within {seconds:.1f} s")
    output = folders.get("output")
    if output and output.kind == "overlay" and output.mount == "/":
        volume = _largest_volume(table)
        if volume:
            folders["volume"] = volume
    kept = cache if isinstance(cache, HubCache) and "model" not in folders else None
    timings = {**facts.timings, "folders": time.perf_counter() - started}
    return msgspec.structs.replace(facts, folders=folders, hub_cache=kept, timings=timings)


def places(train: TrainConfig | None, environ: Mapping[str, str]) -> dict[str, Path]:
    """Where the job and its libraries will read and write, by purpose. Nothing is looked at."""
    home = _expand(environ.get("HOME") or "~")
    xdg = _expand(environ["XDG_CACHE_HOME"]) if environ.get("XDG_CACHE_HOME") else home / ".cache"
    temporary = next((environ[n] for n in ("TMPDIR", "TEMP", "TMP") if environ.get(n)), "/tmp")  # noqa: S108
    triton = environ.get("TRITON_CACHE_DIR") or f"{environ.get('TRITON_HOME') or home}/.triton"
    inductor = environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{temporary}/torchinductor_{_user()}"
    found = {
        "hub": hub_folder(environ),
        "temporary": Path(temporary),
        "torch_extensions": Path(environ.get("TORCH_EXTENSIONS_DIR") or xdg / "torch_extensions"),
        "triton": Path(triton),
        "inductor": Path(inductor),
        "home": home,
    }
    if train is not None:
        found |= {"output": Path(train.output_dir), "cache": train.cache_path, "images": Path(train.img_dir)}
    return found


def hub_folder(environ: Mapping[str, str]) -> Path:
    """The hub library's cache, by its own order (huggingface_hub/constants.py, 0.24 and 1.x)."""
    named = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    return _expand(os.path.expandvars(named)) if named else hf_home(environ) / "hub"


def local_model(name: str) -> Path | None:
    """The model's folder when the name is a path on this machine; `None` for a hub id."""
    path = _expand(name)
    # `output/flux` reads like a hub id; where `output` is a folder here, a path is meant.
    local = path.exists() or name.startswith((".", "/", "~")) or (path.parts[:1] and Path(path.parts[0]).is_dir())
    return path if local or len(path.parts) > 2 else None


def base_place(train: TrainConfig, environ: Mapping[str, str]) -> Path | None:
    """Where the base model lies on this machine: a folder or the transformer's single file; None: the hub's.

    Where pretrained_model is null X-Flux's FLUX_DEV or FLUX_SCHNELL names the file (trainer/find.py).
    """
    named = "" if train.pretrained_model else environ.get(VARIABLES[train.model_name], "")
    return _expand(named) if named else local_model(train.base_model)


def _model(train: TrainConfig, environ: Mapping[str, str], table: tuple[Mount, ...]) -> Folder | None:
    path = base_place(train, environ)
    return _look("model", path, table, None) if path is not None else None


def _look(purpose: str, path: Path, table: tuple[Mount, ...], train: TrainConfig | None) -> Folder:
    """One place. May wait for ever."""
    absolute = _absolute(path)
    try:
        existing = _nearest(absolute)
        mount = under(table, os.path.realpath(existing))
        stat = os.statvfs(existing)
    except OSError as error:  # a server that went away: ENOTCONN, ESTALE, EHOSTDOWN, EIO
        return _silent(path, table, (error.strerror or str(error)).lower())
    old = list(_leftovers(purpose, absolute, train)) if absolute == existing else []
    return Folder(
        path=str(absolute),
        existing=str(existing),
        mount=mount.place if mount else "",
        kind=mount.kind if mount else "",
        read_only=bool(stat.f_flag & os.ST_RDONLY) or bool(mount and "ro" in mount.options),
        writable=os.access(existing, os.W_OK | os.X_OK),
        total=stat.f_blocks * stat.f_frsize,
        free=stat.f_bavail * stat.f_frsize,
        inodes_free=stat.f_favail if stat.f_files else None,
        device=mount.device if mount else "",
        is_file=not existing.is_dir(),
        no_exec=bool(mount and "noexec" in mount.options),
        entries=_entries(purpose, absolute),
        leftovers=len(old),
        leftover_bytes=sum(old),
    )


def _nearest(path: Path) -> Path:
    """The nearest parent that exists; a place that cannot be entered counts as not there."""
    for place in (path, *path.parents):
        try:
            place.stat()
        except OSError as error:
            if error.errno in _NOT_THERE:
                continue
            raise
        return place
    return Path("/")


def _absolute(path: Path) -> Path:
    try:
        return Path(os.path.abspath(path))  # noqa: PTH100 - links stay as they are named
    except OSError:  # the working folder is gone
        return path


def _silent(path: Path, table: tuple[Mount, ...], why: str) -> Folder:
    """A place that gave no answer; its mount is known by its name alone."""
    absolute = str(_absolute(path))
    mount = under(table, absolute)
    return Folder(
        path=absolute,
        existing="",
        mount=mount.place if mount else "",
        kind=mount.kind if mount else "",
        device=mount.device if mount else "",
        error=why,
    )


def _entries(purpose: str, folder: Path) -> int:
    """What an earlier run left here that this one need not write: encoded images, or checkpoints."""
    if purpose == "cache":
        return sum(name.startswith("image-") and name.endswith(".safetensors") for name in _names(folder))
    return sum(bool(re.fullmatch(_CHECKPOINT, name)) for name in _names(folder)) if purpose == "output" else 0


def _leftovers(purpose: str, folder: Path, train: TrainConfig | None) -> Iterator[int]:
    """Sizes of parts of broken-off writes. The job's own repository is left out: its download goes on from them."""
    if purpose == "cache":
        yield from _old(folder, lambda name: name.startswith(TEMPORARY))
    elif purpose == "hub":
        own = repository_folder(folder, train.base_model).name if train else ""
        for name in _names(folder):
            if name.startswith("models--") and name != own:
                yield from _old(folder / name / "blobs", lambda blob: blob.endswith(".incomplete"))


def _old(folder: Path, wanted: Callable[[str], bool]) -> Iterator[int]:
    for name in _names(folder):
        if wanted(name):
            try:
                stat = (folder / name).stat()
            except OSError:
                continue
            if time.time() - stat.st_mtime > _OLD:
                yield stat.st_size


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names are enough, and there may be many
    except OSError:
        return []


def _largest_volume(table: tuple[Mount, ...]) -> Folder | None:
    """The writable data mount with the most free room."""
    calls = {m.place: functools.partial(_look, "volume", Path(m.place), table, None) for m in table if m.holds_data}
    usable = [f for f in within(_VOLUME_SECONDS, calls).values() if f.writable and not f.is_file and not f.read_only]
    return max(usable, key=lambda found: found.free, default=None)


def _user() -> str:
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (OSError, KeyError, ImportError):
        return "user"


def _expand(path: str) -> Path:
    """With the user's home folder; as it stands for a user who has none, where Path.expanduser would raise."""
    return Path(os.path.expanduser(path))  # noqa: PTH111
