"""FLUX's two kinds of block as one autograd function each, over the weights of diffusers' modules.

What such a function keeps for its backward pass is its input, q, k and v before their norms, the attention's output and
the MLP's input; in a double block also the tokens after attention. Everything else is cheaper to make again than to
keep: norms, modulation, rotation, GELU, the adapters' inputs. A block that is `checkpointed` keeps its input alone and
computes these again, but not its last products, whose results no gradient needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from xflux_trainer.attention import Attention
from xflux_trainer.products import Grads, Group

FP16_MAX = 65504.0
Saved = dict[str, Tensor]


class Rope(NamedTuple):
    """(L, C) fp32 each, the text's tokens first; both channels of a pair have the same value."""

    cos: Tensor
    sin: Tensor


class _Block:
    """The way of computing one block; its parameters stay where diffusers has them."""

    inputs: int
    """Tensors that come before the parameters: streams of tokens, and the modulation of each."""

    def __init__(self, attention: Attention, ops: Any) -> None:
        self.attention, self.ops = attention, ops
        self.groups: dict[str, Group] = {}
        self.norms: tuple[nn.Parameter, ...] = ()
        self.checkpointed = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What a gradient may be found for, beside the streams and their modulation."""
        own = [parameter for group in self.groups.values() for parameter in group.parameters]
        return own + [weight for weight in dict.fromkeys(self.norms) if weight.requires_grad]

    def forward(self, inputs: list[Tensor], rope: Rope, saved: Saved, *, last: bool) -> tuple[Tensor, ...]:
        """The streams behind the block; `saved` is filled. Without `last` the products that end it are left out."""
        raise NotImplementedError

    def backward(
        self, grads_out: list[Tensor], inputs: list[Tensor], rope: Rope, saved: Saved, grads: Grads, need: list[bool],
        *, own: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of the inputs; those of the parameters go to `grads`. `own`: nobody else holds what was saved, and
        it may be written over."""
        raise NotImplementedError

    def __call__(self, inputs: list[Tensor], rope: Rope) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return self.forward(inputs, rope, {}, last=True)
        made: tuple[Tensor, ...] = _Run.apply(self, rope, *inputs, *self.parameters)
        return made

    def _attend(self, qkv: Tensor, rope: Rope, saved: Saved, text: int, *, last: bool) -> Tensor:
        """(B, L, D) of qkv (B, L, 3 D). Without `last` the gradient comes next: q and k are kept for it."""
        q, k, v = self._qkv(qkv, rope, text)
        if not last:
            saved |= {"q": q, "k": k}
        o, kept = self.attention.forward(q, k, v)
        saved |= {f"attention.{number}": each for number, each in enumerate(kept)}
        saved["o"] = o.flatten(2)
        return saved["o"]

    def _attend_backward(
        self, do: Tensor, qkv: Tensor, rope: Rope, saved: Saved, text: int, dqkv: Tensor, grads: Grads
    ) -> None:
        """From the gradient of the attention's output to that of qkv (B, L, 3 D)."""
        width = 2 * do.shape[-1]
        heads = (-1, rope.cos.shape[-1])
        if "q" in saved:
            q, k, v = saved.pop("q"), saved.pop("k"), qkv[..., width:].unflatten(-1, heads)
        else:
            q, k, v = self._qkv(qkv, rope, text)
        kept = tuple(saved[f"attention.{number}"] for number in range(sum("attention." in key for key in saved)))
        place = dqkv[..., width:].unflatten(-1, heads)
        # v is read to the end: where its gradient takes its place, that waits aside.
        dv = torch.empty_like(v) if place.data_ptr() == v.data_ptr() else place
        o = saved["o"].unflatten(-1, heads)
        dq, dk = self.attention.backward(do.unflatten(-1, heads), q, k, v, o, kept, dv)
        if dv is not place:
            place.copy_(dv)
        trained = any(weight.requires_grad for weight in self.norms)
        found = self.ops.qk_rope_backward(
            dq, dk, qkv[..., :width], self._norms(), *rope, text, dqkv[..., :width], sums=trained
        )
        if found is not None:
            # A single block has one pair of norms for all tokens, named twice: the second names count.
            own = zip(self.norms, found)  # noqa: B905 (of one length)
            grads |= {weight: grad.to(weight.dtype) for weight, grad in own if weight.requires_grad}

    def _qkv(self, qkv: Tensor, rope: Rope, text: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, H, C) each, q and k ready for attention."""
        width = qkv.shape[-1] // 3 * 2
        q, k = self.ops.qk_rope(qkv[..., :width], self._norms(), *rope, text)
        return q, k, qkv[..., width:].unflatten(-1, (-1, rope.cos.shape[-1]))

    def _norms(self) -> tuple[Tensor, ...]:
        return tuple(weight.detach() for weight in self.norms)


class Single(_Block):
    """diffusers' FluxSingleTransformerBlock over text and image in one stream: (x, modulation (B, 3 D)) to x."""

    inputs = 2

    def __init__(self, block: Any, attention: Attention, ops: Any) -> None:
        super().__init__(attention, ops)
        own = block.attn
        self.groups = {
            "in": Group([own.to_q, own.to_k, own.to_v, block.proj_mlp], ops),
            "out": Group([block.proj_out], ops),
        }
        self.norms = (own.norm_q.weight, own.norm_k.weight) * 2

    def forward(self, inputs: list[Tensor], rope: Rope, saved: Saved, *, last: bool) -> tuple[Tensor, ...]:
        x, mod = inputs
        shift, scale, gate = mod.chunk(3, dim=-1)
        width = x.shape[-1]
        wide, saved["low in"] = self.groups["in"].forward(self.ops.modulate(x, shift, scale))
        saved["wide"] = wide
        o = self._attend(wide[..., : 3 * width], rope, saved, 0, last=last)
        if not last and not mod.requires_grad and not self.groups["out"].adapters:
            return ()
        cat = self._joined(o, wide[..., 3 * width :])
        if not last and not mod.requires_grad:
            saved["low out"] = self.groups["out"].narrow(cat)
            return ()
        y, saved["low out"] = self.groups["out"].forward(cat)
        if mod.requires_grad:
            saved["y"] = y
        return (_clip(self.ops.add_gated(x, y, gate)),) if last else ()

    def _joined(self, o: Tensor, h: Tensor) -> Tensor:
        """[o | GELU(h)], what the last product reads."""
        cat = o.new_empty(*o.shape[:-1], o.shape[-1] + h.shape[-1])
        cat[..., : o.shape[-1]].copy_(o)
        self.ops.gelu(h, cat[..., o.shape[-1] :])
        return cat

    def backward(
        self, grads_out: list[Tensor], inputs: list[Tensor], rope: Rope, saved: Saved, grads: Grads, need: list[bool],
        *, own: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        x, mod = inputs
        shift, scale, gate = mod.chunk(3, dim=-1)
        width = x.shape[-1]
        wide, o = saved["wide"], saved["o"]
        h = wide[..., 3 * width :]
        dx = grads_out[0]
        dy, dgate = self.ops.gated(dx, gate, saved.get("y"))
        dcat = self.groups["out"].backward(dy, lambda: self._joined(o, h), saved.get("low out"), grads)
        assert dcat is not None
        del dy
        dwide = wide if own else torch.empty_like(wide)
        self.ops.gelu_backward(dcat[..., width:], h, dwide[..., 3 * width :])
        qkv = wide[..., : 3 * width]
        self._attend_backward(dcat[..., :width], qkv, rope, saved, 0, dwide[..., : 3 * width], grads)
        del dcat
        dn = self.groups["in"].backward(
            dwide, lambda: self.ops.modulate(x, shift, scale), saved.get("low in"), grads, need_dx=need[0] or need[1]
        )
        if dn is None:
            return [None, None]
        dx, dshift, dscale = self.ops.modulate_backward(dn, x, scale, dx, sums=need[1])
        return [dx, torch.cat([dshift, dscale, dgate], dim=-1).to(mod.dtype) if need[1] else None]


class Double(_Block):
    """diffusers' FluxTransformerBlock: (text, image, their modulations (B, 6 D)) to (text, image)."""

    inputs = 4

    def __init__(self, block: Any, attention: Attention, ops: Any) -> None:
        super().__init__(attention, ops)
        own = block.attn
        self.groups = {
            "text qkv": Group([own.add_q_proj, own.add_k_proj, own.add_v_proj], ops),
            "image qkv": Group([own.to_q, own.to_k, own.to_v], ops),
            "text out": Group([own.to_add_out], ops),
            "image out": Group([own.to_out[0]], ops),
            "text up": Group([block.ff_context.net[0].proj], ops),
            "image up": Group([block.ff.net[0].proj], ops),
            "text down": Group([block.ff_context.net[2]], ops),
            "image down": Group([block.ff.net[2]], ops),
        }
        self.norms = (own.norm_added_q.weight, own.norm_added_k.weight, own.norm_q.weight, own.norm_k.weight)

    def forward(self, inputs: list[Tensor], rope: Rope, saved: Saved, *, last: bool) -> tuple[Tensor, ...]:
        text, image, *_ = inputs
        length = text.shape[1]
        tokens = length + image.shape[1]
        qkv = saved["qkv"] = image.new_empty(len(image), tokens, 3 * image.shape[-1])
        for name, part, x, mod in _streams(inputs):
            shift, scale = mod.chunk(6, dim=-1)[:2]
            n = self.ops.modulate(x, shift, scale)
            saved[f"low {name} qkv"] = self.groups[f"{name} qkv"].forward(n, qkv[:, part])[1]
        o = self._attend(qkv, rope, saved, length, last=last)
        return tuple(
            made for stream in _streams(inputs) for made in self._after_attention(*stream, o, saved, last=last)
        )

    def _after_attention(
        self, name: str, part: slice, x: Tensor, mod: Tensor, o: Tensor, saved: Saved, *, last: bool
    ) -> tuple[Tensor, ...]:
        """The rest of one stream; nothing without `last`."""
        _, _, gate_a, shift, scale, gate_m = mod.chunk(6, dim=-1)
        y, saved[f"low {name} out"] = self.groups[f"{name} out"].forward(o[:, part])
        x, n = self.ops.add_modulate(x, y, gate_a, shift, scale)
        h, saved[f"low {name} up"] = self.groups[f"{name} up"].forward(n)
        saved |= {f"{name} x": x, f"{name} h": h}
        del n
        down, trained = self.groups[f"{name} down"], mod.requires_grad
        if trained:
            saved[f"{name} y"] = y
        if not last and not trained:
            if down.adapters:
                saved[f"low {name} down"] = down.narrow(self.ops.gelu(h, torch.empty_like(h)))
            return ()
        z, saved[f"low {name} down"] = down.forward(self.ops.gelu(h, torch.empty_like(h)))
        if trained:
            saved[f"{name} z"] = z
        return (_clip(self.ops.add_gated(x, z, gate_m)),) if last else ()

    def backward(
        self, grads_out: list[Tensor], inputs: list[Tensor], rope: Rope, saved: Saved, grads: Grads, need: list[bool],
        *, own: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        text = inputs[0]
        qkv, o = saved["qkv"], saved["o"]
        do = torch.empty_like(o)
        dxs, dmods = [], []
        for number, (stream, dx) in enumerate(zip(_streams(inputs), grads_out)):  # noqa: B905 (of one length)
            dx, dmod = self._before_attention(*stream, dx, do, o, saved, grads, sums=need[2 + number])
            dxs.append(dx)
            dmods.append(dmod)
        dqkv = qkv if own else torch.empty_like(qkv)
        self._attend_backward(do, qkv, rope, saved, text.shape[1], dqkv, grads)
        del do
        for number, (name, part, x, mod) in enumerate(_streams(inputs)):
            shift, scale = mod.chunk(6, dim=-1)[:2]
            wanted = need[number] or need[2 + number]

            def again(x: Tensor = x, shift: Tensor = shift, scale: Tensor = scale) -> Tensor:
                made: Tensor = self.ops.modulate(x, shift, scale)
                return made

            low = saved.get(f"low {name} qkv")
            dn = self.groups[f"{name} qkv"].backward(dqkv[:, part], again, low, grads, need_dx=wanted)
            if dn is None:
                dxs[number] = None
                continue
            dxs[number], *sums = self.ops.modulate_backward(dn, x, scale, dxs[number], sums=need[2 + number])
            dmods[number] = [*sums, *dmods[number]]
        whole = [
            torch.cat(dmod, dim=-1).to(inputs[2].dtype) if wanted else None
            for dmod, wanted in zip(dmods, need[2:4])  # noqa: B905
        ]
        return [*dxs, *whole]

    def _before_attention(
        self, name: str, part: slice, x: Tensor, mod: Tensor, dx: Tensor, do: Tensor, o: Tensor, saved: Saved,
        grads: Grads, *, sums: bool,
    ) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
        """Back through one stream to the attention's output: the gradient of the tokens before it along the
        residual, and with `sums` those of the last four of the modulation's six parts."""
        _, _, gate_a, shift, scale, gate_m = mod.chunk(6, dim=-1)
        h, middle = saved.pop(f"{name} h"), saved.pop(f"{name} x")
        dz, dgate_m = self.ops.gated(dx, gate_m, saved.get(f"{name} z"))
        down, up, out = (self.groups[f"{name} {which}"] for which in ("down", "up", "out"))
        dh = down.backward(dz, lambda: self.ops.gelu(h, torch.empty_like(h)), saved.get(f"low {name} down"), grads)
        assert dh is not None
        self.ops.gelu_backward(dh, h, dh)
        dn = up.backward(dh, lambda: self.ops.modulate(middle, shift, scale), saved.get(f"low {name} up"), grads)
        del dh, dz
        dx, dshift, dscale = self.ops.modulate_backward(dn, middle, scale, dx, sums=sums)
        dy, dgate_a = self.ops.gated(dx, gate_a, saved.get(f"{name} y"))
        out.backward(dy, lambda: o[:, part], saved.get(f"low {name} out"), grads, do[:, part])
        return dx, [dgate_a, dshift, dscale, dgate_m]


def _streams(inputs: list[Tensor]) -> list[tuple[str, slice, Tensor, Tensor]]:
    """Name, tokens among all, values and modulation of the text's and the image's stream."""
    text, image, text_mod, image_mod = inputs
    length = text.shape[1]
    return [
        ("text", slice(0, length), text, text_mod),
        ("image", slice(length, length + image.shape[1]), image, image_mod),
    ]


class _Run(torch.autograd.Function):
    """One block. The parameters are handed over so that their gradients are asked for."""

    @staticmethod
    def forward(ctx: Any, block: _Block, rope: Rope, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = list(tensors[: block.inputs])
        saved: Saved = {}
        made = block.forward(inputs, rope, saved, last=True)
        ctx.block, ctx.rope = block, rope
        kept = {} if block.checkpointed else {key: value for key, value in saved.items() if value is not None}
        ctx.keys = list(kept)
        ctx.save_for_backward(*inputs, *kept.values())
        return made

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        block: _Block = ctx.block
        inputs, kept = list(ctx.saved_tensors[: block.inputs]), ctx.saved_tensors[block.inputs :]
        saved: Saved = dict(zip(ctx.keys, kept))  # noqa: B905 (of one length)
        if not kept:
            block.forward(inputs, ctx.rope, saved, last=False)
        grads: Grads = {}
        need = list(ctx.needs_input_grad[2 : 2 + block.inputs])
        given = [grad.contiguous() for grad in grads_out]
        found = block.backward(given, inputs, ctx.rope, saved, grads, need, own=not kept)
        return None, None, *found, *(grads.get(parameter) for parameter in block.parameters)


def _clip(x: Tensor) -> Tensor:
    """As diffusers does in fp16, where a residual stream may leave the format."""
    return x.clip_(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else x
