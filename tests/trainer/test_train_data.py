"""Images as tensors, and who trains on which image when."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from trainer_kit import DEMO, put  # noqa: E402
from xflux_trainer.data import (  # noqa: E402
    RATIOS,
    Order,
    choose_ratio,
    epoch_batches,
    list_samples,
    load_image,
    outside,
    target_size,
)
from xflux_trainer.entries import Entries  # noqa: E402
from xflux_trainer.errors import DataError  # noqa: E402
from xflux_trainer.order import buckets_of  # noqa: E402


@pytest.mark.parametrize(
    ("size", "img_size", "ratio", "target"),
    [
        ((512, 512), 512, None, (512, 512)),
        ((1920, 1080), 512, None, (512, 288)),
        ((1080, 1920), 512, None, (288, 512)),
        ((100, 50), 512, None, (512, 256)),
        ((3000, 10), 512, None, (512, 16)),
        ((800, 600), 512, 1.0, (512, 512)),
        ((800, 600), 512, 16 / 9, (512, 288)),
        ((600, 800), 512, 16 / 9, (288, 512)),
        ((1, 1), 64, None, (64, 64)),
    ],
)
def test_target_size(size: tuple[int, int], img_size: int, ratio: float | None, target: tuple[int, int]) -> None:
    assert target_size(*size, img_size, ratio) == target


def test_images_are_never_stretched(tmp_path: Path) -> None:
    """A circle stays one: its width and height differ by less than two pixels after scaling and cutting."""
    y, x = np.mgrid[0:300, 0:437]
    circle = ((x - 218) ** 2 + (y - 150) ** 2 < 100**2).astype(np.uint8) * 255
    Image.fromarray(circle).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 256, None)
    assert image.shape == (3, 160, 256)
    white = image[0] > 0
    assert abs(int(white.any(0).sum()) - int(white.any(1).sum())) <= 2
    assert -1 <= float(image.min()) < float(image.max()) <= 1


def test_turned_transparent_and_deep_images(tmp_path: Path) -> None:
    wide = Image.new("RGB", (64, 32), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg", 64, None).shape == (3, 64, 32)

    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert float(load_image(tmp_path / "clear.png", 32, None).min()) == 1  # white, not the hidden red

    Image.fromarray(np.full((32, 32), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert float(load_image(tmp_path / "deep.png", 32, None).mean()) == pytest.approx(0, abs=0.01)

    Image.new("P", (32, 32), 3).save(tmp_path / "palette.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "gray.png")
    Image.new("CMYK", (32, 32)).save(tmp_path / "print.jpg")
    for name in ("palette.png", "gray.png", "print.jpg"):
        assert load_image(tmp_path / name, 32, None).shape == (3, 32, 32)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    data = bytearray((DEMO / "photos" / "coffee.jpg").read_bytes())
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    (tmp_path / "bad.jpg").write_bytes(data[:300] + data[-2:])
    for name in ("bad.png", "bad.jpg"):
        with pytest.raises(DataError, match=name):
            load_image(tmp_path / name, 64, None)


def test_problems_stop_the_run_and_are_all_named(tmp_path: Path) -> None:
    put(tmp_path, "good.png")
    for number in range(12):
        put(tmp_path, f"bad{number:02}.png", None)
    with pytest.raises(DataError) as caught:
        list_samples(str(tmp_path), "json")
    assert str(caught.value).count("has no caption file") == 10
    assert "2 more" in str(caught.value)


def test_the_crop_follows_the_seed_and_the_place_in_the_folder() -> None:
    def chosen(seed: int, root: str = "/a") -> list[float | None]:
        return [choose_ratio(Path(root) / f"{k}.png", Path(root), seed, True) for k in range(40)]

    assert chosen(0) == chosen(0) == chosen(0, "/b/c")
    assert chosen(0) != chosen(1)
    assert set(chosen(0)) == set(RATIOS)
    assert choose_ratio(Path("/a/1.png"), Path("/a"), 0, False) is None


SHAPES = [(16, 8, 8)] * 5 + [(16, 8, 4)] * 3 + [(16, 4, 8)]


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_every_image_comes_and_batches_are_of_one_shape(batch: int) -> None:
    batches = epoch_batches(buckets_of(SHAPES), batch, seed=0, epoch=3).tolist()
    assert {image for images in batches for image in images} == set(range(len(SHAPES)))
    for images in batches:
        assert len(images) == batch
        assert len({SHAPES[image] for image in images}) == 1
    if batch == 1:
        assert Counter(image for images in batches for image in images) == Counter(range(len(SHAPES)))


def test_the_order_is_a_function_of_the_seed() -> None:
    def order(seed: int) -> list[list[int]]:
        images = Order(buckets_of(SHAPES), 1, seed)
        return [images[number] for number in range(40)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    epochs = [order(0)[start : start + 9] for start in (0, 9, 18)]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert all(sorted(image for images in epoch for image in images) == list(range(9)) for epoch in epochs)


def test_going_back_in_the_order_gives_the_same_batches() -> None:
    images = Order(buckets_of(SHAPES), 2, 0)
    forward = [images[number] for number in range(50)]
    assert [images[number] for number in reversed(range(50))] == forward[::-1]


def test_the_order_of_earlier_releases_is_kept() -> None:
    """What a seed gave before the order was kept in arrays; a run that is resumed goes on with the same images."""
    images = Order(buckets_of(SHAPES), 2, 7)
    assert [images[number] for number in range(10)] == EARLIER


EARLIER = [[6, 5], [8, 8], [0, 1], [4, 2], [7, 6], [3, 0], [1, 0], [0, 3], [8, 8], [6, 7]]


@pytest.mark.parametrize("count", [8, 9, 11])
def test_two_ranks_see_what_one_would_whatever_the_number_of_images(count: int) -> None:
    """One stream over all epochs: steps of two ranks hold the batches of one rank that accumulates twice."""
    images = Order(buckets_of([(16, 8, 8)] * count), 1, 0)
    stream = [images[number][0] for number in range(6 * count)]
    two = [[images[number][0] for number in range(rank, 6 * count, 2)] for rank in (0, 1)]
    assert [image for pair in zip(*two, strict=True) for image in pair] == stream
    for epoch in range(6):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_repeats_count_in_every_pass() -> None:
    images = Order(buckets_of(SHAPES, [3, 1, 1, 1, 1, 2, 1, 1, 1]), 1, 0)
    assert images.per_epoch == 12
    seen = Counter(images[number][0] for number in range(12))
    assert (seen[0], seen[5], sum(seen.values())) == (3, 2, 12)


def test_views_follow_from_the_seed_and_the_number() -> None:
    """Half are mirrored, a third are silent, and a run that starts in the middle draws the same."""
    images = Order(buckets_of([(16, 8, 8)] * 50), 2, 3, flip=True, dropout=1 / 3)
    drawn = [images[number] for number in range(2000)]
    again = Order(buckets_of([(16, 8, 8)] * 50), 2, 3, flip=True, dropout=1 / 3)
    assert again[1234] == drawn[1234]
    views = [pick // 50 for batch in drawn for pick in batch]
    assert abs(sum(view & 1 for view in views) / len(views) - 1 / 2) < 0.03
    assert abs(sum(view >> 1 for view in views) / len(views) - 1 / 3) < 0.03
    plain = Order(buckets_of([(16, 8, 8)] * 50), 2, 3)
    assert [[pick % 50 for pick in batch] for batch in drawn] == [plain[number] for number in range(2000)]
    # The views of one image differ from pass to pass.
    assert len({pick // 50 for batch in drawn for pick in batch if pick % 50 == 7}) == 4


def test_a_million_images_are_a_few_arrays_and_start_at_once(tmp_path: Path) -> None:
    """An index of generated keys: 36 bytes an image, the first batch after two seconds of an idle core."""
    count = 1_000_000
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (count, 20), dtype=np.uint8).view("V20")
    texts = [bytes([k] * 20) for k in range(7)]
    numbers = np.arange(count, dtype=np.int32)
    shapes = [(16, 8, 30 - 2 * kind) for kind in range(12)]
    started = time.process_time()
    made = Entries(tmp_path, keys, texts, numbers % 7, shapes, numbers % 12)
    buckets = made.buckets
    images = Order(buckets, 4, 0)
    first = [made[pick] for pick in images[0]]
    assert time.process_time() - started < 5
    assert len({entry.shape for entry in first}) == 1
    names = [f"image-{keys[k, 0].tobytes().hex()}.safetensors" for k in images[0]]
    assert [entry.latents.name for entry in first] == names
    assert images.per_epoch == sum(-(-int(n) // 4) for n in np.bincount(numbers % 12))
    held = [made.latents, made.text_of, made.shape_of, *buckets, *images._epochs.values()]
    assert sum(array.nbytes for array in held) <= 36.1 * count
    last = made[count - 1]
    assert last.shape == shapes[(count - 1) % 12]
    assert last.text.name == f"text-{texts[(count - 1) % 7].hex()}.safetensors"


def test_samples_below_a_folder_are_told_apart(tmp_path: Path) -> None:
    """By where they lie, through links as well."""
    put(tmp_path / "images", "a.png")
    put(tmp_path / "images" / "held", "b.png")
    put(tmp_path / "images" / "held-not", "c.png")
    put(tmp_path / "store", "d.png")
    (tmp_path / "images" / "held" / "d.png").symlink_to(tmp_path / "store" / "d.png")
    (tmp_path / "images" / "held" / "d.json").symlink_to(tmp_path / "store" / "d.json")
    (tmp_path / "images" / "e.png").symlink_to(tmp_path / "images" / "held" / "b.png")
    (tmp_path / "images" / "e.json").write_text('{"caption": "b again"}')
    (tmp_path / "link").symlink_to(tmp_path / "images" / "held")
    samples, _ = list_samples(str(tmp_path / "images"), "json")
    for folder in (tmp_path / "images" / "held", tmp_path / "link", tmp_path / "store" / ".." / "link"):
        kept = outside(samples, folder)
        assert [sample.image.name for sample in kept] == ["a.png", "c.png"]
    assert outside(samples, tmp_path / "elsewhere") == samples
