"""Where the parts of a base model lie: one folder in diffusers' layout, or Black Forest Labs' single files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


@dataclass(frozen=True)
class Base:
    """The parts of a base model. A part is a folder in diffusers' layout; transformer and vae may be single files."""

    transformer: Path
    vae: Path
    text_encoder: Path
    """CLIP."""
    text_encoder_2: Path
    """T5."""
    tokenizer: Path
    tokenizer_2: Path
    scheduler: Path
    """May be absent: it is only asked whether the model samples with a shift that depends on the resolution."""

    @classmethod
    def of(cls, folder: str | Path) -> Base:
        """A pipeline folder in diffusers' layout."""
        return cls(*(Path(folder) / part for part in PARTS))
