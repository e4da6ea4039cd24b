"""Where compiled kernels are kept from one run to the next, so that a second start compiles nothing. Torch-free."""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

FLASH = "FLASH_ATTENTION_CUTE_DSL_CACHE"
"""flash-attn-4 forgets what it compiled unless NAME_ENABLED is 1, and by itself would keep it below /tmp."""
INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
"""torch.compile's own default lies below /tmp as well, and is gone after the machine's next start."""
TRITON = "TRITON_CACHE_DIR"
"""Triton keeps its kernels below the home folder, which is as good as here: set only where that cannot be written."""


def persist(environ: MutableMapping[str, str]) -> None:
    """Name folders of the user's cache in the environment; what is set already stays. To be called before torch is
    imported, whose compilers read these variables once.

    Where the user's cache cannot be written nothing is set: kernels are then compiled at every start.
    """
    base = folder(environ)
    if environ.get(f"{FLASH}_ENABLED", "1") == "1" and (environ.get(f"{FLASH}_DIR") or _usable(base / "flash-attn")):
        environ.setdefault(f"{FLASH}_DIR", str(base / "flash-attn"))
        environ.setdefault(f"{FLASH}_ENABLED", "1")
    if not environ.get(INDUCTOR) and _usable(base / "inductor"):
        environ[INDUCTOR] = str(base / "inductor")
    own = Path(environ.get("TRITON_HOME") or _home(environ), ".triton", "cache")
    if not environ.get(TRITON) and not _usable(own) and _usable(base / "triton"):
        environ[TRITON] = str(base / "triton")


def folder(environ: MutableMapping[str, str]) -> Path:
    """The part of the user's cache that is ours, by the XDG base directory specification."""
    return Path(environ.get("XDG_CACHE_HOME") or Path(_home(environ), ".cache"), "xflux-doctor", "kernels")


def _home(environ: MutableMapping[str, str]) -> str:
    return environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - a user without a home must not raise


def _usable(place: Path) -> bool:
    """Whether files can be written there; the folder is made."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return True
    except OSError:
        return False
