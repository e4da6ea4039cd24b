"""The contact sheet: every sample image that a run has drawn, prompts downwards, steps to the right.

It is made from the images on the disk, so it goes on where a resumed run goes on.
"""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from xflux_trainer import files

NAME = "contact-sheet.png"
_IMAGE = re.compile(r"^(?:step-(\d+)|final)-(\d+)\.png$")
FINAL = 10**12
"""The step that an image of the end is sorted under."""
THUMB, LABEL, LINE, GAP = 224, 176, 18, 6
"""Pixels: a thumbnail's long side, the width of the labels, the height of a line of text, the space between."""
COLUMNS = 16
"""More drawings than these are thinned out evenly; the first and the last stay."""


def images(samples: Path) -> dict[int, dict[int, Path]]:
    """{prompt's number: {step: image}} of a folder of samples; the end's step is `FINAL`."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(samples.glob("*.png")):
        if match := _IMAGE.match(path.name):
            step = int(match[1]) if match[1] else FINAL
            found.setdefault(int(match[2]), {})[step] = path
    return found


def write(samples: Path, *, final: bool) -> Path | None:
    """Make the sheet of the folder, or make it anew; None when it holds no images.

    `final`: whether the end is drawn. Before, an image of an earlier end (the run was made longer) stays out.
    """
    found = images(samples)
    steps = sorted({step for row in found.values() for step in row if final or step != FINAL})
    if not steps:
        return None
    if len(steps) > COLUMNS:
        steps = [steps[round(k * (len(steps) - 1) / (COLUMNS - 1))] for k in range(COLUMNS)]
    rows = {number: {step: _thumb(row[step]) for step in steps if step in row} for number, row in found.items()}
    buffer = io.BytesIO()
    _draw(steps, dict(sorted(rows.items()))).save(buffer, "PNG")
    files.write_bytes(samples / NAME, buffer.getvalue())
    return samples / NAME


def set_aside(output: Path, after: int | None) -> Path | None:
    """Move the samples of later steps (None: all) out of the way of a run that draws its own; nothing is deleted.

    They go where that branch's checkpoints went, or to a `previous-N` of their own. Returns where, or None.
    """
    old = [
        path
        for row in images(output / "samples").values()
        for step, path in row.items()
        if after is None or FINAL > step > after
    ]
    return _move(output, old)


def set_aside_ends(output: Path, prompts: int) -> Path | None:
    """Move an earlier end's drawings of prompts that are not drawn any more: no card is to show them as this run's."""
    samples = output / "samples"
    place = _move(output, [row[FINAL] for k, row in images(samples).items() if k >= prompts and FINAL in row])
    if place and images(samples):
        write(samples, final=True)
    return place


def _move(output: Path, old: list[Path]) -> Path | None:
    if not old:
        return None
    last = max((int(p.name[9:]) for p in output.glob("previous-*") if p.name[9:].isdigit()), default=0)
    place = output / f"previous-{last}"
    if not last or (place / "samples").exists():
        place = output / f"previous-{last + 1}"
    with files.sentences(place):
        (place / "samples").mkdir(parents=True)
        for path in old:
            path.rename(place / "samples" / path.name)
        (output / "samples" / NAME).unlink(missing_ok=True)
    return place


def _thumb(path: Path) -> tuple[Image.Image | None, str]:
    """The image made small, and its prompt; no image where the file is broken."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
            caption = str(getattr(opened, "text", {}).get("Description", ""))
    except (OSError, ValueError, SyntaxError):
        return None, ""
    image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    return image, caption


def _draw(steps: list[int], rows: dict[int, dict[int, tuple[Image.Image | None, str]]]) -> Image.Image:
    thumbs = [image for row in rows.values() for image, _ in row.values() if image]
    wide = max((image.width for image in thumbs), default=THUMB)
    high = max((image.height for image in thumbs), default=THUMB)
    width = LABEL + len(steps) * (wide + GAP) + GAP
    sheet = Image.new("RGB", (width, LINE + GAP + len(rows) * (high + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), _font()
    for column, step in enumerate(steps):
        text = "end" if step == FINAL else f"step {step}"
        pen.text((LABEL + GAP + column * (wide + GAP), 2), text, fill="black", font=font)
    for line, (number, row) in enumerate(rows.items()):
        top = LINE + GAP + line * (high + GAP)
        caption = next((text for _, text in reversed(row.values()) if text), f"prompt {number}")
        shown = textwrap.wrap(caption, 24, max_lines=max(1, high // LINE), placeholder=" …")
        for k, text in enumerate(shown):
            pen.text((GAP, top + k * LINE), _plain(text, font), fill="black", font=font)
        for column, step in enumerate(steps):
            image = row.get(step, (None, ""))[0]
            if image:
                sheet.paste(image, (LABEL + GAP + column * (wide + GAP), top))
    return sheet


def _font() -> Any:
    try:
        return ImageFont.load_default(13)
    except (TypeError, ImportError, OSError):  # Pillow before 10.1, or one without FreeType
        return ImageFont.load_default()


def _plain(text: str, font: Any) -> str:
    """Pillow's own bitmap font knows Latin letters alone, and raises for others."""
    return text if isinstance(font, ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")
