"""The plan as a page: its numbers, that it stands alone and escapes, and how a real browser lays it out."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import xflux_kit as kit
from conftest import GIB, machine, record
from picture_kit import ONE, TWO, Planned, planned

from xflux_doctor.cli import main
from xflux_doctor.matrix import Matrix
from xflux_doctor.plans import Card
from xflux_doctor.report.groups import GROUPS, sizes
from xflux_doctor.report.planhtml import page, reasons_of

SUMMARY = "LoRA r16 of FLUX.1-dev at 1024 px, batch 1"
JOBS: dict[str, dict[str, Any]] = {
    "fits as it is": {"free": 70, "gradient_checkpointing": False},
    "fits after a change": {"gpu": "RTX 5090:32", "gradient_checkpointing": False},
    "lossy only": {"gpu": "RTX 4090:24"},
    "nothing fits": {"gpu": "RTX 3050:8"},
    "two ranks": {"free": 70, "launch": TWO},
    "no card": {"card": None},
    "on the CPU": {"cpu": True},
}
VOID = {"meta"}


class Read(HTMLParser):
    """A page's elements, attributes and texts; that its elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module", params=JOBS)
def job(request: pytest.FixtureRequest, matrix: Matrix) -> Planned:
    return planned(matrix, **JOBS[request.param])


def made(job: Planned, summary: str = SUMMARY) -> str:
    return page(job.document, summary=summary, cards=job.cards, chosen=job.chosen, reasons=reasons_of(job.bill))


def test_the_page_says_what_the_document_says(job: Planned) -> None:
    read, document = Read(made(job)), job.document
    assert SUMMARY in read.words and f"±{document['error_bar']:.0%}" in read.words
    plan = document["plan"]
    if plan is not None:
        assert f"{plan['label']}: {plan['why']}." in read.words
    for row in document["alternatives"]:
        assert row["label"] in read.words and f"{row['gpu']['device_bytes'] / GIB:.1f} GiB" in read.words
    for term in (*job.bill.host, *job.bill.gpu):
        entry = document["ranks"][0]
        if term.name in entry["host"]["terms"] or (entry["gpu"] and term.name in entry["gpu"]["terms"]):
            assert term.name in read.words
    bill = next(table for table in read.tables if table[0] == ["term", "GiB", "why"])
    amounts = [float(row[1]) for row in bill[1:] if row[0] in (*job.bill.gpu_phases, *terms(document))]
    assert amounts == sorted(amounts, reverse=True) and amounts
    whys = {row[0]: row[2] for row in bill[1:]}
    assert all(whys[name] for name in terms(document))


def terms(document: dict[str, Any]) -> dict[str, int]:
    first = document["ranks"][0]
    found: dict[str, int] = (first["gpu"] or first["host"])["terms"]
    return found


