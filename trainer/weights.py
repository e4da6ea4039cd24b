"""The tensors of a model's safetensors files, read one at a time and straight to the device, by diffusers' names.

A file in another layout is read through a table of places: a fused tensor is never read as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from xflux_trainer import bfl
from xflux_trainer.bfl import COMFY, Place
from xflux_trainer.errors import ModelError
from xflux_trainer.tensorfile import swap_halves

STEM = "diffusion_pytorch_model"
TRAINABLE = ("F64", "F32", "F16", "BF16")
EIGHT_BITS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8"}

Locate = Callable[[str], "Place | None"]


class Weights:
    """Open files, and where in them each of diffusers' tensors lies."""

    def __init__(self, source: Path, files: list[Any], device: torch.device, locate: Locate) -> None:
        self.source = source
        self._device = device
        self._locate = locate
        self._files: dict[str, tuple[Any, str]] = {}
        for file in files:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                self._files[name.removeprefix(COMFY)] = (file, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of diffusers' tensor of that name. Raises KeyError when it is not there."""
        place = self._place(name)
        return place.shape(tuple(self._slice(place).get_shape()))

    def read(self, name: str) -> Tensor:
        """Diffusers' tensor of that name, on the device, in the file's format."""
        place = self._place(name)
        file, key = self._files[place.name]
        try:
            if place.of == 1:
                tensor: Tensor = file.get_tensor(key)
            else:
                rows = file.get_slice(key)
                start, end = place.rows(rows.get_shape()[0])
                tensor = rows[start:end]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.source} is broken or cut short: {error}.", "Download it again.") from error
        tensor = tensor.to(self._device)
        return swap_halves(tensor) if place.swapped else tensor

    def names(self) -> list[str]:
        """The names as the files have them: diffusers' own in diffusers' layout."""
        return list(self._files)

    def refuse(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise `ModelError` unless the files hold exactly tensors of these names and shapes, and can be trained."""
        place = self.source
        for name in self._files:
            kind = self._slice(Place(name)).get_dtype()
            if kind not in TRAINABLE:
                seen = f"{place} holds {EIGHT_BITS.get(kind, kind)} weights, which cannot be trained."
                raise ModelError(seen, "Use the bf16 weights of FLUX.1-dev or FLUX.1-schnell.")
        wanted = {name: self._locate(name) for name in expected}
        known = {found.name for found in wanted.values() if found}
        extra = [name for name in self._files if name not in known]
        if extra:
            raise ModelError(f"{place} holds a tensor {extra[0]} that this model has not.", "Is it a FLUX.1 model?")
        missing = [name for name, found in wanted.items() if found is None or found.name not in self._files]
        if missing:
            seen = f"{place} lacks {len(missing)} tensors, the first is {missing[0]}."
            raise ModelError(seen, "A file is missing or was not downloaded to its end: download it again.")
        for name, shape in expected.items():
            if self.shape(name) != shape:
                seen = f"{name} in {place} has the shape {self.shape(name)}, not {shape}."
                raise ModelError(seen, "Is its config.json the right one?")

    def _place(self, name: str) -> Place:
        place = self._locate(name)
        if place is None or place.name not in self._files:
            raise KeyError(name)
        return place

    def _slice(self, place: Place) -> Any:
        file, key = self._files[place.name]
        return file.get_slice(key)


@contextmanager
def open_weights(source: Path, device: torch.device, locate: Locate | None = None) -> Iterator[Weights]:
    """A folder in diffusers' layout, or a single file, BFL's unless `locate` says otherwise."""
    files = [source] if source.is_file() else shards(source)
    default: Locate = bfl.place if source.is_file() else Place
    with ExitStack() as stack:
        opened = [stack.enter_context(_open(file, device)) for file in files]
        yield Weights(source, opened, device, locate or default)


def _open(file: Path, device: torch.device) -> Any:
    try:
        return safe_open(file, framework="pt", device=str(device))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing.", "Download the model again.") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is broken or cut short: {error}.", "Download it again.") from error


def shards(folder: Path, stem: str = STEM) -> list[Path]:
    """The safetensors files of a folder in diffusers' layout, in the order of their names."""
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ModelError(f"{folder} holds neither {single.name} nor {index.name}.", "Download the model again.")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not a list of shards.", "Download the model again.") from error
    missing = sorted(name for name in names if not (folder / name).exists())
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}.", "Download the model again.")
    return [folder / name for name in sorted(names)]
