"""What a ControlNet is shown: of the image's own crop and size, mirrored with it, and never another's."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import numpy as np  # noqa: E402
from cache_kit import config, fill  # noqa: E402
from PIL import Image  # noqa: E402
from test_train_tables import forbid  # noqa: E402
from trainer_kit import png, put, squares  # noqa: E402
from xflux_trainer import cache, conditions  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.data import fit  # noqa: E402
from xflux_trainer.errors import DataError  # noqa: E402
from xflux_trainer.order import FLIPPED  # noqa: E402


def bar(width: int, height: int, at: float, mode: str = "RGB") -> Image.Image:
    """White left of `at` of the width, black right of it."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : int(at * width)] = 255
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def of_files(folder: Path, **changes: object) -> TrainConfig:
    more = {"mode": "controlnet", "control_type": "files", "control_dir": str(folder / "control"), **changes}
    return config(folder, **more)


def test_conditions_from_files(tmp_path: Path) -> None:
    """Found by the relative path, whatever the ending; of the latents' size times 8; mirrored with the image."""
    for k, (name, size) in enumerate((("a", (64, 64)), ("deep.v1/b", (96, 48)))):
        put(tmp_path / "images", f"{name}.png", f"picture {k}", saved(bar(*size, 0.5)))
        put(tmp_path / "control", f"{name}.BMP.png", None, png())
        put(tmp_path / "control", f"{name}.PNG", None, saved(bar(2 * size[0], 2 * size[1], 0.25 + k / 8, "L")))
    put(tmp_path / "images", "color.png", "c", saved(bar(64, 64, 0.5)))
    put(tmp_path / "control", "color.webp", None, png(64, 64, (0, 255, 0)))
    run = of_files(tmp_path, random_flip=True, resolutions=(32,))
    made = fill(run)
    assert [entry.shape for entry in made] == [(16, 8, 8), (16, 8, 8), (16, 4, 8), (16, 4, 4), (16, 4, 4), (16, 2, 4)]
    for number, at in ((0, 0.25), (2, 0.375), (3, 0.25), (5, 0.375)):
        for view in (0, FLIPPED):
            batch = cache.read_batch([made[number + view * len(made)]])
            assert batch.condition is not None
            assert batch.condition.dtype == torch.uint8
            b, c, h, w = batch.condition.shape
            assert (b, c, h, w) == (1, 3, 8 * batch.latents.shape[2], 8 * batch.latents.shape[3])
            share = (batch.condition[0, 0] > 127).float().mean(0)
            share = share.flip(0) if view else share
            assert float(share[: int(at * w)].min()) == 1
            assert float(share[int(at * w) + 1 :].max()) == 0
    green = cache.read_batch([made[1]]).condition
    assert green is not None
    assert green[0].float().mean((1, 2)).tolist() == [0, 255, 0]
    # Another file under the same name is another condition, and the image is not encoded again for it.
    put(tmp_path / "control", "color.webp", None, png(64, 64, (255, 0, 0)))
    again = fill(run)
    assert again[1].latents == made[1].latents
    assert again[1].condition != made[1].condition
    assert again[0] == made[0]


def test_conditions_that_are_missing_or_of_another_aspect(tmp_path: Path) -> None:
    put(tmp_path / "images", "a.png", "x", png(64, 64))
    run = of_files(tmp_path)
    with pytest.raises(DataError, match=r"control_dir .* is not a folder"):
        fill(run)
    put(tmp_path / "control", "b.png", None, png(64, 64))
    with pytest.raises(DataError, match=r"a\.png has no condition image a\.\*"):
        fill(run)
    put(tmp_path / "control", "a.png", None, png(64, 32))
    with pytest.raises(DataError, match="is 64 x 32 and its training image 64 x 64"):
        fill(run)
    put(tmp_path / "control", "a.png", None, png(64, 64)[:60])
    with pytest.raises(DataError, match=r"control/a\.png cannot be decoded"):
        fill(run)


def test_without_opencv_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squares(tmp_path / "images")
    forbid(monkeypatch, "cv2")
    with pytest.raises(DataError, match="pip install opencv-python-headless"):
        fill(config(tmp_path, mode="controlnet"))


def test_canny_edges_are_those_of_the_image_as_it_is_trained_on(tmp_path: Path) -> None:
    """X-Flux's: cv2.Canny of the RGB image after crop and resize, with the config's thresholds."""
    cv2 = pytest.importorskip("cv2")
    image = bar(300, 150, 0.5)
    put(tmp_path / "images", "a.png", "x", saved(image))
    batch = cache.read_batch([fill(config(tmp_path, mode="controlnet", canny_low=50, canny_high=150))[0]])
    assert batch.condition is not None
    expected = cv2.Canny(np.asarray(fit(image, (64, 32))), 50, 150)
    assert np.array_equal(batch.condition[0, 1].numpy(), expected)
    assert expected.max() == 255
    assert int((expected.max(0) > 0).sum()) <= 2  # one edge, in the middle


def test_thresholds_are_part_of_the_entry(tmp_path: Path) -> None:
    one = conditions.signature(config(tmp_path, mode="controlnet"))
    assert one != conditions.signature(config(tmp_path, mode="controlnet", canny_low=99))
    assert conditions.signature(config(tmp_path)) == ""