def test_a_table_has_the_bars_numbers(job: Planned) -> None:
    read = Read(made(job))
    bars = [attributes for tag, attributes in read.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(bars) == len(job.rows)
    if not job.rows:
        return
    table = next(table for table in read.tables if table[0][1:] == [*(group.name for group in GROUPS), "together"])
    ordered = sorted(job.rows, key=lambda row: row is not job.chosen)
    for cells, row in zip(table[1:], ordered, strict=True):
        assert cells[0].startswith(row.label)
        assert cells[1:-1] == [f"{size / GIB:.1f}" for size in sizes(row.terms, row.context, row.reserve)]
        assert cells[-1] == f"{row.device / GIB:.1f}"
    other = next(table for table in read.tables if "lossy" in table[0])
    for cells, row in zip(other[1:], ordered, strict=True):
        assert cells[1:3] == [row.verdict(job.cards) or "unknown", f"{row.device / GIB:.1f} GiB"]
        assert row.host and cells[3] == f"{row.host / GIB:.1f} GiB"
        assert cells[4] == ("unknown" if row.seconds is None else f"{row.seconds:.2f} s")
        assert cells[5] == ("yes" if row.lossy else "no")
        assert all(f"{key}: " in cells[6] for key in row.changes) and (row.changes or cells[6] == "none")


def test_it_stands_alone(job: Planned) -> None:
    text = made(job)
    read = Read(text)
    assert not {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe", "object", "a", "base", "form"}
    names = {name for _, attributes in read.tags for name in attributes}
    assert not names & {"src", "href", "xlink:href", "style"} and not any(name.startswith("on") for name in names)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert ("html", {"lang": "en"}) in read.tags and "prefers-color-scheme: dark" in text
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in read.tags:
        if tag == "svg" and attributes.get("role") == "img":
            assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)
        elif tag == "svg":
            assert attributes["aria-hidden"] == "true"


def test_the_document_alone_makes_a_page(job: Planned) -> None:
    """`plan --format json > plan.json`, and a page of it somewhere else."""
    read = Read(page(json.loads(json.dumps(job.document))))
    assert "Memory plan" in read.words and f"xflux-doctor {job.document['version']}" in read.words
    for row in job.document["alternatives"]:
        assert row["label"] in read.words


def test_a_plan_s_own_numbers_in_the_document_are_taken(matrix: Matrix) -> None:
    job = planned(matrix, gpu="RTX 5090:32", gradient_checkpointing=False)
    document = job.document
    text = page(document)
    assert "not in this file" not in text and text.count('role="img"') == len(job.rows)
    del document["plan"]["gpu"]  # as an older doctor wrote it
    assert "not in this file" in page(document)


def test_a_page_of_x_flux_s_own_scripts(
    tmp_path: Path, matrix: Matrix, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command's own output."""
    kit.job(tmp_path, data={"img_size": 1024})
    record(tmp_path / "facts.json", machine(matrix))
    (tmp_path / "accelerate.yaml").write_text(ONE)
    monkeypatch.chdir(tmp_path)
    usual = ["--accelerate-config", "accelerate.yaml", "--facts", "facts.json", "--gpu", "A100:80", "--format", "json"]
    main(["plan", "--config", "own.yaml", "--xflux", str(tmp_path), *usual])
    read = Read(page(json.loads(capsys.readouterr().out)))
    assert "under DeepSpeed in bf16: the first change that fits." in read.words and "±3%" in read.words
    assert "T5, CLIP and the autoencoder" in read.words and "distributed_type: DEEPSPEED" in read.words


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></title>&amp;", "a\x00\x1b\ud800b"]
)
def test_every_text_is_escaped(matrix: Matrix, text: str) -> None:
    job = planned(matrix, free=70)
    document = job.document
    plain = Read(made(job))
    document["plan"] |= {"label": text, "why": text}
    document["version"] = text
    for row in document["alternatives"]:
        row["label"], row["changes"] = text, {text: text, "repeats": [text, None, True]}
    for entry in (document["ranks"][0]["gpu"], document["ranks"][0]["host"]):
        entry["terms"] = {f"{text}{name}": size for name, size in entry["terms"].items()}
    reasons = {key: dict.fromkeys(document["ranks"][0][key]["terms"], text) for key in ("gpu", "host")}
    whole = page(document, summary=text, cards=(Card(text, 79 * GIB, 70 * GIB),), reasons=reasons)
    whole.encode()
    read = Read(whole)
    assert {tag for tag, _ in read.tags} <= {tag for tag, _ in plain.tags}
    assert {name for _, attributes in read.tags for name in attributes} == {
        name for _, attributes in plain.tags for name in attributes
    }
    if text.isprintable():
        assert read.words.count(" ".join(text.split())) > 10


# In a browser --------------------------------------------------------------------------------------------

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
FRAME = """<!DOCTYPE html><html><body><iframe style="border: 0" width="{width}" height="1600" srcdoc="{page}"></iframe>
<pre></pre><script>addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const all = (what) => [...inside.querySelectorAll(what)].map((one) => one.getBoundingClientRect());
  document.querySelector("pre").textContent = JSON.stringify({{
    width: root.clientWidth, page: root.scrollWidth, text: inside.body.innerText,
    tables: all(".scroll").map((table) => table.right),
    bars: all("svg.bar").map((bar) => [bar.left, bar.right, bar.height]),
    segments: all("svg.bar rect[class^=g]").map((one) => one.right)}});
}})</script></body></html>"""
"""A window is no narrower than 500 px, a frame may be."""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CHROMIUM"), *NAMES)))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} on PATH, and CHROMIUM names none")
    return found


def headless(browser: str, folder: Path, width: int, *arguments: str, height: int = 1600) -> str:
    # The page is ours, and root may start a browser without its sandbox only.
    usual = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
             f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]  # fmt: skip
    done = subprocess.run([browser, *usual, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["fits as it is", "lossy only", "two ranks"])
def test_nothing_is_wider_than_the_page(matrix: Matrix, browser: str, tmp_path: Path, width: int, name: str) -> None:
    """Measured from outside of a frame: the page itself is not changed, and runs no script."""
    job = planned(matrix, **JOBS[name])
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=escape(made(job))), "utf-8")
    dom = headless(browser, tmp_path, width, "--dump-dom", f"file://{tmp_path}/frame.html")
    found = json.loads(unescape(dom.split("<pre>")[1].split("</pre>")[0]))
    assert width - 20 <= found["width"] == found["page"] <= width  # less a bar to scroll by
    assert max(found["tables"]) <= found["width"]
    assert len(found["bars"]) == len(job.rows)
    for left, right, height in found["bars"]:
        assert 0 < left < right < found["width"] and right - left > found["width"] * 0.75 and height >= 20
    assert max(found["segments"]) <= found["bars"][0][1] + 0.5
    for words in (SUMMARY, "The plan", "The alternatives", *(row.label for row in job.rows)):
        assert words in found["text"]


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_drawn_inside_its_margins(matrix: Matrix, browser: str, tmp_path: Path, width: int, dark: bool) -> None:
    images = pytest.importorskip("PIL.Image")
    job = planned(matrix, gpu="RTX 4090:24")
    (tmp_path / "page.html").write_text(made(job), "utf-8")
    shot = tmp_path / "page.png"
    scheme = "--blink-settings=preferredColorScheme=0" if dark else "--blink-settings=preferredColorScheme=1"
    headless(browser, tmp_path, width, scheme, f"--screenshot={shot}", f"file://{tmp_path}/page.html")
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (width, 1600)
    picture = images.open(shot).convert("RGB")
    paper = (0x14, 0x17, 0x1B) if dark else (0xFD, 0xFD, 0xFC)
    for left, right in ((0, 14), (width - 14, width)):
        assert picture.crop((left, 0, right, 1600)).getcolors() == [(14 * 1600, paper)]
    weights = (0x5B, 0x93, 0xCC) if dark else (0x2F, 0x5D, 0x8C)
    drawn = {color: count for count, color in picture.getcolors(1 << 24)}
    assert drawn[weights] > width * 40
