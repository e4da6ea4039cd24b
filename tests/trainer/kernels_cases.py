"""Every Triton kernel beside its meaning in plain torch, over sizes, formats and layouts: one line of JSON a case.

    python kernels_cases.py cpu|cuda     (cpu: with TRITON_INTERPRET=1 from the start)

A line has the case and what is wrong with it, or nothing. Inputs are views into wider buffers, and memory that nothing
was written to is NaN: whatever is read beside the tensors, or not written, shows.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from xflux_trainer import kernels, pointwise

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
# 300 rows: more than there are programs to walk over them where sums are kept.
SHAPES = ((2, 7, 96), (1, 300, 32), (3, 1, 200), (1, 3, 3072), (2, 2, 8192))
HEADS = ((2, 7, 3, 16), (1, 9, 2, 48), (1, 3, 24, 128), (2, 6, 1, 64), (1, 4, 12, 6))
"""Batch, tokens, heads, channels."""
NAMES = ("dx", "dshift", "dscale")


class Layouts:
    """Makes the same inputs for both, as they lie in a trainer: in wider buffers, and modulation in one chunk."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.random = torch.Generator().manual_seed(0)

    def _values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def wide(self, batch: int, tokens: int, width: int) -> Tensor:
        """(batch, tokens, width) with NaN before and after each row, and rows between the batches."""
        buffer = self.empty(batch, tokens, width)
        return buffer.copy_(self._values(batch, tokens, width))

    def empty(self, batch: int, tokens: int, width: int) -> Tensor:
        buffer = torch.full((batch, tokens + 2, 2 * width + 16), torch.nan, dtype=self.dtype, device=self.device)
        return buffer[:, 1:-1, 16 : 16 + width]

    def parts(self, batch: int, width: int, count: int) -> tuple[Tensor, ...]:
        return self._values(batch, count * width).to(self.device, self.dtype).chunk(count, dim=-1)

    def heads(self, batch: int, tokens: int, heads: int, channels: int, swapped: bool) -> Tensor:
        """(batch, tokens, heads, channels), and with `swapped` as (batch, heads, tokens, channels) in memory."""
        x = self._values(batch, tokens, heads, channels).to(self.device, self.dtype)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if swapped else x


def wrong(name: str, made: Tensor | None, meant: Tensor | None) -> str:
    """What is wrong with what a kernel made; empty where nothing is."""
    if made is None or meant is None:
        return "" if made is meant else f"{name}: {made} instead of {meant}"
    if made.dtype != meant.dtype or made.shape != meant.shape:
        return f"{name}: {made.dtype} {tuple(made.shape)} instead of {meant.dtype} {tuple(meant.shape)}"
    a, b = made.double(), meant.double()
    off = (a - b).abs()
    if not bool(a.isfinite().all()):
        return f"{name}: {int((~a.isfinite()).sum())} of {a.numel()} not finite"
    if made.dtype == torch.float32:
        worst = float((off / (1 + b.abs())).max())
        return f"{name}: off by {worst:.1e}" if worst > 1e-5 else ""
    # The last place of a number is at most eps of it. Another sum's order may tip a rounding, and that the next one.
    places = off / (b.abs() * torch.finfo(made.dtype).eps + 1e-5)
    beyond, worst = float((places > 1).double().mean()), float(places.max())
    return f"{name}: {beyond:.2%} off by more than one place, up to {worst:.1f}" if beyond > 1e-3 or worst > 3 else ""


def untouched(out: Tensor) -> str:
    """Whether what lies around a view is still NaN."""
    base = out._base
    assert base is not None
    around = int(base.isnan().sum()) - int(out.isnan().sum())
    return "" if around == base.numel() - out.numel() else "written beside the output"


def twice(call: Callable[[], tuple[Tensor | None, ...]]) -> str:
    """Whether sums over tokens come out in the same bits each time."""
    for once, again in zip(call(), call(), strict=True):
        if once is None or again is None or not torch.equal(once, again):
            return "not the same twice"
    return ""


Case = tuple[str, Callable[[], list[str]]]


