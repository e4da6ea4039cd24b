"""What lies in the folder that the job starts in and has a package's name."""

from __future__ import annotations

import sys
from pathlib import Path

STACK = frozenset(
    "torch accelerate diffusers transformers safetensors numpy huggingface_hub PIL peft yaml tokenizers".split()
)
"""What every start imports."""
OTHERS = frozenset(
    "absl annotated_types certifi charset_normalizer click cpuinfo datasets deepspeed einops filelock fsspec google "
    "h11 hjson httpx idna jinja2 markdown markupsafe mpmath msgpack networkx ninja optimum packaging psutil "
    "pydantic pynvml regex requests rich scipy sentencepiece setuptools sympy tensorboard tqdm triton typer "
    "typing_extensions urllib3 wandb".split()
)
"""What those import, or a job may."""
LOOKED_FOR = frozenset(
    "apex aqlm awq backports bitsandbytes colorama dill eetq envwrap flash_attn hqq jaraco kernels mistral_common "
    "more_itertools pydot pyzstd soundfile soxr tabulate torch_mlu torch_musa torch_npu torch_sdaa torchao torchaudio "
    "torchvision transformer_engine xformers zstandard".split()
)
"""What no stack needs and its packages import wherever they find it; they die of another's (benchmarks/shadows.py)."""


def shadows(folder: Path) -> tuple[str, ...]:
    """`-m` puts the working folder before all others (Python docs, sys.path): its `torch.py` wins over the real one.

    A folder without an `__init__.py` does not.
    """
    names = STACK | OTHERS | LOOKED_FOR | sys.stdlib_module_names
    try:
        found = [path for path in folder.iterdir() if path.name.removesuffix(".py") in names]
    except OSError:
        return ()
    return tuple(sorted(path.name for path in found if path.suffix == ".py" or (path / "__init__.py").is_file()))
