"""Most of a long log says the same with other numbers: pieces in which nothing else stands are counted, not read.

What two lines differ in beyond digits is their shape. A piece whose shapes were all seen before and are of no interest,
or are those of a loss that is a number, moves the clock on by as many lines as it has. All others go to the reader.
"""

from __future__ import annotations

from collections import Counter

from xflux_doctor.explain import log
from xflux_doctor.explain.reader import Reader

_DIGITS = b"0123456789"
_KNOWN = 50_000
"""Shapes that are remembered."""
_FEW = 40
"""Last lines of a piece, which the reader may want to look back at."""


class Skimmer:
    """Stands before a reader and takes from it what it need not read."""

    def __init__(self, reader: Reader, made: log.Lines) -> None:
        self._reader, self._made = reader, made
        self._shapes: dict[bytes, tuple[int, int] | None] = {}
        """Of each shape how far one such line moves the clock (steady lines, printed characters); None: it is to be
        read."""

    def skim(self, piece: bytes) -> bool:
        """Whether the piece was dealt with. One with colors or zeros is not, nor one inside a traceback."""
        if self._reader.open or b"\x1b" in piece or b"\x00" in piece:
            return False
        count = piece.count(b"\n") + (not piece.endswith(b"\n"))
        whole = piece.replace(b"\r", b"\n") if b"\r" in piece else piece
        bare = whole.translate(None, _DIGITS).split(b"\n")
        shapes = Counter(bare)
        steady, prints = 0, set()
        for shape, times in shapes.items():
            moves = self._shapes.get(shape)
            if moves is None:
                if shape in self._shapes or not self._learn(whole, shapes):
                    return False
                moves = self._shapes.get(shape)
                if moves is None:
                    return False
            steady += times * moves[0]
            if moves[1]:
                prints.add(shape)
        printed = 0
        if prints:
            pairs = zip(whole.split(b"\n"), bare, strict=True)
            printed = sum(len(line) + 1 for line, shape in pairs if shape in prints)
        self._made.number += count
        self._reader.passed(steady, printed, self._made.last(log.text_of(_end(whole))))
        return True

    def _learn(self, whole: bytes, shapes: Counter[bytes]) -> bool:
        """Look at a line of each shape that is new; False where too many are known already."""
        new = {shape for shape in shapes if shape not in self._shapes}
        if len(self._shapes) + len(new) > _KNOWN:
            return False
        for line in whole.split(b"\n"):
            shape = line.translate(None, _DIGITS)
            if shape in new:
                new.discard(shape)
                self._shapes[shape] = self._moves(line)
        return True

    def _moves(self, line: bytes) -> tuple[int, int] | None:
        """How far that line moves the clock of a reader that has seen nothing; None where it is more than a loss."""
        if b"\r" in line or len(line) > log.MAX_LINE:
            return None
        steps = []
        for made in log.Lines().of(log.text_of(line)):
            clock = self._reader.progress_of(made)
            if clock is None or clock.done:
                return None
            steps.append((clock.steady, clock.printed))
        return sum(step[0] for step in steps), sum(step[1] for step in steps)


def _end(whole: bytes) -> bytes:
    """The last few lines."""
    place = len(whole)
    for _ in range(_FEW + 1):
        place = whole.rfind(b"\n", 0, place)
        if place < 0:
            return whole
    return whole[place + 1 :]
