"""The transformer's forward pass over diffusers' modules, block by block in `blocks`' own functions.

The same sums as diffusers', rounded at fewer places: within a block activations are rounded to 16 bits where a matrix
product reads or writes them and where tokens leave it, and nowhere between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from xflux_trainer import fastops, fp8, pointwise
from xflux_trainer.adapters import Adapters
from xflux_trainer.attention import Attention, choose
from xflux_trainer.blocks import Double, Rope, Single
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
from xflux_trainer.frozen import FrozenLinear
from xflux_trainer.model import DTYPES, Prepare
from xflux_trainer.products import pack
from xflux_trainer.side import Sides

ROPES = 64
"""Sizes of images whose rotations are kept: 5 MB each at 1024 px."""


@dataclass
class Fast:
    """Computes what `transformer` (diffusers' FluxTransformer2DModel) does. Made when all adapters are in it."""

    transformer: Any
    attention: Attention
    ops: Any
    checkpointed: int
    """The first so many blocks keep their input alone: while the later ones are gone through backward, what they kept
    goes, and makes room for what these compute again."""

    def __post_init__(self) -> None:
        net = self.transformer
        sides = Sides.on(net.x_embedder.weight.device)
        made = self.attention, self.ops, sides.narrow
        self._ahead = sides.ahead
        self._scatter = self.ops.Scatter()
        self.doubles = [_settled(Double(block, *made), block) for block in net.transformer_blocks]
        self.singles = [_settled(Single(block, *made), block) for block in net.single_transformer_blocks]
        self._blocks = [*self.doubles, *self.singles]
        for block in self._blocks[: self.checkpointed]:
            block.checkpointed = True
        self._ropes: deque[tuple[Tensor, Tensor, Rope]] = deque(maxlen=ROPES)

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        pooled: Tensor,
        t: Tensor,
        guidance: Tensor | None,
        ids: Tensor,
        text_ids: Tensor,
        residuals: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, N, 4C) velocity of what diffusers' forward takes: t and guidance are (B,)."""
        net = self.transformer
        self._cast(image.dtype)
        x, text = net.x_embedder(image), net.context_embedder(text)
        # As diffusers: both are rounded before they are embedded; the trainer's hook puts the exact t back.
        times = [t.to(x.dtype) * 1000] + ([] if guidance is None else [guidance.to(x.dtype) * 1000])
        emb = net.time_text_embed(*times, pooled)
        mods = self._modulations(nn.functional.silu(emb))
        rope = self.rotation(ids, text_ids)
        for number, double in enumerate(self.doubles):
            text, x = double([text, x, *next(mods)], rope)
            if residuals:
                x = x + residuals[number % len(residuals)]
        length = text.shape[1]
        x = torch.cat([text, x], dim=1)
        for single in self.singles:
            (x,) = single([x, *next(mods)], rope)
        x = net.norm_out(x[:, length:], emb)
        v: Tensor = net.proj_out(x)
        return v

    def _modulations(self, silu: Tensor) -> Iterator[list[Tensor]]:
        """Of each block, as it is asked for. Where nothing of them is trained all but the first are computed beside."""
        net = self.transformer
        layers = [[block.norm1_context.linear, block.norm1.linear] for block in net.transformer_blocks]
        layers += [[block.norm.linear] for block in net.single_transformer_blocks]
        trained = any(each.requires_grad for own in layers for layer in own for each in layer.parameters())
        if trained or silu.requires_grad or not self._ahead.active:
            yield from ([layer(silu) for layer in own] for own in layers)
            return
        made = []
        with self._ahead.fork():
            for own in layers[1:]:
                made.append(([layer(silu) for layer in own], self._ahead.mark()))
        yield [layer(silu) for layer in layers[0]]
        for mods, mark in made:
            self._ahead.wait(mark)
            yield mods

    def adapters(self) -> Iterator[Adapters]:
        """Of every group of every block, in the order in which they compute."""
        for block in self._blocks:
            yield from (group.adapters for group in block.groups.values() if group.adapters is not None)

    def held(self) -> tuple[Rope, ...]:
        """What a recording of a pass reads and does not hold itself."""
        return tuple(rope for *_, rope in self._ropes)

    def _cast(self, dtype: torch.dtype) -> None:
        """The adapters' copies in the format of the products, all in one go."""
        copies = [copy for adapters in self.adapters() for copy in adapters.cast(dtype)]
        dense = [copy for copy in copies if copy.to.is_contiguous() and copy.scale == 1]
        apart = [copy for copy in copies if not (copy.to.is_contiguous() and copy.scale == 1)]
        with torch.no_grad():
            if any(copy.of.dtype != torch.float32 for copy in apart):  # DeepSpeed holds what it trains in 16 bits
                pointwise.Scatter()(apart)
                apart = []
            if dense:
                torch._foreach_copy_([copy.to for copy in dense], [copy.of for copy in dense])
            if apart:
                # One by one is what the above would do with rows that lie apart.
                self._scatter(apart)

    def rotation(self, ids: Tensor, text_ids: Tensor) -> Rope:
        """Of these positions. Whoever calls with the very tensors of a call before gets what was made then."""
        known = next((known for known in self._ropes if known[0] is ids and known[1] is text_ids), None)
        if known is not None:
            return known[2]
        with torch.no_grad():
            cos, sin = self.transformer.pos_embed(torch.cat((text_ids, ids)))
        rope = Rope(cos.float().contiguous(), sin.float().contiguous())
        self._ropes.append((ids, text_ids, rope))
        return rope

    def describe(self) -> str:
        """One line about what computes."""
        return f"fused kernels, attention by {self.attention.name}"


