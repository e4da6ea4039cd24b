"""The names of cache entries: a hash of everything that an entry depends on."""

from __future__ import annotations

import hashlib

from xflux_trainer.digests import ID

VERSION = "2"
"""Part of every key: raised when what is encoded, or how, changes."""


def key(*parts: str) -> bytes:
    """Equal for equal parts only: lengths stand before the parts, so that no two lists of parts read alike."""
    text = "".join(f"{len(part)}:{part}" for part in (VERSION, *parts))
    return hashlib.sha256(text.encode()).digest()[:ID]
