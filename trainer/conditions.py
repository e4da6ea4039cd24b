"""What a ControlNet is shown: an image's Canny edges, or a picture of the same name from another folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from xflux_trainer.config import TrainConfig
from xflux_trainer.data import decode, fit
from xflux_trainer.errors import DataError
from xflux_trainer.imagefile import EXTENSIONS, shown
from xflux_trainer.samples import walk

_NEAR = 0.02
"""How far the aspects of an image and its condition may be apart: what rounding to whole pixels makes."""


def signature(config: TrainConfig) -> str:
    """How conditions are made, as part of a cache entry's key; empty where none are."""
    if config.mode != "controlnet":
        return ""
    return f"canny {config.canny_low} {config.canny_high}" if config.control_type == "canny" else "files"


def canny(image: Image.Image, low: int, high: int) -> Tensor:
    """(1, H, W) uint8: 255 on the edges of an RGB image that is at its final size, as X-Flux draws them."""
    try:
        import cv2
    except ImportError as error:
        seen = f"Canny edges are drawn by OpenCV, which cannot be imported ({error})."
        raise DataError(seen, "Run `pip install opencv-python-headless`, or set control_type to files.") from error
    edges = cv2.Canny(np.asarray(image), low, high)
    return torch.from_numpy(np.asarray(edges, dtype=np.uint8).copy())[None]


def picture(content: bytes, name: Path, image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(1 or 3, H, W) uint8: the condition with the image's crop and size. `image` is as it was decoded."""
    condition = decode(content, name, gray=True)
    wide, high = condition.size
    if abs(wide * image.height / (high * image.width) - 1) > _NEAR:
        seen = f"{shown(name)} is {wide} x {high} and its training image {image.width} x {image.height}."
        raise DataError(seen, "A condition has its image's aspect: save it again, or remove both.")
    pixels = np.asarray(fit(condition, size), dtype=np.uint8).copy()
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


class ControlFiles:
    """The pictures below `control_dir`, found by their relative path without its ending."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._found: dict[str, Path] = {}
        if not self.folder.is_dir():
            seen = f"control_dir {shown(folder)} is not a folder."
            raise DataError(seen, "Name the folder of condition images.")
        for place, names in walk(self.folder, []):
            for name in sorted(names):
                stem, ending = os.path.splitext(name)  # noqa: PTH122
                if ending.lower() in EXTENSIONS:
                    self._found.setdefault(Path(place, stem).relative_to(self.folder).as_posix(), Path(place, name))

    def of(self, image: Path, root: Path) -> Path:
        """The condition of an image below `root`. Raises `DataError` where there is none."""
        name = image.relative_to(root).with_suffix("").as_posix()
        if name not in self._found:
            seen = f"{shown(image)} has no condition image {shown(name)}.* below {shown(self.folder)}."
            raise DataError(seen, "Put it there, or remove the image.")
        return self._found[name]
