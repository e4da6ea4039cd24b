"""The plans as stacked bars against the card, for a terminal.

Each group has a fill of its own, so that the picture reads without color; `click.echo` takes colors off where they are
not wanted. No line is longer than the width.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence

import click
import msgspec

from xflux_doctor.plans import Card, Row
from xflux_doctor.report.groups import GROUPS, gib, printable, scale, sizes

NARROWEST, WIDEST = 60, 200
"""Columns: a terminal of fewer gets as many, and a bar across more is no clearer."""
_ROOMY = 80
"""From here on there is room to write units out."""
_COLORS = ("blue", "magenta", "cyan", "yellow", "bright_black", "white")
"""Of each group."""
_WORDS = {"fits": "green", "tight": "yellow", "does not fit": "red"}


class _Signs(msgspec.Struct, frozen=True):
    """What the picture is made of."""

    fills: str
    """One for each group."""
    limit: str
    total: str
    cut: str
    """The end of a bar that is longer than the picture."""
    mark: str
    """Of the plan that was chosen."""
    dots: str
    """For the rest of a text that is too long."""


_FULL = _Signs("█▓▒░╱■", "│", "┆", "▶", "▸", "…")
_ASCII = _Signs("#%=-/o", "|", ":", ">", "*", "...")


class _Picture(msgspec.Struct, frozen=True):
    """What all bars share: their signs, the bytes of the whole width, and the cells before each mark."""

    signs: _Signs
    cells: int
    scale: int
    limit: int | None
    """Bytes; None without a card."""
    before_limit: int
    before_total: int | None
    """None where all of the card may be held."""


class _Cell(msgspec.Struct, frozen=True):
    """One column of a bar."""

    sign: str
    color: str | None = None
    bold: bool = False


def lines(
    rows: Sequence[Row], cards: tuple[Card, ...], chosen: Row | None, *, width: int, encoding: str | None = "utf-8"
) -> Iterator[str]:
    """A heading, two lines for each plan (its name; its bar, memory, time and verdict), and a legend with the groups'
    sizes in the chosen plan, else the first. `encoding`: the terminal's; ASCII is drawn where it lacks a sign."""
    if not rows:
        return
    width = min(max(width, NARROWEST), WIDEST)
    signs = _FULL if _encodes(encoding) else _ASCII
    card = min(cards, key=lambda card: card.limit, default=None)
    notes = [_numbers(row, cards, timed=any(row.seconds is not None for row in rows), width=width) for row in rows]
    room = width - 2 - max(len(click.unstyle(note)) for note in notes) - 1
    picture = _picture(rows, card, room, signs)
    yield _fit(_heading(card), width, signs)
    for row, note in zip(rows, notes, strict=True):
        yield _label(row, row is chosen, width, signs)
        yield f"  {_bar(row, picture)} {note}".rstrip()
    shown = next((row for row in rows if row is chosen), rows[0])
    yield ""
    yield from _legend(shown, card, picture, width, cut=any(row.device > picture.scale for row in rows))


def _encodes(encoding: str | None) -> bool:
    """Whether a terminal of that encoding has all signs."""
    try:
        "".join(msgspec.structs.astuple(_FULL)).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _picture(rows: Sequence[Row], card: Card | None, room: int, signs: _Signs) -> _Picture:
    limit = card.limit if card else None
    more = card is not None and card.total is not None and card.total > card.limit
    reach = scale((row.device for row in rows), limit, card.total if card else None)
    cells = room - (card is not None) - more
    if card is None or limit is None:
        return _Picture(signs, cells, reach, None, cells, None)
    # What does not fit shows beyond the mark, by a cell at least.
    over = any(row.device > limit for row in rows)
    before = min(max(1, round(cells * limit / reach)), cells - over)
    total = max(before, round(cells * (card.total or 0) / reach)) if more else None
    return _Picture(signs, cells, reach, limit, before, total)


