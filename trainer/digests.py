"""Remember the hashes of files, so that a second start need not read 20,000 images and 10 GB of weights again.

A hash is believed as long as the file's path, length, time of change (in nanoseconds) and inode are what they were.
Git trusts the same four, with the same exception, which is kept here: a file that changed within the last seconds
could change again without its time moving on, so its hash is not remembered yet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xflux_trainer import files
from xflux_trainer.errors import WriteError

ID = 20
"""Bytes of a content's hash that are kept: SHA-256 cut to 160 bits."""
FRESH = 2_000_000_000
"""Nanoseconds after its last change in which a file's hash is not remembered."""
ROW = np.dtype([("id", f"V{ID}"), ("width", "<u4"), ("height", "<u4")])
"""What is remembered of one image: who it is, and its pixels as it is shown."""
Rows = NDArray[np.void]


class Content(NamedTuple):
    """One image's hash, and its width and height as it is shown."""

    id: bytes
    width: int
    height: int


def content_id(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:ID]


class Digests:
    """What is known of the files below one folder, kept in one JSON file of the cache.

    Two runs may write it at once: one of the two is kept whole, and what the other knew is found out again.
    """

    def __init__(self, cache: Path, purpose: str) -> None:
        name = hashlib.sha256(os.fsencode(purpose)).hexdigest()[:16]
        self._place = cache / f"digests-{name}.json"
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        try:
            data = json.loads(self._place.read_text(encoding="utf-8"))
            if isinstance(data, dict) and data.get("version") == 1:
                self._known = dict(data["files"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # absent, or not ours: all is found out again

    def get(self, path: Path) -> str | None:
        """What was put for the file, if it is still the same file."""
        kept = self._known.get(os.path.abspath(path))  # noqa: PTH100
        seen = state(path)
        if seen is None or not isinstance(kept, list) or kept[:3] != seen:
            return None
        return str(kept[3])

    def put(self, path: Path, value: str, before: list[int] | None) -> None:
        """Remember `value`, which was found by reading the file after its state was `before`."""
        if before is None or before != state(path) or time.time_ns() - before[1] < FRESH:
            return
        self._known[os.path.abspath(path)] = [*before, value]  # noqa: PTH100
        self._changed = True

    def image(self, path: Path) -> Content | None:
        rows = self.rows(path)
        return None if rows is None or len(rows) != 1 else content(rows[0])

    def rows(self, path: Path) -> Rows | None:
        """Every row of a table."""
        text = self.get(path)
        if text is None:
            return None
        try:
            return np.frombuffer(base64.b64decode(text, validate=True), ROW)
        except ValueError:
            return None

    def put_rows(self, path: Path, rows: Rows, before: list[int] | None) -> None:
        self.put(path, base64.b64encode(rows.tobytes()).decode(), before)

    def write(self) -> None:
        """Keep it for the next run. One that cannot be kept costs that run time, and nothing else."""
        if not self._changed:
            return
        text = json.dumps({"version": 1, "files": self._known}, separators=(",", ":"))
        try:
            files.write_bytes(self._place, text.encode())
        except (OSError, WriteError):
            return
        self._changed = False

    def weights(self, part: Path) -> str:
        """Who the weights of a model's part are: every byte of every file that says what it computes.

        A part is a folder in diffusers' layout, or one file.
        """
        digest = hashlib.sha256()
        for file in [part] if part.is_file() else sorted(part.glob("*")):
            if file.suffix not in (".safetensors", ".json", ".txt", ".model") or not file.is_file():
                continue
            known, before = self.get(file), state(file)
            if known is None:
                known = files.sha256(file)
                self.put(file, known, before)
            digest.update(f"{file.name}:{known}:".encode())
        return digest.hexdigest()[:32]


def content(row: np.void) -> Content:
    return Content(bytes(row["id"]), int(row["width"]), int(row["height"]))


def pack(contents: list[Content]) -> Rows:
    """As one array, of 28 bytes an image."""
    rows = np.zeros(len(contents), ROW)
    for place, one in enumerate(contents):
        rows[place] = (np.void(one.id), one.width, one.height)
    return rows


def state(path: Path) -> list[int] | None:
    try:
        seen = os.stat(path)  # noqa: PTH116 - asked for every image
    except OSError:
        return None
    return [seen.st_size, seen.st_mtime_ns, seen.st_ino]
