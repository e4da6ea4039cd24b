"""loss.svg: the curves of a run as one picture that any browser shows, written by hand, without a plotting library.

Made from metrics.jsonl and heldout.jsonl, so that it shows a resumed run from its start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from xflux_trainer import files
from xflux_trainer.track import Smooth, read_lines

NAME = "loss.svg"
WIDTH, PANEL = 860, 300
"""Pixels: of the picture, and of one panel's height."""
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 34, 30
"""Pixels around a panel's axes."""
POINTS = 1500
"""More steps than these are drawn as the means of their neighbours: more would not be seen."""
COLORS = ("#1f6fb4", "#d1603d", "#3f8f4f", "#8a5aa8", "#b8860b", "#4aa5a8", "#a8476b", "#666666")

Points = list[tuple[float, float]]


def write(output: Path, title: str = "loss") -> Path | None:
    """Draw the run in that folder; None when it has no step yet."""
    lines = read_lines(output / "metrics.jsonl")
    raw = [(float(line["step"]), float(line["loss"])) for line in lines if _number(line.get("loss"))]
    if not raw:
        return None
    smooth = Smooth()
    averaged = [(step, smooth.add(loss)) for step, loss in raw]
    heldout = [line for line in read_lines(output / "heldout.jsonl") if _number(line.get("mean"))]
    mean = [(float(line["step"]), float(line["mean"])) for line in heldout]
    first = [("loss of the step", _thin(raw), "#bcd2e5", False), ("averaged", _thin(averaged), COLORS[0], False)]
    if mean:
        first.append(("held out", mean, COLORS[1], True))
    last = max([step for step, _ in raw + mean])
    panels = [_panel(first, f"{title}, by optimizer step", last, 0, robust=raw)]
    if by_time := _by_time(heldout):
        panels.append(_panel(by_time, "held-out loss at each time t", last, PANEL))
    height = PANEL * len(panels)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n{"".join(panels)}</svg>\n'
    )
    files.write_bytes(output / NAME, svg.encode())
    return output / NAME


def _by_time(heldout: list[dict[str, Any]]) -> list[tuple[str, Points, str, bool]]:
    """One line for each time, where there are two values to join."""
    by_time: dict[str, Points] = {}
    for line in heldout:
        for t, value in (line.get("by_time") or {}).items():
            if _number(value):
                by_time.setdefault(str(t), []).append((float(line["step"]), float(value)))
    lines = [(f"t = {t}", points) for t, points in by_time.items() if len(points) > 1]
    return [(label, points, COLORS[k % len(COLORS)], True) for k, (label, points) in enumerate(lines)]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _thin(points: Points) -> Points:
    size = math.ceil(len(points) / POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _panel(
    lines: list[tuple[str, Points, str, bool]], title: str, last: float, top: int, robust: Points | None = None
) -> str:
    """Axes, grid, lines (label, points, color, whether with dots) and a legend. `robust`: points of which the most
    outlying hundredth on either side does not set the axis."""
    values = sorted(y for label, points, _, _ in lines for _, y in points if robust is None or label != lines[0][0])
    if robust:
        outer = sorted(y for _, y in robust)
        values = sorted([*values, outer[len(outer) // 100], outer[-1 - len(outer) // 100]])
    low, high = _range(values[0], values[-1])
    wide, deep = WIDTH - LEFT - RIGHT, PANEL - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + wide * step / max(last, 1.0)

    def y(value: float) -> float:
        return top + TOP + deep * (1 - (min(max(value, low), high) - low) / (high - low))

    parts = [f'<text x="{LEFT}" y="{top + 20}" font-weight="bold">{escape(title)}</text>\n']
    for value in _ticks(low, high):
        parts.append(_line(LEFT, y(value), WIDTH - RIGHT, y(value), "#e6e6e6"))
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>\n')
    for step in _ticks(0, last):
        parts.append(_line(x(step), top + TOP, x(step), top + TOP + deep, "#f2f2f2"))
        parts.append(f'<text x="{x(step):.1f}" y="{top + PANEL - 10}" text-anchor="middle">{step:g}</text>\n')
    at = WIDTH - RIGHT
    for _, points, color, dots in lines:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>\n')
        if dots:
            parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6" fill="{color}"/>\n' for a, b in points]
    for label, _, color, _ in reversed(lines):
        parts.append(f'<text x="{at}" y="{top + 20}" text-anchor="end" fill="{color}">{escape(label)}</text>\n')
        at -= 8 * len(label) + 14
    return "".join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>\n'


def _range(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> Sequence[float]:
    """Four to nine round numbers between the two."""
    rough = max(high - low, 1e-12) / 6
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