def _bar(row: Row, picture: _Picture) -> str:
    """The segments with the marks between them; a segment ends where the sum so far does, to the nearest cell."""
    ends, sum_so_far = [], 0
    for size in sizes(row.terms, row.context, row.reserve):
        sum_so_far += size
        ends.append(round(picture.cells * min(sum_so_far, picture.scale) / picture.scale))
    whole = ends[-1]
    if picture.limit is not None:
        # The bar must say what the verdict says, however coarse the cells are.
        fits = row.device <= picture.limit
        whole = min(whole, picture.before_limit) if fits else max(whole, picture.before_limit + 1)
    places = [next((k for k, end in enumerate(ends) if cell < end), len(ends) - 1) for cell in range(whole)]
    signs = picture.signs
    drawn = [_Cell(signs.fills[k], _COLORS[k]) for k in places]
    if row.device > picture.scale:
        drawn[-1] = _Cell(signs.cut, "red", bold=True)
    drawn += [_Cell(" ")] * (picture.cells - whole)
    if picture.before_total is not None:
        drawn.insert(picture.before_total, _Cell(signs.total))
    if picture.limit is not None:
        drawn.insert(picture.before_limit, _Cell(signs.limit, bold=True))
    return "".join(
        click.style("".join(cell.sign for cell in run), fg=color, bold=bold or None, reset=bool(color or bold))
        for (color, bold), run in itertools.groupby(drawn, lambda cell: (cell.color, cell.bold))
    )


def _numbers(row: Row, cards: tuple[Card, ...], *, timed: bool, width: int) -> str:
    """Memory, seconds of a step and verdict, each in a column of its own."""
    text = f"{gib(row.device):>9}"
    if timed:
        unit = " s/step" if width >= _ROOMY else " s"
        time = "" if row.seconds is None else f"{row.seconds:.2f}{unit}"
        text += f" {time:>{5 + len(unit)}}"
    word = row.verdict(cards)
    return text if word is None else f"{text} {click.style(word, fg=_WORDS[word])}"


def _label(row: Row, chosen: bool, width: int, signs: _Signs) -> str:
    """The plan's name; what is said of it stays when the name is cut."""
    ending = (" (lossy)" if row.lossy else "") + (" (chosen)" if chosen else "")
    ending += f" (the host lacks {gib(row.lacks)})" if row.lacks else ""
    text = _fit(row.label, width - 2 - len(ending), signs) + ending
    return click.style(f"{signs.mark} {text}", bold=True) if chosen else f"  {text}"


def _heading(card: Card | None) -> str:
    if card is None:
        return "GPU memory of each plan; no card is known to hold it against:"
    free = f"{gib(card.limit)[:-4]} of " if card.total is not None and card.total > card.limit else ""
    return f"GPU memory of each plan, on {free}{gib(card.total or card.limit)} of {card.name or 'GPU'}:"


def _legend(row: Row, card: Card | None, picture: _Picture, width: int, *, cut: bool) -> Iterator[str]:
    signs = picture.signs
    items = [
        f"{click.style(fill, fg=color)} {group.name} {gib(size)[:-4]}"
        for fill, color, group, size in zip(
            signs.fills, _COLORS, GROUPS, sizes(row.terms, row.context, row.reserve), strict=True
        )
    ]
    if card is not None:
        items.append(f"{click.style(signs.limit, bold=True)} limit {gib(card.limit)[:-4]}")
        if picture.before_total is not None:
            items.append(f"{signs.total} total {gib(card.total or 0)[:-4]}")
    if cut:
        items.append(f"{signs.cut} goes on to the right")
    yield _fit(f"  GiB of `{row.label}`:", width, signs)
    line = ""
    for item in items:
        if line and len(click.unstyle(line)) + 3 + len(click.unstyle(item)) > width:
            yield line
            line = ""
        line += f"{'   ' if line else '  '}{item}"
    yield line


def _fit(text: str, width: int, signs: _Signs) -> str:
    """The text in one line of so many columns, of which some letters take two."""
    text = printable(text)
    if signs is _ASCII:
        text = text.encode("ascii", "replace").decode()
    if _columns(text) <= width:
        return text
    while text and _columns(text) > width - len(signs.dots):
        text = text[:-1]
    return text.rstrip() + signs.dots


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
