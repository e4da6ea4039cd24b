"""Edits of JSON text that keep every byte outside the edited keys.

JSON is spliced as YAML's flow style (`yamltext`), which it nearly is: YAML takes no tabs as indentation, so they are
hidden as spaces, one for one, while the place of the splice is found. The result must be JSON that says exactly what
the old text said plus the change; if not, nothing is changed and `CannotEdit` tells why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from xflux_doctor import yamltext
from xflux_doctor.finding import Change
from xflux_doctor.meaning import Unchanged, after, difference
from xflux_doctor.yamlnodes import CannotEdit

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\t')
_LEAD = re.compile(r"(?<=\n) +")


def apply(text: str, edits: Sequence[Change]) -> str:
    """The text after the edits, in order."""
    for edit in edits:
        text = _apply_one(text, edit)
    return text


def _apply_one(text: str, edit: Change) -> str:
    old = _read(text, edit)
    try:
        wanted = after(old, edit)
    except Unchanged:
        return text
    hidden = _TOKEN.sub(lambda match: " " if match[0] == "\t" else match[0], text)
    result = _splice(text, hidden, yamltext.apply(hidden, [edit]))
    where = difference(wanted, _read(result, edit))
    if where is not None:
        raise CannotEdit(edit.key, f"the change would also reach {'.'.join(where) or 'the whole file'}")
    return result


def _splice(text: str, hidden: str, edited: str) -> str:
    """What was put into the text without tabs, put into the text with them."""
    start = _alike(hidden, edited)
    end = min(_alike(hidden[::-1], edited[::-1]), min(len(hidden), len(edited)) - start)
    middle = edited[start : len(edited) - end]
    if "\n\t" in text:
        # The splice may begin right after the line break that it belongs to.
        lead = edited[:start].endswith("\n")
        middle = _LEAD.sub(lambda match: "\t" * len(match[0]), ("\n" if lead else "") + middle)[lead:]
    return text[:start] + middle + text[len(text) - end :]


def _alike(one: str, other: str) -> int:
    """How many characters they have in common from the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _read(text: str, edit: Change) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CannotEdit(edit.key, f"not readable as JSON ({' '.join(str(error).split())})") from error
