"""The pixels that an image is brought to: its crop, its size, and which images can share a batch. Torch-free."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from pathlib import Path

from xflux_trainer.config import PATCH

RATIOS = (None, 16 / 9, 4 / 3, 1.0)
"""What random_ratio chooses from; None keeps the image's own."""
STEP = 64
"""Pixels between the sides of buckets of one area: few enough buckets that batches fill up."""
FLATTEST = 3.0
"""Width over height of the flattest bucket of an area; the steepest is its inverse."""


def choose_ratio(image: Path, root: Path, seed: int, random_ratio: bool) -> float | None:
    """The crop of one image. It follows from its path, because images are encoded once."""
    if not random_ratio:
        return None
    # Names are bytes: one that is not UTF-8 has a crop as well.
    name = f"{seed}:".encode() + os.fsencode(image.relative_to(root).as_posix())
    return RATIOS[hashlib.blake2b(name, digest_size=8).digest()[0] % len(RATIOS)]


def target_size(
    width: int, height: int, img_size: int, ratio: float | None, bucket_by: str = "long_side"
) -> tuple[int, int]:
    """Width and height that an image of `width` x `height` is brought to.

    `long_side`: the long side is img_size, both sides are multiples of 16. `area`: the bucket of about
    img_size x img_size pixels whose aspect is nearest, both sides multiples of 64.
    """
    wide, high = float(width), float(height)
    if ratio is not None:
        ratio = ratio if width >= height else 1 / ratio
        wide, high = min(wide, high * ratio), min(high, wide / ratio)
    if bucket_by == "area":
        aspect = math.log(wide / high)
        # Of two that are equally near the first wins, so the order of the list is part of the answer.
        return min(area_buckets(img_size), key=lambda size: abs(math.log(size[0] / size[1]) - aspect))
    scale = img_size / max(wide, high)

    def side(length: float) -> int:
        # A side that is a hair below a multiple because of the division is that multiple.
        return max(PATCH, int(length * scale / PATCH + 1e-6) * PATCH)

    return side(wide), side(high)


@functools.lru_cache(maxsize=64)
def area_buckets(img_size: int) -> tuple[tuple[int, int], ...]:
    """Every (width, height) in steps of 64 with an aspect from 1:3 to 3:1 and at most img_size squared pixels.

    For each width the largest height, so that none needs more memory than the square.
    """
    step = STEP if img_size >= STEP else PATCH
    area = img_size * img_size
    found = set()
    for long in range(step, area // step + 1, step):
        short = area // long // step * step
        if short and short <= long and long / short <= FLATTEST + 1e-9:
            found |= {(long, short), (short, long)}
    return tuple(sorted(found))


def enlarged(width: int, height: int, target: tuple[int, int]) -> float:
    """How many times larger than its file an image is drawn to cover `target`; at most 1: nothing is made up."""
    return max(target[0] / width, target[1] / height)
