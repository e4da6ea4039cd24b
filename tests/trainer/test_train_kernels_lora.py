"""The adapters' Triton kernels against their meaning in plain torch, and that meaning against fp64 and autograd.

The kernels run in a child process, since Triton decides between a GPU and its interpreter when it is imported.
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

from xflux_trainer import pointwise  # noqa: E402
from xflux_trainer.pointwise import Part, Parts  # noqa: E402

HERE = Path(__file__).resolve().parent
ON = "cuda" if torch.cuda.is_available() else "cpu"
FUNCTIONS = {
    "lora_add": 27, "lora_narrow_backward": 27, "lora_up_grad": 27, "lora_down_grad": 27, "join": 12,
    "scatter": 3,
}  # fmt: skip
"""Cases of each: nine groups, four sizes or one list, in three formats."""

QKV: Parts = (Part(0, 12, 0, 4, 0.5), Part(12, 12, 4, 4, 0.5), Part(24, 12, 8, 4, 0.5))
MIXED: Parts = (Part(0, 8, 0, 3, 2.0), Part(8, 20, 3, 3), Part(28, 8, 6, 3, 0.25))


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """What is wrong, by function, format and size."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    interpreted = {} if ON == "cuda" else {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **interpreted}
    argv = [sys.executable, str(HERE / "kernels_lora_cases.py"), ON]
    ended = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(json.loads(line) for line in ended.stdout.splitlines())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_kernel_does_what_plain_torch_does(found: dict[str, list[str]], function: str) -> None:
    cases = {case: faults for case, faults in found.items() if case.split()[0] == function}
    assert len(cases) == FUNCTIONS[function]
    assert {case: faults for case, faults in cases.items() if faults} == {}


@pytest.mark.parametrize("parts", [QKV, MIXED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_of_adapters_is_what_autograd_says(parts: Parts, dtype: torch.dtype) -> None:
    """Values and all three gradients of y + scale B A x, adapter by adapter in fp64."""
    random = torch.Generator().manual_seed(0)
    rank, inputs, outputs = sum(part.rank for part in parts), 10, 36
    x, y, dy = (torch.randn((17, width), generator=random).to(dtype) for width in (inputs, outputs, outputs))
    down = torch.randn((rank, inputs), generator=random).to(dtype)
    up = torch.randn((outputs, parts[0].rank), generator=random).to(dtype)

    wide_down, wide_up = down.double().requires_grad_(), up.double().requires_grad_()
    low = x.double() @ wide_down.t()
    low.retain_grad()
    added = [
        scale * low[:, narrow : narrow + own] @ wide_up[column : column + width].t()
        for column, width, narrow, own, scale in parts
    ]
    meant = y.double() + torch.cat(added, 1)
    meant.backward(dy.double())
    assert low.grad is not None

    near = {"rtol": 2e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    low16 = low.detach().to(dtype)
    made = pointwise.lora_add(y.clone(), low16, up, parts)
    torch.testing.assert_close(made.double(), meant.detach(), **near)
    dlow = pointwise.lora_narrow_backward(dy, up, parts)
    assert dlow.dtype == dtype
    torch.testing.assert_close(dlow.double(), low.grad, **near)
    up_grad = pointwise.lora_up_grad(dy, low16, parts, torch.full_like(up, torch.nan, dtype=torch.float32))
    torch.testing.assert_close(up_grad.double(), wide_up.grad, **near)
    down_grad = pointwise.lora_down_grad(dlow, x, torch.full((rank, inputs), torch.nan))
    torch.testing.assert_close(down_grad.double(), wide_down.grad, **near)


def test_join_is_its_parts() -> None:
    """Bit for bit what the separate calls make."""
    random = torch.Generator().manual_seed(0)
    wide = torch.randn((2, 5, 64), generator=random).bfloat16()
    o, h = wide[..., :16], wide[..., 16:]
    m = pointwise.gelu(h, torch.empty(h.shape, dtype=h.dtype))
    assert torch.equal(pointwise.join(o, h), torch.cat([o, m], -1))