def _settled(made: Any, block: nn.Module) -> Any:
    """What computes a block whose weights may just have moved. The rest of the block's frozen memory moves after them:
    what all of it leaves behind is one piece, which takes the next block in, where single weights leave holes that fit
    nothing. Measured on an H200: 1.53 GiB of FLUX.1's instead of 2.05.
    """
    moved = [part for group in made.groups.values() for part in group.moved()]
    if moved:
        _move(block, {part.untyped_storage().data_ptr() for part in moved})
        torch.cuda.empty_cache()
    return made


@torch.no_grad()
def _move(block: nn.Module, but: set[int]) -> None:
    """Give what is frozen a new place, whole storages at a time, but those that begin at these addresses."""
    layers = [each for each in block.modules() if isinstance(each, FrozenLinear) and each.store is not None]
    frozen = [each for each in block.parameters() if not each.requires_grad]
    places: dict[int, Tensor] = {}
    for each in [*frozen, *(layer.store for layer in layers)]:
        storage = each.untyped_storage()
        start = storage.data_ptr()
        if start in but or not storage.nbytes():
            continue
        if start not in places:
            places[start] = torch.empty(0, dtype=torch.uint8, device=each.device).set_(storage).clone()
    for parameter in frozen:
        new = places.get(parameter.untyped_storage().data_ptr())
        if new is not None:
            parameter.data = _again(parameter, new)
    for layer in layers:
        new = places.get(layer.store.untyped_storage().data_ptr())
        if new is not None:
            layer.keep(_again(layer.store, new))


def _again(tensor: Tensor, place: Tensor) -> Tensor:
    """The same part of another storage."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(place.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def build(
    transformer: nn.Module, config: TrainConfig, device: torch.device, *, cut: bool = False
) -> tuple[Fast | None, list[str]]:
    """What computes the transformer as the config wants it, None for diffusers' own code; and what is worth a note.

    `cut`: the weights are cut up among the ranks by hooks around diffusers' modules, which this would go past.
    Raises `Unsupported` where fused kernels are asked for and cannot be had.
    """
    why = _passed_over(config, device, cut=cut)
    if why:
        notes = [f"attention is {config.attention}, and diffusers' own blocks choose theirs."]
        notes = notes if config.attention != "auto" else []
        told = device.type == "cuda" and config.kernels != "diffusers"
        return None, [*([f"diffusers' own blocks compute: {why}."] if told else []), *notes]
    net: Any = transformer
    dtype = DTYPES[config.mixed_precision]
    channels = net.config.attention_head_dim
    attention, passed = choose(config.attention, device, dtype, channels, deterministic=config.deterministic)
    count = len(net.transformer_blocks) + len(net.single_transformer_blocks)
    checkpointed = 0
    if config.gradient_checkpointing:
        checkpointed = count if config.checkpointed_blocks is None else min(count, config.checkpointed_blocks)
    made = Fast(net, attention, fastops.ops(device), checkpointed)
    if device.type != "cuda":
        return made, []
    slow = fastops.why_not(device)
    notes = [f"Triton does not work here, and plain torch takes the kernels' place: {slow}."] if slow else []
    return made, [f"{made.describe()}{''.join(f' ({each})' for each in passed)}.", *notes]


def refuse(config: TrainConfig, device: torch.device, channels: int, *, cut: bool) -> None:
    """Raise `Unsupported` for what `build` will not be able to do, before anything is encoded or loaded.

    `channels` are those of one attention head.
    """
    if _passed_over(config, device, cut=cut) is not None:
        return
    if config.attention != "auto":
        choose(config.attention, device, DTYPES[config.mixed_precision], channels)
    # The CPU has the products in plain torch.
    why = fp8.supported(device) if config.quantization == "fp8-dynamic" and device.type == "cuda" else None
    if why:
        seen = f"quantization is fp8-dynamic, which cannot be had here: {why}."
        raise Unsupported(seen, "Set quantization to fp8, or kernels to diffusers: the weights take as little room.")


def _passed_over(config: TrainConfig, device: torch.device, *, cut: bool) -> str | None:
    """Why diffusers' own code computes; None: it does not. Raises `Unsupported` where something else was asked for."""
    if config.kernels == "diffusers":
        return "kernels is diffusers"
    why = _why_not(config, device, cut=cut)
    if why and config.kernels == "fused":
        raise Unsupported(f"kernels is fused, but {why}.", "Set kernels to auto, which takes diffusers' code here.")
    if why and config.checkpointed_blocks is not None and config.gradient_checkpointing:
        seen = f"checkpointed_blocks is {config.checkpointed_blocks}, which fused kernels alone do, and {why}."
        raise Unsupported(seen, "Set checkpointed_blocks to null.")
    return why


def _why_not(config: TrainConfig, device: torch.device, *, cut: bool) -> str | None:
    """Why diffusers' own code computes; None: it does not."""
    if cut:
        return "the model is cut up among the ranks"
    if config.kernels == "fused":
        return None
    if device.type != "cuda":
        return "there is no CUDA device"
    if config.mixed_precision == "no":
        return "nothing is computed in 16 bits"
    why = fastops.why_not(device)
    return f"Triton does not work here: {why}" if why else None


@dataclass
class Packed:
    """What `load_transformer` calls for every block: what is done to it else, and its weights laid together."""

    first: Prepare | None = None

    def __call__(self, name: str, module: nn.Module) -> None:
        if self.first is not None:
            self.first(name, module)
        block: Any = module
        if name.startswith("transformer_blocks."):
            pack([block.attn.to_q, block.attn.to_k, block.attn.to_v])
            pack([block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj])
        elif name.startswith("single_transformer_blocks."):
            pack([block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp])
