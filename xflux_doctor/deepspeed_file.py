"""The DeepSpeed file that accelerate's file names: its text and values, read as accelerate reads them.

Source: huggingface/accelerate v0.30.1 and v1.15.0, utils/deepspeed.py, `HfDeepSpeedConfig.__init__`: a path that
exists, relative to the working folder, goes through `json.load`; else the value itself is tried as base64 of JSON
(and from 1.4.0 on as JSON). DeepSpeed itself reads its file with hjson, which takes comments and stray commas and
refuses a key that is written twice; under accelerate it never opens the file.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

SECTION = "deepspeed_config"
KEY = "deepspeed_config_file"
_LARGEST = 1 << 20
_EXPECTED = "Expected a string path to an existing deepspeed config, or a dictionary, or a base64 encoded string."


class Read(msgspec.Struct, frozen=True):
    """What was found under the name. Without a path the values stand in accelerate's file itself, as base64."""

    path: Path | None = None
    values: dict[str, Any] | None = None
    text: str = ""
    seen: str = ""
    """Why it cannot be used; empty where it can."""
    hint: str = ""


def read(accelerate: Mapping[str, Any] | None, folder: Path, beside: Path | None = None) -> Read | None:
    """The file that accelerate's file names; None where it names none. `beside` is accelerate's own file."""
    section = (accelerate or {}).get(SECTION)
    name = section.get(KEY) if isinstance(section, Mapping) else None
    if name is None or name == "none":
        return None
    if not isinstance(name, str):
        return Read(seen=f"{KEY} is {name!r}, not the name of a file", hint="Name a JSON file.")
    path = folder / name
    try:
        return _file(path) if name and path.exists() else _inline(name, path, beside)
    except OSError as error:
        return _inline(name, path, beside, error.strerror or str(error))


def _inline(name: str, path: Path, beside: Path | None, why: str = "") -> Read:
    """The value itself, as base64 of JSON."""
    try:
        text = name if name.lstrip().startswith("{") else base64.urlsafe_b64decode(name).decode("utf-8")
        values = json.loads(text)
    except (ValueError, binascii.Error, UnicodeDecodeError, RecursionError):
        return _not_there(name, path, beside, why)
    if not isinstance(values, dict):
        return _not_there(name, path, beside, why)
    return Read(None, values, text)


def _not_there(name: str, path: Path, beside: Path | None, why: str) -> Read:
    hint = "Correct the path: it is taken relative to the folder in which the training is launched."
    if name.startswith("~"):
        hint = "Write the whole path: accelerate expands no ~."
    elif beside is not None and name and _there(beside.parent / name):
        hint = f"It lies at {beside.parent / name}: write that, or launch in {beside.parent}."
    seen = f"{KEY} is {name[:200]!r}, and {'it cannot be opened: ' + why if why else f'there is no file {path}'}"
    return Read(path, seen=f"{seen[:400]} (accelerate: {_EXPECTED})", hint=hint)


def _there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _file(path: Path) -> Read:
    if not path.is_file():
        return Read(path, seen=f"{path} is no file", hint="Name DeepSpeed's JSON file.")
    size = path.stat().st_size
    if size > _LARGEST:
        return Read(path, seen=f"{path} holds {size} bytes; that is no configuration file", hint="Name another file.")
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        hint = "Give yourself read permission, or name another file."
        return Read(path, seen=f"{path} cannot be read: {error.strerror}", hint=hint)
    except UnicodeDecodeError:
        return Read(path, seen=f"{path} is not UTF-8 text", hint="Save it as UTF-8, without a byte order mark.")
    if "\0" in text:
        return Read(path, seen=f"{path} is binary, not text", hint="Name DeepSpeed's JSON file.")
    return _parsed(path, text)


def _parsed(path: Path, text: str) -> Read:
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except _Twice as twice:
        last = "accelerate takes the last, and DeepSpeed itself refuses the file"
        return Read(path, text=text, seen=f"{path} says {twice.key!r} twice: {last}", hint="Keep one of them.")
    except (ValueError, RecursionError) as error:
        return Read(path, text=text, seen=_not_json(path, text, error), hint=_cure(text))
    if not isinstance(values, dict):
        seen = f"{path} holds {type(values).__name__}, not a JSON object"
        return Read(path, text=text, seen=seen, hint="Begin it with { and write keys and values.")
    return Read(path, values, text)


class _Twice(Exception):
    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """DeepSpeed's own rule. Source: deepspeed/runtime/config_utils.py, dict_raise_error_on_duplicate_keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(key)
        found[key] = value
    return found


def _not_json(path: Path, text: str, error: Exception) -> str:
    if text.startswith("\ufeff"):
        return f"{path} begins with a byte order mark (accelerate: Unexpected UTF-8 BOM)"
    if not text.strip():
        return f"{path} is empty (accelerate: Expecting value: line 1 column 1 (char 0))"
    return f"{path} is not JSON: {' '.join(str(error).split())}"


def _cure(text: str) -> str:
    if text.startswith("\ufeff"):
        return "Save it as UTF-8 without a byte order mark."
    if any(line.lstrip().startswith(("//", "#", "/*")) or " //" in line for line in text.splitlines()):
        return "Remove the comments: DeepSpeed's own reader takes them, accelerate's json.load does not."
    squeezed = "".join(text.split())
    if ",}" in squeezed or ",]" in squeezed:
        return "Remove the comma before the closing bracket: accelerate's json.load takes none there."
    return "Repair that line: accelerate reads the file by json.load."
