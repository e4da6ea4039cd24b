"""The plans as stacked bars in a page: each bar is a drawing as wide as the page, its words stand in the page itself.

What a color says is also said by the order of the segments, by their titles, and by the tables below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from xflux_doctor.plans import Card
from xflux_doctor.report.groups import GROUPS, gib, printable, scale, sizes
from xflux_doctor.report.htmlparts import add, line, rect

_WIDE, _HIGH, _BELOW = 1000, 24, 8
"""Of a bar's drawing: units across, which the page stretches to its own width, pixels down, and those below the bar
where its error stands."""
_ARROW = 12
"""Units of the end of a bar that is longer than the drawing."""
_CLASSES = {"fits": "fits", "tight": "tight", "does not fit": "over"}


@dataclass(frozen=True)
class Drawn:
    """One plan as the page shows it."""

    label: str
    changes: Mapping[str, Any]
    lossy: bool
    gpu: Mapping[str, Any] | None
    """An entry of the document; None where the document does not have it."""
    seconds: float | None
    chosen: bool = False
    host: Mapping[str, Any] | None = None
    """Of the document, as `gpu`."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of each group."""
        if not self.gpu:
            return ()
        return sizes(self.gpu["terms"], self.gpu["context_bytes"], self.gpu["reserved_bytes"] - self.gpu["peak_bytes"])


@dataclass(frozen=True)
class Scale:
    """What all bars are held against."""

    whole: int
    limit: int | None
    total: int | None
    """None where all of the card may be held, or where that is not known."""
    error: float

    def at(self, size: float) -> float:
        """Where a size ends in a drawing."""
        return _WIDE * max(0.0, min(1.0, size / self.whole))


def scale_of(document: Mapping[str, Any], drawn: Sequence[Drawn], card: Card | None) -> Scale:
    """That of the plans that are drawn, against the card that has least."""
    entries = [plan.gpu for plan in drawn if plan.gpu]
    limit = next((entry["limit_bytes"] for entry in entries), None)
    total = card.total if card and limit and card.total and card.total > limit else None
    whole = scale((entry["device_bytes"] for entry in entries), limit, total)
    return Scale(whole, limit, total, document["error_bar"])


def picture(body: Element, drawn: Sequence[Drawn], reach: Scale, card: Card | None) -> None:
    """The stacked bars, and what their colors and marks mean."""
    name = (card.name if card else "") or "GPU"
    of = "" if reach.limit is None else f", on {_room(reach)} of {name}"
    add(body, "h2", f"GPU memory of each plan{of}")
    legend = SubElement(body, "ul", {"class": "legend"})
    for place, group in enumerate(GROUPS):
        item = SubElement(legend, "li", title=group.why)
        key = SubElement(item, "svg", {"class": "key", "viewBox": "0 0 10 10", "aria-hidden": "true"})
        SubElement(key, "rect", {"class": f"g{place}", "width": "10", "height": "10"})
        add(item, "span", group.name)
    marks = [] if reach.limit is None else [("", f"limit {gib(reach.limit)}")]
    marks += [] if reach.total is None else [("3 2", f"total {gib(reach.total)}")]
    for dashes, text in marks:
        item = SubElement(legend, "li")
        key = SubElement(item, "svg", {"class": "key", "viewBox": "0 0 10 10", "aria-hidden": "true"})
        line(key, "mark", 5, 0, 5, 10, 2, dashes)
        add(item, "span", text)
    for number, plan in enumerate(drawn):
        _plan(body, plan, reach, number)
    axis = SubElement(body, "div", {"class": "axis soft num", "aria-hidden": "true"})
    add(axis, "span", "0")
    add(axis, "span", gib(reach.whole))
    add(body, "p", "The thin line below a bar's end is the forecast's error.", "soft")


def _room(reach: Scale) -> str:
    limit = gib(reach.limit or 0)
    return limit if reach.total is None else f"{limit[:-4]} of {gib(reach.total)}"


