"""Products with frozen weights that are held in fp8, multiplied in fp8: both operands e4m3, a scale for each row.

A weight is e4m3 (N, K) with a scale for each of its N output channels, `quantize`'s fp8 format as it lies. Activations
and gradients get a scale for each row, a token. Gradients are e4m3 as well: a row's own scale leaves them no need for
the range of e5m2, and the bit of precision halves their error. The channels' scales lie along the contracted dimension
of the backward product, so they are multiplied into dy before it is rounded.

Functions named `…_fp8` are those of `pointwise` that end in fp8: activations (B, L, D) in, rows (B L, D) out, with
`keep` the result in the activations' own format as well. On the CPU everything is plain torch, the meaning of
`kernels_fp8` and of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from xflux_trainer import pointwise
from xflux_trainer.errors import first_line

LARGEST = 448.0
"""The largest number of e4m3; beyond it lies NaN."""
FEW = 16
"""Rows up to which a product is bound by reading the weight, and the tensor cores' smallest tile."""
DIP = 0.1700408
"""The largest size of tanh-GELU below zero, rounded up."""
STEEPEST = 1.1291
"""The largest slope of tanh-GELU, rounded up."""
TILE = 16
"""Rows of which a product takes whole multiples on a GPU."""
TINY = 1e-30
"""The least that a row's largest value counts as: a row of zeros has a scale all the same."""
PROBE_ERROR = 0.01
"""Relative error beyond the reference's at which this device's product is broken; bf16's rounding makes 0.002."""


