"""The allocator's setting: ours where the user has none, and none where it is known to fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from trainer_kit import environment
from xflux_trainer import allocator

LINUX, WSL = "Linux version 6.1.0 (gcc)", "Linux version 5.15.90.1-microsoft-standard-WSL2"


@pytest.mark.parametrize(("kernel", "before", "after"), [
    (LINUX, {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
    (LINUX, {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
    (LINUX, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
    (LINUX, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
    (WSL, {}, {}),
])  # fmt: skip
def test_ours_where_the_user_has_none(
    tmp_path: Path, kernel: str, before: dict[str, str], after: dict[str, str]
) -> None:
    (tmp_path / "version").write_text(kernel)
    environ = dict(before)
    allocator.prefer(environ, tmp_path / "version")
    assert environ == after


def test_torch_takes_it() -> None:
    """A misspelt one would stop torch at its first allocation on a card; here it parses what it is told."""
    code = (
        "import os\nfrom xflux_trainer import allocator\nallocator.prefer(os.environ)\nimport torch\n"
        "parse = getattr(torch._C, '_accelerator_setAllocatorSettings', None)\n"
        "parse and parse(allocator.SETTING)\nprint(os.environ['PYTORCH_CUDA_ALLOC_CONF'])"
    )
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0 and done.stdout.split()[-1] == allocator.SETTING, done.stderr
