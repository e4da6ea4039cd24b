"""A caption as its file or its cell holds it, and what can be wrong with one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from xflux_trainer.imagefile import at_once, shown

MAX_CAPTION = 1 << 20
"""Bytes of the largest caption file that is read."""


class SampleProblem(NamedTuple):
    """One file that cannot be used. `kind` is a fixed word, the rest is for people."""

    path: Path
    kind: str
    seen: str
    hint: str

    def __str__(self) -> str:
        return f"{shown(self.path)} {self.seen}. {self.hint}".strip()


def read_caption(image: Path, path: Path, caption_type: str) -> tuple[str, SampleProblem | None]:
    """The caption of an image, or an empty one and why it cannot be used."""
    try:
        with open(path, "rb", opener=at_once) as file:
            raw = file.read(MAX_CAPTION + 1)
    except FileNotFoundError:
        return "", no_caption(image, path, caption_type)
    except OSError as error:
        return "", SampleProblem(path, "unreadable", f"cannot be read: {error.strerror}", "Allow reading it.")
    if len(raw) > MAX_CAPTION:
        return "", SampleProblem(path, "bad-caption", "is larger than 1 MiB", "A caption is a sentence or a few.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", SampleProblem(path, "not-utf8", "is not UTF-8 text", "Save the caption as UTF-8.")
    if caption_type == "json":
        return _json_caption(path, text)
    if not text.strip():
        return "", SampleProblem(path, "empty-caption", "is empty", "Write what the image shows.")
    return text.strip(), None


def no_caption(image: Path, path: Path, caption_type: str) -> SampleProblem:
    """What is said of an image without a caption file."""
    other = "txt" if caption_type == "json" else "json"
    hint = f"Write {shown(path.name)} beside the image."
    if image.with_suffix(f".{other}").exists():
        hint = f"There is a .{other} caption: set caption_type to {other}."
    return SampleProblem(image, "no-caption", f"has no caption file {shown(path.name)}", hint)


def check_caption(path: Path, caption: Any, hint: str) -> tuple[str, SampleProblem | None]:
    """A caption that stands in a JSON file or in a table's cell: a text that is not blank."""
    if not isinstance(caption, str):
        what = "nothing" if caption is None else f"not a text but a {type(caption).__name__}"
        return "", SampleProblem(path, "bad-caption", f'has a "caption" that is {what}', hint)
    if not caption.strip():
        return "", SampleProblem(path, "empty-caption", 'has an empty "caption"', hint)
    try:
        caption.encode()
    except UnicodeEncodeError:
        return "", SampleProblem(path, "bad-caption", "holds half of a character (a lone surrogate)", "Write it anew.")
    return caption.strip(), None


def _json_caption(path: Path, text: str) -> tuple[str, SampleProblem | None]:
    hint = 'Write {"caption": "what the image shows"}.'
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        seen = "is empty" if not text.strip() else f"is not JSON: {error}"
        return "", SampleProblem(path, "bad-json", seen, hint)
    if not isinstance(data, dict) or "caption" not in data:
        return "", SampleProblem(path, "no-caption-key", 'has no "caption"', hint)
    return check_caption(path, data["caption"], hint)


def estimate_tokens(caption: str) -> int:
    """About how many T5 tokens a caption is, without a tokenizer.

    T5's vocabulary holds short and common words whole and cuts others into pieces of five or six letters; a mark is a
    token of its own, and one ends the text. Runs of scripts that it does not know are one unknown token.
    """
    pieces = re.findall(r"[A-Za-z\u00c0-\u024f]+|\d|[^\sA-Za-z\u00c0-\u024f\d]+", caption)
    return 1 + sum(math.ceil(len(piece) / 6) if piece[0].isalpha() and piece[0] < "\u0250" else 1 for piece in pieces)
