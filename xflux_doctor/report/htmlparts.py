"""Pieces of a page that opens anywhere: no other file, no script, light and dark by the reader's setting.

Pages are built as trees: whatever text is put into one is escaped when it is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from xflux_doctor.report.groups import printable

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d2127; --soft: #5b6470; --line: #d5d9de;
  --g0: #2f5d8c; --g1: #b8497a; --g2: #4f9d8f; --g3: #d69a2d; --g4: #9aa3ad; --g5: #5f6772;
  --fits: #1d7a3e; --tight: #8a5a00; --over: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --soft: #a3acb7; --line: #363d46;
  --g0: #5b93cc; --g1: #df7ba7; --g2: #66bfae; --g3: #e6b655; --g4: #7d8792; --g5: #b8c0c9;
  --fits: #63c987; --tight: #e3b341; --over: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .35rem 0; } .soft { color: var(--soft); } .num { font-variant-numeric: tabular-nums; }
.fits { color: var(--fits); } .tight { color: var(--tight); } .over { color: var(--over); }
.fits, .tight, .over { font-weight: 600; }
.card { border: 1px solid var(--line); border-left: .3rem solid var(--g0); border-radius: .3rem;
  padding: .75rem 1rem; margin: .75rem 0; }
.plan { margin: .9rem 0; } .head { display: flex; flex-wrap: wrap; gap: 0 1rem; justify-content: space-between; }
.chosen .name { font-weight: 700; }
.tag { border: 1px solid currentColor; border-radius: .6rem; font-size: .75rem; font-weight: 400; padding: 0 .45rem;
  margin-left: .4rem; white-space: nowrap; }
svg.bar { display: block; width: 100%; height: 32px; margin-top: .15rem; }
svg.key { width: .9rem; height: .9rem; flex: none; }
.room { fill: none; stroke: var(--line); } .seam { stroke: var(--paper); } .mark { stroke: var(--ink); }
.error { stroke: var(--soft); } .arrow { fill: var(--ink); } .gap { fill: var(--paper); }
.g0 { fill: var(--g0); } .g1 { fill: var(--g1); } .g2 { fill: var(--g2); } .g3 { fill: var(--g3); }
.g4 { fill: var(--g4); } .g5 { fill: var(--g5); }
line, .room { vector-effect: non-scaling-stroke; }
ul.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: .5rem 0; padding: 0; }
ul.legend li { display: flex; align-items: center; gap: .4rem; }
.axis { display: flex; justify-content: space-between; font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; max-width: calc(100vw - 2rem); }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
td.num, thead th.num { text-align: right; } td.num, td.verdict, td code { white-space: nowrap; }
thead th { vertical-align: bottom; } tbody th { font-weight: 400; min-width: 11rem; }
tr.chosen th, tfoot th, tfoot td { font-weight: 700; } td.why { color: var(--soft); min-width: 14rem; }
code { font-size: .9em; } li code { white-space: pre-wrap; overflow-wrap: anywhere; }
svg.curve { display: block; width: 100%; height: 220px; } .stroke { fill: none; stroke-width: 1.6;
  vector-effect: non-scaling-stroke; } .stroke.g0 { stroke: var(--g0); } .stroke.g3 { stroke: var(--g3); }
img.sample { display: block; max-width: 100%; height: auto; margin: .75rem 0; }
@media print { .plan, tr { break-inside: avoid; } }
"""


def start(title: str, *, images: bool = False) -> tuple[Element, Element]:
    """A new page, and the place for its content. `images`: whether it holds any, inside of itself."""
    html = Element("html", lang="en")
    head = SubElement(html, "head")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    policy = "default-src 'none'; style-src 'unsafe-inline'" + ("; img-src data:" if images else "")
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": policy})
    add(head, "title", title)
    SubElement(head, "style").text = STYLE
    return html, SubElement(SubElement(html, "body"), "main")


def written(html: Element) -> str:
    """The page as a file's text."""
    return "<!DOCTYPE html>\n" + tostring(html, encoding="unicode", method="html") + "\n"


def add(parent: Element, tag: str, text: str, kind: str = "") -> Element:
    """A new element with a text, the last of its parent's; `kind`: its class."""
    made = SubElement(parent, tag, {"class": kind} if kind else {})
    made.text = printable(text)
    return made


def after(parent: Element, text: str) -> None:
    """Text after the last element that was put into it."""
    parent[-1].tail = printable(text)


def table(body: Element, caption: str, names: Sequence[str], *, numbers: Iterable[int]) -> tuple[Element, Element]:
    """The body and the foot of a table that scrolls by itself where the page is too narrow."""
    right = set(numbers)
    box = SubElement(body, "div", {"class": "scroll", "role": "region", "aria-label": caption, "tabindex": "0"})
    made = SubElement(box, "table")
    add(made, "caption", caption)
    head = SubElement(SubElement(made, "thead"), "tr")
    for place, name in enumerate(names):
        add(head, "th", name, "num" if place in right else "").set("scope", "col")
    return SubElement(made, "tbody"), SubElement(made, "tfoot")


def rect(svg: Element, kind: str, x: float, y: float, width: float, height: float) -> Element:
    """A rectangle in a drawing."""
    values = {"x": x, "y": y, "width": width, "height": height}
    return SubElement(svg, "rect", {"class": kind, **{key: f"{value:.2f}" for key, value in values.items()}})


def line(
    svg: Element, kind: str, x1: float, y1: float, x2: float, y2: float, width: float = 1, dashes: str = ""
) -> None:
    """A line in a drawing; `width` and `dashes` in pixels, however the drawing is stretched."""
    values = {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "stroke-width": width}
    more = {"stroke-dasharray": dashes} if dashes else {}
    SubElement(svg, "line", {"class": kind, **{key: f"{value:.2f}" for key, value in values.items()}, **more})
