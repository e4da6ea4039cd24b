"""ST: the mounts under the job's places: do they answer, may they be written, will they keep what is written.

Room and inodes are in checks/room.py. `Facts.folders` holds everything; nothing is looked at here.
"""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterator

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.room import GIB, downloads, of_output
from xflux_doctor.facts import Folder
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.gather.mounts import NETWORK

MIB = 1 << 20
_MEMORY = ("tmpfs", "ramfs")
_OBJECTS = ("s3", "gcsfuse", "goofys", "rclone", "blobfuse", "ossfs", "cosfs")
"""Words in the type of a FUSE mount over object storage."""
_SETTINGS = {
    "torch_extensions": "TORCH_EXTENSIONS_DIR",
    "triton": "TRITON_CACHE_DIR",
    "hub": "HF_HOME",
    "cache": "cache_dir",
    "output": "output_dir",
    "images": "img_dir",
    "model": "pretrained_model",
    "temporary": "TMPDIR",
    "home": "HOME",
}
_RELEASED = 2026
"""The year of this doctor: an earlier one on the clock is wrong."""


def _folder(case: Case, purpose: str) -> Folder | None:
    """The place, if the job has it and it answered."""
    folder = (case.facts.folders or {}).get(purpose)
    return folder if folder and not folder.error else None


def _caches(case: Case) -> list[str]:
    """The compile caches that this job uses."""
    used = ["torch_extensions"] if case.job.compiled_ops else []
    return [*used, "triton"] if case.job.deepspeed and "triton" in (case.facts.packages or {}) else used


def _used(case: Case) -> list[str]:
    """Every place that this job cannot do without."""
    hub = ["hub"] if case.job.train and "model" not in (case.facts.folders or {}) else []
    return ["output", "cache", "images", "model", "temporary", "home", *hub, *_caches(case)]


@check("ST101", "every place that the job uses answers", needs=("folders",))
def answers(case: Case) -> Iterator[Finding]:
    """A network mount whose server is gone makes every process that touches it wait for ever (nfs(5), `hard`)."""
    silent: dict[str, list[str]] = {}
    for purpose in _used(case):
        folder = (case.facts.folders or {}).get(purpose)
        if folder and folder.error:
            kind = f" ({folder.kind})" if folder.kind else ""
            silent.setdefault(f"{folder.mount or folder.path}{kind}: {folder.error}", []).append(_SETTINGS[purpose])
    for seen, settings in silent.items():
        yield error(
            f"{seen}.",
            f"The training would wait there, or end. It is the place of {', '.join(settings)}.",
            "Have the mount repaired, or name places on another one.",
        )


@check("ST104", "what should stay is on a disk", needs=("train", "folders"))
def on_a_disk(case: Case) -> Iterator[Finding]:
    """tmpfs is memory: it is gone after a restart, and counts against the container's limit (tmpfs(5))."""
    what = {"output": "The output", "cache": "The cache", "hub": "The hub cache"}
    found: dict[str, list[str]] = {}
    for purpose in ("output", "cache", *(["hub"] if downloads(case) else [])):
        folder = _folder(case, purpose)
        if folder and folder.kind in _MEMORY:
            found.setdefault(f"{folder.mount} ({folder.kind})", []).append(purpose)
    for mount, purposes in found.items():
        settings = " and ".join(_SETTINGS[purpose] for purpose in purposes)
        yield warning(
            f"{', '.join(what[purpose] for purpose in purposes)}: {mount}, which is memory.",
            "It is lost when the machine or the container is restarted, and takes the memory that the ranks need.",
            f"Point {settings} at a disk.",
        )


