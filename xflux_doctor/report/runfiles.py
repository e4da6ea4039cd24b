"""Files of a run folder, as far as they can be read: broken off, foreign or missing ones are said, and are no error."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MOST = 64 << 20
"""Bytes of one file that are read; of a longer file of lines the last ones."""


class RunFiles:
    """One folder. `faults` tells what was not as it should be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[str] = []

    def document(self, name: str, *, wanted: bool = True) -> dict[str, Any]:
        """A JSON object; an empty one where there is none. `wanted`: its absence is a fault."""
        data = self._bytes(name, wanted)
        if data is None:
            return {}
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            self.faults.append(f"{name} is broken off or is no JSON")
            return {}
        if not isinstance(found, dict):
            self.faults.append(f"{name} holds something else than a run's")
            return {}
        return found

    def lines(self, name: str, *, wanted: bool = False) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines, without lines that are none."""
        data = self._bytes(name, wanted)
        found, bad = [], 0
        for line in (data or b"").splitlines():
            try:
                item = json.loads(line)
            except (ValueError, RecursionError):
                item = None
            if isinstance(item, dict):
                found.append(item)
            else:
                bad += bool(line.strip())
        if bad:
            self.faults.append(f"{bad} line{'s' if bad > 1 else ''} of {name} cannot be read")
        return found

    def checkpoints(self) -> list[dict[str, Any]]:
        """{name, step, bytes, whole, seconds since 1970} of each, the first first."""
        found = []
        for path in self._glob("checkpoint-*"):
            step = path.name.rpartition("-")[2]
            if step.isdigit() and path.is_dir():
                files = [one.stat() for one in path.rglob("*") if one.is_file()]
                written = max((one.st_mtime for one in files), default=None)
                size, whole = sum(one.st_size for one in files), (path / "manifest.json").is_file()
                found.append({"name": path.name, "step": int(step), "bytes": size, "whole": whole, "written": written})
        return sorted(found, key=lambda one: one["step"])

    def images(self) -> list[Path]:
        """The contact sheet, or the newest samples where there is none."""
        sheet = self.folder / "samples" / "contact-sheet.png"
        return [sheet] if sheet.is_file() else self._glob("samples/*.png")[-6:]

    def logs(self) -> list[str]:
        return [f"logs/{path.name}" for path in self._glob("logs/*") if path.is_file()]

    def bytes_of(self, path: Path, most: int) -> bytes | None:
        """A file that is not larger than that."""
        try:
            return path.read_bytes() if path.stat().st_size <= most else None
        except OSError:
            return None

    def _glob(self, pattern: str) -> list[Path]:
        try:
            return sorted(self.folder.glob(pattern))
        except OSError:
            return []

    def _bytes(self, name: str, wanted: bool) -> bytes | None:
        try:
            with (self.folder / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - _MOST))
                return file.read(_MOST)
        except FileNotFoundError:
            if wanted:
                self.faults.append(f"{name} is not there")
        except OSError as error:
            self.faults.append(f"{name} cannot be read: {error.strerror}")
        return None


def at(value: Any, *path: str | int) -> Any:
    """What lies at a path of keys and indices in a document; None where it is another document."""
    for key in path:
        if isinstance(key, int):
            value = value[key] if isinstance(value, list) and len(value) > key else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number(value: Any) -> float | None:
    """A finite number, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if good and math.isfinite(value) else None


def word(value: Any) -> str:
    """A text or a number, in one line and not without end."""
    return " ".join(str(value).split())[:2000] if isinstance(value, str | int | float) else ""


def items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
