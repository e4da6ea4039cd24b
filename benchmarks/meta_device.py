"""A card without memory: torch's meta device, with what it lacks to take this trainer's steps.

On `meta` a tensor has a shape and no values: FLUX.1 is built in a second, and a step takes the time of its launches.
`Ledger` counts the bytes of the storages that are alive, as a card's allocator does. What meta has not, stands in here:

addresses     each storage gets one of its own: weights that lie side by side are known by them
numbers       a value that the host reads (a loss, a norm) is 1
Triton        the kernels' functions run, with all that they allocate, and launch nothing; the package is not needed
attention     flash-attn-4 under the trainer's blocks and torch's flash under diffusers', as what they allocate: their
              outputs, what is kept for the backward pass, and the fp32 that it sums up in
RMS norms     where torch has a kernel of CUDA's for them (from 2.9 on), what that keeps
checkpoints   torch 2.4 asks for a module of the device's name
compilers     torchao's step is not compiled

Not seen is what lies outside of tensors (cuBLAS' workspaces, which are a term of the bill; the CUDA context), what the
allocator holds and nobody uses, and scratch inside of torch's own kernels.
"""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from xflux_trainer import fastops
from xflux_trainer.attention import Attention, Kept

META = torch.device("meta")
ROUND = 512
"""Bytes to whose multiples torch's allocator rounds."""
_aten: Any = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Inside, the storages on the meta device that operations make are counted until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[Any, int, int]] = {}
        """By a storage's own identity: a weak reference to it, its address and its bytes."""
        self._next = ROUND
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, Tensor) and each.is_meta:
                self.address(each.untyped_storage())
        self.peak = max(self.peak, self.live)
        return made

    def reset_peak(self) -> None:
        self.peak = self.live

    def address(self, storage: torch.UntypedStorage) -> int:
        """Where this storage would begin. One that was not known is counted from now on."""
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None:
            return known[1]
        size = -(-storage.nbytes() // ROUND) * ROUND
        place = self._next
        self._next += size + ROUND
        self._storages[key] = weakref.ref(storage, lambda _: self._gone(key)), place, size
        self.live += size
        return place

    def _gone(self, key: int) -> None:
        self.live -= self._storages.pop(key)[2]


@contextmanager
def card() -> Iterator[Ledger]:
    """Inside, the meta device is one that the trainer can compute on. For a process of its own."""
    ledger = Ledger()
    tensors, storages = Tensor.data_ptr, torch.UntypedStorage.data_ptr

    def data_ptr(tensor: Tensor) -> int:
        if not tensor.is_meta:
            return tensors(tensor)
        return ledger.address(tensor.untyped_storage()) + tensor.storage_offset() * tensor.element_size()

    def begin(storage: torch.UntypedStorage) -> int:
        return ledger.address(storage) if storage.device.type == "meta" else storages(storage)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Tensor, "data_ptr", data_ptr))
        stack.enter_context(patch.object(torch.UntypedStorage, "data_ptr", begin))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _flash))
        if hasattr(_aten, "_fused_rms_norm_backward"):
            stack.enter_context(patch.object(F, "rms_norm", _rms_norm))
        stack.enter_context(patch.object(torch, "meta", META, create=True))
        stack.enter_context(_uncompiled())
        stack.enter_context(_unlaunched())
        stack.enter_context(ledger)
        yield ledger


# Triton and compilers ---------------------------------------------------------------------------------------


class _Launcher:
    """A kernel whose launches do nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _Language(ModuleType):
    """triton.language where nothing is compiled: constants are themselves, and types stand in annotations alone."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda value=None: value


def _jit(function: Any = None, **options: Any) -> Any:
    """As a decorator, with options and without."""
    return _jit if function is None else _Launcher()


def _triton() -> dict[str, ModuleType]:
    """The parts of Triton that kernels' functions ask for. A real one would want pointers into a card's memory."""
    whole: Any = ModuleType("triton")
    whole.jit, whole.language = _jit, _Language("triton.language")
    whole.cdiv = lambda a, b: -(-a // b)
    whole.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    return {"triton": whole, "triton.language": whole.language}


@contextmanager
def _unlaunched() -> Iterator[None]:
    """The trainer's modules of kernels over that Triton, and taken for this device."""
    ours = ("xflux_trainer.kernels", "xflux_trainer.stepkernels", "xflux_trainer.adamkernels")
    known = [name for name in sys.modules if name.startswith(ours) or name.partition(".")[0] == "triton"]
    aside = {name: sys.modules.pop(name) for name in known}
    stand_ins = _triton()
    sys.modules.update(stand_ins)
    for name in ours:
        importlib.import_module(name)
    for name in stand_ins:  # whoever else imports Triton gets the real one, or none
        del sys.modules[name]
    sys.modules.update({name: module for name, module in aside.items() if not name.startswith(ours)})
    fastops._chosen.cache_clear()
    try:
        with patch.dict(os.environ, {fastops.VARIABLE: "triton"}):
            yield
    finally:
        fastops._chosen.cache_clear()
        for name in [name for name in sys.modules if name.startswith(ours)]:
            del sys.modules[name]
        sys.modules.update(aside)


def _uncompiled() -> AbstractContextManager[Any]:
    """As `optimizers.quietly` on the CPU."""
    if hasattr(torch.compiler, "set_stance"):  # from 2.6 on
        return torch.compiler.set_stance("force_eager")
    from torch._dynamo import config

    return config.patch(disable=True)  # type: ignore[no-any-return]


# Attention and norms ----------------------------------------------------------------------------------------


def flash_attn_4() -> Attention:
    """What flash-attn-4's two calls allocate in `attention._flash_attn_4`."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        batch, tokens, heads, _ = q.shape
        return torch.empty_like(q), (q.new_empty(batch, heads, tokens, dtype=torch.float32),)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        _sums(q, 2)
        return dq, dk

    return Attention("flash-attn-4", forward, backward)


def _sums(q: Tensor, more: int) -> None:
    """Taken and given back: the gradient of q in fp32, and so many numbers of each of its rows."""
    q.new_empty(*q.shape[:-1], q.shape[-1] + more, dtype=torch.float32)


class _Flash(torch.autograd.Function):
    """What torch's FlashAttention-2 for CUDA allocates, of q, k and v (B, H, L, C) that lie as (B, L, H, C)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v, *_ = ctx.saved_tensors
        made = tuple(torch.empty_like(each.transpose(1, 2)).transpose(1, 2) for each in (q, k, v))
        _sums(q, 1)
        return made


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
) -> Tensor:
    """torch's choice on a card where cuDNN's attention is off, and no mask is given."""
    if attn_mask is not None or dropout_p:
        raise NotImplementedError("flash attention takes no mask")
    made: Tensor = _Flash.apply(query, key, value)
    return made


class _RmsNorm(torch.autograd.Function):
    """What CUDA's kernel allocates: it keeps its input, and a number of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = ctx.saved_tensors[:2]
        return tuple(torch.empty_like(each) if need else None for each, need in zip(kept, ctx.needs_input_grad))  # noqa: B905


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    made: Tensor = _RmsNorm.apply(x, weight)
    return made