def _plan(body: Element, plan: Drawn, reach: Scale, number: int) -> None:
    """One plan's name, numbers and bar."""
    gpu = plan.gpu
    assert gpu is not None
    box = SubElement(body, "div", {"class": "plan chosen" if plan.chosen else "plan"})
    head = SubElement(box, "div", {"class": "head"})
    name = SubElement(head, "span", {"class": "name"})
    tagged(name, plan)
    facts = SubElement(head, "span", {"class": "num"})
    facts.text = gib(gpu["device_bytes"]) + (f", {plan.seconds:.2f} s a step" if plan.seconds is not None else "")
    if gpu["verdict"]:
        facts.text += ", "
        judged(facts, gpu)
    ids = (f"bar{number}", f"about{number}")
    shown = {"class": "bar", "viewBox": f"0 0 {_WIDE} {_HIGH + _BELOW}", "preserveAspectRatio": "none", "role": "img"}
    svg = SubElement(box, "svg", {**shown, "aria-labelledby": " ".join(ids)})
    add(svg, "title", f"{plan.label}: {gib(gpu['device_bytes'])}{_against(gpu)}").set("id", ids[0])
    parts = ", ".join(f"{group.name} {gib(size)}" for group, size in zip(GROUPS, plan.sizes, strict=True))
    add(svg, "desc", parts).set("id", ids[1])
    _bar(svg, plan.sizes, gpu, reach)


def _against(gpu: Mapping[str, Any]) -> str:
    return f" of {gib(gpu['limit_bytes'])}, {gpu['verdict']}" if gpu["verdict"] else ""


def _bar(svg: Element, parts: Sequence[int], gpu: Mapping[str, Any], reach: Scale) -> None:
    """Segments, the error below their end, and the card's marks."""
    rect(svg, "room", 0, 0.5, _WIDE, _HIGH - 1)
    sum_so_far = 0
    for place, size in enumerate(parts):
        left, right = reach.at(sum_so_far), reach.at(sum_so_far + size)
        if right > left:
            add(rect(svg, f"g{place}", left, 2, right - left, _HIGH - 4), "title", f"{GROUPS[place].name} {gib(size)}")
            if left:
                line(svg, "seam", left, 2, left, _HIGH - 2)
        sum_so_far += size
    end, error = gpu["device_bytes"], gpu["peak_bytes"] * reach.error
    if end > reach.whole:
        rect(svg, "gap", _WIDE - 1.5 * _ARROW, 0, 1.5 * _ARROW, _HIGH)
        points = f"{_WIDE - _ARROW},0 {_WIDE},{_HIGH / 2} {_WIDE - _ARROW},{_HIGH}"
        SubElement(svg, "polygon", {"class": "arrow", "points": points})
    else:
        low, high, middle = reach.at(end - error), reach.at(end + error), _HIGH + _BELOW / 2
        line(svg, "error", low, middle, high, middle)
        for x in (low, high) if end + error <= reach.whole else (low,):
            line(svg, "error", x, middle - 2.5, x, middle + 2.5)
    if reach.limit is not None:
        line(svg, "mark", reach.at(reach.limit), 0, reach.at(reach.limit), _HIGH, 2)
    if reach.total is not None:
        line(svg, "mark", reach.at(reach.total), 0, reach.at(reach.total), _HIGH, 2, "3 2")


def judged(place: Element, gpu: Mapping[str, Any] | None) -> None:
    """The verdict in its color."""
    word = gpu["verdict"] if gpu else None
    add(place, "span", word or "unknown", _CLASSES.get(word or "", "soft"))


def tagged(place: Element, plan: Drawn) -> None:
    """A plan's name, and in short what is to be known of it."""
    place.text = printable(plan.label)
    for word, said in (("chosen", plan.chosen), ("lossy", plan.lossy)):
        if said:
            add(place, "span", word, "tag")
