"""Read YAML values as the types that the fields of a dataclass declare.

YAML 1.1 reads `1e-5`, which has no dot, as a text; what the field wants decides here, not what YAML guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


class Wrong(Exception):
    """A value that its key cannot take."""

    def __init__(self, seen: str, hint: str) -> None:
        super().__init__(seen)
        self.seen = seen
        self.hint = hint


def coerce(value: Any, hint: Any) -> Any:
    """`value` as the field's type wants it, or `Wrong`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _union(value, args)
    if origin is Literal:
        if value in args and isinstance(value, str):
            return value
        words = [arg for arg in args if isinstance(arg, str)]
        near = _near(str(value), words)
        raise Wrong(
            f"is {show(value)}",
            (f"Did you mean {near[0]}? " if near else "") + f"One of: {', '.join(words)}.",
        )
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise Wrong(f"is {show(value)}", "Write a list.")
        return tuple(coerce(item, args[0]) for item in value)
    return _scalar(value, hint)


def _union(value: Any, args: tuple[Any, ...]) -> Any:
    if value is None and type(None) in args:
        return None
    wrongs = []
    for arg in (arg for arg in args if arg is not type(None)):
        try:
            return coerce(value, arg)
        except Wrong as wrong:
            wrongs.append(wrong)
    raise (wrongs[0] if len(wrongs) == 1 else Wrong(wrongs[0].seen, " Or: ".join(wrong.hint for wrong in wrongs)))


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        quoted = isinstance(value, str) and value.strip().lower() in (
            "true",
            "false",
            "yes",
            "no",
            "on",
            "off",
        )
        raise Wrong(f"is {show(value)}", "Write true or false" + (", without quotes." if quoted else "."))
    if kind is str:
        if isinstance(value, str) and value.strip():
            return value
        hint = "Write a text." if value is None or isinstance(value, (str, list, dict)) else "Put it in quotes."
        raise Wrong(f"is {show(value)}", hint)
    hint = "Write a whole number." if kind is int else "Write a number."
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise Wrong(f"is {show(value)}", hint)
    return (value if isinstance(value, int) else int(number)) if kind is int else number


def _near(word: str, words: Iterable[str]) -> list[str]:
    import difflib  # for a misspelt word alone

    return difflib.get_close_matches(word, [*words], 1, 0.6)


def nearest(key: str, names: Iterable[str]) -> str:
    near = _near(key, names)
    return f"Did you mean {near[0]}?" if near else "Remove it."


def show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
