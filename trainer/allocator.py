"""How torch's allocator takes memory from the card. Torch-free.

By itself it takes pieces of fixed sizes, and what is freed of one fits only what is as large: batches of several sizes
and streamed blocks leave holes that no tensor fits. Expandable segments grow and shrink instead. The forecasts of
memory and every step of the benchmarks were measured with them (torch 2.11, an H200).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The newer name and the older, which every release reads."""
SETTING = "expandable_segments:True"


def prefer(environ: MutableMapping[str, str], version: Path = Path("/proc/version")) -> None:
    """Ask for expandable segments, where the user asks for nothing; to be called before torch is imported.

    Not under WSL2, some of whose drivers fail with them (pytorch#192330).
    """
    if any(environ.get(name) for name in NAMES):
        return
    try:
        wsl = "microsoft" in version.read_text(encoding="utf-8", errors="replace").lower()
    except OSError:
        wsl = False
    if not wsl:
        environ["PYTORCH_CUDA_ALLOC_CONF"] = SETTING
