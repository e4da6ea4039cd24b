"""What FLUX's blocks do to their activations between the matrix products, in plain torch: the meaning of `kernels`.

Every function computes in fp32 and rounds once, to the format of its input, where it writes. Activations are
(B, L, D), a modulation's part is (B, D), queries and keys are (B, L, H, C) with C channels a head. A tensor may be a
view whose last dimension lies together. Gradients come out in the format of the activations, sums over tokens in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
"""Of every norm in FLUX."""
_GELU_IN, _GELU_CUBE = 0.7978845608028654, 0.044715


def _norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm without weights, and 1 / deviation: both fp32."""
    x = x.float()
    x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return x * rstd, rstd


def modulate(x: Tensor, shift: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, into `out` where that is given."""
    made = _norm(x)[0] * (1 + scale.float())[:, None] + shift.float()[:, None]
    return made.to(x.dtype) if out is None else out.copy_(made)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y."""
    return (x.float() + gate.float()[:, None] * y.float()).to(x.dtype)


def add_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + gate y, and that modulated, into `out` where that is given."""
    added = add_gated(x, y, gate)
    return added, modulate(added, shift, scale, out)


def modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, dx: Tensor | None, *, sums: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of `modulate`: its input's gradient plus `dx`, and with `sums` those of shift and scale, (B, D) fp32."""
    n, rstd = _norm(x)
    up = dy.float()
    inner = up * (1 + scale.float())[:, None]
    inner = (inner - inner.mean(-1, keepdim=True) - n * (inner * n).mean(-1, keepdim=True)) * rstd
    total = (inner if dx is None else inner + dx.float()).to(x.dtype)
    return (total, up.sum(1), (up * n).sum(1)) if sums else (total, None, None)


def gated(dx: Tensor, gate: Tensor, y: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """gate dx, the gradient of y in `add_gated`, into `out` where that is given; where y is that of the gate as well,
    (B, D) fp32."""
    dgate = None if y is None else (dx.float() * y.float()).sum(1)
    made = gate.float()[:, None] * dx.float()
    return made.to(dx.dtype) if out is None else out.copy_(made), dgate


def gelu(h: Tensor, out: Tensor) -> Tensor:
    """tanh-GELU of h (B, L, M), written into `out`."""
    return out.copy_(F.gelu(h.float(), approximate="tanh"))


def gelu_backward(dy: Tensor, h: Tensor, out: Tensor) -> Tensor:
    """dy GELU'(h), written into `out`, which may be dy."""
    x = h.float()
    t = torch.tanh(_GELU_IN * (x + _GELU_CUBE * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _GELU_IN * (1 + 3 * _GELU_CUBE * x * x)
    return out.copy_(dy.float() * slope)


Norms = tuple[Tensor, Tensor, Tensor, Tensor]
"""The QK norms' weights (C,) each: of the text's q and k, and of the image's."""


def qk_rope(qk: Tensor, norms: Norms, cos: Tensor, sin: Tensor, text: int) -> tuple[Tensor, Tensor]:
    """q and k (B, L, H, C) for attention: RMSNorm over each head, then rotary embedding over pairs of channels.

    qk (B, L, 2 D) are both, side by side; the first `text` tokens are normed with the text's weights. cos and sin are
    (L, C) fp32, alike for both channels of a pair, as diffusers makes them.
    """
    made = []
    for x, first, rest in zip(_heads(qk, cos), norms[:2], norms[2:]):  # noqa: B905 (of one length)
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        n = n * _weights(first, rest, text, x.shape[1])
        made.append((n * cos[:, None] + _turn(n) * sin[:, None]).to(qk.dtype))
    return made[0], made[1]


def qk_rope_backward(
    dq: Tensor, dk: Tensor, qk: Tensor, norms: Norms, cos: Tensor, sin: Tensor, text: int, out: Tensor,
    *, sums: bool = False,
) -> Norms | None:  # fmt: skip
    """Of `qk_rope`: the gradient of qk into `out` (B, L, 2 D); with `sums` those of the norms' weights, (C,) fp32."""
    grads: list[Tensor] = []
    width = qk.shape[-1] // 2
    for place, (dy, x) in enumerate(zip((dq, dk), _heads(qk, cos))):  # noqa: B905
        dy = dy.float()
        dn = dy * cos[:, None] - _turn(dy * sin[:, None])
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        n = x * rstd
        if sums:
            both = dn * n
            grads += [both[:, :text].sum((0, 1, 2)), both[:, text:].sum((0, 1, 2))]
        dn = dn * _weights(norms[place], norms[place + 2], text, x.shape[1])
        dx = (dn - n * (dn * n).mean(-1, keepdim=True)) * rstd
        out[..., place * width : (place + 1) * width].copy_(dx.flatten(2))
    return (grads[0], grads[2], grads[1], grads[3]) if sums else None


def _heads(qk: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """q and k in fp32, (B, L, H, C) each."""
    q, k = qk.float().unflatten(-1, (2, -1, cos.shape[-1])).unbind(2)
    return q, k


def _weights(first: Tensor, rest: Tensor, text: int, tokens: int) -> Tensor:
    """(L, 1, C) fp32."""
    return torch.cat([first.float().expand(text, -1), rest.float().expand(tokens - text, -1)])[:, None]


def _turn(x: Tensor) -> Tensor:
    """Each pair of channels a quarter turn on: (a, b) to (-b, a)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-b, a], dim=-1).flatten(-2)


def join(o: Tensor, h: Tensor, out: Tensor | None = None) -> Tensor:
    """[o | GELU(h)], (B, L, D + M) of o (B, L, D) and h (B, L, M), into `out` where that is given."""
    width = o.shape[-1]
    cat = o.new_empty(*o.shape[:-1], width + h.shape[-1]) if out is None else out
    cat[..., :width].copy_(o)
    gelu(h, cat[..., width:])
    return cat


class Part(NamedTuple):
    """One adapter of a group of layers with one input: where its outputs and its narrow columns begin."""

    column: int
    width: int
    narrow: int
    rank: int
    scale: float = 1.0


Parts = tuple[Part, ...]
"""A group's adapters, all of one rank r, R in sum; their wide factors lie one below the other, (N', r), in order."""


def factors(whole: Tensor, parts: Parts) -> tuple[Tensor, ...]:
    """Each part's own rows of (N', r), views."""
    return whole.split([part.width for part in parts])


def lora_add(y: Tensor, low: Tensor, up: Tensor, parts: Parts) -> Tensor:
    """y (M, N) plus scale low up^T in each part's columns, in place; low (M, R), up (N', r)."""
    for part, factor in zip(parts, factors(up, parts)):  # noqa: B905 (of one length)
        _outputs(y, part).addmm_(_narrow(low, part), factor.t(), alpha=part.scale)
    return y


def lora_narrow_backward(dy: Tensor, up: Tensor, parts: Parts, out: Tensor | None = None) -> Tensor:
    """The gradient of low, (M, R), into `out` where that is given: scale dy up, each part's in its narrow columns."""
    dlow = dy.new_empty(len(dy), sum(part.rank for part in parts)) if out is None else out
    for part, factor in zip(parts, factors(up, parts)):  # noqa: B905 (of one length)
        _narrow(dlow, part).addmm_(_outputs(dy, part), factor, beta=0, alpha=part.scale)
    return dlow


def lora_up_grad(dy: Tensor, low: Tensor, parts: Parts, out: Tensor) -> Tensor:
    """The gradients of the parts' wide factors, scale dy^T low, into `out` (N', r) in fp32."""
    for part, factor in zip(parts, factors(out, parts)):  # noqa: B905 (of one length)
        factor.addmm_(_outputs(dy, part).float().t(), _narrow(low, part).float(), beta=0, alpha=part.scale)
    return out


def lora_down_grad(dlow: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """The gradient of all narrow factors, dlow^T x of dlow (M, R) and x (M, K), into `out` (R, K) in fp32."""
    return torch.mm(dlow.float().t(), x.float(), out=out)


def _outputs(y: Tensor, part: Part) -> Tensor:
    return y[:, part.column : part.column + part.width]


def _narrow(low: Tensor, part: Part) -> Tensor:
    return low[:, part.narrow : part.narrow + part.rank]


class Copy(NamedTuple):
    """`to` becomes scale times `of`, matrices (N, M) whose rows lie together; `of` is fp32."""

    to: Tensor
    of: Tensor
    scale: float = 1.0


class Scatter:
    """Makes copies, the same ones again and again."""

    def __call__(self, copies: list[Copy]) -> None:
        for to, of, scale in copies:
            to.copy_(of if scale == 1 else of * scale)
