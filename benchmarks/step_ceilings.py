"""What a card can do at the most, measured: dense matrix products, and attention with each kernel that is there.

A step's limit is its linear work at the one and its attention at the other. Kernels that may end the process (an
illegal memory access) are asked in processes of their own: `GROUPS`.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from xflux_trainer.spec import FluxSpec, image_tokens

GROUPS: tuple[tuple[str, ...], ...] = (("bf16", "fp8", "flash", "efficient"), ("cudnn",), ("flash-attn-4",))
"""What shares a process: the first are known to do no harm."""
ATTENTION = ("flash", "efficient", "cudnn", "flash-attn-4")
SIDE, TOKENS = 8192, 4608
"""Of the square matrices; of the attention at 1024 px with 512 tokens of text."""
CPU_SIDE, CPU_TOKENS = 512, 256


@dataclass(frozen=True)
class Work:
    """FLOPs of one step that are of use: recomputing and the adapters' own products (below 1 %) do not count."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def limit(self, linear: float, attention: float) -> float:
        """Seconds at these ceilings in TFLOP/s."""
        return self.linear / (linear * 1e12) + self.attention / (attention * 1e12)


def work(spec: FluxSpec, pixels: int, size: int, text_tokens: int = 512, *, finetune: bool = False) -> Work:
    """Of a batch of so many images: forward and input gradients, and in a fine-tune the weights' gradients as well."""
    image = image_tokens(pixels, pixels)
    forward = (spec.double_blocks + spec.single_blocks) * 4 * (image + text_tokens) ** 2 * spec.hidden
    linear = spec.forward_flops(image, text_tokens) - forward
    return Work(size * linear * (3 if finetune else 2), size * forward * 3.5)


class GpuOnly(Exception):
    """There is no ceiling of that name on a CPU."""


def measure(names: list[str], heads: int) -> dict[str, Any]:
    """TFLOP/s by name, and why there is none under `not_there`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"not_there": {}}
    for name in names:
        try:
            if name in ATTENTION:
                found[name] = attention(name, device, heads)
            else:
                found |= {"bf16": bf16, "fp8": fp8}[name](device)
        except (GpuOnly, ImportError, AttributeError, RuntimeError, TypeError) as error:
            found["not_there"][name] = " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
    return found


def bf16(device: torch.device) -> dict[str, float]:
    """A square product; in fp32 on a CPU, which computes in it."""
    cuda = device.type == "cuda"
    side, dtype = (SIDE, torch.bfloat16) if cuda else (CPU_SIDE, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return {"bf16": _rate(lambda: a @ b, 2.0 * side**3, device)}


def fp8(device: torch.device) -> dict[str, float]:
    """e4m3 with one scale for each tensor, and with one for each row and column; `fp8` is the faster of them."""
    if device.type != "cuda":
        raise GpuOnly("measured on a GPU only")
    a, b = (torch.randn(SIDE, SIDE, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    rows = torch.ones(SIDE, 1, device=device)

    def product(scale_a: Tensor, scale_b: Tensor) -> Callable[[], Any]:
        return lambda: torch._scaled_mm(
            a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    found = {"fp8-tensorwise": _rate(product(one, one), 2.0 * SIDE**3, device)}
    with contextlib.suppress(RuntimeError):  # older torch, or a card that has tensorwise scales only
        found["fp8-rowwise"] = _rate(product(rows, rows.t()), 2.0 * SIDE**3, device)
    return {**found, "fp8": max(found.values())}


def attention(name: str, device: torch.device, heads: int) -> float:
    """Forward and backward at FLUX.1's shape, by the kernel of that name."""
    cuda = device.type == "cuda"
    if not cuda and name != "flash":
        raise GpuOnly("measured on a GPU only")
    tokens, dtype = (TOKENS, torch.bfloat16) if cuda else (CPU_TOKENS, torch.float32)
    shape = (1, tokens, heads, 128) if name == "flash-attn-4" else (1, heads, tokens, 128)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, device=device, dtype=dtype)
    forward = _kernel(name)

    def both() -> None:
        torch.autograd.grad(forward(q, k, v), (q, k, v), grad)

    return _rate(both, 3.5 * 4 * tokens**2 * heads * 128, device)


def _kernel(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name == "flash-attn-4":
        from flash_attn.cute import flash_attn_func

        def cute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attn_func(q, k, v)
            return out[0] if isinstance(out, tuple) else out  # some releases give the row sums as well

        return cute
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {
        "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }[name]  # fmt: skip

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return sdpa


def _rate(call: Callable[[], Any], flops: float, device: torch.device) -> float:
    """TFLOP/s: the median of five stretches of about 0.1 s each, after a warm-up that lets the clocks settle."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for _ in range(3):
        call()
    wait()
    started = time.perf_counter()
    call()
    wait()
    times = max(1, min(200, round((0.1 if device.type == "cuda" else 0.02) / (time.perf_counter() - started))))
    stretches = []
    for _ in range(6):
        started = time.perf_counter()
        for _ in range(times):
            call()
        wait()
        stretches.append((time.perf_counter() - started) / times)
    return flops / statistics.median(stretches[1:]) / 1e12
