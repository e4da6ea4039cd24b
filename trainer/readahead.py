"""Pieces of files, read by several threads into a few buffers, in one order and a bounded window ahead.

Copying to a device out of a mapped file goes page by page through the one thread that asks: 1 to 3 GB/s, and less from
a cold disk, which sees one small request at a time. Here each thread asks the disk for a whole piece at once, and the
device copies out of pinned memory while the next pieces are read.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from xflux_trainer.ahead import settle

MEMORY = Path("/proc/meminfo")


class Window(NamedTuple):
    """How much is read ahead: by default 256 MiB of the host's memory for each rank."""

    buffers: int = 16
    size: int = 16 << 20
    """Bytes of a buffer, and the most that one piece has: large enough for a disk's full speed."""
    threads: int = 8


class Range(NamedTuple):
    """Bytes of a file."""

    file: Path
    start: int
    size: int


class Cut(Exception):
    """A file ended before its time."""


def prefetch(files: Sequence[Path]) -> threading.Thread:
    """Let the system bring files into its page cache while this process does other things, such as importing.

    Nothing waits for it and nothing is raised; where they would fill most of the free memory nothing is done.
    """
    thread = threading.Thread(target=_prefetch, args=(files,), name="prefetch", daemon=True)
    thread.start()
    return thread


def _prefetch(files: Sequence[Path]) -> None:
    piece = Window().size
    with suppress(OSError, ValueError, StopIteration):
        sizes = [file.stat().st_size for file in files]
        lines = MEMORY.read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        for file, size in zip(files, sizes) if 1.5 * sum(sizes) < available else ():  # noqa: B905 (of one length)
            with file.open("rb") as stream:
                for start in range(0, size, piece):
                    os.posix_fadvise(stream.fileno(), start, piece, os.POSIX_FADV_WILLNEED)


@dataclass
class _Buffer:
    """Memory for one piece, and the event after which the device has taken it."""

    memory: Tensor
    taken: Any = None


def read(ranges: Sequence[Range], device: torch.device, window: Window | None = None) -> Generator[Tensor, None, None]:
    """The bytes (size,) of each range, on the device, in turn; what the current stream does next may use them.

    Raises `Cut` and OSError. To be used up or closed, which ends its threads.
    """
    reader = _Reader(ranges, device, window or Window())
    try:
        yield from reader.tensors()
    finally:
        reader.close()


class _Reader:
    """One reading of ranges: its buffers, threads and open files."""

    def __init__(self, ranges: Sequence[Range], device: torch.device, window: Window) -> None:
        self._ranges, self._device, self._size = ranges, device, window.size
        self._pieces = (
            Range(one.file, one.start + start, min(self._size, one.size - start))
            for one in ranges
            for start in range(0, one.size, self._size)
        )
        pin = device.type == "cuda"
        self._free = [
            _Buffer(torch.empty(self._size, dtype=torch.uint8, pin_memory=pin)) for _ in range(window.buffers)
        ]
        # Buffers are handed out by the caller's thread and not by the others: in the order of the pieces, so that the
        # piece that is waited for has always got one.
        self._ahead: deque[Future[_Buffer]] = deque()
        threads = max(1, min(window.threads, window.buffers, len(os.sched_getaffinity(0))))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weights", initializer=lambda: settle(device))
        self._local = threading.local()
        self._opened: list[int] = []

    def tensors(self) -> Iterator[Tensor]:
        for one in self._ranges:
            made = torch.empty(one.size, dtype=torch.uint8, device=self._device)
            for start in range(0, one.size, self._size):
                self._submit()
                buffer = self._ahead.popleft().result()
                part = made[start : start + self._size]
                part.copy_(buffer.memory[: len(part)], non_blocking=True)
                if self._device.type == "cuda":
                    buffer.taken = buffer.taken or torch.cuda.Event()
                    buffer.taken.record(torch.cuda.current_stream(self._device))
                self._free.append(buffer)
            yield made

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for handle in self._opened:
            os.close(handle)

    def _submit(self) -> None:
        """Start reading as many pieces as there are buffers."""
        while self._free and (piece := next(self._pieces, None)):
            self._ahead.append(self._pool.submit(self._fill, self._free.pop(), piece))

    def _fill(self, buffer: _Buffer, piece: Range) -> _Buffer:
        """In a thread: all of the piece."""
        if buffer.taken is not None:
            buffer.taken.synchronize()
        handle = self._open(piece.file)
        # All of it is asked of the disk at once; reading alone would ask for 128 KiB after 128 KiB.
        os.posix_fadvise(handle, piece.start, piece.size, os.POSIX_FADV_WILLNEED)
        view = memoryview(buffer.memory.numpy())[: piece.size]
        done = 0
        while done < piece.size:
            count = os.preadv(handle, [view[done:]], piece.start + done)
            if count == 0:
                raise Cut(f"{piece.file.name} ends after {piece.start + done:,} bytes")
            done += count
        return buffer

    def _open(self, file: Path) -> int:
        """A handle of this thread's own: what the system reads ahead it remembers by handle."""
        handles = self._local.__dict__.setdefault("handles", {})
        if file not in handles:
            handles[file] = os.open(file, os.O_RDONLY)
            self._opened.append(handles[file])
        found: int = handles[file]
        return found