@check("ST105", "the output outlives the container", needs=("train", "folders"))
def outlives_container(case: Case) -> Iterator[Finding]:
    """What is written to a container's own layer goes with the container (Docker's documentation, volumes)."""
    folder, volume = _folder(case, "output"), _folder(case, "volume")
    if folder is None:
        raise SkipCheck("the output folder did not answer (see ST101)")
    if folder.kind != "overlay" or folder.mount != "/" or volume is None:
        return
    if volume.free > max(of_output(case), 10 * GIB):
        yield warning(
            f"output_dir {folder.path} is on the container's own disk; {volume.mount} ({volume.kind}) is mounted "
            f"beside it with {volume.free / GIB:.0f} GiB free.",
            "Checkpoints and the adapter are lost with the container.",
            f"If {volume.mount} is kept when the container ends, set output_dir to a folder there.",
            docs="https://docs.docker.com/engine/storage/volumes/",
        )


@check("ST106", "the caches can be written", needs=("train", "folders"))
def caches_writable(case: Case) -> Iterator[Finding]:
    """The trainer writes every encoded image, and the hub library what it downloads (output_dir itself is DA102's)."""
    output = _folder(case, "output")
    for purpose in ("cache", *(["hub"] if downloads(case) else [])):
        folder = _folder(case, purpose)
        if folder is None or (output and folder.existing == output.existing):
            continue
        if folder.is_file or folder.read_only or not folder.writable:
            why = "is a file" if folder.is_file else "cannot be written by this user"
            why = f"is on {folder.mount}, which is mounted read-only" if folder.read_only else why
            yield error(
                f"{folder.existing} {why}.",
                "Images cannot be encoded." if purpose == "cache" else "The model cannot be downloaded.",
                f"Point {_SETTINGS[purpose]} at a folder that you may write to.",
            )


@check("ST107", "compile caches are on a local disk", needs=("folders",))
def caches_local(case: Case) -> Iterator[Finding]:
    """DeepSpeed warns of hangs with ~/.triton on NFS (DeepSpeed@v0.14.4 inference/triton/matmul_ext.py)."""
    if not (used := _caches(case)):
        raise SkipCheck("this job compiles nothing")
    for purpose in used:
        folder = _folder(case, purpose)
        if folder and folder.kind in NETWORK:
            yield warning(
                f"{folder.path} is on {folder.mount} ({folder.kind}).",
                "Ranks compile and lock there over the network: slow, and known to hang when DeepSpeed ends.",
                f"Point {_SETTINGS[purpose]} at a local disk.",
                commands=(f"export {_SETTINGS[purpose]}=/tmp/{purpose}-$USER",),
                docs="https://github.com/deepspeedai/DeepSpeed/blob/v0.14.4/deepspeed/ops/transformer/inference/triton/matmul_ext.py",
            )


@check("ST108", "compiled operators may be loaded from their cache", needs=("folders",))
def may_load(case: Case) -> Iterator[Finding]:
    """A library cannot be loaded from a mount with noexec (mount(8)); operators are, from TORCH_EXTENSIONS_DIR."""
    if not (used := _caches(case)):
        raise SkipCheck("this job compiles nothing")
    for purpose in used:
        folder = _folder(case, purpose)
        if folder and folder.no_exec:
            make = error if purpose == "torch_extensions" else warning
            yield make(
                f"{folder.path} is on {folder.mount}, which is mounted noexec.",
                "'failed to map segment from shared object' when the compiled file is loaded.",
                f"Point {_SETTINGS[purpose]} at a folder on another mount.",
            )


@check("ST109", "temporary files have a place", needs=("folders",))
def temporary(case: Case) -> Iterator[Finding]:
    """Python silently takes another folder than an unusable TMPDIR (tempfile.gettempdir); compilers and tools fail."""
    folder = _folder(case, "temporary")
    if folder is None:
        raise SkipCheck("the folder of temporary files did not answer (see ST101)")
    because = "Compilers and launchers put files there; Python takes another folder without a word."
    if folder.path != folder.existing:
        yield warning(
            f"TMPDIR is {folder.path} and there is no such folder.",
            because,
            "Make it, or set TMPDIR to one that is there.",
            commands=(f"mkdir -p {shlex.quote(folder.path)}",),
        )
    elif folder.is_file or folder.read_only or not folder.writable:
        yield warning(
            f"{folder.path}, for temporary files, cannot be written by this user.",
            because,
            "Set TMPDIR to a folder that you may write to.",
        )
    elif folder.total and (folder.free < 256 * MIB or folder.inodes_free == 0):
        yield warning(
            f"{folder.path}, for temporary files, has {folder.free / MIB:.0f} MiB free on {folder.mount}.",
            "'No space left on device' while the job starts or compiles.",
            "Free some room, or set TMPDIR to a larger mount.",
            commands=(f"df -h {shlex.quote(folder.path)}",),
        )


