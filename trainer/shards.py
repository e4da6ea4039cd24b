"""Tensors written to safetensors files as they come, and read back without holding the files.

The library writes a file from tensors that are all in memory; a fine-tune's optimizer is 95 GB. The format allows what
is needed to do better: its header comes first, but may be padded with spaces, so room for it is left and filled at the
end (https://huggingface.co/docs/safetensors: 8 bytes of length, JSON, then the tensors' bytes).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from xflux_trainer import files
from xflux_trainer.errors import CheckpointError

LIMIT = 4 << 30
"""Bytes of a shard, but for a single tensor that is larger."""

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Writer:
    """Shards `STEM-00001.safetensors`, … in a folder; each is hashed while the next one is written.

    `room` is the length of the header that each file gets: `room_for` of the names.
    """

    def __init__(self, folder: Path, stem: str, room: int, limit: int = LIMIT) -> None:
        self._folder, self._stem, self._room, self._limit = folder, stem, room, limit
        self._file: BinaryIO | None = None
        self._path = folder
        self._header: dict[str, Any] = {}
        self._size = 0
        self._count = 0
        self._hashes: dict[str, tuple[int, Future[str]]] = {}
        self._pool = ThreadPoolExecutor(1)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor that lies on the host."""
        # A tensor without elements, and a scalar, have bytes as well as any other.
        data = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        if self._file and self._size + len(data) > self._limit:
            self._end()
        file = self._file or self._begin()
        file.write(data)
        self._header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._size, self._size + len(data)],
        }
        self._size += len(data)

    def close(self) -> dict[str, dict[str, Any]]:
        """End the last file. Returns each file's `bytes` and `sha256` by its name."""
        if self._file:
            self._end()
        entries = {name: {"bytes": size, "sha256": digest.result()} for name, (size, digest) in self._hashes.items()}
        self._pool.shutdown()
        return entries

    def abandon(self) -> None:
        """After an error: let go of the file; the caller removes the folder."""
        if self._file:
            self._file.close()
            self._file = None
        self._pool.shutdown(cancel_futures=True)

    def _begin(self) -> BinaryIO:
        self._count += 1
        self._path = self._folder / f"{self._stem}-{self._count:05d}.safetensors"
        self._file = self._path.open("wb")
        self._file.seek(8 + self._room)
        self._header, self._size = {}, 0
        return self._file

    def _end(self) -> None:
        assert self._file is not None
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= self._room, f"{len(header)} bytes of header, but room for {self._room}"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        size = 8 + self._room + self._size
        self._hashes[self._path.name] = (size, self._pool.submit(files.sha256, self._path))


def room_for(names: Iterable[str]) -> int:
    """Bytes that suffice for the header of a file with all these tensors."""
    # Beside the name: 46 characters, a type, two offsets of up to 16 digits, and six dimensions of as many.
    return math.ceil((2 + sum(len(json.dumps(name)) + 192 for name in names)) / 8) * 8


class Reader:
    """Tensors by name out of shards, mapped into memory: their bytes are read when they are looked at."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}.", "Remove that folder.") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor
