"""Images as tensors, and which images make up which batch.

The order is a pure function of the seed and the batch's number, so a resumed run, a run of two ranks and a
run of one with twice the accumulation all see the same images.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from xflux_trainer.config import PATCH
from xflux_trainer.errors import DataError
from xflux_trainer.samples import Sample, find_samples

RATIOS = (None, 16 / 9, 4 / 3, 1.0)
"""What random_ratio chooses from; None keeps the image's own."""


def list_samples(folder: str, caption_type: str) -> tuple[list[Sample], str]:
    """The samples, and a note about images that were left out. Any problem stops the run: no image is lost silently."""
    index = find_samples(folder, caption_type)
    if index.problems:
        shown = [str(problem) for problem in index.problems[:10]]
        rest = len(index.problems) - len(shown)
        raise DataError("\n".join(shown + ([f"… and {rest} more."] if rest else [])))
    note = ""
    if index.ignored:
        note = f"{len(index.ignored)} images of other formats are left out, the first is {index.ignored[0]}."
    return list(index.samples), note


def outside(samples: list[Sample], folder: str | Path) -> list[Sample]:
    """The samples whose image does not lie below the folder, neither by its path nor behind a link."""
    root = Path(folder).resolve()
    return [
        sample
        for sample in samples
        # The parent as well: an image below the folder may itself be a link to elsewhere.
        if not any(path.is_relative_to(root) for path in (sample.image.resolve(), sample.image.parent.resolve()))
    ]


def choose_ratio(image: Path, root: Path, seed: int, random_ratio: bool) -> float | None:
    """The crop of one image. It follows from its path, because images are encoded once."""
    if not random_ratio:
        return None
    digest = hashlib.blake2b(f"{seed}:{image.relative_to(root).as_posix()}".encode(), digest_size=8).digest()
    return RATIOS[digest[0] % len(RATIOS)]


def target_size(width: int, height: int, img_size: int, ratio: float | None) -> tuple[int, int]:
    """Pixels that an image is brought to: long side `img_size`, both sides multiples of 16."""
    wide, high = float(width), float(height)
    if ratio is not None:
        ratio = ratio if width >= height else 1 / ratio
        wide, high = min(wide, high * ratio), min(high, wide / ratio)
    scale = img_size / max(wide, high)

    def side(length: float) -> int:
        # A side that is a hair below a multiple because of the division is that multiple.
        return max(PATCH, int(length * scale / PATCH + 1e-6) * PATCH)

    return side(wide), side(high)


def load_image(path: Path, img_size: int, ratio: float | None) -> Tensor:
    """(3, H, W) in [-1, 1]: scaled to cover the target and cut at its middle, never stretched."""
    try:
        with Image.open(path) as opened:
            image = _rgb(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded: {error}.", "Save it again, or remove it.") from error
    width, height = target_size(image.width, image.height, img_size, ratio)
    scale = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.uint8).copy())
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion cuts off instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def epoch_batches(shapes: Sequence[tuple[int, ...]], batch: int, world: int, seed: int, epoch: int) -> list[list[int]]:
    """Every batch of one epoch as image numbers; the images of a batch have one shape.

    Incomplete batches are filled up from the start of their shape's list, and the epoch with its own first
    batches, so that every rank gets the same number. Every image is in at least one batch.
    """
    dice = random.Random(f"{seed}:{epoch}")  # noqa: S311 (not for secrets)
    batches = []
    for shape in sorted(set(shapes)):
        numbers = [number for number, other in enumerate(shapes) if other == shape]
        dice.shuffle(numbers)
        for start in range(0, len(numbers), batch):
            batches.append([numbers[(start + k) % len(numbers)] for k in range(batch)])
    dice.shuffle(batches)
    return batches + [batches[k % len(batches)] for k in range(-len(batches) % world)]


class Order:
    """Batch number to image numbers, for all epochs. Rank r of W takes the batches with number % W == r."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], batch: int, world: int, seed: int) -> None:
        self._shapes = list(shapes)
        self._batch, self._world, self._seed = batch, world, seed
        self._epoch = -1
        self._batches: list[list[int]] = []
        self.per_epoch = len(epoch_batches(self._shapes, batch, world, seed, 0))

    def __getitem__(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._batches = epoch_batches(self._shapes, self._batch, self._world, self._seed, epoch)
            self._epoch = epoch
        return self._batches[place]