@check("ST110", "libraries can write their caches", needs=("folders",))
def home_writable(case: Case) -> Iterator[Finding]:
    """A user whose home is / or read-only has no ~/.cache and no ~/.triton (usual for a container's arbitrary user)."""
    for purpose in _caches(case):
        folder = _folder(case, purpose)
        if folder and (folder.is_file or folder.read_only or not folder.writable):
            make = error if purpose == "torch_extensions" else warning
            yield make(
                f"{folder.path} cannot be made or written by this user (HOME is {_home(case)}).",
                "Compiled operators have no place: 'PermissionError'."
                if purpose == "torch_extensions"
                else "DeepSpeed 0.14 makes it when it is imported: 'PermissionError'.",
                f"Point {_SETTINGS[purpose]} or HOME at a folder that you may write to.",
                commands=(f"export {_SETTINGS[purpose]}=/tmp/{purpose}-$USER",),
            )


def _home(case: Case) -> str:
    home = (case.facts.folders or {}).get("home")
    return home.path if home else "not known"


@check("ST111", "the clock is right")
def clock(case: Case) -> Iterator[Finding]:
    """With a clock that is years behind no certificate is valid yet, and downloads fail (RFC 5280, 4.1.2.5)."""
    try:
        year = datetime.datetime.fromisoformat(case.facts.created).year
    except ValueError:
        raise SkipCheck("these facts do not say when they were made") from None
    if year < _RELEASED:
        yield warning(
            f"The clock says {case.facts.created[:10]}; this doctor was released in {_RELEASED}.",
            "Certificates are 'not yet valid': nothing can be downloaded, and files get wrong times.",
            "Set the clock.",
            commands=("sudo timedatectl set-ntp true",),
        )


@check("ST112", "no broken-off downloads fill the disk", needs=("folders",))
def leftovers(case: Case) -> Iterator[Finding]:
    """The hub library keeps `*.incomplete` of downloads that ended, and the trainer's cache `.xflux-tmp-*`."""
    patterns = {"hub": "*.incomplete", "cache": ".xflux-tmp-*"}
    for purpose, pattern in patterns.items():
        folder = _folder(case, purpose)
        if folder and folder.leftover_bytes >= GIB:
            yield warning(
                f"{folder.path} holds {folder.leftovers} unfinished files older than an hour ({pattern}), "
                f"{folder.leftover_bytes / GIB:.1f} GiB.",
                "They take room and are of no use to this job.",
                "Remove them, if nothing is being downloaded or encoded there.",
                commands=(f"find {shlex.quote(folder.path)} -name '{pattern}' -mmin +60 -delete",),
            )


@check("ST113", "the output is on a file system that can rename", needs=("train", "folders"))
def can_rename(case: Case) -> Iterator[Finding]:
    """A checkpoint appears whole by renaming its folder; mounts of object storage copy file by file, or refuse."""
    folder = _folder(case, "output")
    if folder is None:
        raise SkipCheck("the output folder did not answer (see ST101)")
    if folder.kind.startswith("fuse") and any(word in folder.kind for word in _OBJECTS):
        yield warning(
            f"output_dir {folder.path} is on {folder.mount} ({folder.kind}), a mount of object storage.",
            "Renaming a folder is a copy there, or not possible: a checkpoint can be half written, or fail.",
            "Set output_dir to a disk, and copy the finished run to the store.",
        )
