"""Images as tensors: decoded, turned upright, on white, scaled to cover their bucket and cut at their middle."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from xflux_trainer.buckets import RATIOS, choose_ratio, target_size
from xflux_trainer.errors import DataError
from xflux_trainer.imagefile import shown
from xflux_trainer.order import Order, epoch_batches
from xflux_trainer.samples import COLUMNS, Sample, find_samples

__all__ = [
    "RATIOS", "Order", "choose_ratio", "decode", "epoch_batches", "fit", "list_samples", "load_image", "outside",
    "target_size", "to_tensor",
]  # fmt: skip


def list_samples(folder: str, caption_type: str, columns: tuple[str, str] = COLUMNS) -> tuple[list[Sample], str]:
    """The samples, and a note about images that were left out. Any problem stops the run: no image is lost silently.

    `columns` are those of images and captions where the folder holds tables.
    """
    index = find_samples(folder, caption_type, columns)
    if index.problems:
        listed = [str(problem) for problem in index.problems[:10]]
        rest = len(index.problems) - len(listed)
        raise DataError("\n".join(listed + ([f"… and {rest} more."] if rest else [])))
    note = ""
    if index.ignored:
        note = f"{len(index.ignored)} images of other formats are left out, the first is {shown(index.ignored[0])}."
    return list(index.samples), note


def outside(samples: list[Sample], folder: str | Path) -> list[Sample]:
    """The samples whose image does not lie below the folder, neither by its path nor behind a link."""
    root = Path(folder).resolve()

    @functools.lru_cache(maxsize=1024)  # a table's rows share one file, a folder's images one parent
    def below(path: Path) -> bool:
        return path.resolve().is_relative_to(root)

    # The parent as well: an image below the folder may itself be a link to elsewhere.
    return [sample for sample in samples if not below(sample.image) and not below(sample.image.parent)]


def load_image(
    path: Path, img_size: int, ratio: float | None, *, bucket_by: str = "long_side", flip: bool = False
) -> Tensor:
    """(3, H, W) in [-1, 1]: scaled to cover the target and cut at its middle, never stretched."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{shown(path)} cannot be read: {error.strerror}.", "Allow reading it, or remove it."
        ) from error
    image = decode(content, path)
    return to_tensor(fit(image, target_size(image.width, image.height, img_size, ratio, bucket_by)), flip=flip)


def decode(content: bytes, name: Path, *, gray: bool = False) -> Image.Image:
    """The image that these bytes are, upright, in RGB or, where `gray` allows and it has no color, in L.

    Of an animation the first picture. Raises `DataError`.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = ImageOps.exif_transpose(opened)
            keep = gray and image.mode in ("L", "1")
            return image.convert("L") if keep else _rgb(image)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        seen = f"{shown(name)} cannot be decoded: {shown(error)}."
        hint = "Save it again, or remove it."
        if name.suffix.lower() in (".avif", ".avifs"):
            hint = "Pillow reads AVIF from 11.3 on: update it, or save the image as PNG."
        raise DataError(seen, hint) from error
    except Exception as error:  # the decoders of rare formats fall over broken files in their own ways
        seen = f"{shown(name)} cannot be decoded: {type(error).__name__} ({shown(error)})."
        raise DataError(seen, "Save it as PNG or JPEG, or remove it.") from error


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image scaled to cover (width, height) and cut at its middle: never stretched."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image, *, flip: bool = False) -> Tensor:
    """(3, H, W) in [-1, 1]; `flip` mirrors left and right."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.uint8).copy()).permute(2, 0, 1)
    return (pixels.flip(-1) if flip else pixels).float() / 127.5 - 1


def _rgb(image: Image.Image) -> Image.Image:
    """8 bits of red, green and blue, whatever the mode; transparency lies on white."""
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion cuts off instead of scaling
        values = np.asarray(image).astype(np.float64)
        full = 65535 if values.max(initial=0) <= 65535 else 2**32 - 1
        image = Image.fromarray((values * 255 / full).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":  # floats reach from 0 to 1, or to 255
        values = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((values * (255 if values.max(initial=0) <= 1 else 1)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
