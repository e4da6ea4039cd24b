"""Attention forward and backward by hand, over the fastest kernels that work here.

A backend is given q, k and v as (B, L, H, C), views of wider buffers too, and what it keeps between the passes is
tensors. Which one is right and quick depends on the card, the driver and the packages, and a wrong one kills the
process or the gradients: what `auto` takes was tried before, forward and backward, against the plain formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from xflux_trainer.errors import Unsupported, first_line

Kept = tuple[Tensor, ...]
Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Kept]]
"""(q, k, v) to the output (B, L, H, C), contiguous, and what the backward pass needs beside it."""
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Kept, Tensor], tuple[Tensor, Tensor]]
"""(dout, q, k, v, out, kept, dv) to the gradients of q and k; that of v is written into dv."""
TOLERANCE = 0.02
"""Relative error at which a backend is wrong: bf16 has 0.005 to 0.01 on normal values."""


@dataclass(frozen=True)
class Attention:
    """One backend by its name."""

    name: str
    forward: Forward
    backward: Backward


def choose(
    wanted: str, device: torch.device, dtype: torch.dtype, channels: int, *, deterministic: bool = False
) -> tuple[Attention, list[str]]:
    """The backend of that name or, for `auto`, the fastest that works; and why faster ones were passed over.

    With `deterministic`, `auto` takes none whose gradients differ from one time to the next. Raises `Unsupported` where
    the one that is asked for does not work, or where trying one has broken this process's use of the device.
    """
    passed: list[str] = []
    order = _STEADY if deterministic else _ORDER
    for name in order if wanted == "auto" else (wanted,):
        try:
            made = _MAKERS[name](device)
            _try(made, device, dtype, channels)
        except Exception as error:  # noqa: BLE001 (packages for another card or another torch raise anything)
            passed.append(f"{name}: {first_line(error)}")
            _refuse_broken(name, order, device)
            continue
        return made, passed
    if wanted == "auto":
        return _plain(device), passed
    raise Unsupported(
        f"attention is {wanted}, which does not work here: {passed[0].partition(': ')[2]}.",
        "Set attention to auto, which takes the fastest that works.",
    )


def _refuse_broken(name: str, order: tuple[str, ...], device: torch.device) -> None:
    """Raise `Unsupported` where a kernel's illegal access has ended CUDA in this process: no other one can be tried."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        seen = f"The attention kernels of {name} broke this process's use of the GPU: {first_line(error)}."
        others = [other for other in order if other != name] or ["sdpa"]
        raise Unsupported(seen, f"Set attention to {others[-1]} in the train config, or remove the package.") from error


def _try(made: Attention, device: torch.device, dtype: torch.dtype, channels: int) -> None:
    """Raise ValueError for an output or a gradient that is not the formula's. q, k and v are slices, as in a block."""
    dice = torch.Generator(device).manual_seed(0)
    tokens, heads = 320, 2
    buffer = torch.randn(1, tokens, 4, heads, channels, device=device, generator=dice).to(dtype)
    q, k, v, dout = (part.contiguous() if place in (0, 1) else part for place, part in enumerate(buffer.unbind(2)))
    right = _plain(device)
    grads = torch.full((1, tokens, 3, heads, channels), math.nan, device=device, dtype=dtype)
    results = []
    for each, dv in ((made, grads[:, :, 1]), (right, grads[:, :, 2])):
        wide = [part.float() if each is right else part for part in (q, k, v, dout)]
        out, kept = each.forward(*wide[:3])
        dq, dk = each.backward(wide[3], *wide[:3], out, kept, dv)
        results.append((out, dq, dk, dv))
    for name, got, true in zip(("output", "dq", "dk", "dv"), *results):  # noqa: B905 (of one length)
        error = float((got.float() - true.float()).norm() / true.float().norm())
        if not error < TOLERANCE:
            raise ValueError(f"its {name} is wrong by {error:.0%}")


