"""FLUX's two kinds of block as one autograd function each, over the weights of diffusers' modules.

What such a function keeps for its backward pass is its input, q, k and v before their norms, the attention's output and
the MLP's input; in a double block also the tokens after attention. Everything else is cheaper to make again than to
keep: norms, modulation, rotation, GELU, the adapters' inputs. A block that is `checkpointed` keeps its input alone and
computes these again, but not its last products, whose results no gradient needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from xflux_trainer import fp8
from xflux_trainer.adapters import Grads
from xflux_trainer.attention import Attention
from xflux_trainer.products import Group, Rows
from xflux_trainer.side import Side

FP16_MAX = 65504.0
Saved = dict[str, Tensor]


class Rope(NamedTuple):
    """(L, C) fp32 each, the text's tokens first; both channels of a pair have the same value."""

    cos: Tensor
    sin: Tensor


class _Block(ABC):
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

    @abstractmethod
    def forward(self, inputs: list[Tensor], rope: Rope, saved: Saved, *, last: bool) -> tuple[Tensor, ...]:
        """The streams behind the block; `saved` is filled. Without `last` the products that end it are left out."""

    @abstractmethod
    def backward(
        self, grads_out: list[Tensor], inputs: list[Tensor], rope: Rope, saved: Saved, grads: Grads, need: list[bool],
        *, own: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of the inputs; those of the parameters go to `grads`. `own`: nobody else holds what was saved, and
        it may be written over."""

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

    def _modulated(self, group: Group, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor | None, Rows | None]:
        """The modulated x as the group wants it: for a product in fp8 as rows, and itself only where it is read."""
        if group.held is None:
            room = group.input_room(x)
            self.ops.modulate(x, shift, scale, room[..., : group.inputs])
            return room, None
        q, s, kept = fp8.modulate_fp8(x, shift, scale, keep=group.adapters is not None)
        return kept, Rows(q, s)

    def _gated(
        self, group: Group, dx: Tensor, gate: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Rows | None, Tensor | None]:
        """The gradient of the group's output, as rows too where its product is in fp8; and that of the gate."""
        if group.held is None or y is not None:
            dy = group.room(dx)
            _, dgate = self.ops.gated(dx, gate, y, dy[..., : group.width])
            return dy, None, dgate
        q, s, kept = fp8.gated_fp8(dx, gate, group.held.columns, keep=group.adapters is not None)
        return dx if kept is None else kept, Rows(q, s), None

    def _norms(self) -> tuple[Tensor, ...]:
        return tuple(weight.detach() for weight in self.norms)


class Single(_Block):
    """diffusers' FluxSingleTransformerBlock over text and image in one stream: (x, modulation (B, 3 D)) to x."""

    inputs = 2

    def __init__(self, block: Any, attention: Attention, ops: Any, side: Side) -> None:
        super().__init__(attention, ops)
        own = block.attn
        self.groups = {
            "in": Group([own.to_q, own.to_k, own.to_v, block.proj_mlp], ops, side),
            "out": Group([block.proj_out], ops, side),
        }
        self.norms = (own.norm_q.weight, own.norm_k.weight) * 2

    def forward(self, inputs: list[Tensor], rope: Rope, saved: Saved, *, last: bool) -> tuple[Tensor, ...]:
        x, mod = inputs
        shift, scale, gate = mod.chunk(3, dim=-1)
        width = x.shape[-1]
        ahead, out = self.groups["in"], self.groups["out"]
        wide = saved["wide"] = x.new_empty(*x.shape[:-1], ahead.width)
        n, rows = self._modulated(ahead, x, shift, scale)
        saved["low in"] = ahead.forward(n, wide, rows)[1]
        del n, rows
        o = self._attend(wide[..., : 3 * width], rope, saved, 0, last=last)
        if not last and not mod.requires_grad and out.adapters is None:
            return ()
        h, y = wide[..., 3 * width :], torch.empty_like(x)
        if out.held is not None and last and not mod.requires_grad:
            q, s, cat = fp8.gelu_fp8(o, h, keep=out.adapters is not None)
            saved["low out"] = out.forward(cat, y, Rows(q, s))[1]
            return (_clip(self.ops.add_gated(x, y, gate)),)
        if not last and not mod.requires_grad:
            saved["low out"] = out.narrow(self.ops.join(o, h))
            return ()
        cat = out.input_room(x)
        self.ops.join(o, h, cat[..., : out.inputs])
        saved["low out"] = out.forward(cat, y)[1]
        if mod.requires_grad:
            saved["y"] = y
        return (_clip(self.ops.add_gated(x, y, gate)),) if last else ()

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
        ahead, out = self.groups["in"], self.groups["out"]
        dy, rows, dgate = self._gated(out, dx, gate, saved.get("y"))
        dcat = out.backward(dy, lambda: self.ops.join(o, h), saved.get("low out"), grads, quantised=rows)
        assert dcat is not None
        del dy, rows
        qkv, dm, do = wide[..., : 3 * width], dcat[..., width:], dcat[..., :width]
        if ahead.held is None:
            # In its own place there is no room beside it: a product with a bias is slower where rows lie apart.
            dwide, rows = wide if own else ahead.room(x), None
            self.ops.gelu_backward(dm, h, dwide[..., 3 * width : ahead.width])
            self._attend_backward(do, qkv, rope, saved, 0, dwide[..., : 3 * width], grads)
        else:
            dqkv = qkv if own else qkv.new_empty(qkv.shape)
            self._attend_backward(do, qkv, rope, saved, 0, dqkv, grads)
            whole = ahead.adapters is not None and ahead.adapters.reaches > 3 * width
            q, s, kept = fp8.gelu_backward_fp8(dqkv, dm, h, ahead.held.columns, keep=whole)
            dwide, rows = dqkv if kept is None else kept, Rows(q, s)
        del dcat, dm, do
        dn = ahead.backward(
            dwide, lambda: self.ops.modulate(x, shift, scale), saved.get("low in"), grads,
            need_dx=need[0] or need[1], quantised=rows,
        )  # fmt: skip
        if dn is None:
            return [None, None]
        dx, dshift, dscale = self.ops.modulate_backward(dn, x, scale, dx, sums=need[1])
        return [dx, torch.cat([dshift, dscale, dgate], dim=-1).to(mod.dtype) if need[1] else None]


class Double(_Block):
    """diffusers' FluxTransformerBlock: (text, image, their modulations (B, 6 D)) to (text, image)."""

    inputs = 4

    def __init__(self, block: Any, attention: Attention, ops: Any, side: Side) -> None:
        super().__init__(attention, ops)
        own = block.attn
        self.groups = {
            "text qkv": Group([own.add_q_proj, own.add_k_proj, own.add_v_proj], ops, side),
            "image qkv": Group([own.to_q, own.to_k, own.to_v], ops, side),
            # What comes to these lies where attention left it.
            "text out": Group([own.to_add_out], ops, side, beside=False),
            "image out": Group([own.to_out[0]], ops, side, beside=False),
            "text up": Group([block.ff_context.net[0].proj], ops, side),
            "image up": Group([block.ff.net[0].proj], ops, side),
            "text down": Group([block.ff_context.net[2]], ops, side),
            "image down": Group([block.ff.net[2]], ops, side),
        }
        self.norms = (own.norm_added_q.weight, own.norm_added_k.weight, own.norm_q.weight, own.norm_k.weight)

    def forward(self, inputs: list[Tensor], rope: Rope, saved: Saved, *, last: bool) -> tuple[Tensor, ...]:
        text, image, *_ = inputs
        length = text.shape[1]
        tokens = length + image.shape[1]
        qkv = saved["qkv"] = image.new_empty(len(image), tokens, 3 * image.shape[-1])
        for name, part, x, mod in _streams(inputs):
            shift, scale = mod.chunk(6, dim=-1)[:2]
            group = self.groups[f"{name} qkv"]
            n, rows = self._modulated(group, x, shift, scale)
            saved[f"low {name} qkv"] = group.forward(n, qkv[:, part], rows)[1]
            del n, rows
        o = self._attend(qkv, rope, saved, length, last=last)
        return tuple(
            made for stream in _streams(inputs) for made in self._after_attention(*stream, o, saved, last=last)
        )

    def _room(self, o: Tensor) -> Tensor:
        """For the gradient of q, k and v of both streams, with what either needs beside it."""
        rooms = [self.groups[f"{name} qkv"].room(o) for name in ("text", "image")]
        return max(rooms, key=lambda room: room.shape[-1])

    def _after_attention(
        self, name: str, part: slice, x: Tensor, mod: Tensor, o: Tensor, saved: Saved, *, last: bool
    ) -> tuple[Tensor, ...]:
        """The rest of one stream; nothing without `last`."""
        _, _, gate_a, shift, scale, gate_m = mod.chunk(6, dim=-1)
        out, up, down = (self.groups[f"{name} {which}"] for which in ("out", "up", "down"))
        y, saved[f"low {name} out"] = out.forward(o[:, part], torch.empty_like(x))
        rows: Rows | None = None
        if up.held is None:
            n = up.input_room(x)
            x, _ = self.ops.add_modulate(x, y, gate_a, shift, scale, n[..., : up.inputs])
        else:
            x, q, s, n = fp8.add_modulate_fp8(x, y, gate_a, shift, scale, keep=up.adapters is not None)
            rows = Rows(q, s)
        h = x.new_empty(*x.shape[:-1], up.width)
        saved[f"low {name} up"] = up.forward(n, h, rows)[1]
        saved |= {f"{name} x": x, f"{name} h": h}
        del n, rows
        trained = mod.requires_grad
        if trained:
            saved[f"{name} y"] = y
        if not last and not trained:
            if down.adapters is not None:
                saved[f"low {name} down"] = down.narrow(self.ops.gelu(h, torch.empty_like(h)))
            return ()
        z = torch.empty_like(x)
        if down.held is None:
            m = down.input_room(h)
            self.ops.gelu(h, m[..., : down.inputs])
            saved[f"low {name} down"] = down.forward(m, z)[1]
        else:
            q, s, m = fp8.gelu_fp8(None, h, keep=down.adapters is not None)
            saved[f"low {name} down"] = down.forward(m, z, Rows(q, s))[1]
        if trained:
            saved[f"{name} z"] = z
        return (_clip(self.ops.add_gated(x, z, gate_m)),) if last else ()

    def backward(
        self, grads_out: list[Tensor], inputs: list[Tensor], rope: Rope, saved: Saved, grads: Grads, need: list[bool],
        *, own: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        text = inputs[0]
        qkv, o = saved["qkv"], saved["o"]
        width = qkv.shape[-1]
        do = torch.empty_like(o)
        dxs, dmods = [], []
        for number, (stream, dx) in enumerate(zip(_streams(inputs), grads_out)):  # noqa: B905 (of one length)
            dx, dmod = self._before_attention(*stream, dx, do, o, saved, grads, sums=need[2 + number])
            dxs.append(dx)
            dmods.append(dmod)
        dqkv = qkv if own else self._room(o)
        self._attend_backward(do, qkv, rope, saved, text.shape[1], dqkv[..., :width], grads)
        del do
        for number, (name, part, x, mod) in enumerate(_streams(inputs)):
            shift, scale = mod.chunk(6, dim=-1)[:2]
            wanted = need[number] or need[2 + number]

            def again(x: Tensor = x, shift: Tensor = shift, scale: Tensor = scale) -> Tensor:
                made: Tensor = self.ops.modulate(x, shift, scale)
                return made

            low = saved.get(f"low {name} qkv")
            group = self.groups[f"{name} qkv"]
            extended = None if own else group.extended()
            dy = dqkv[:, part, : width + (extended.extra if extended else 0)]
            dn = group.backward(dy, again, low, grads, need_dx=wanted)
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
        down, up, out = (self.groups[f"{name} {which}"] for which in ("down", "up", "out"))
        dz, rows, dgate_m = self._gated(down, dx, gate_m, saved.get(f"{name} z"))
        low = saved.get(f"low {name} down")
        room = up.room(dx)
        dh = room[..., : up.width]
        down.backward(dz, lambda: self.ops.gelu(h, torch.empty_like(h)), low, grads, dh, quantised=rows)
        del dz
        if up.held is None:
            self.ops.gelu_backward(dh, h, dh)
            dh, rows = room, None
        else:
            q, s, kept = fp8.gelu_backward_fp8(None, dh, h, up.held.columns, keep=up.adapters is not None)
            dh, rows = dh if kept is None else kept, Rows(q, s)
        low = saved.get(f"low {name} up")
        dn = up.backward(dh, lambda: self.ops.modulate(middle, shift, scale), low, grads, quantised=rows)
        del dh, room
        dx, dshift, dscale = self.ops.modulate_backward(dn, middle, scale, dx, sums=sums)
        dy, rows, dgate_a = self._gated(out, dx, gate_a, saved.get(f"{name} y"))
        out.backward(dy, lambda: o[:, part], saved.get(f"low {name} out"), grads, do[:, part], quantised=rows)
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
        stored: list[Tensor] = list(ctx.saved_tensors)
        inputs, kept = stored[: block.inputs], stored[block.inputs :]
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
