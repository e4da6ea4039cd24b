"""What NVML shows of the cards while something else runs on them."""

from __future__ import annotations

import os
import threading


class Watched:
    """The most that NVML shows of each card while it is entered, less what was held before, in bytes."""

    def __enter__(self) -> Watched:
        self._before = used()
        self.most = [0] * len(self._before)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            now = used()
            if len(now) == len(self.most):  # else a look that failed
                held = [each - old for each, old in zip(now, self._before, strict=True)]
                self.most = [max(both) for both in zip(self.most, held, strict=True)]

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def used() -> list[int]:
    """Bytes of each visible card that are held; nothing where there is no card, or no NVML."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(card) for card in _visible(pynvml.nvmlDeviceGetCount())]
        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]
    except pynvml.NVMLError:
        return []


def _visible(count: int) -> list[int]:
    """Of so many cards those that CUDA_VISIBLE_DEVICES names by number; all where it names none so."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return (
        [int(name) for name in named]
        if all(name.isdigit() and int(name) < count for name in named)
        else list(range(count))
    )
