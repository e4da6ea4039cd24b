"""From images to cache entries: read once, hashed, decoded, brought to every size, encoded where no entry is there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, overload

import torch
from PIL import Image
from xflux_trainer import conditions, entries
from xflux_trainer.buckets import choose_ratio, target_size
from xflux_trainer.conditions import ControlFiles
from xflux_trainer.config import TrainConfig
from xflux_trainer.data import decode, fit, to_tensor
from xflux_trainer.digests import Content, content_id
from xflux_trainer.encoders import ImageCodec, free
from xflux_trainer.entries import Key
from xflux_trainer.errors import DataError
from xflux_trainer.imagefile import shown
from xflux_trainer.keys import key
from xflux_trainer.layout import Base
from xflux_trainer.pulse import PULSE
from xflux_trainer.ranks import Ranks
from xflux_trainer.samples import Sample

PATIENCE = 15.0
"""Seconds between two lines about how far the work is."""


class View(NamedTuple):
    """One of an image's pictures: the pixels it has, and its entries' keys, plain and mirrored."""

    size: tuple[int, int]
    latents: tuple[Key, ...]
    condition: Key | None


@dataclass(frozen=True)
class Item:
    """One image of one set. Only the training set has all sizes and mirror images."""

    sample: Sample
    root: Path
    training: bool


class Items(Sequence[Item]):
    """The images of all sets behind each other. Each is made when it is asked for: a million take no memory."""

    def __init__(self, sets: Mapping[str, Sequence[Sample]], img_dir: str) -> None:
        self._sets = [(Path(root), root == img_dir, samples) for root, samples in sets.items()]

    def __len__(self) -> int:
        return sum(len(samples) for _, _, samples in self._sets)

    def __iter__(self) -> Iterator[Item]:
        return (Item(sample, root, training) for root, training, samples in self._sets for sample in samples)

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...
    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self[k] for k in range(*number.indices(len(self)))]
        place = range(len(self))[number]
        for root, training, samples in self._sets:
            if place < len(samples):
                return Item(samples[place], root, training)
            place -= len(samples)
        raise IndexError(number)


@dataclass(frozen=True)
class Recipe:
    """How this run makes entries of images; everything that an entry depends on besides the image."""

    config: TrainConfig
    folder: Path
    encoder: str
    """Who the VAE's weights are."""
    control: ControlFiles | None = None
    signature: str = ""

    def sizes(self, item: Item) -> tuple[int, ...]:
        return self.config.sizes if item.training else (self.config.img_size,)

    def targets(self, item: Item, content: Content) -> list[tuple[int, int]]:
        """Width and height of the image at every size that it is trained at."""
        config = self.config
        # The name is a path to be made: not for each of a million images that need none.
        ratio = (
            choose_ratio(item.sample.name, item.root, config.seed, random_ratio=True) if config.random_ratio else None
        )
        return [
            target_size(content.width, content.height, size, ratio, config.bucket_by) for size in self.sizes(item)
        ]  # fmt: skip

    def views(self, item: Item, content: Content, condition: Key) -> list[View]:
        """Every picture of the image; `condition` is the hash of its condition's file, empty where there is none."""
        views = []
        for target in self.targets(item, content):
            # What the crop and the size came from does not matter, only what they are.
            crop = (content.id.hex(), f"{target[0]}x{target[1]}")
            flips = (False, True) if self.config.random_flip and item.training else (False,)
            latents = tuple(key(self.encoder, *crop, "mirrored" if flip else "") for flip in flips)
            edges = key(self.signature, *crop, condition.hex()) if self.signature else None
            views.append(View(target, latents, edges))
        return views

    def missing(self, view: View) -> tuple[list[bool], bool]:
        """Which of a view's latents (as `flip`) and whether its condition must be made."""
        flips = [bool(k) for k, one in enumerate(view.latents) if not self.is_there("image", one)]
        lacks = view.condition is not None and not self.is_there("condition", view.condition)
        return flips, lacks

    def is_there(self, kind: str, one: Key) -> bool:
        return entries.whole(entries.place(self.folder, kind, one))

    def condition_of(self, item: Item) -> Path | None:
        """The file of the image's condition."""
        if self.control is None:
            return None
        if item.sample.row is not None:
            seen = f"{shown(item.sample.image)} is a table, and control_type is files."
            raise DataError(seen, "Set control_type to canny, or write the images as files.")
        return self.control.of(item.sample.image, item.root)


