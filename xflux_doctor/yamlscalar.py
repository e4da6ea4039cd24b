"""One value as YAML text that reads back as exactly this value, in YAML 1.1 and 1.2 alike."""

from __future__ import annotations

import re

import yaml

# What is text to YAML 1.1 may be a number or a bool to YAML 1.2 and to OmegaConf: that is written in quotes.
_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@%+=~ -]*(?<! )")
_NUMBER = re.compile(r"[-+]?(\.\d+|\d[\d_]*(\.[\d_]*)?)(e[-+]?\d+)?|0[ox][\da-f]+|[-+]?\.(inf|nan)", re.IGNORECASE)
_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "~", ""))


def scalar(value: object, style: str | None = None, was: str = "") -> str:
    """The value as YAML that reads back as exactly this value; the old style is kept where it can be."""
    if value is None:
        return "~" if was == "~" else "null"
    if isinstance(value, bool):
        word = "true" if value else "false"
        return word.title() if was in ("True", "False") else word
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return f".{value}" if value != float("-inf") else "-.inf"
        mantissa, mark, exponent = repr(value).partition("e")
        point = "" if "." in mantissa else ".0"  # without it YAML 1.1 reads 1e-5 as text
        return mantissa + point + mark + exponent
    if isinstance(value, str):
        return _string(value, style)
    raise TypeError(f"a {type(value).__name__} is not a value of one key")


def _string(value: str, style: str | None) -> str:
    if style == '"' or not (value.isprintable() and "\ufeff" not in value):
        return '"' + "".join(map(_escape, value)) + '"'
    if style != "'" and _reads_as_text(value):
        return value
    return "'" + value.replace("'", "''") + "'"


def _reads_as_text(value: str) -> bool:
    if not _PLAIN.fullmatch(value) or _NUMBER.fullmatch(value) or value.lower() in _WORDS:
        return False
    try:
        return isinstance(yaml.safe_load(value), str)
    except (yaml.YAMLError, ValueError):  # 2024-99-99 looks like a date and is none
        return False


def _escape(char: str) -> str:
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char)
    if short is not None:
        return short
    if char.isprintable() and char != "\ufeff":
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
