"""The cache's files: one safetensors file for each caption, image and condition, and which of them a sample needs.

An entry carries a checksum over its numbers, which is compared whenever it is read: a disk that turned a bit, or a
copy that stopped in the middle, ends in a sentence and not in a picture of noise.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from xflux_trainer import files
from xflux_trainer.digests import ID
from xflux_trainer.errors import DataError
from xflux_trainer.imagefile import shown
from xflux_trainer.order import FLIPPED, SILENT, Numbers, split

Key = bytes
KEY = np.dtype(f"V{ID}")
Keys = NDArray[np.void]


def place(folder: Path, kind: str, key: Key) -> Path:
    """`kind` is text, image or condition."""
    return folder / f"{kind}-{key.hex()}.safetensors"


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    files.write_bytes(path, save(tensors, {"crc32": _checksum(tensors)}))


def whole(path: Path) -> bool:
    """Whether the entry is there. Opening it compares the file's size with what its header promises."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.keys())
    except (OSError, SafetensorError):
        return False


def shape(path: Path) -> tuple[int, ...]:
    """The shape of an image's latents."""
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice("latents").get_shape())
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def read(path: Path) -> dict[str, Tensor]:
    """An entry's tensors. Raises `DataError` where they are not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            written = (file.metadata() or {}).get("crc32")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    if written != _checksum(tensors):
        # Its length is right, so the next start would take it again.
        path.unlink(missing_ok=True)
        seen = f"The cache entry {shown(path)} was damaged on the disk (its checksum differs) and was removed."
        raise DataError(seen, "Start again: it is encoded anew. If this repeats, look at the disk.")
    return tensors


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"The cache entry {shown(path)} cannot be read: {error}.", "Start again: it is encoded anew.")


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


@dataclass(frozen=True)
class Entry:
    """Where one sample's latents (C, h, w) and its caption's embeddings lie."""

    latents: Path
    text: Path
    shape: tuple[int, ...]
    condition: Path | None = None
    flipped: bool = False
    """Whether `latents` are the mirror image's; the condition is mirrored when it is read."""


class Entries(Sequence[Entry]):
    """The entries of a training set, of a few dozen bytes each.

    Images come size by size: first all at img_size. Above the images' numbers lie their views (see `Order`): number
    view * len + k is entry k mirrored, without its caption, or both.
    """

    def __init__(
        self,
        folder: Path,
        latents: Keys,
        texts: Sequence[Key] | Keys,
        text_of: Numbers,
        shapes: list[tuple[int, ...]],
        shape_of: Numbers,
        *,
        silent: Key | None = None,
        conditions: Keys | None = None,
        repeats: Numbers | None = None,
    ) -> None:
        self.folder = folder
        self.latents = latents
        """(images, 1), or (images, 2) with the mirror images'."""
        self.texts: Keys = texts if isinstance(texts, np.ndarray) else np.frombuffer(b"".join(texts), KEY)
        self.text_of = text_of
        self.shapes, self.shape_of = shapes, shape_of
        self.silent, self.conditions = silent, conditions
        self.repeats = repeats

    def __len__(self) -> int:
        return len(self.text_of)

    def __iter__(self) -> Iterator[Entry]:  # Sequence's own would go on through the views
        return (self[number] for number in range(len(self)))

    @overload
    def __getitem__(self, number: int) -> Entry: ...
    @overload
    def __getitem__(self, number: slice) -> list[Entry]: ...
    def __getitem__(self, number: int | slice) -> Entry | list[Entry]:
        if isinstance(number, slice):
            return [self[k] for k in range(*number.indices(len(self)))]
        view, k = divmod(number + len(self) if number < 0 else number, max(1, len(self)))
        flipped = bool(view & FLIPPED)
        if not 0 <= view <= FLIPPED | SILENT or (flipped and self.latents.shape[1] < 2):
            raise IndexError(number)
        text = bytes(self.texts[self.text_of[k]])
        if view & SILENT:
            if self.silent is None:
                raise IndexError(number)
            text = self.silent
        condition = None if self.conditions is None else place(self.folder, "condition", bytes(self.conditions[k]))
        latents = place(self.folder, "image", bytes(self.latents[k, int(flipped)]))
        return Entry(latents, place(self.folder, "text", text), self.shapes[self.shape_of[k]], condition, flipped)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and len(self) == len(other) and all(map(Entry.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    @property
    def buckets(self) -> list[Numbers]:
        """The numbers of each shape, in the shapes' order, each as often as it counts in one pass."""
        ranks = np.argsort(sorted(range(len(self.shapes)), key=lambda kind: self.shapes[kind])).astype(np.int32)
        return split(ranks[self.shape_of], self.repeats)

    def digest(self) -> str:
        """What is trained on, in its order: images, captions, shapes, conditions and repeats, as a hash in hex.

        Mirror images do not count, which follow from the others. Of the arrays and not of their files' names: a million
        entries take a fraction of a second.
        """
        found = hashlib.sha256(repr(self.shapes).encode())
        texts = self.texts[self.text_of]
        for part in (self.latents[:, 0], texts, self.shape_of, self.conditions, self.repeats):
            data = b"" if part is None else np.ascontiguousarray(part).tobytes()
            found.update(b"%d:" % len(data) + data)
        return found.hexdigest()
