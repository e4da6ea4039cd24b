"""The NVIDIA driver's two halves by their files: the loaded kernel module and the library that talks to it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_MODULE = r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s"
_LIBRARY = r"\.so\.(\d+\.[\d.]*\d)$"
_FOLDERS = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/nvidia/lib64",
    "run/opengl-driver/lib",
    "usr/lib/wsl/lib",
)
_LARGEST_CACHE = 4 << 20


def module_version(root: Path = Path("/")) -> str:
    """Version of the loaded kernel module; empty where none is loaded or /proc is not shown."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(_MODULE, text)
    return match[1] if match else ""


def library_version(root: Path = Path("/"), environ: Mapping[str, str] | None = None) -> str:
    """The version in the real file name behind libnvidia-ml.so.1, else libcuda.so.1; nothing is loaded.

    The loader's order: LD_LIBRARY_PATH (for NVML only: a compat folder there holds another libcuda on purpose),
    what ldconfig wrote down, the usual folders.
    """
    chosen = [Path(p) for p in (environ or {}).get("LD_LIBRARY_PATH", "").split(":") if p]
    places = [root / folder for folder in _FOLDERS]
    for name, first in (("libnvidia-ml.so.1", chosen), ("libcuda.so.1", [])):
        paths = [folder / name for folder in first] + _cached(root, name) + [folder / name for folder in places]
        for path in paths:
            match = re.search(_LIBRARY, os.path.realpath(path)) if path.exists() else None
            if match:
                return match[1]
    return ""


def _cached(root: Path, name: str) -> list[Path]:
    """Where ldconfig's cache says that a library lies: the paths stand in it as text."""
    try:
        with (root / "etc/ld.so.cache").open("rb") as file:
            data = file.read(_LARGEST_CACHE)
    except OSError:
        return []
    found = re.findall(rb"\x00(/[^\x00]*/" + re.escape(name.encode()) + rb")\x00", data)
    return [root / os.fsdecode(path).lstrip("/") for path in dict.fromkeys(found)]


def pci_addresses(root: Path = Path("/")) -> list[str]:
    """PCI addresses of the cards that the kernel module drives, in order, for example 0000:3b:00.0."""
    try:
        return sorted(entry.name for entry in (root / "proc/driver/nvidia/gpus").iterdir())
    except OSError:
        return []


def same_place(address: str) -> str:
    """A PCI address as one spelling: NVML writes 00000000:3B:00.0, the kernel log 0000:3b:00."""
    parts = address.strip().lower().partition(".")[0].split(":")
    return ":".join([f"{int(parts[0], 16):04x}", *parts[1:]]) if len(parts) == 3 and _is_hex(parts[0]) else address


def _is_hex(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]+", text))
