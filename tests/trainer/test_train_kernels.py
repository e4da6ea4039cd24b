"""The Triton kernels against their meaning in plain torch: on a GPU where there is one, else in Triton's interpreter.

In a child process, since Triton decides between the two when it is imported. `kernels_cases` has the comparisons.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

HERE = Path(__file__).resolve().parent
ON = "cuda" if torch.cuda.is_available() else "cpu"
FUNCTIONS = ("modulate", "add_gated", "add_modulate", "modulate_backward", "gated", "gelu", "gelu_backward", "qk_rope",
             "qk_rope_backward")  # fmt: skip


def child(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    interpreted = {} if ON == "cuda" else {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **interpreted, **variables}
    return subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """What is wrong, by function, size and format."""
    ended = child(str(HERE / "kernels_cases.py"), ON)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(json.loads(line) for line in ended.stdout.splitlines())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_kernel_does_what_plain_torch_does(found: dict[str, list[str]], function: str) -> None:
    cases = {case: faults for case, faults in found.items() if case.split()[0] == function}
    assert len(cases) == 15  # five sizes in three formats
    assert {case: faults for case, faults in cases.items() if faults} == {}


CHOICE = """
import torch
from xflux_trainer import fastops
device = torch.device({device!r})
print(fastops.ops(device).__name__.rpartition(".")[2], fastops.why_not(device))
"""


def chosen(device: str, **variables: str) -> list[str]:
    ended = child("-c", CHOICE.format(device=device), **variables)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.split()


def test_a_device_gets_the_kernels_only_where_they_run() -> None:
    """Triton compiles for GPUs alone: a CPU gets plain torch, unless the interpreter is there and asked for."""
    assert chosen("cpu") == ["pointwise", "on", "cpu"]
    assert chosen("cpu", XFLUX_POINTWISE="triton", TRITON_INTERPRET="1") == ["kernels"]
    name, *why = chosen("cpu", XFLUX_POINTWISE="triton", TRITON_INTERPRET="0")
    assert name == "pointwise" and why
    if ON == "cuda":
        assert chosen("cuda") == ["kernels"]
        assert chosen("cuda", XFLUX_POINTWISE="torch") == ["pointwise", "XFLUX_POINTWISE=torch"]


def test_importing_the_choice_does_not_import_triton() -> None:
    """Triton takes a second to import, and is not on every machine."""
    ended = child("-c", "import sys; from xflux_trainer import fastops, pointwise; print('triton' in sys.modules)")
    assert ended.stdout.split() == ["False"], ended.stderr[-3000:]
