"""Every format, mode and letter case that Pillow opens is read, and what is not is said."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

import numpy as np  # noqa: E402
from PIL import Image, features  # noqa: E402
from trainer_kit import png, put  # noqa: E402
from xflux_trainer.data import decode, list_samples, load_image  # noqa: E402
from xflux_trainer.errors import DataError  # noqa: E402
from xflux_trainer.imagefile import EXTENSIONS, OTHER_IMAGES, look, shown  # noqa: E402
from xflux_trainer.samples import find_samples  # noqa: E402


def test_the_endings_are_those_that_pillow_opens() -> None:
    """The list is kept by hand, because the doctor has no Pillow; of what is left out every one is named."""
    Image.init()
    opened = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    if not features.check("avif") and tuple(map(int, Image.__version__.split(".")[:2])) < (11, 3):
        opened |= {".avif", ".avifs"}
    assert opened - set(OTHER_IMAGES) == set(EXTENSIONS)
    assert not set(EXTENSIONS) & set(OTHER_IMAGES)


PICTURE = np.zeros((40, 60, 3), np.uint8)
PICTURE[:, :30] = (200, 30, 30)

SAVED = (
    "JPEG .JPG", "JPEG .jfif", "PNG .Png", "WEBP .WebP", "BMP .BMP", "DIB .dib", "GIF .GIF", "TIFF .TIFF", "AVIF .avif",
    "JPEG2000 .jp2", "JPEG2000 .j2k", "TGA .tga", "PPM .ppm", "PCX .pcx", "SGI .rgb", "ICO .ico", "IM .im", "QOI .qoi",
    "DDS .dds", "ICNS .icns",
)  # fmt: skip


@pytest.mark.parametrize("saved", SAVED)
def test_formats(tmp_path: Path, saved: str) -> None:
    """Listed without a fault, with its pixels where the header is read, and decoded to the picture."""
    kind, ending = saved.split()
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind}")
    path = put(tmp_path, f"a{ending}", data=b"-")
    try:
        Image.fromarray(PICTURE).save(path, kind)
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow does not write {kind}: {error}")
    index = find_samples(tmp_path)
    assert (index.problems, len(index.samples)) == ((), 1)
    seen = look(path)
    assert seen.size in (None, (60, 40))
    if kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        assert seen.size == (60, 40)
    image = decode(path.read_bytes(), path)
    assert image.mode == "RGB"
    left = np.asarray(image)[image.height // 2, image.width // 4]
    assert np.abs(left.astype(int) - (200, 30, 30)).max() < 16
    if kind in ("JPEG", "PNG", "GIF", "WEBP"):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
        assert look(path).fault is not None
        with pytest.raises(DataError, match="cannot be decoded"):
            decode(path.read_bytes(), path)


def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    for ending in (".gif", ".webp", ".png"):
        path = tmp_path / f"a{ending}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        red, _, blue = np.asarray(decode(path.read_bytes(), path)).mean((0, 1))
        assert red > 240
        assert blue < 15


def test_modes(tmp_path: Path) -> None:
    """16 bits and floats are scaled and not cut off; transparency of a palette lies on white."""
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "ints.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "unit.tif")
    Image.fromarray((ramp / 257).astype(np.float32)).save(tmp_path / "floats.tif")
    for name in ("deep", "ints", "unit", "floats"):
        image = load_image(tmp_path / f"{name}.tif", 32, None)[0]
        assert float(image.mean()) == pytest.approx(0, abs=0.02), name
        assert (float(image.min()), float(image.max())) == pytest.approx((-1, 1), abs=0.01), name
    clear = Image.new("P", (32, 32), 0)
    clear.putpalette([255, 0, 0] * 256)
    clear.save(tmp_path / "clear.gif", transparency=0)
    assert float(load_image(tmp_path / "clear.gif", 32, None).min()) == 1
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "print.tif")
    red, green, _ = load_image(tmp_path / "print.tif", 32, None).mean((1, 2)).tolist()
    assert (red, green) == pytest.approx((1, -1), abs=0.02)


def test_a_turned_photograph_is_measured_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.jpg", exif=exif)
    assert look(tmp_path / "a.jpg").size == (32, 64)
    assert load_image(tmp_path / "a.jpg", 64, None).shape == (3, 64, 32)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_a_name_that_is_not_utf8_is_read_and_can_be_shown(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    name = b"caf\xe9"
    (tmp_path / "b.png").write_bytes(png())
    for ending, data in ((b".png", png()), (b".json", b'{"caption": "a cup"}')):
        with open(os.path.join(folder, name + ending), "wb") as file:
            file.write(data)
    index = find_samples(tmp_path)
    assert [sample.caption for sample in index.samples] == ["a cup"]
    assert index.samples[0].image.read_bytes() == png()
    assert shown(index.samples[0].image).endswith("caf\\xe9.png")
    shown(index.samples[0].image).encode()
    with open(os.path.join(folder, name + b".json"), "wb") as file:
        file.write(b"{}")
    with pytest.raises(DataError) as caught:
        list_samples(str(tmp_path), "json")
    assert "caf\\xe9.json" in str(caught.value)
    str(caught.value).encode()


def test_not_decodable_images_are_counted(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    put(tmp_path, "b.HEIC", None)
    put(tmp_path, "c.jxl", None)
    samples, note = list_samples(str(tmp_path), "json")
    assert len(samples) == 1
    assert note.startswith("2 images of other formats are left out")