def _flash_attn_4(device: torch.device) -> Attention:
    """The package flash-attn-4, for Hopper and newer."""
    if device.type != "cuda":
        raise ValueError("it is for CUDA")
    if torch.cuda.get_device_capability(device)[0] < 9:
        raise ValueError("it is for cards of compute capability 9.0 and newer")
    from flash_attn.cute import interface

    # With autograd it would save its own copies; these two are what its autograd function calls.
    ahead: Any = interface._flash_attn_fwd
    back: Any = interface._flash_attn_bwd

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        out, lse = ahead(q, k, v, softmax_scale=q.shape[-1] ** -0.5, return_lse=True)[:2]
        return out, (lse,)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Its checks want gradients of the inputs' strides; dv's are those of a wider buffer.
        dq, dk, _ = back(q, k, v, out, dout, kept[0], softmax_scale=q.shape[-1] ** -0.5, dv=dv)[:3]
        return dq, dk

    return Attention("flash-attn-4", forward, backward)


def _flash(device: torch.device) -> Attention:
    """torch's own FlashAttention-2, on a CPU its own kernel of that name."""
    if device.type == "cpu":
        return _flash_for_cpu()
    if device.type != "cuda":
        raise ValueError("it is for CUDA and the CPU")
    ahead: Any = torch.ops.aten._scaled_dot_product_flash_attention.default
    back: Any = torch.ops.aten._scaled_dot_product_flash_attention_backward.default

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        out, lse, _, _, _, _, seed, offset, _ = ahead(*_heads_first(q, k, v), 0.0, False, False)
        return out.transpose(1, 2), (lse, seed, offset)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        lse, seed, offset = kept
        tensors = _heads_first(dout, q, k, v, out)
        grads = back(*tensors, lse, None, None, q.shape[1], k.shape[1], 0.0, False, seed, offset)
        dq, dk, made = _heads_first(*grads)
        dv.copy_(made)
        return dq, dk

    return Attention("flash", forward, backward)


def _flash_for_cpu() -> Attention:
    ahead: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    back: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        out, lse = ahead(*_heads_first(q, k, v))
        return out.transpose(1, 2), (lse,)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        dq, dk, made = _heads_first(*back(*_heads_first(dout, q, k, v, out), kept[0], 0.0, False))
        dv.copy_(made)
        return dq, dk

    return Attention("flash", forward, backward)


def _cudnn(device: torch.device) -> Attention:
    """cuDNN's, by name only: its backward pass has died on this model on an H100 (torch 2.11)."""
    if device.type != "cuda":
        raise ValueError("it is for CUDA")
    ahead: Any = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    back: Any = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        out, lse, _, _, _, _, seed, offset, _ = ahead(
            *_heads_first(q, k, v.contiguous()), None, True, 0.0, False, False
        )
        return out.transpose(1, 2).contiguous(), (lse, seed, offset)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        lse, seed, offset = kept
        tensors = _heads_first(dout.contiguous(), q, k, v.contiguous(), out)
        grads = back(*tensors, lse, seed, offset, None, None, None, q.shape[1], k.shape[1], 0.0, False)
        dq, dk, made = _heads_first(*grads)
        dv.copy_(made)
        return dq.contiguous(), dk.contiguous()

    return Attention("cudnn", forward, backward)


def _plain(device: torch.device) -> Attention:
    """torch's choice, with its forward pass once more in the backward pass: works wherever torch does."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        return F.scaled_dot_product_attention(*_heads_first(q, k, v)).transpose(1, 2).contiguous(), ()

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        leaves = [each.detach().requires_grad_() for each in (q, k, v)]
        with torch.enable_grad():
            again = F.scaled_dot_product_attention(*_heads_first(*leaves)).transpose(1, 2)
        dq, dk, made = torch.autograd.grad(again, leaves, dout)
        dv.copy_(made)
        return dq, dk

    return Attention("sdpa", forward, backward)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, L, H, C) to (B, H, L, C) and back."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


_MAKERS: dict[str, Callable[[torch.device], Attention]] = {
    "flash-attn-4": _flash_attn_4,
    "flash": _flash,
    "cudnn": _cudnn,
    "sdpa": _plain,
}
_ORDER = ("flash-attn-4", "flash")
"""What `auto` tries, the fastest first; torch's own choice is left when none works."""
_STEADY = ("flash",)
"""Those of them that give the same bits every time, when torch is told to."""
