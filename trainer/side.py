"""Work beside the main stream of kernels, inside a recording: what reads memory runs while what computes runs.

A matrix product leaves the memory idle, and the gradients of adapters, the modulation and transpositions leave the
tensor cores idle. A recorded step knows who waits for whom, so these run at the same time. Outside of a recording
everything stays in one stream: there the events would cost the host more than the overlap brings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sides:
    """What runs beside what in a model."""

    narrow: Side
    """Beside a product its adapters' narrow ones."""
    ahead: Side
    """Beside the first blocks the modulation of all others."""

    @classmethod
    def on(cls, device: torch.device) -> Sides:
        return cls(*(Side(device) for _ in range(2)))


class Side:
    """One stream beside the current one. Whoever forks holds what is used beside until it has joined."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def active(self) -> bool:
        return self._stream is not None and torch.cuda.is_current_stream_capturing()

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Inside, kernels wait for those launched before and for nothing that is launched after."""
        if not self.active:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Any:
        """The place that the stream beside has come to, for `wait`."""
        if not self.active:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: Any) -> None:
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)

    def join(self) -> None:
        """Everything that is launched from now on waits for what was launched beside."""
        if self.active:
            torch.cuda.current_stream().wait_stream(self._stream)
