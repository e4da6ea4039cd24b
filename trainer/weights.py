"""The tensors of a model's safetensors files, read one after the other and straight to the device, by diffusers' names.

A file in another layout is read through a table of places: a fused tensor is never read as a whole.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from xflux_trainer import bfl, readahead
from xflux_trainer.bfl import COMFY, Place
from xflux_trainer.errors import ModelError
from xflux_trainer.readahead import Cut, Range, Window
from xflux_trainer.tensorfile import swap_halves

STEM = "diffusion_pytorch_model"
TRAINABLE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EIGHT_BITS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8"}

Locate = Callable[[str], "Place | None"]


class Weights:
    """Open files, and where in them each of diffusers' tensors lies."""

    def __init__(self, source: Path, files: dict[Path, Any], device: torch.device, locate: Locate) -> None:
        """`files` are those of the model, opened."""
        self.source = source
        self._device = device
        self._locate = locate
        self._files: dict[str, tuple[Any, str]] = {}
        self._paths: dict[str, Path] = {}
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118 (not a dict)
                self._files[name.removeprefix(COMFY)] = (file, name)
                self._paths[name.removeprefix(COMFY)] = path

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
            raise _broken(self.source, error) from error
        tensor = tensor.to(self._device)
        return swap_halves(tensor) if place.swapped else tensor

    def stream(self, names: Iterable[str], window: Window | None = None) -> Generator[Tensor, None, None]:
        """What `read` gives for each of the names in turn. On a GPU, or where a `window` is given, the next ones are
        read ahead, which is several times as fast."""
        if window is None and self._device.type != "cuda":
            yield from map(self.read, names)  # views of the mapped file, which cost no memory
            return
        places = [self._place(name) for name in names]
        headers = {path: _header(path) for path in dict.fromkeys(self._paths.values())}
        parts = readahead.read([self._range(place, headers) for place in places], self._device, window)
        with closing(parts):  # its threads end with whoever stops asking
            for place in places:
                try:
                    data = next(parts)
                except (Cut, OSError) as error:
                    raise _broken(self.source, error) from error
                stored = self._slice(place)
                tensor = data.view(TRAINABLE[stored.get_dtype()]).view(place.shape(tuple(stored.get_shape())))
                yield swap_halves(tensor) if place.swapped else tensor

    def _range(self, place: Place, headers: dict[Path, tuple[int, dict[str, Any]]]) -> Range:
        """The bytes of a tensor: rows follow each other, so a part of them is one piece as well."""
        path = self._paths[place.name]
        data, header = headers[path]
        entry = header[self._files[place.name][1]]
        (start, end), shape = entry["data_offsets"], entry["shape"]
        if place.of == 1:
            return Range(path, data + start, end - start)
        row = (end - start) // shape[0]
        first, last = place.rows(shape[0])
        return Range(path, data + start + first * row, (last - first) * row)

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
        opened = {file: stack.enter_context(_open(file, device)) for file in files}
        yield Weights(source, opened, device, locate or default)


def prefetch(source: Path) -> None:
    """Have a model's files read by the system until they are asked for: see `readahead.prefetch`."""
    with suppress(ModelError):  # said when they are opened
        readahead.prefetch([source] if source.is_file() else shards(source))


def _open(file: Path, device: torch.device) -> Any:
    try:
        return safe_open(file, framework="pt", device=str(device))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing.", "Download the model again.") from error
    except (SafetensorError, OSError) as error:
        raise _broken(file, error) from error


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the file's tensors begin, and its header, which `safe_open` has found to be whole."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return 8 + length, json.loads(stream.read(length))


def _broken(source: Path, error: Exception) -> ModelError:
    return ModelError(f"{source} is broken or cut short: {error}.", "Download it again.")


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
