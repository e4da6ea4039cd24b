"""Do numbered pieces of work on threads, a few of them ahead of who asks, and hand the results out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Made = TypeVar("Made")

DEPTH = 4
"""Pieces that are done or being done ahead, on as many threads: a disk that takes four steps' time for one batch still
keeps up, and 1024 px at batch 4 are 100 MB of the host's memory."""


class Ahead(Generic[Made]):
    """`make(number)` for each of the numbers, in turn."""

    def __init__(
        self, make: Callable[[int], Made], numbers: Iterator[int], device: torch.device, depth: int = DEPTH
    ) -> None:
        self._make, self._numbers = make, numbers
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="ahead", initializer=lambda: settle(device))
        self._pending: deque[Future[Made]] = deque()
        for _ in range(depth):
            self._submit()

    def take(self) -> Made:
        """The next one; what its making raised is raised here. Raises StopIteration after the last."""
        if not self._pending:
            raise StopIteration
        made = self._pending.popleft()
        try:
            return made.result()
        finally:
            self._submit()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        number = next(self._numbers, None)
        if number is not None:
            self._pending.append(self._pool.submit(self._make, number))


def settle(device: torch.device) -> None:
    """In a new thread: it would begin on the first GPU, and take memory there, whichever is this process's own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
