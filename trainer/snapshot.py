"""What an earlier start made of a training set: its samples and its entries, as arrays in the cache, of which
large ones are mapped. A start that finds all as it was takes them, and makes nothing for each image.

All as it was: every file below the folders has the name, length, time of change and inode that it had, with the
exception of `digests`: what changed within the last seconds is not believed. Entries are asked for their length.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xflux_trainer import entries, files, keys
from xflux_trainer.config import TrainConfig
from xflux_trainer.digests import FRESH
from xflux_trainer.entries import KEY, Entries
from xflux_trainer.errors import WriteError
from xflux_trainer.samples import Sample
from xflux_trainer.sampletable import Samples, digest_of

VERSION = 1
MAPPED = 32 << 20
"""Bytes from which on an array is mapped. What other machines of a network disk replace meanwhile is gone for a mapping
of this one, and the process with it: what training reads, 28 bytes an image, is in memory up to a million images."""
MANIFEST = "index.json"
LISTED = ("heldout_samples", "caption_type", "image_column", "caption_column")
"""What decides which samples there are, beside the folders."""
ENCODED = (
    "img_size", "resolutions", "bucket_by", "repeats", "random_flip", "random_ratio", "max_text_tokens", "text_padding",
)  # fmt: skip
"""What decides which entries they have, beside who encodes them."""


class Known(NamedTuple):
    """The entries of each set by its folder, and what was said of its images."""

    sets: dict[str, Entries]
    notes: list[str]


def stamp(config: TrainConfig) -> str | None:
    """What the samples of a run follow from, as a hash; None where a file has changed just now, or cannot be asked.

    To be taken before the samples are listed. A million files take some seconds, of which the system has most.
    """
    digest = hashlib.sha256(repr((VERSION, [getattr(config, name) for name in LISTED])).encode())
    started = time.time_ns()
    newest = 0
    controls = config.control_dir if config.mode == "controlnet" and config.control_type == "files" else None
    try:
        for folder in (config.img_dir, config.heldout_dir, controls):
            spelled = (folder, os.path.abspath(folder)) if folder else ()  # noqa: PTH100 - the samples' paths as well
            digest.update(repr(tuple(map(os.fsencode, spelled))).encode())
            newest = max(newest, _add(digest, folder) if folder else 0)
    except (OSError, OverflowError):
        return None
    return digest.hexdigest() if started - newest >= FRESH else None


def _add(digest: Any, root: str) -> int:
    """Add the state of every file below the folder, and return the newest time of change (ns).

    The files of a folder come as the system lists them: where nothing changes, that does not either.
    """
    newest, visited, waiting = 0, set(), [root]
    while waiting:
        folder = waiting.pop()
        own = os.stat(folder)  # noqa: PTH116
        if (own.st_dev, own.st_ino) in visited:  # a link that leads back up
            continue
        visited.add((own.st_dev, own.st_ino))
        names, numbers, below = [], array("q"), []
        with os.scandir(folder) as listing:
            for entry in listing:
                name = entry.name
                if name.startswith("."):
                    continue
                seen = entry.stat()
                if stat.S_ISDIR(seen.st_mode):
                    below.append(entry.path)
                    continue
                names.append(name)
                numbers.extend((seen.st_size, seen.st_mtime_ns, seen.st_ino))
        digest.update(b"%d:%b/%b/" % (len(names), os.fsencode(folder), os.fsencode("/".join(names))))
        digest.update(numbers)
        newest = max(newest, max(numbers[1::3], default=0))
        waiting += sorted(below, reverse=True)
    return newest


def encoding(config: TrainConfig, text: str, image: str, conditions: str) -> str:
    """What the entries of a run follow from, beside its samples. The three say who encodes, and draws, what."""
    values: list[Any] = [getattr(config, name) for name in ENCODED]
    values += [config.seed if config.random_ratio else None, config.caption_dropout > 0]
    parts = (VERSION, keys.VERSION, text, image, conditions, values)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


# Reading ------------------------------------------------------------------------------------------------


def listing(config: TrainConfig, stamp: str) -> tuple[dict[str, Samples], str, list[str]] | None:
    """The samples by folder, the held-out ones' folder and the notes, as an earlier start had them."""
    place = _place(config)
    manifest = _manifest(place)
    if manifest.get("stamp") != stamp:
        return None
    try:
        return (
            {
                root: Samples(_load(place, manifest, f"samples-{k}"), config.caption_type, stamp, digest)
                for k, (root, digest) in enumerate(zip(_roots(config), manifest["digests"], strict=True))
            },
            config.heldout_dir or config.img_dir,
            list(manifest["said"]),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def find(config: TrainConfig, stamp: str, encoding: str, *, check: bool) -> Known | None:
    """The entries of an earlier start of the same stamps. `check`: look whether all of them are there still."""
    place, folder = _place(config), config.cache_path
    manifest = _manifest(place)
    if (manifest.get("stamp"), manifest.get("encoding")) != (stamp, encoding):
        return None
    try:
        if check and not _all_there(folder, _load(place, manifest, "payload")):
            return None
        sets = {}
        for k, root in enumerate(_roots(config)):
            arrays = _load(place, manifest, f"entries-{k}")
            told = manifest["entries"][k]
            silent = None if told["silent"] is None else bytes.fromhex(told["silent"])
            sets[root] = Entries(
                folder, _keys(arrays["latents"]), _keys(arrays["texts"])[:, 0], arrays["text_of"],
                [tuple(shape) for shape in told["shapes"]], arrays["shape_of"], silent=silent,
                conditions=_keys(arrays["conditions"])[:, 0] if "conditions" in arrays else None,
                repeats=arrays.get("repeats"),
            )  # fmt: skip
        return Known(sets, list(manifest["notes"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _place(config: TrainConfig) -> Path:
    """One for each pair of folders: a run with other settings takes the place of the one before."""
    name = hashlib.sha256(b"\0".join(os.fsencode(os.path.abspath(root)) for root in _roots(config))).hexdigest()[:16]  # noqa: PTH100
    return config.cache_path / f"index-{name}"


def _roots(config: TrainConfig) -> list[str]:
    return list(dict.fromkeys((config.img_dir, config.heldout_dir or config.img_dir)))


def _manifest(place: Path) -> dict[str, Any]:
    try:
        found = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _load(place: Path, manifest: dict[str, Any], kind: str) -> dict[str, NDArray[Any]]:
    """The arrays of that kind. Raises ValueError where one is not what was written."""
    found = {}
    for name, crc in manifest["arrays"][kind].items():
        file = place / f"{kind}-{name}.npy"
        large = file.stat().st_size >= MAPPED
        made = np.asarray(np.load(file, mmap_mode="r" if large else None, allow_pickle=False))
        if zlib.crc32(made) != crc:
            raise ValueError(f"{file} is damaged")
        found[name] = made
    return found


def _keys(stored: NDArray[np.uint8]) -> Any:
    """(n, m) keys of (n, m * 20) bytes."""
    return stored.view(KEY)


def _all_there(folder: Path, payload: Mapping[str, NDArray[Any]]) -> bool:
    top = os.path.join(folder, "")  # noqa: PTH118 - texts: there may be a million
    width = 2 * KEY.itemsize
    for kind in ("image", "text", "condition"):
        names, sizes = payload[f"{kind}_keys"].tobytes().hex(), payload[f"{kind}_sizes"].tolist()
        try:
            for k, size in enumerate(sizes):
                path = f"{top}{kind}-{names[k * width : (k + 1) * width]}.safetensors"
                if os.stat(path).st_size != size:  # noqa: PTH116
                    return False
        except OSError:
            return False
    return True


# Writing ------------------------------------------------------------------------------------------------


def keep(
    config: TrainConfig, encoding: str, sets: Mapping[str, Sequence[Sample]], said: Sequence[str],
    made: Mapping[str, Entries], notes: Sequence[str],
) -> None:  # fmt: skip
    """Remember what this start found, where its samples can be believed again. What cannot be written is left out."""
    stamps = {one.stamp if isinstance(one, Samples) else None for one in sets.values()}
    roots = _roots(config)
    if len(stamps) != 1 or None in stamps or list(sets) != roots:
        return
    arrays: dict[str, dict[str, NDArray[Any]]] = {}
    told = []
    try:
        for k, root in enumerate(roots):
            samples, entry = sets[root], made[root]
            assert isinstance(samples, Samples)
            arrays[f"samples-{k}"] = samples.arrays
            arrays[f"entries-{k}"] = _arrays(entry)
            silent = None if entry.silent is None else entry.silent.hex()
            told.append({"shapes": entry.shapes, "silent": silent})
        arrays["payload"] = _payload(config.cache_path, list(made.values()))
        with files.new_folder(_place(config)) as folder:
            crcs: dict[str, dict[str, int]] = {}
            for kind, members in arrays.items():
                for name, values in members.items():
                    np.save(folder / f"{kind}-{name}.npy", values, allow_pickle=False)
                    crcs.setdefault(kind, {})[name] = zlib.crc32(np.ascontiguousarray(values))
            manifest = {
                "stamp": next(iter(stamps)), "encoding": encoding, "said": list(said), "notes": list(notes),
                "digests": [digest_of(sets[root], root) for root in roots], "entries": told, "arrays": crcs,
            }  # fmt: skip
            files.write_json(folder / MANIFEST, manifest)
    except (OSError, WriteError):
        return


def _arrays(entry: Entries) -> dict[str, NDArray[Any]]:
    found = {
        "latents": _bytes(entry.latents), "texts": _bytes(entry.texts[:, None]), "text_of": entry.text_of,
        "shape_of": entry.shape_of,
    }  # fmt: skip
    if entry.conditions is not None:
        found["conditions"] = _bytes(entry.conditions[:, None])
    if entry.repeats is not None:
        found["repeats"] = entry.repeats
    return found


def _bytes(values: NDArray[np.void]) -> NDArray[np.uint8]:
    """(n, m * 20) bytes of (n, m) keys: numpy's own format keeps no voids."""
    return np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8).reshape(
        len(values), values.shape[1] * KEY.itemsize
    )


def _payload(folder: Path, sets: list[Entries]) -> dict[str, NDArray[Any]]:
    """The entries' files, each once, and their lengths. Raises OSError where one is not there."""
    found: dict[str, NDArray[Any]] = {}
    silent = np.frombuffer(b"".join(one.silent or b"" for one in sets), KEY)
    none = np.zeros(0, KEY)
    for kind, parts in {
        "image": [one.latents.ravel() for one in sets],
        "text": [*(one.texts for one in sets), silent],
        "condition": [none if one.conditions is None else one.conditions for one in sets],
    }.items():
        unique = np.unique(np.concatenate(parts))
        found[f"{kind}_keys"] = _bytes(unique[:, None])
        sizes = (entries.place(folder, kind, bytes(one)).stat().st_size for one in unique)
        found[f"{kind}_sizes"] = np.fromiter(sizes, np.int64, len(unique))
    return found