def hold(weight: Tensor) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Callable[[], Tensor]]]:
    """A `frozen.Format`: weight (N, K) as data (N, K) e4m3 and the scale (N, 1) fp32 of each output channel."""
    largest = weight.float().abs().amax(1, keepdim=True).clamp_min(TINY)
    # In bf16 as well: the backward product reads it in that.
    scale = (largest / LARGEST).bfloat16().float()
    data = (weight.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return {"data": data, "scale": scale}, open_held


def open_held(parts: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The dense weight again, for products in another format."""
    return _Opened(parts["data"], parts["scale"])


class _Opened:
    """A weight (N, K) with scales (N, 1) fp32, whose dense copy is made when this is called."""

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self._data, self._scale = data, scale
        self._rounded = scale.bfloat16()

    def __call__(self) -> Tensor:
        return self._data.to(torch.bfloat16).mul_(self._rounded)

    def few(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x W^T + bias (…, N) of up to `FEW` rows x (…, K), which are not quantised; None where a dense copy serves.

        So few take no longer than reading the weight does, and a dense copy would be written and read as well.
        """
        if torch.compiler.is_compiling() or not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
            return None
        if x.numel() > FEW * x.shape[-1] or supported(x.device) is not None:
            return None
        from xflux_trainer import kernels_few

        y = kernels_few.few(x.reshape(-1, x.shape[-1]), self._data, self._scale, bias)
        return y.view(*x.shape[:-1], -1)


def product(
    xq: Tensor, xs: Tensor, data: Tensor, wscale: Tensor, bias: Tensor | None, out: Tensor | None = None,
    *, fast: bool = True,
) -> Tensor:  # fmt: skip
    """x W^T + bias (M, N) bf16 of xq (M, K) e4m3, xs (M, 1) fp32, data (N, K) e4m3, wscale (N, 1) and bias (N,) bf16.

    K and N are multiples of 16; `data` and `out` are contiguous. `fast` sums in the tensor cores alone, some 14 bits
    wide. A wscale that is not fp32 is converted at every call.
    """
    return _multiply(xq, xs, data.t(), wscale.reshape(1, -1).float(), bias, out, fast)


def backward(
    dq: Tensor, ds: Tensor, data: Tensor, out: Tensor | None = None,
    *, transposed: Tensor | None = None, fast: bool = True,
) -> Tensor:  # fmt: skip
    """dx (M, K) bf16 of (dq, ds), which `quantize_rows(dy, wscale)` or its like made of dy (M, N): data is (N, K).

    fp8 products want both operands along the contracted dimension, so the weight is transposed first, into bytes
    that the next product uses again, or was already: `transposed` (K, N).
    """
    if not dq.is_cuda:
        return _multiply(dq, ds, data, _ones(data.shape[1], dq.device), None, out, fast)
    if transposed is None:
        transposed = transpose(data)
    return _multiply(dq, ds, transposed.t(), _ones(data.shape[1], dq.device), None, out, fast)


def _multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out: Tensor | None, fast: bool
) -> Tensor:
    if a.is_cuda:
        rows = len(a)
        beyond = -rows % TILE
        if beyond:  # cuBLAS (torch 2.11, an H200) has no such product for 5 rows: rows of zeros make it one that it has
            a, a_scale = F.pad(a.view(torch.uint8), (0, 0, 0, beyond)).view(a.dtype), F.pad(a_scale, (0, 0, 0, beyond))
        more = {} if out is None or beyond else {"out": out}
        made: Tensor = torch._scaled_mm(
            a, b, scale_a=a_scale, scale_b=b_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast, **more
        )
        if not beyond:
            return made
        return made[:rows] if out is None else out.copy_(made[:rows])
    y = (a.float() @ b.float()) * a_scale * b_scale
    y = (y if bias is None else y + bias.float()).bfloat16()
    return y if out is None else out.copy_(y)


@lru_cache(maxsize=64)
def _ones(width: int, device: torch.device) -> Tensor:
    return torch.ones(1, width, device=device)


_scratch: dict[tuple[torch.device, int], Tensor] = {}


def transpose(data: Tensor, out: Tensor | None = None) -> Tensor:
    """data (N, K), one byte a value, as (K, N) in rows; without `out` in bytes that the next call on this stream uses.

    The products of one stream run in order, so one scratch of the largest weight's size serves them all.
    """
    rows, cols = data.shape
    if out is None:
        if not data.is_cuda:
            return data.t().contiguous()
        key = data.device, torch.cuda.current_stream(data.device).cuda_stream
        if key not in _scratch or _scratch[key].numel() < data.numel():
            _scratch[key] = torch.empty(data.numel(), dtype=torch.uint8, device=data.device)
        out = _scratch[key][: data.numel()].view(data.dtype).view(cols, rows)
    if not data.is_cuda:
        return out.copy_(data.t())
    from xflux_trainer import kernels_fp8

    kernels_fp8.transpose(data, out)
    return out


def quantize_rows(x: Tensor, colscale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (…, K), with colscale (K,) or (K, 1) each column times its own, as (M, K) e4m3 and scales (M, 1) fp32.

    Every row's largest value becomes 448. x may be (M, K) or (B, L, K), a view whose last dimension lies together.
    """
    if x.is_cuda:
        from xflux_trainer import kernels_fp8

        return kernels_fp8.quantize_rows(x, colscale)
    y = x.float().flatten(0, -2)
    y = y if colscale is None else y * colscale.reshape(1, -1).float()
    return _scaled(y, y.abs().amax(1, keepdim=True))


def _scaled(y: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """y (M, K) fp32 at the scales that make 448 of `largest` (M, 1)."""
    scale = largest.clamp_min(TINY) / LARGEST
    return (y * (1 / scale)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


Made = tuple[Tensor, Tensor, "Tensor | None"]
"""Rows (M, K) e4m3, their scales (M, 1), and what they were made of where it was to be kept, (B, L, K)."""


def modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor, *, keep: bool = False) -> Made:
    """`pointwise.modulate`."""
    if x.is_cuda:
        from xflux_trainer import kernels_fp8

        return kernels_fp8.modulate_fp8(x, shift, scale, keep=keep)
    return _made(pointwise.modulate(x.float(), shift, scale), x.dtype, None, keep)


def add_modulate_fp8(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`pointwise.add_modulate`: the sum (B, L, D) comes before the rows."""
    if x.is_cuda:
        from xflux_trainer import kernels_fp8

        return kernels_fp8.add_modulate_fp8(x, y, gate, shift, scale, keep=keep)
    added = pointwise.add_gated(x, y, gate)
    return added, *modulate_fp8(added, shift, scale, keep=keep)


def gelu_fp8(o: Tensor | None, h: Tensor, *, keep: bool = False) -> Made:
    """[o | GELU(h)] of o (B, L, D) and h (B, L, M), as a single block's last layer wants it; or GELU(h) alone.

    A row's scale makes 448 of its largest value, or of GELU's dip where that is more.
    """
    if h.is_cuda:
        from xflux_trainer import kernels_fp8

        return kernels_fp8.gelu_fp8(o, h, keep=keep)
    up = h.float()
    top = up.amax(-1, keepdim=True).clamp_min(0)
    most = pointwise.gelu(top, torch.empty_like(top)).clamp_min(DIP)
    return _beside(o, pointwise.gelu(up, torch.empty_like(up)), most, h.dtype, None, keep)


def gelu_backward_fp8(d: Tensor | None, dy: Tensor, h: Tensor, colscale: Tensor | None, *, keep: bool = False) -> Made:
    """[d | dy GELU'(h)], the gradient of [q k v | h]; the rows' columns are times colscale, what is kept is not.

    A row's scale makes 448 of the largest that it could hold, were GELU' as steep as it gets everywhere: a row whose
    largest is less by some powers of two lies lower in e4m3, which is as fine there.
    """
    if h.is_cuda:
        from xflux_trainer import kernels_fp8

        return kernels_fp8.gelu_backward_fp8(d, dy, h, colscale, keep=keep)
    up = h.float()
    columns = 1.0 if colscale is None else colscale.flatten()[-h.shape[-1] :].float()
    most = (dy.float() * columns).abs().amax(-1, keepdim=True) * STEEPEST
    return _beside(d, pointwise.gelu_backward(dy, up, torch.empty_like(up)), most, h.dtype, colscale, keep)


def gated_fp8(dx: Tensor, gate: Tensor, colscale: Tensor | None, *, keep: bool = False) -> Made:
    """`pointwise.gated`; the rows' columns are times colscale, what is kept is not."""
    if dx.is_cuda:
        from xflux_trainer import kernels_fp8

        return kernels_fp8.gated_fp8(dx, gate, colscale, keep=keep)
    return _made(pointwise.gated(dx.float(), gate)[0], dx.dtype, colscale, keep)


def _beside(
    left: Tensor | None, right: Tensor, most: Tensor, dtype: torch.dtype, colscale: Tensor | None, keep: bool
) -> Made:
    """[left | right] in rows; `most` (B, L, 1): what the right's columns are at most, times theirs of colscale."""
    y = right if left is None else torch.cat([left.float(), right], dim=-1)
    rows = y.flatten(0, -2) if colscale is None else y.flatten(0, -2) * colscale.reshape(1, -1).float()
    largest = most.flatten(0, -2)
    if left is not None:
        largest = largest.maximum(rows[:, : left.shape[-1]].abs().amax(1, keepdim=True))
    return *_scaled(rows, largest), y.to(dtype) if keep else None


def _made(y: Tensor, dtype: torch.dtype, colscale: Tensor | None, keep: bool) -> Made:
    q, s = quantize_rows(y, colscale)
    return q, s, y.to(dtype) if keep else None


@lru_cache(maxsize=8)
def supported(device: torch.device) -> str | None:
    """Why fp8 products cannot be had on this device; None: they can, a small one was right in both directions."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"fp8 products need an NVIDIA card, and this run is on {device.type}"
    capability, release = torch.cuda.get_device_capability(device), _release()
    if capability < (8, 9):
        return (
            f"fp8 products need compute capability 8.9, and {torch.cuda.get_device_name(device)} has {_dot(capability)}"
        )
    if release < (2, 5):
        return f"fp8 products with a scale for each row need torch 2.5, and this is {torch.__version__}"
    if capability == (8, 9) and release < (2, 12):  # pytorch/pytorch#177651
        return f"torch {torch.__version__} starts fp8 products outside of its streams on this card; 2.12 does not"
    try:
        error = _probe(device)
    except Exception as failure:  # noqa: BLE001 (no Triton, no kernel in this build, a driver too old)
        return f"a small fp8 product failed: {first_line(failure)}"
    return None if error < PROBE_ERROR else f"a small fp8 product came back with an error of {error:.0%}"


def _probe(device: torch.device) -> float:
    """The larger relative error of a product forward and backward, from the same ones on the CPU."""
    made = torch.Generator().manual_seed(0)
    x, dy, weight = (torch.randn(size, generator=made) for size in ((64, 128), (64, 256), (256, 128)))
    data, wscale = quantize_rows(weight)
    errors = []
    for a, forward in ((x.bfloat16(), True), (dy.bfloat16(), False)):
        found = []
        for place in (device, torch.device("cpu")):
            w, scale = data.to(place), wscale.to(place)
            if forward:
                y = product(*quantize_rows(a.to(place)), w, scale, torch.ones(256, dtype=a.dtype, device=place))
            else:
                y = backward(*quantize_rows(a.to(place), scale), w)
            found.append(y.cpu().float())
        errors.append(((found[0] - found[1]).norm() / found[1].norm()).item())
    return max(errors)


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def _dot(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