@dataclass
class Prepared:
    """An image that was read: who it is, and the pictures that must still be encoded."""

    index: int
    item: Item
    content: Content
    condition: Key = b""
    pictures: list[tuple[Image.Image, View, list[bool]]] = field(default_factory=list)


def prepare(recipe: Recipe, index: int, item: Item, content: bytes | None) -> Prepared:
    """Read, hash and decode one image, and draw its condition. Runs on a thread; raises `DataError`."""
    name = item.sample.name
    data = _read(item.sample.image) if content is None else content
    image = decode(data, name)
    found = Content(content_id(data), image.width, image.height)
    place = recipe.condition_of(item)
    control = _read(place) if place else b""
    prepared = Prepared(index, item, found, content_id(control) if place else b"")
    for view in recipe.views(item, found, prepared.condition):
        flips, lacks = recipe.missing(view)
        if not flips and not lacks:
            continue
        picture = fit(image, view.size)
        if lacks and view.condition:
            config = recipe.config
            if place:
                drawn = conditions.picture(control, place, image, view.size)
            else:
                drawn = conditions.canny(picture, config.canny_low, config.canny_high)
            entries.write(entries.place(recipe.folder, "condition", view.condition), {"condition": drawn})
        prepared.pictures.append((picture, view, flips))
    return prepared


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{shown(path)} cannot be read: {error.strerror}.", "Allow reading it, or remove it."
        ) from error


def encode(recipe: Recipe, base: Base, ranks: Ranks, work: list[tuple[int, Item]]) -> tuple[list[Prepared], int]:
    """Make the entries that these images lack. Returns who they are, and how many were encoded.

    The VAE is loaded when the first picture needs it and freed at the end.
    """
    done: list[Prepared] = []
    encoded = 0
    codec: ImageCodec | None = None
    started = told = time.monotonic()
    for prepared in _ahead(recipe, work):
        PULSE.tick()
        for picture, view, flips in prepared.pictures:
            codec = codec or ImageCodec(base, ranks.device, torch.float32)
            for flip in flips:
                latents = codec.encode(to_tensor(picture, flip=flip)).cpu().contiguous()
                if not torch.isfinite(latents).all():
                    seen = f"{shown(prepared.item.sample.name)} is encoded to numbers that are not finite."
                    raise DataError(seen, "Look at the image.")
                entries.write(entries.place(recipe.folder, "image", view.latents[int(flip)]), {"latents": latents})
        encoded += bool(prepared.pictures)
        prepared.pictures = []
        done.append(prepared)
        if (now := time.monotonic()) - told > PATIENCE:
            told = now
            left = (now - started) / len(done) * (len(work) - len(done))
            ranks.say(f"images: {len(done):,} of {len(work):,} are ready, about {max(1, round(left / 60))} min to go")
    if codec is not None:
        codec = None
        free()
    return done, encoded


def _ahead(recipe: Recipe, work: list[tuple[int, Item]]) -> Iterator[Prepared]:
    """The images, a few of them read and decoded ahead on threads."""
    workers = recipe.config.num_workers
    if workers == 0:
        for index, item, content in _contents(recipe, work):
            yield prepare(recipe, index, item, content)
        return
    with ThreadPoolExecutor(workers) as threads:
        pending: list[Future[Prepared]] = []
        try:
            for index, item, content in _contents(recipe, work):
                pending.append(threads.submit(prepare, recipe, index, item, content))
                if len(pending) >= 2 * workers:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for one in pending:
                one.cancel()


def _contents(recipe: Recipe, work: list[tuple[int, Item]]) -> Iterator[tuple[int, Item, bytes | None]]:
    """Each image; of those in tables the bytes as well, because a table is read from its start to its end."""
    for (table, path), group in groupby(work, lambda pair: (pair[1].sample.row is not None, pair[1].sample.image)):
        if not table:
            for index, item in group:
                yield index, item, None
            continue
        from xflux_trainer import parquet  # needs pyarrow

        rows = list(group)
        column = recipe.config.image_column
        contents = parquet.read_images(path, column, [item.sample.row or 0 for _, item in rows])
        for (index, item), (_, content) in zip(rows, contents, strict=True):
            yield index, item, content
