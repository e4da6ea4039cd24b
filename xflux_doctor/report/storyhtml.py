"""A run's story as one page that opens anywhere: no other file, no script; its samples are inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from xflux_doctor.report.htmlparts import add, line, start, table, written
from xflux_doctor.report.runfiles import RunFiles
from xflux_doctor.report.story import when
from xflux_doctor.report.storytext import memory, sections, size, speed

_WIDE, _HIGH = 1000, 220
_IMAGES = 8 << 20
"""Bytes of images that a page holds; a larger one is named and left out."""
_PNG = b"\x89PNG\r\n\x1a\n"


def page(story: Mapping[str, Any]) -> str:
    """The whole page of `story.tell`'s document."""
    html, body = start(f"Run {story['folder']}", images=True)
    add(body, "h1", "Training run")
    add(body, "p", story["folder"], "soft")
    for title, lines in sections(story):
        add(body, "h2", title)
        if title == "How it ended":
            _end(body, story, lines)
        elif title == "Memory and speed":
            _measured(body, story)
        elif title == "Loss":
            _loss(body, story, [text for text in lines if not story["loss"]["points"] or text != lines[-1]])
        elif title == "Checkpoints":
            _checkpoints(body, story)
        elif title == "What happened":
            rows, _ = table(body, "Starts, ends and retries.", ("time", "what"), numbers=())
            for one in story["timeline"]:
                row = SubElement(rows, "tr")
                add(row, "td", one["time"] or "-", "num")
                add(row, "td", one["what"])
        else:
            _list(body, lines)
    add(body, "p", f"xflux-doctor {story['version']}", "soft")
    return written(html)


def _list(body: Element, lines: Sequence[str]) -> None:
    place = SubElement(body, "ul")
    for text in lines:
        item = SubElement(place, "li")
        add(item, "code" if text.startswith("$ ") else "span", text)


def _end(body: Element, story: Mapping[str, Any], lines: Sequence[str]) -> None:
    bad = story["ended"]["exit_code"] not in (0, None) or story["ended"]["cause"] not in ("none", None)
    box = SubElement(body, "div", {"class": "card"})
    for number, text in enumerate(lines):
        add(box, "p", text.strip(), ("over" if bad else "fits") if number == 0 else "")


def _measured(body: Element, story: Mapping[str, Any]) -> None:
    rows, _ = table(body, "What was foreseen before the start, and what was measured.",
                    ("", "forecast", "measured", "difference"), numbers=(1, 2, 3))  # fmt: skip
    for one in story["memory"]:
        _row(rows, one["where"], size(one["forecast"]), size(one["measured"]), one["off"])
    found = story["speed"]
    if any(found[key] is not None for key in ("forecast", "measured")):
        told = [f"{found[key]:.3f} s" if found[key] is not None else "unknown" for key in ("forecast", "measured")]
        _row(rows, "a step", told[0], told[1], found["off"])
    for text in [*memory(story), *speed(story)][len(story["memory"]) :]:
        add(body, "p", text, "soft")


def _row(rows: Element, name: str, forecast: str, measured: str, off: float | None) -> None:
    row = SubElement(rows, "tr")
    add(row, "th", name).set("scope", "row")
    for text in (forecast, measured, "" if off is None else f"{off:+.1%}"):
        add(row, "td", text, "num")


def _loss(body: Element, story: Mapping[str, Any], lines: Sequence[str]) -> None:
    for text in lines:
        add(body, "p", text, "num")
    points, heldout = story["loss"]["points"], story["heldout"]["points"]
    if points:
        _curve(body, points, heldout)
    for name in story["samples"]:
        _image(body, Path(story["folder"]), name)


def _curve(body: Element, points: Sequence[Sequence[float]], heldout: Sequence[Sequence[float]]) -> None:
    """The loss of the steps as a line, what was held out as a second one."""
    every = [*points, *heldout]
    last = max(step for step, _ in every) or 1.0
    low, high = min(value for _, value in every), max(value for _, value in every)
    span = (high - low) or 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        return _WIDE * step / last, 10 + (_HIGH - 20) * (1 - (value - low) / span)

    picture = SubElement(body, "svg", {
        "class": "curve", "viewBox": f"0 0 {_WIDE} {_HIGH}", "preserveAspectRatio": "none", "role": "img",
    })  # fmt: skip
    add(picture, "title", f"loss of {len(points)} points, from {points[0][1]:.4g} to {points[-1][1]:.4g}")
    line(picture, "room", 0, _HIGH - 10, _WIDE, _HIGH - 10)
    for kind, drawn in (("g0", points), ("g3", heldout)):
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(step, value) for step, value in drawn))
        if len(drawn) > 1:
            SubElement(picture, "polyline", {"class": f"stroke {kind}", "points": where})
    axis = SubElement(body, "div", {"class": "axis"})
    for text in ("step 0", f"loss {low:.4g} to {high:.4g}{', and held out' if heldout else ''}", f"step {last:.0f}"):
        add(axis, "span", text)


def _image(body: Element, folder: Path, name: str) -> None:
    data = RunFiles(folder).bytes_of(folder / name, _IMAGES)
    if data is None or not data.startswith(_PNG):
        add(body, "p", f"{name} is no image that could be shown here.", "soft")
        return
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    SubElement(body, "img", {"src": source, "alt": name, "class": "sample"})


def _checkpoints(body: Element, story: Mapping[str, Any]) -> None:
    rows, _ = table(body, "What a start can go on from.", ("checkpoint", "size", "written", "state"), numbers=(1,))
    for one in story["checkpoints"]:
        row = SubElement(rows, "tr")
        add(row, "th", one["name"]).set("scope", "row")
        add(row, "td", size(one["bytes"]), "num")
        add(row, "td", when(one["written"]))
        add(row, "td", "whole" if one["whole"] else "not whole: it has no manifest", "" if one["whole"] else "over")
