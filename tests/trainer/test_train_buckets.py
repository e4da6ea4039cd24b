"""Buckets of one area: how many, how large, and which an image falls into. Torch-free."""

from __future__ import annotations

import math

import pytest
from xflux_trainer.buckets import FLATTEST, STEP, area_buckets, enlarged, target_size


@pytest.mark.parametrize("size", [256, 512, 768, 1024, 1536])
def test_buckets_of_an_area(size: int) -> None:
    found = area_buckets(size)
    assert (size, size) in found
    for width, height in found:
        assert width % STEP == height % STEP == 0
        assert 1 / FLATTEST - 1e-9 <= width / height <= FLATTEST + 1e-9
        assert width * height <= size * size
        assert width * height > size * size - STEP * max(width, height)  # no larger side would fit
        assert (height, width) in found


@pytest.mark.parametrize(
    ("image", "target"),
    [
        ((512, 512), (512, 512)), ((4000, 4000), (512, 512)), ((1920, 1080), (640, 384)), ((1080, 1920), (384, 640)),
        ((520, 500), (512, 512)), ((10000, 100), (768, 320)), ((100, 10000), (320, 768)),
    ],
)  # fmt: skip
def test_the_bucket_of_the_nearest_aspect(image: tuple[int, int], target: tuple[int, int]) -> None:
    found = target_size(*image, 512, None, "area")
    assert found in area_buckets(512)
    aspect = math.log(image[0] / image[1])
    assert all(
        abs(math.log(found[0] / found[1]) - aspect) <= abs(math.log(w / h) - aspect) + 1e-9
        for w, h in area_buckets(512)
    )
    assert found == target


def test_a_crop_comes_before_the_bucket() -> None:
    assert target_size(2000, 1000, 512, 1.0, "area") == (512, 512)
    assert target_size(1000, 2000, 512, 16 / 9, "area") == target_size(900, 1600, 512, None, "area")


@pytest.mark.parametrize("size", range(32, 320, 16))
def test_every_size_has_buckets(size: int) -> None:
    assert area_buckets(size)
    assert target_size(300, 200, size, None, "area") in area_buckets(size)


def test_how_much_is_made_up() -> None:
    assert enlarged(100, 50, (200, 100)) == 2
    assert enlarged(4000, 3000, (512, 384)) < 1
    assert enlarged(512, 200, (512, 256)) == 1.28
