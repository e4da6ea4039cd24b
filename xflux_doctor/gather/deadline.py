"""Questions to file systems that may never answer: each is asked in a thread that can be left behind.

A network mount whose server is gone keeps a caller in the kernel for ever; no timeout of Python's reaches it there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """The answers that came within `seconds`, by name. A call that raises, as one that hangs, has no answer."""
    answers: dict[str, T] = {}

    def ask(name: str, call: Callable[[], T]) -> None:
        try:
            answers[name] = call()
        except (OSError, ValueError, RuntimeError):
            return

    # Daemons: the doctor ends, whatever they wait for.
    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in calls.items()]
    until = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(answers)
