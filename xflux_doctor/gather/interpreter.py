"""The interpreter that would train, and the folders that it imports from, without starting it."""

from __future__ import annotations

import importlib
import os
import re
import site
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xflux_doctor.errors import UsageError
from xflux_doctor.facts import PythonFacts


def python_facts(executable: str | None = None) -> PythonFacts:
    """The interpreter that would train: this one, or the one named. Raises UsageError when it is not there."""
    if executable is None:
        managed = sys.prefix == sys.base_prefix and _is_managed()
        threaded = "t" in getattr(sys, "abiflags", "")
        number, inside = sys.version.split()[0], sys.prefix != sys.base_prefix
        return PythonFacts(sys.executable, number, sys.prefix, managed, _is_conda(Path(sys.prefix)), threaded, inside)
    path = Path(executable)
    if path.is_file() and not (re.match(r"(python|pypy)", path.name) and os.access(path, os.X_OK)):
        raise UsageError(f"{executable} is no Python that can be started.", "Name its bin/python.")
    if not path.is_file():
        raise UsageError(f"There is no Python at {executable}.", "Name an interpreter, such as venv/bin/python.")
    if path.samefile(sys.executable) and path.parent == Path(sys.executable).parent:
        return python_facts()
    prefix = path.absolute().parent.parent
    version = _pyvenv(prefix).get("version") or _pyvenv(prefix).get("version_info", "")
    if not version:  # no venv: links lead to the installation, whose executable carries the version
        real = path.resolve()
        prefix = real.parent.parent
        named = re.fullmatch(r"python(3\.\d+)t?", real.name)
        version = named[1] if named else _newest(prefix)
    if not version:
        raise UsageError(f"{executable} does not look like a Python installation.", "Name its bin/python.")
    managed = not (prefix / "pyvenv.cfg").exists() and any(prefix.glob("lib/python3*/EXTERNALLY-MANAGED"))
    threaded = re.search(r"python3\.\d+t$", str(path.resolve())) is not None
    number = ".".join(version.split(".")[:3])
    return PythonFacts(
        str(path.absolute()), number, str(prefix), managed, _is_conda(prefix), threaded, bool(_pyvenv(prefix))
    )


def _is_managed() -> bool:
    sysconfig: Any = importlib.import_module("sysconfig")  # its data take 2 ms, and a venv is never managed
    return (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists()


def _is_conda(prefix: Path) -> bool:
    return (prefix / "conda-meta").is_dir()


def _newest(prefix: Path) -> str:
    """The newest Python that has a library folder below a prefix, such as "3.11"; empty when there is none."""
    names = (re.fullmatch(r"python3\.(\d+)", folder.name) for folder in prefix.glob("lib/python3.*"))
    minors = [int(match[1]) for match in names if match]
    return f"3.{max(minors)}" if minors else ""


def site_folders(python: PythonFacts, environ: Mapping[str, str]) -> list[tuple[Path, str]]:
    """Folders that the interpreter imports from, in its own order, each with its origin; it is not started.

    Origins: `path` (PYTHONPATH), `site`, `user` (~/.local), `system` (the Python below a venv). Source: CPython's
    Lib/site.py: PYTHONPATH first; in a venv its own folder, then the user's and the system's where it includes them.
    """
    named = [Path(entry) for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if Path(python.executable) == Path(sys.executable):
        entries = [Path(entry) for entry in dict.fromkeys(sys.path) if entry]
        return [(entry, _origin(entry, python, named)) for entry in entries if entry.is_dir()]
    folders = [(entry, "path") for entry in named]
    prefix = Path(python.prefix)
    minor = ".".join(python.version.split(".")[:2])
    user = [(Path(environ.get("HOME", "/nowhere")) / f".local/lib/python{minor}/site-packages", "user")]
    if environ.get("PYTHONNOUSERSITE"):
        user = []
    own = [(folder, "site") for folder in _site_packages(prefix, minor)]
    config = _pyvenv(prefix)
    if not config:
        folders += user + own
    elif config.get("include-system-site-packages", "").lower() == "true" and config.get("home"):
        below = [(folder, "system") for folder in _site_packages(Path(config["home"]).parent, minor)]
        folders += own + user + below
    else:
        folders += own
    found: dict[Path, str] = {}
    for folder, origin in folders:
        for place in (folder, *_linked(folder, origin)):
            found.setdefault(place, origin)
    return [(folder, origin) for folder, origin in found.items() if folder.is_dir()]


def _origin(entry: Path, python: PythonFacts, named: list[Path]) -> str:
    if entry in named:
        return "path"
    if entry == Path(site.getusersitepackages()):
        return "user"
    inside = entry.is_relative_to(python.prefix) or not entry.is_relative_to(sys.base_prefix)
    return "site" if inside else "system"


def _site_packages(prefix: Path, minor: str) -> list[Path]:
    """Of a prefix and a Python such as "3.11". Debian's own Python has pip's packages in usr/local."""
    folders = [prefix / f"lib/python{minor}/site-packages"]
    folders += [base / f"lib/python{minor}/dist-packages" for base in (prefix / "local", prefix)]
    return [*folders, prefix / "lib/python3/dist-packages"]


def _linked(folder: Path, origin: str) -> list[Path]:
    """Folders that a .pth file of a site folder adds; its lines of code are not looked at."""
    if origin == "path":
        return []  # site.py reads no .pth there
    found: list[Path] = []
    for file in sorted(folder.glob("*.pth")):
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        found += [Path(line.strip()) for line in lines if line.strip().startswith("/")]
    return found


def _pyvenv(prefix: Path) -> dict[str, str]:
    try:
        lines = (prefix / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}
