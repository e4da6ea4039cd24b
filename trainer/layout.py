"""Where the parts of a base model lie: one folder in diffusers' layout, or Black Forest Labs' single files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
TRANSFORMER_FILES = {"flux-dev": "flux1-dev.safetensors", "flux-schnell": "flux1-schnell.safetensors"}
"""What Black Forest Labs call the transformer's single file, by the train config's model_name."""
VAE_FILE = "ae.safetensors"
VARIABLES = {"flux-dev": "FLUX_DEV", "flux-schnell": "FLUX_SCHNELL"}
"""X-Flux's environment variables that name the transformer's file."""
VAE_VARIABLE = "AE"


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


def parts_in(place: Path) -> dict[str, Path]:
    """The parts that lie in a folder, or beside the transformer's single file; what is not there is left out.

    The folder's own layout decides: diffusers' where it has the part as a folder, else Black Forest Labs' file. Where
    the transformer's file is named, its own VAE's file comes first too.
    """
    folder = place.parent if place.is_file() else place
    parts = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    vae = folder / VAE_FILE
    if place.is_file():
        parts["transformer"] = place
    elif "transformer" not in parts:
        files = [folder / name for name in TRANSFORMER_FILES.values() if (folder / name).is_file()]
        if len(files) == 1:
            parts["transformer"] = files[0]
    if vae.is_file() and ("vae" not in parts or place.is_file()):
        parts["vae"] = vae
    return parts