def rows(device: str, dtype: torch.dtype, batch: int, tokens: int, width: int) -> Iterator[Case]:
    lay = Layouts(device, dtype)
    x, y, dx = (lay.wide(batch, tokens, width) for _ in range(3))
    shift, scale, gate, *_ = lay.parts(batch, width, 6)

    def modulate() -> list[str]:
        meant, place = pointwise.modulate(x, shift, scale), lay.empty(batch, tokens, width)
        found = [wrong("out", kernels.modulate(x, shift, scale), meant)]
        assert kernels.modulate(x, shift, scale, place) is place
        return [*found, wrong("place", place, meant), untouched(place)]

    def add_gated() -> list[str]:
        return [wrong("out", kernels.add_gated(x, y, gate), pointwise.add_gated(x, y, gate))]

    def add_modulate() -> list[str]:
        made, meant = (module.add_modulate(x, y, gate, shift, scale) for module in (kernels, pointwise))
        # The norm is of the sum as it was rounded.
        found = [wrong("added", made[0], meant[0]), wrong("out", made[1], pointwise.modulate(made[0], shift, scale))]
        place = lay.empty(batch, tokens, width)
        assert kernels.add_modulate(x, y, gate, shift, scale, place)[1] is place
        return [*found, wrong("place", place, made[1]), untouched(place)]

    def modulate_backward() -> list[str]:
        found = []
        for more in (dx, None):
            for sums in (False, True):
                made, meant = (m.modulate_backward(y, x, scale, more, sums=sums) for m in (kernels, pointwise))
                found += [wrong(f"{n} {sums}", *pair) for n, *pair in zip(NAMES, made, meant, strict=True)]
        found.append(twice(lambda: kernels.modulate_backward(y, x, scale, dx, sums=True)))
        # One value for all of a row, as a sum's gradient comes: without memory of its own.
        flat = torch.ones((), dtype=dtype, device=device).expand(batch, tokens, width)
        made, meant = (m.modulate_backward(flat, x, scale, None) for m in (kernels, pointwise))
        return [*found, wrong("flat", made[0], meant[0])]

    def gated() -> list[str]:
        found = []
        for value in (None, y):
            made, meant = kernels.gated(dx, gate, value), pointwise.gated(dx, gate, value)
            found += [wrong("out", made[0], meant[0]), wrong("dgate", made[1], meant[1])]
            place = lay.empty(batch, tokens, width)
            assert kernels.gated(dx, gate, value, place)[0] is place
            found += [wrong("place", place, meant[0]), untouched(place)]
        return [*found, twice(lambda: kernels.gated(dx, gate, y))]

    def gelu() -> list[str]:
        h, out = 3 * x, lay.empty(batch, tokens, width)
        assert kernels.gelu(h, out) is out
        return [wrong("out", out, pointwise.gelu(h, torch.empty_like(h))), untouched(out)]

    def gelu_backward() -> list[str]:
        h, out = 3 * x, lay.empty(batch, tokens, width)
        meant = pointwise.gelu_backward(dx, h, torch.empty_like(h))
        found = [wrong("out", kernels.gelu_backward(dx, h, out), meant), untouched(out)]
        mine = lay.empty(batch, tokens, width).copy_(dx)
        return [*found, wrong("in place", kernels.gelu_backward(mine, h, mine), meant), untouched(mine)]

    for case in (modulate, add_gated, add_modulate, modulate_backward, gated, gelu, gelu_backward):
        yield case.__name__, case


def heads(device: str, dtype: torch.dtype, batch: int, tokens: int, count: int, channels: int) -> Iterator[Case]:
    lay = Layouts(device, dtype)
    width = count * channels
    qk = lay.wide(batch, tokens, 2 * width)
    angles = torch.rand((tokens, channels // 2), generator=lay.random).repeat_interleave(2, 1).to(device) * 6
    cos, sin = angles.cos(), angles.sin()
    norms = tuple(1 + part[0] / 4 for part in lay.parts(1, channels, 4))
    wide_norms = tuple(weight.float() for weight in norms)

    def qk_rope() -> list[str]:
        found = []
        for weights in (norms, wide_norms):
            for text in {0, 2, tokens}:
                made, meant = (module.qk_rope(qk, weights, cos, sin, text) for module in (kernels, pointwise))
                found += [wrong(f"{name} {text}", *pair) for name, *pair in zip("qk", made, meant, strict=True)]
                found += ["not contiguous"] * (not all(x.is_contiguous() for x in made))
        return found

    def qk_rope_backward() -> list[str]:
        found = []
        for swapped in (False, True):
            dq, dk = (lay.heads(batch, tokens, count, channels, swapped) for _ in range(2))
            for text in {0, 2, tokens}:
                for sums in (False, True):
                    out, meant = lay.empty(batch, tokens, 2 * width), torch.empty_like(qk)
                    grads = kernels.qk_rope_backward(dq, dk, qk, norms, cos, sin, text, out, sums=sums)
                    truth = pointwise.qk_rope_backward(dq, dk, qk, norms, cos, sin, text, meant, sums=sums)
                    found += [wrong(f"dqk {text}", out, meant), untouched(out)]
                    found += [
                        wrong(f"{i} {text}", *p) for i, p in enumerate(zip(grads or (), truth or (), strict=True))
                    ]
        return found

    for case in (qk_rope, qk_rope_backward):
        yield case.__name__, case


def main(device: str) -> None:
    # What torch.empty gives is NaN from here on.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for dtype in FORMATS:
        for make, shapes in ((rows, SHAPES), (heads, HEADS)):
            for shape in shapes:
                for name, case in make(device, dtype, *shape):
                    try:
                        found = [fault for fault in case() if fault]
                    except Exception:  # noqa: BLE001 (a case that breaks is a fault found, and the others run)
                        found = [traceback.format_exc(limit=-3)]
                    words = [name, str(dtype).removeprefix("torch."), "x".join(map(str, shape))]
                    print(json.dumps([" ".join(words), found]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
