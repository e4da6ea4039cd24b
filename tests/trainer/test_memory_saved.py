"""The bill's activations against what autograd really keeps: one block at a time, counted by its saved tensors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from torch import Tensor, nn  # noqa: E402
from trainer_kit import ROOT  # noqa: E402
from xflux_trainer import attention, fast, flow, lora, memory_diffusers, memory_fused, pointwise, quantize  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.spec import FluxSpec  # noqa: E402
from xflux_trainer.trained import trained  # noqa: E402

sys.path.insert(0, str(ROOT / "benchmarks"))
import random_flux  # noqa: E402

CPU = torch.device("cpu")
BATCH, WORDS, SIDE = 2, 512, 32
PATCHES = (SIDE // 16) ** 2
TOKENS = PATCHES + WORDS
SPEC = random_flux.spec_of((1, 1), 2)


def saved_by(compute: Callable[[], Any], without: nn.Module, shared: tuple[Tensor, ...] = ()) -> int:
    """Bytes that autograd holds for the backward pass, each place once, but for weights and what all blocks share."""
    weights = {each.untyped_storage().data_ptr() for each in (*without.parameters(), *without.buffers(), *shared)}
    held: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in weights:
            held[place.data_ptr()] = place.nbytes()
        alive.append(tensor)  # so that no place is given away, and counted once for two
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(held.values())


def model(config: TrainConfig) -> Any:
    """diffusers' transformer of `SPEC` in bf16, with what is trained in it."""
    torch.manual_seed(0)
    prepare = fast.Packed(quantize.preparer(config, CPU, (1, 1)))
    net = random_flux.build(SPEC, torch.bfloat16, CPU, prepare)
    if config.mode == "finetune":
        net.requires_grad_(True)
    else:
        lora.attach(net, config)
    return net


def inputs(spec: FluxSpec, count: int, *, modulated: bool) -> list[Tensor]:
    """Of a block: a stream of all tokens, or text and image; and the modulations."""

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape).bfloat16()

    rows = [TOKENS] if count == 2 else [WORDS, PATCHES]
    streams = [make(BATCH, length, spec.hidden).requires_grad_() for length in rows]
    parts = 3 if count == 2 else 6
    return [*streams, *(make(BATCH, parts * spec.hidden).requires_grad_(modulated) for _ in rows)]


def given(tensors: list[Tensor], of: slice) -> int:
    return sum(tensor.nbytes for tensor in tensors[of])


@pytest.mark.parametrize("checkpointed", [0, 2])
@pytest.mark.parametrize("kind", [0, 1], ids=["double", "single"])
@pytest.mark.parametrize(
    "keys",
    [{"lora_targets": "diffusers"}, {"lora_targets": "xflux"}, {"lora_targets": "attn", "rank": 48},
     {"mode": "finetune"}],
    ids=["diffusers", "xflux", "attn", "finetune"],
)  # fmt: skip
def test_fused_blocks_keep_what_the_bill_says(keys: dict[str, Any], kind: int, checkpointed: int) -> None:
    """To the byte, but for the modulation itself, (B, 3 D) or twice (B, 6 D), which the bill leaves out."""
    config = TrainConfig("none", img_size=SIDE, train_batch_size=BATCH, gradient_checkpointing=True,
                         checkpointed_blocks=checkpointed, kernels="fused", **keys)  # fmt: skip
    net = model(config)
    chosen, _ = attention.choose("auto", CPU, torch.bfloat16, SPEC.head_dim)
    made = fast.Fast(net, chosen, pointwise, checkpointed)
    made._cast(torch.bfloat16)
    rope = made.rotation(flow.image_ids(SIDE // 8, SIDE // 8), flow.text_ids(WORDS))
    block = [*made.doubles, *made.singles][kind]
    tensors = inputs(SPEC, block.inputs, modulated=config.mode == "finetune")
    kept = saved_by(lambda: block(tensors, rope), net)
    billed = memory_fused._blocks(config, SPEC, TOKENS)[0][kind]
    assert billed.checkpointed == bool(checkpointed)
    assert kept == billed.kept + given(tensors, slice(block.inputs // 2, None))


def test_the_sums_are_those_of_the_blocks() -> None:
    """The bill's terms are made of the numbers that the test above holds to what is kept."""
    config = TrainConfig("none", img_size=SIDE, train_batch_size=BATCH, gradient_checkpointing=False, kernels="fused")
    spec = replace(SPEC, double_blocks=2, single_blocks=3)
    terms = {term.name: term.bytes for term in memory_fused.activations(config, spec)}
    blocks, _ = memory_fused._blocks(config, spec, TOKENS)
    assert terms["activations"] == sum(block.kept for block in blocks)
    assert terms["one block's backward pass"] == blocks[-1].needed


class _FusedNorm(torch.autograd.Function):
    """An RMS norm that keeps what CUDA's fused kernel keeps: its input, and a number of each row in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError("only what is kept is looked at")


@pytest.mark.parametrize("targets", ["attn", "diffusers", "xflux"])
def test_diffusers_single_blocks_keep_what_the_bill_says(targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2 %: the bill leaves out the numbers of each row that its layer norm keeps."""
    norm = torch.nn.RMSNorm
    monkeypatch.setattr(norm, "forward", lambda self, x: _FusedNorm.apply(x, self.weight, self.eps))
    config = TrainConfig("none", img_size=SIDE, train_batch_size=BATCH, gradient_checkpointing=False,
                         kernels="diffusers", lora_targets=targets)  # fmt: skip
    net = model(config)
    block = net.single_transformer_blocks[0]
    rope = net.pos_embed(torch.cat((flow.text_ids(WORDS), flow.image_ids(SIDE // 8, SIDE // 8))))
    text, image = inputs(SPEC, 4, modulated=False)[:2]
    temb = torch.randn(BATCH, SPEC.hidden).bfloat16()
    if "encoder_hidden_states" not in inspect.signature(block.forward).parameters:
        pytest.skip("this diffusers norms q and k by code of its own, which has no fused form to be compared with")
    given = {"hidden_states": image, "encoder_hidden_states": text}
    kept = saved_by(lambda: block(**given, temb=temb, image_rotary_emb=rope), net, rope)
    billed = list(memory_diffusers.saved_per_block(config, SPEC, trained(config, SPEC), TOKENS))[1]
    assert billed == pytest.approx(kept, rel=0.02)
