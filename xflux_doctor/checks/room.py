"""ST: the room that this job takes on each mount, against what is free there."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import msgspec

from xflux_doctor.bill import dataset, need, spec_of, views
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.facts import Folder
from xflux_doctor.finding import Finding, error
from xflux_doctor.gather.environment import is_offline

GIB = 1 << 30
_HUB_FILES = 60
"""Files, links and locks of one download in diffusers' layout."""

_RESULTS = {"lora": "the adapter", "finetune": "the transformer", "controlnet": "the ControlNet"}


class Share(msgspec.Struct, frozen=True):
    """What this job will put into one of its places."""

    purpose: str
    what: str
    bytes: int
    files: int


def offline(case: Case) -> bool:
    """Whether nothing may be fetched: by `--offline`, or as the hub library reads its variables."""
    return case.job.offline or is_offline(case.facts.environment)


def downloads(case: Case) -> bool:
    """Whether weights will come from the hub. Unknown counts as no."""
    cache = case.facts.hub_cache
    return cache is not None and not cache.complete and not offline(case)


def to_download(case: Case) -> int:
    """Bytes that the hub still has to send: the parts that the trainer reads, in bf16, less what is cached."""
    assert case.facts.hub_cache is not None
    spec = spec_of(case)
    parameters: int = spec.transformer_parameters + spec.t5_parameters + spec.clip_parameters + spec.vae_parameters
    return max(0, 2 * parameters - case.facts.hub_cache.present)


def shares(case: Case) -> tuple[Share, ...]:
    """Every place's share, without what an earlier run left there already. Raises SkipCheck as `need` does."""
    train, folders = case.job.train, case.facts.folders or {}
    assert train is not None
    found = []
    if downloads(case):
        found.append(Share("hub", "the model's download", to_download(case), _HUB_FILES))
    terms = need(case).disk
    samples = dataset(case).count
    cache, output = folders.get("cache"), folders.get("output")
    each = views(train)
    # Beside these one caption, and one condition for each size.
    files = each + 1 + (len(train.sizes) if train.mode == "controlnet" else 0)
    left = max(0, samples - (cache.entries if cache else 0) // each)
    encoded = sum(term.bytes for term in terms if term.phase == "cache")
    what = "encoded images, captions and conditions" if train.mode == "controlnet" else "encoded images and captions"
    found.append(Share("cache", what, encoded * left // max(1, samples), files * left))
    written = sum(term.bytes for term in terms if term.phase != "cache")
    checkpoints = next((term.bytes for term in terms if term.name == "checkpoints"), 0)
    if train.resume_from_checkpoint and output and train.checkpoints_total_limit:
        kept = min(output.entries, train.checkpoints_total_limit)
        written -= min(checkpoints, checkpoints * kept // (train.checkpoints_total_limit + 1))
    found.append(Share("output", f"checkpoints and {_RESULTS[train.mode]}", written, 100))
    return tuple(found)


def group(case: Case) -> dict[str, list[tuple[Share, Folder]]]:
    """The shares by the file system that they fall on; places that gave no answer are ST101's."""
    groups: dict[str, list[tuple[Share, Folder]]] = {}
    for share in shares(case):
        folder = (case.facts.folders or {}).get(share.purpose)
        if folder and not folder.error:
            groups.setdefault(folder.device or folder.mount or folder.existing, []).append((share, folder))
    return groups


def of_output(case: Case) -> int:
    """Bytes that the run puts on the output's own file system: checkpoints, and the cache where it lies there too."""
    for pairs in group(case).values():
        if any(share.purpose == "output" for share, _ in pairs):
            return sum(share.bytes for share, _ in pairs if share.purpose != "hub")
    return 0


@check("ST102", "every mount has the room for what this job puts there", needs=("train", "folders"))
def room(case: Case) -> Iterator[Finding]:
    """The download, the cache and the checkpoints, summed by mount, against statvfs (the output alone is DA102's)."""
    unknown, full = [], False
    for pairs in group(case).values():
        folder = pairs[0][1]
        wanted, free = sum(share.bytes for share, _ in pairs), folder.free
        if not folder.total:  # file systems over object storage do not tell
            unknown.append(folder.mount)
        elif wanted > free and not _is_of_da102(pairs, free):
            full = True
            parts = "; ".join(
                f"{share.what} {share.bytes / GIB:.1f} ({place.path})" for share, place in pairs if share.bytes
            )
            yield error(
                f"{_named(folder)} has {free / GIB:.1f} GiB free; this job puts about {wanted / GIB:.1f} GiB there: "
                f"{parts}.",
                "It ends in 'No space left on device'.",
                *_elsewhere(case, pairs, wanted),
            )
    if unknown and not full:
        raise SkipCheck(f"{', '.join(unknown)} does not say how much room it has")


def _is_of_da102(pairs: list[tuple[Share, Folder]], free: int) -> bool:
    """The output's own share does not fit: one finding is enough."""
    has_output = any(share.purpose == "output" for share, _ in pairs)
    return has_output and sum(share.bytes for share, _ in pairs if share.purpose != "hub") > free


def _elsewhere(case: Case, pairs: list[tuple[Share, Folder]], wanted: int) -> tuple[str]:
    """Name a place of this machine that has the room, and the setting that leads there."""
    largest = max(pairs, key=lambda pair: pair[0].bytes)[0].purpose
    setting = {"hub": "HF_HOME", "cache": "cache_dir", "output": "output_dir"}[largest]
    full = pairs[0][1].device
    others = [f for f in (case.facts.folders or {}).values() if f.device != full and f.writable and f.free > wanted]
    if not others:
        return (f"Free some room, or point {setting} at a larger volume.",)
    best = max(others, key=lambda folder: folder.free)
    return (f"Point {setting} at {best.mount or best.existing}, which has {best.free / GIB:.0f} GiB free.",)


def _named(folder: Folder) -> str:
    return f"{folder.mount or folder.existing} ({folder.kind})" if folder.kind else folder.mount or folder.existing


@check("ST103", "every mount has inodes for the files of this job", needs=("train", "folders"))
def inodes(case: Case) -> Iterator[Finding]:
    """A file system that is out of inodes says 'No space left on device' while df shows room (statvfs, f_favail)."""
    for pairs in group(case).values():
        folder = pairs[0][1]
        wanted = sum(share.files for share, _ in pairs)
        if folder.inodes_free is not None and wanted > folder.inodes_free:
            yield error(
                f"{_named(folder)} has {folder.inodes_free:,} free inodes; this job makes about {wanted:,} files.",
                "'No space left on device', though df shows free room.",
                "Remove folders of many small files there, or use another mount.",
                commands=(f"df -i {shlex.quote(folder.existing)}",),
            )
