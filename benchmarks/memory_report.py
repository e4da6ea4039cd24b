"""Predicted beside measured memory, as lines of text and as a picture."""

from __future__ import annotations

import statistics
from html import escape
from pathlib import Path
from typing import Any

from children import GIB, Outcome

HEAD = (
    "| row | px | batch | predicted GiB | allocated | error | reserved | device | s/step | |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
WIDTH, MARGIN = 640, 56
BAND = 0.03
"""What the forecast is held to."""


def line(row: Outcome) -> str:
    """One row of the table. `device` is the whole card's, as NVML has it when the row's steps are done."""
    width, height = row["shape"]
    error = f"{row['error']:+.2%}" if row.get("error") is not None else "–"
    cells = [
        row["row"], f"{width}" if width == height else f"{width}x{height}", str(row["batch"]), _gib(row, "predicted"),
        _gib(row, "allocated"), error, _gib(row, "reserved"), _gib(row, "device"),
        f"{row['seconds_per_step']:.2f}" if "seconds_per_step" in row else "–", _said(row),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _gib(row: Outcome, name: str) -> str:
    value = row.get(f"{name}_bytes")
    return f"{value / GIB:.2f}" if value else "–"


def _said(row: Outcome) -> str:
    if row["outcome"] == "measured":
        return row.get("wrong", "")
    return f"{row['outcome']}, called {row['called']}" if row["outcome"] == "out of memory" else row["outcome"]


def table(rows: list[Outcome]) -> str:
    return "\n".join([HEAD, *map(line, rows)])


def summary(rows: list[Outcome]) -> dict[str, Any]:
    """How far off the forecasts are: of the errors' sizes the median and the largest, and the verdicts that failed."""
    errors = {row["row"]: row["error"] for row in rows if row.get("error") is not None}
    outcomes = [row["outcome"] for row in rows]
    found: dict[str, Any] = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    if errors:
        sizes = [abs(error) for error in errors.values()]
        worst = max(errors, key=lambda name: abs(errors[name]))
        found |= {"median": statistics.median(sizes), "worst": errors[worst], "worst_row": worst}
        found["mean_signed"] = statistics.fmean(errors.values())
        found["beyond_3_percent"] = sum(size > BAND for size in sizes)
    return {**found, "wrong_verdicts": [row["row"] for row in rows if row.get("wrong")]}


def said(found: dict[str, Any]) -> str:
    """The summary in a sentence or two."""
    words = [f"{found[key]} {key}" for key in ("measured", "out of memory", "not there", "failed") if key in found]
    text = ", ".join(words) + "."
    if "median" in found:
        text += f" Error of the predicted peak: median {found['median']:.2%}, worst {found['worst']:+.2%}"
        text += f" ({found['worst_row']}), {found['beyond_3_percent']} beyond 3 %; on average "
        text += f"{found['mean_signed']:+.2%}."
    wrong = found["wrong_verdicts"]
    return text + (f" Wrong verdicts: {', '.join(wrong)}." if wrong else "")


def draw(path: Path, rows: list[Outcome]) -> None:
    """Predicted against measured peaks: a dot each, the line where they are equal, and 3 % to both sides of it."""
    dots = [row for row in rows if row.get("error") is not None]
    most = max((max(row["predicted_bytes"], row["allocated_bytes"]) for row in dots), default=GIB) / GIB * 1.05
    scale = (WIDTH - 2 * MARGIN) / most

    def at(measured: float, predicted: float) -> tuple[float, float]:
        return round(MARGIN + measured * scale, 1), round(WIDTH - MARGIN - predicted * scale, 1)

    (left, bottom), (right, top) = at(0, 0), at(most, most)
    low, high = at(most, most * (1 - BAND)), at(most / (1 + BAND), most)
    parts = [
        f'<polygon points="{left},{bottom} {low[0]},{low[1]} {right},{top} {high[0]},{high[1]}" fill="#d9e7f3"/>',
        f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{top}" stroke="#1f6fb4"/>',
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>',
    ]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**6) if most / step <= 10)
    for tick in range(0, int(most) + 1, step):
        x, y = at(tick, tick)
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{tick}</text>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{tick}</text>')
    for row in dots:
        x, y = at(row["allocated_bytes"] / GIB, row["predicted_bytes"] / GIB)
        color = "#d1603d" if abs(row["error"]) > BAND else "#1f6fb4"
        title = escape(f"{row['row']}: {row['error']:+.2%}")
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"><title>{title}</title></circle>')
    middle = WIDTH / 2
    parts += [
        f'<text x="{middle}" y="{WIDTH - 12}" text-anchor="middle">measured peak of a step, GiB allocated</text>',
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">predicted, GiB</text>',
        f'<text x="{left + 12}" y="{top + 16}">{len(dots)} configurations; the band is ±3 %</text>',
    ]
    body = "\n".join(parts)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{WIDTH}" viewBox="0 0 {WIDTH} {WIDTH}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="{WIDTH}" height="{WIDTH}" fill="white"/>\n{body}\n'
        "</svg>\n",
        "utf-8",
    )
