"""The parts of a log that a bug report needs: its head, its tail, and what stands around errors. Bounded, however large
the log is."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from xflux_doctor.explain import log

HEAD, TAIL = 200, 400
"""Lines of a log's two ends."""
BEFORE, AFTER = 20, 30
"""Lines around a line that tells of an error."""
_WINDOWS = 40
_WIDE = 1000
_ERROR = re.compile(
    r"error|exception|traceback|fatal|killed|abort|segfault|segmentation|signal \d|out of memory|timed? ?out"
    r"|no space left|refused|\bnan\b|\bxid\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Excerpt:
    """Lines with their numbers, and how many the log has."""

    text: str
    shown: int
    lines: int


def of_file(path: Path, proof: Collection[int] = ()) -> Excerpt:
    """An excerpt of one log; `proof`: numbers of lines that must not be missing."""
    kept: dict[int, list[str]] = {}
    recent: deque[tuple[int, str]] = deque(maxlen=TAIL)
    wanted, windows, last = frozenset(proof), 0, 0
    upto = HEAD
    made = log.Lines()
    with log.opened(path) as file:
        for piece in log.pieces(file):
            for line in made.of(log.text_of(piece)):
                number = line.number
                rank = "" if line.rank is None else f"[rank {line.rank}] "
                text = f"{number}: {rank}{line.text[:_WIDE]}"
                error = number in wanted or (windows < _WINDOWS and number > upto and _ERROR.search(line.text))
                if error:
                    windows += number > upto
                    for before, said in list(recent)[-BEFORE:]:
                        _keep(kept, before, said)
                    upto = max(upto, number + AFTER)
                if number <= upto:
                    _keep(kept, number, text)
                recent.append((number, text))
                last = number
    for number, text in recent:
        _keep(kept, number, text)
    return Excerpt(_joined(kept), len(kept), last)


def _keep(kept: dict[int, list[str]], number: int, text: str) -> None:
    """The redraws of a progress bar share one number: the newest two of them say enough."""
    there = kept.setdefault(number, [])
    if text not in there:
        there[:] = [*there[-1:], text]


def _joined(kept: dict[int, list[str]]) -> str:
    lines: list[str] = []
    before = 0
    for number in sorted(kept):
        if number > before + 1:
            lines.append(f"… {number - before - 1} lines left out")
        lines += kept[number]
        before = number
    return "\n".join(lines) + "\n" if lines else ""
