"""Write a safetensors file tensor by tensor, each at its own place, so that a model never lies in memory to be saved.

The safetensors library takes all tensors at once, which for FLUX.1 are 24 GB of the host's memory. The format is a
header of JSON with every tensor's dtype, shape and bytes, and after it the bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from xflux_trainer.bfl import Place
from xflux_trainer.files import new_file

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What safetensors calls the formats that models are saved in."""


class TensorFile:
    """A safetensors file of tensors of one format, whose shapes are known and whose values come one after the other."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        """`path` should be a temporary name: until `close` the file is not whole."""
        self.dtype = dtype
        self._shapes = dict(shapes)
        self._left = {name: _rows(shape) for name, shape in shapes.items()}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._start, end = {}, 0
        for name, shape in shapes.items():
            self._start[name] = end
            end += dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [self._start[name], end]}
        head = _head(header)
        self._data = len(head)
        self._file = path.open("wb")
        self._file.write(head)
        self._file.truncate(self._data + end)

    def put(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Write `tensor` into the tensor `name`, from that row on."""
        shape = self._shapes[name]
        rows, width = _rows(tuple(tensor.shape)), torch.Size(shape[1:]).numel()
        if tuple(tensor.shape[1:]) != shape[1:] or row + rows > _rows(shape):
            raise ValueError(f"{name}: {tuple(tensor.shape)} at row {row} does not fit into {shape}")
        self._file.seek(self._data + self._start[name] + row * width * self.dtype.itemsize)
        self._file.write(_raw(tensor.detach().to("cpu", self.dtype)))
        self._left[name] -= rows

    def close(self) -> None:
        """Flush the file to the disk. Raises ValueError when a tensor is not whole."""
        with self._file:
            short = [name for name, rows in self._left.items() if rows]
            if short:
                raise ValueError(f"{len(short)} tensors were not written, the first is {short[0]}")
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def write_placed(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    locate: Callable[[str], Place | None],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a file in another layout than diffusers': `locate` says where each of diffusers' tensors goes.

    Raises ValueError for a name without a place, and when tensors are missing.
    """
    places = {name: _known(locate(name), name) for name in shapes}
    stored = {places[name].name: places[name].stored(shape) for name, shape in shapes.items()}
    with new_file(path) as temporary, TensorFile(temporary, stored, dtype or torch.bfloat16) as file:
        for name, tensor in tensors:
            place = places[name]
            file.put(place.name, swap_halves(tensor) if place.swapped else tensor, place.rows(stored[place.name][0])[0])
    return path


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors that the host holds anyway, of any of `NAMES`' formats, without a copy of them.

    Equal tensors and metadata give equal bytes. safetensors' own writer puts the metadata into another order in every
    process, so that no hash of a file could be compared. Raises `WriteError`.
    """
    # The widest first, as safetensors has them: each lies at a multiple of its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    with new_file(path) as temporary, temporary.open("wb") as file:
        file.write(_head(header))
        for name in order:
            file.write(_raw(tensors[name]))
        file.flush()
        os.fsync(file.fileno())


def _head(header: Mapping[str, object]) -> bytes:
    """What stands before the tensors' bytes: the length of the JSON, and the JSON, filled up to eight bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _raw(tensor: Tensor) -> Any:
    """The bytes of a tensor, row by row; its own memory where that lies so on the host."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()


def swap_halves(tensor: Tensor) -> Tensor:
    """The lower half of the rows above the upper."""
    upper, lower = tensor.chunk(2)
    return torch.cat([lower, upper])


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _known(place: Place | None, name: str) -> Place:
    if place is None:
        raise ValueError(f"{name} has no place in this layout")
    return place
