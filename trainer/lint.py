"""What a training set that can be read still gets wrong: too few pixels, copies, batches that do not fill up.

Torch-free, and quick: it works on a `Survey`, and opens nothing but files of one length.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from xflux_trainer.buckets import choose_ratio, enlarged, target_size
from xflux_trainer.config import TrainConfig
from xflux_trainer.imagefile import EXTENSIONS, at_once
from xflux_trainer.samples import Opened, Survey, walk

Size = tuple[int, int]


class Fill(NamedTuple):
    """How the batches of one pass fill up. `places` are images that come, `repeated` those that come once more."""

    buckets: dict[Size, int]
    places: int
    repeated: int
    batches: int


def targets(look: Opened, config: TrainConfig) -> list[Size]:
    """Width and height of one image at every size that it is trained at; none where its own are not known."""
    if look.size is None or not min(look.size):
        return []
    root = Path(config.img_dir)
    ratio = choose_ratio(Path(look.path), root, config.seed, config.random_ratio)
    return [target_size(*look.size, size, ratio, config.bucket_by) for size in config.sizes]


def enlargement(look: Opened, config: TrainConfig) -> float:
    """How many times larger than its file the image is drawn at its largest size; 0 where that is not known."""
    if look.size is None:
        return 0
    return max((enlarged(*look.size, target) for target in targets(look, config)), default=0)


def times(path: str, config: TrainConfig) -> int:
    """How often an image counts in one pass: as the nearest folder above it that `repeats` names."""
    named = {os.path.normpath(folder): count for folder, count in config.repeats}
    folder = os.path.dirname(os.path.relpath(path, config.img_dir)) if named else ""  # noqa: PTH120
    while folder not in named and folder not in ("", "."):
        folder = os.path.dirname(folder)  # noqa: PTH120
    return named.get(folder or ".", 1)


def fill(survey: Survey, config: TrainConfig) -> Fill | None:
    """The batches of one pass; None where not every image's pixels are known, as in tables and in large sets."""
    if survey.tables or survey.opened < len(survey.paths) or any(look.size is None for look in survey.looks):
        return None
    buckets: Counter[Size] = Counter()
    for look in survey.looks:
        for target in targets(look, config):
            buckets[target] += times(look.path, config)
    batch = config.train_batch_size
    repeated = sum(-count % batch for count in buckets.values())
    places = sum(buckets.values())
    return Fill(dict(buckets), places, repeated, (places + repeated) // batch)


def unnamed_folders(survey: Survey, config: TrainConfig) -> list[str]:
    """Folders that `repeats` names and below which no image lies for which they are the nearest."""
    named = {os.path.normpath(folder): folder for folder, _ in config.repeats}
    used = set()
    for folder in survey.folders:
        while folder not in named and folder not in ("", "."):
            folder = os.path.dirname(folder) or "."  # noqa: PTH120
        used.add(folder)
    return [shown for folder, shown in named.items() if folder not in used]


def without_condition(survey: Survey, config: TrainConfig) -> list[str] | None:
    """Images that have no file of their relative name below control_dir; None where that is no folder."""
    folder = config.control_dir or ""
    if not os.path.isdir(folder):  # noqa: PTH112
        return None
    found = set()
    for place, names in walk(Path(folder), []):
        base = os.path.relpath(place, folder)
        for name in names:
            stem, ending = os.path.splitext(name)  # noqa: PTH122
            if ending.lower() in EXTENSIONS:
                found.add(os.path.normpath(os.path.join(base, stem)))  # noqa: PTH118
    stems = {path: os.path.splitext(os.path.relpath(path, config.img_dir))[0] for path in survey.paths}  # noqa: PTH122
    return [path for path, stem in stems.items() if stem not in found]


def copies(paths: tuple[str, ...], most: int = 2000, budget: int = 256 << 20) -> list[tuple[str, str]]:
    """(image, the earlier one that it equals byte for byte).

    Only files of one length are opened, `most` at the most, and only those that begin alike are read on, until
    `budget` bytes are read: a quick look finds the copies that are there by mistake, and the trainer counts all.
    """
    lengths: dict[int, list[str]] = {}
    for path in paths:
        try:
            lengths.setdefault(os.stat(path).st_size, []).append(path)  # noqa: PTH116 - there may be many thousands
        except OSError:
            continue
    alike: dict[tuple[int, bytes], list[str]] = {}
    candidates = [(length, path) for length, group in lengths.items() if len(group) > 1 for path in group]
    for length, path in candidates[:most]:
        alike.setdefault((length, _digest(path, _HEAD)), []).append(path)
    found = []
    for (length, _), group in alike.items():
        first: dict[bytes, str] = {}
        for path in group if len(group) > 1 and length * len(group) <= budget else ():
            budget -= length
            owner = first.setdefault(_digest(path, length), path)
            if owner != path:
                found.append((path, owner))
    return found


_HEAD = 4096


def _digest(path: str, length: int) -> bytes:
    """Of the file's first bytes; of one that cannot be read its name, which no other file's bytes hash to."""
    try:
        with open(path, "rb", opener=at_once) as file:
            return hashlib.blake2b(file.read(length), digest_size=16).digest()
    except OSError:
        return os.fsencode(path)
