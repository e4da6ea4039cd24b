"""Questions to file systems that may never answer: they are asked in threads that can be left behind.

A network mount whose server is gone keeps a caller in the kernel for ever; no timeout of Python's reaches it there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeVar

_PATIENCE = 0.02
"""How long one thread may ask them one after the other: where all answer, as they do nearly always, each further thread
would cost more than its question."""
T = TypeVar("T")


def within(seconds: float, calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """The answers that came within `seconds`, by name. A call that raises, as one that hangs, has no answer."""
    answers: dict[str, T] = {}
    waiting = deque(calls.items())

    def ask() -> None:
        while waiting:
            try:
                name, call = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                answers[name] = call()
            except (OSError, ValueError, RuntimeError):
                continue

    until = time.monotonic() + seconds
    # Daemons: the doctor ends, whatever they wait for.
    threads = [threading.Thread(target=ask, daemon=True)]
    threads[0].start()
    threads[0].join(min(_PATIENCE, seconds))
    if waiting:  # something is slow, and must not hold up the others
        threads += [threading.Thread(target=ask, daemon=True) for _ in range(len(waiting))]
        for thread in threads[1:]:
            thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(answers)
