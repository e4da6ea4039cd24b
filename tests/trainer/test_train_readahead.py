"""Reading weights ahead, in pieces: the same tensors as one at a time, whatever the sizes of the window."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from trainer_kit import tiny_flux
from xflux_trainer import bfl
from xflux_trainer.errors import ModelError
from xflux_trainer.readahead import Cut, Range, Window, prefetch, read
from xflux_trainer.weights import open_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize(("buffers", "size", "threads"), [(1, 100, 1), (3, 1000, 2), (16, 1 << 20, 8)])
def test_every_tensor_is_what_read_gives(tmp_path: Path, buffers: int, size: int, threads: int) -> None:
    single = bfl.write_single_of(tiny_flux() / "transformer", tmp_path / "flux.safetensors", torch.float32)
    with open_weights(tiny_flux() / "transformer", CPU) as weights:
        names = weights.names()[::-1]
    for source in (tiny_flux() / "transformer", single):
        with open_weights(source, CPU) as weights:
            made = list(weights.stream(names, Window(buffers, size, threads)))
            assert len(made) == len(names) > 30
            for name, tensor in zip(names, made, strict=True):
                kept = weights.read(name)
                assert tensor.dtype == kept.dtype and torch.equal(tensor, kept), name


def test_ranges_of_any_length_in_any_order(tmp_path: Path) -> None:
    data = torch.arange(5000, dtype=torch.int32).view(torch.uint8)
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(data.numpy().tobytes())
    wanted = [(0, 0), (19_000, 1000), (3, 7777), (0, 20_000), (999, 1), (0, 100)]
    ranges = [Range(files[k % 2], start, size) for k, (start, size) in enumerate(wanted)]
    parts = list(read(ranges, CPU, Window(buffers=2, size=64, threads=2)))
    for (start, size), part in zip(wanted, parts, strict=True):
        assert torch.equal(part, data[start : start + size])


def test_a_file_that_ends_early_and_a_reader_that_is_left(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(1000))
    parts = read([Range(file, 0, 1000), Range(file, 900, 200)], CPU, Window(buffers=2, size=64))
    assert len(next(parts)) == 1000
    with pytest.raises(Cut, match="a ends after 1,000 bytes"):
        next(parts)
    parts = read([Range(file, 0, 1000)] * 9, CPU, Window(buffers=2, size=64))
    next(parts)
    assert any(thread.name.startswith("weights") for thread in threading.enumerate())
    parts.close()
    assert not any(thread.name.startswith("weights") for thread in threading.enumerate())


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    names = {f"a{k}": torch.full((100,), float(k)) for k in range(9)}
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(names, file)
    with open_weights(tmp_path, CPU) as weights:
        tensors = weights.stream(list(names), Window(buffers=1, size=64))
        assert torch.equal(next(tensors), names["a0"])
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 1000)
        with pytest.raises(ModelError, match="broken or cut short"):
            list(tensors)


def cached(file: Path, start: int) -> bool:
    """Whether a byte of the file is in the page cache."""
    handle = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(handle, [bytearray(1)], start, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def test_files_are_brought_into_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with file.open("wb") as stream:
        stream.write(bytes(40 << 20))
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    places = range(0, 40 << 20, 10 << 20)
    try:
        dropped = not any(cached(file, start) for start in places)
    except OSError:
        dropped = False
    if not dropped:
        pytest.skip("this file system keeps its pages, or does not say")
    prefetch([tmp_path / "absent"]).join()
    prefetch([file]).join()
    until = time.monotonic() + 20
    while not all(cached(file, start) for start in places) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(cached(file, start) for start in places)
