"""What lies in the folder that the job starts in and has a package's name."""

from __future__ import annotations

import sys
from pathlib import Path

STACK = frozenset(
    "torch accelerate diffusers transformers safetensors numpy huggingface_hub PIL peft yaml tokenizers".split()
)
"""What every start imports."""
OTHERS = frozenset("datasets deepspeed wandb tensorboard tqdm einops regex requests packaging psutil scipy".split())


def shadows(folder: Path) -> tuple[str, ...]:
    """`-m` puts the working folder before all others (Python docs, sys.path): its `torch.py` wins over the real one.

    A folder without an `__init__.py` does not.
    """
    names = STACK | OTHERS | sys.stdlib_module_names
    try:
        found = [path for path in folder.iterdir() if path.name.removesuffix(".py") in names]
    except OSError:
        return ()
    return tuple(sorted(path.name for path in found if path.suffix == ".py" or (path / "__init__.py").is_file()))
