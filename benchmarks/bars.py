"""Bars in an SVG written by hand: one panel below the other, each with its own scale and an optional limit."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, LABELS, RIGHT, ROW, HEAD = 860, 210, 110, 22, 34
OURS, PEER, LIMIT = "#1f6fb4", "#b9b9b9", "#d1603d"


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    color: str
    note: str = ""


@dataclass(frozen=True)
class Panel:
    title: str
    bars: list[Bar]
    limit: float | None = None
    """A line across the bars."""


def draw(path: Path, panels: list[Panel]) -> None:
    """Write the picture of these panels."""
    parts, top = [], 0
    for panel in panels:
        parts.append(_panel(panel, top))
        top += HEAD + ROW * len(panel.bars) + 12
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="{WIDTH}" height="{top}" fill="white"/>\n'
        f"{''.join(parts)}</svg>\n",
        "utf-8",
    )


def _panel(panel: Panel, top: int) -> str:
    longest = max([bar.value for bar in panel.bars] + [panel.limit or 0.0]) or 1.0
    scale = (WIDTH - LABELS - RIGHT) / longest
    lines = [f'<text x="8" y="{top + 20}" font-weight="bold">{escape(panel.title)}</text>\n']
    for number, bar in enumerate(panel.bars):
        y = top + HEAD + ROW * number
        wide = bar.value * scale
        lines.append(f'<text x="{LABELS - 8}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>\n')
        lines.append(f'<rect x="{LABELS}" y="{y + 2}" width="{wide:.1f}" height="{ROW - 6}" fill="{bar.color}"/>\n')
        lines.append(f'<text x="{LABELS + wide + 6:.1f}" y="{y + 14}">{escape(bar.note)}</text>\n')
    if panel.limit:
        x, bottom = LABELS + panel.limit * scale, top + HEAD + ROW * len(panel.bars)
        lines.append(f'<line x1="{x:.1f}" y1="{top + HEAD - 4}" x2="{x:.1f}" y2="{bottom}" stroke="{LIMIT}"/>\n')
    return "".join(lines)
