"""The same bits every time: only kernels whose sums come in one order, where the config asks for it.

Without it a run is the same only up to the order in which a GPU's threads add: torch's flash attention, for one,
sums its gradients by atomics. On a CPU with one thread nothing changes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
STEADY = (":4096:8", ":16:8")
"""cuBLAS' workspaces under which it gives the same bits (CUDA's cuBLAS manual, "Results reproducibility")."""
_NO_KERNEL = re.compile(r"^(\S+) does not have a deterministic implementation")


@contextmanager
def kernels(config: TrainConfig) -> Iterator[None]:
    """Inside, `config.deterministic` holds; what was set before comes back after. Without it nothing is touched.

    To be entered before the first use of CUDA, since cuBLAS reads its workspace once. Under it torch takes the
    deterministic backward of its flash and memory-efficient attention; TF32 is left as it is, for it rounds alike
    every time. Raises `Unsupported` for an operation that has no such kernel, and when CUDA was started already.
    """
    if not config.deterministic:
        yield
        return
    _set_workspace()
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if found := _NO_KERNEL.match(str(error)):
            raise Unsupported(
                f"{found[1]} has no kernel that gives the same bits every time on this device.",
                "Set deterministic to false, or what uses it (an optimizer, a quantization) to another.",
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[2:]


def _set_workspace() -> None:
    if os.environ.get(WORKSPACE) in STEADY:
        return
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        raise Unsupported(
            f"deterministic is on, but CUDA was started without {WORKSPACE}.",
            f"Set the environment variable {WORKSPACE}={STEADY[0]} before the start.",
        )
    os.environ[WORKSPACE] = STEADY[0]
