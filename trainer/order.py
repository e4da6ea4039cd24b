"""Which images make up which batch, and which of an image's views is taken.

The order is a pure function of the seed and the batch's number. Batches are one stream over all epochs, of which
rank r of W takes the numbers with number % W == r: a resumed run, a run of two ranks and a run of one with twice the
accumulation all see the same images, whatever the number of images.
"""

from __future__ import annotations

import hashlib
import random
import threading
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from xflux_trainer.config import TrainConfig
from xflux_trainer.shuffle import Shuffler

Numbers = NDArray[np.int32]
FLIPPED, SILENT = 1, 2
"""Bits of a view: the mirror image, and without its caption."""


def buckets_of(shapes: Sequence[tuple[int, ...]], repeats: Sequence[int] | None = None) -> list[Numbers]:
    """The images of each shape, in the shapes' order; an image that counts k times is there k times."""
    kinds = {shape: place for place, shape in enumerate(sorted(set(shapes)))}
    return split(np.fromiter((kinds[shape] for shape in shapes), np.int32, len(shapes)), repeats)


def split(kinds: Numbers, repeats: Sequence[int] | None = None) -> list[Numbers]:
    """The places of each kind from 0 on, ascending."""
    places = np.argsort(kinds, kind="stable").astype(np.int32)
    ends = np.cumsum(np.bincount(kinds))
    buckets = np.split(places, ends[:-1]) if len(kinds) else []
    if repeats is None:
        return buckets
    times = np.asarray(repeats)
    return [np.repeat(bucket, times[bucket]) for bucket in buckets]


def epoch_batches(buckets: Sequence[Numbers], batch: int, seed: int, epoch: int) -> Numbers:
    """(batches, batch) image numbers of one epoch; the images of a batch have one shape.

    Incomplete batches are filled up from the start of their shape's list. Every image is in at least one batch.
    """
    dice = Shuffler(random.Random(f"{seed}:{epoch}"))  # noqa: S311 (not for secrets)
    rows = []
    for bucket in buckets:
        numbers = array("i", np.ascontiguousarray(bucket, np.int32).tobytes())
        dice.shuffle(numbers)
        count = -(-len(numbers) // batch) * batch
        rows.append(np.resize(np.frombuffer(numbers, np.int32), count).reshape(-1, batch))
    places = array("i", range(sum(len(row) for row in rows)))
    dice.shuffle(places)
    return np.concatenate(rows)[np.frombuffer(places, np.int32)]


class Order:
    """Batch number to image numbers, for all epochs.

    An image's number has its view on top of it: view * images + image, which `cache.Entries` understands. With `flip`
    half of the views are mirror images; a share of `dropout` is without its caption.
    """

    def __init__(
        self, buckets: Sequence[Numbers], batch: int, seed: int, *, flip: bool = False, dropout: float = 0.0
    ) -> None:
        self._buckets = [bucket for bucket in buckets if len(bucket)]
        self._batch, self._seed = batch, seed
        self._flip, self._dropout = flip, dropout
        self.images = 1 + max((int(bucket.max()) for bucket in self._buckets), default=-1)
        self.per_epoch = sum(-(-len(bucket) // batch) for bucket in self._buckets)
        """Batches in one pass over the images, of all ranks together."""
        self._epochs: dict[int, Numbers] = {}
        """The newest two that were asked for: around an epoch's end threads that read ahead ask for either."""
        self._lock = threading.Lock()

    @classmethod
    def of(cls, buckets: Sequence[Numbers], config: TrainConfig) -> Order:
        """As the config asks for it."""
        return cls(
            buckets, config.train_batch_size, config.seed, flip=config.random_flip, dropout=config.caption_dropout
        )

    def __getitem__(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.per_epoch)
        with self._lock:
            if epoch not in self._epochs:
                kept = list(self._epochs.items())[-1:]
                self._epochs = dict([*kept, (epoch, epoch_batches(self._buckets, self._batch, self._seed, epoch))])
            picked: list[int] = self._epochs[epoch][place].tolist()
        if not self._flip and not self._dropout:
            return picked
        return [self._view(number, k, image) * self.images + image for k, image in enumerate(picked)]

    def notes(self) -> list[str]:
        """A sentence where images come once more in every pass only to fill up a batch."""
        repeated = sum(-len(bucket) % self._batch for bucket in self._buckets)
        if not repeated:
            return []
        total, shapes = sum(map(len, self._buckets)), len(self._buckets)
        fill = f"{repeated} of a pass's {total + repeated} places are filled with images that had their turn"
        return [f"{fill}: {total} images of {shapes} shapes in batches of {self._batch}."]

    def _view(self, number: int, place: int, image: int) -> int:
        """From the seed, the image and when its turn comes, and from nothing that a process remembers."""
        text = f"{self._seed}:view:{number}:{place}:{image}"
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        flipped = self._flip and digest[0] & 1
        silent = int.from_bytes(digest[8:], "big") < self._dropout * 2**64
        return (FLIPPED if flipped else 0) | (SILENT if silent else 0)
