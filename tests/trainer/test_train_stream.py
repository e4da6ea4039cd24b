"""Streamed weights: the same numbers, no more room than two slots, and each unit copied when its turn comes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from test_train_quantize import CPU, config, gradients, inputs, prepare
from torch import Tensor
from trainer_model import TINY, tiny_transformer
from xflux_trainer import lora, quantize, savings, stream
from xflux_trainer.frozen import FrozenLinear
from xflux_trainer.model import Velocity

BLOCKS = TINY.double_blocks + TINY.single_blocks


@pytest.fixture(scope="module")
def expected() -> dict[int, tuple[Tensor, dict[str, Tensor]]]:
    """Prediction and gradients without streaming, by batch size."""
    return {batch: gradients(tiny_transformer(), batch) for batch in (1, 2, 3)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("stream_blocks", "modulation", "batch"),
    [(1, "keep", 1), (2, "keep", 2), (3, "stream", 3), (BLOCKS, "keep", 2), (0, "stream", 2), (99, "stream", 1)],
)
def test_same_bits(
    expected: Any, stream_blocks: int, modulation: str, batch: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the same layers with their weights at hand; an `nn.Linear` of torch 2.4 sums some products otherwise."""
    settings = config(stream_blocks=stream_blocks, modulation=modulation)
    transformer, resident = tiny_transformer(), tiny_transformer()
    made = prepare(transformer, settings)
    v, found = gradients(transformer, batch, checkpointing)
    with monkeypatch.context() as patch:
        patch.setattr(stream.Streamer, "take", lambda self, layers: None)
        prepare(resident, settings)
    v_resident, wanted = gradients(resident, batch)
    assert torch.equal(v, v_resident) and torch.equal(v, expected[batch][0])
    assert found.keys() == expected[batch][1].keys()
    for name, gradient in expected[batch][1].items():
        assert torch.equal(found[name], wanted[name])
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-8)
    assert made.streamer and made.streamer.copied


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_same_bits_quantised(name: str) -> None:
    pytest.importorskip("optimum.quanto")
    resident, streamed = tiny_transformer(), tiny_transformer()
    prepare(resident, config(quantization=name))
    made = prepare(streamed, config(quantization=name, stream_blocks=3, modulation="stream"))
    v, wanted = gradients(resident, 2)
    v_streamed, found = gradients(streamed, 2, checkpointing=True)
    assert torch.equal(v, v_streamed)
    assert all(torch.equal(found[key], gradient) for key, gradient in wanted.items())
    assert made.streamer and all(slot.room.dtype == torch.uint8 for slot in made.streamer._slots)


def steps(transformer: Any, count: int, *, checkpointing: bool) -> Any:
    """Run training steps; yields after each."""
    lora.attach(transformer, config(rank=2, lora_targets=("attn.to_q",)))
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    velocity = Velocity(transformer, guidance=True)
    for _ in range(count):
        velocity(*inputs(2)).square().mean().backward()
        yield velocity


@pytest.mark.parametrize("checkpointing", [False, True])
def test_foreseen_and_copied_no_oftener_than_needed(checkpointing: bool) -> None:
    """After the first step no layer waits for an unforeseen copy; each direction brings each unit at most once."""
    transformer = tiny_transformer()
    streamer = prepare(transformer, config(stream_blocks=BLOCKS)).streamer
    assert streamer
    copied, missed = [], []
    for _ in steps(transformer, 4, checkpointing=checkpointing):
        copied.append(streamer.copied)
        missed.append(streamer.missed)
    assert missed[0] > 0
    assert missed[-1] == missed[1]
    # The two units on which the pass turns round, at either end, are there already.
    sizes = [unit.host.numel() for unit in streamer._units]
    assert copied[-1] - copied[-2] == sum(sizes[2:]) + sum(sizes[:-2])


def test_the_modulation_travels_once_a_step() -> None:
    """Its backward pass needs no weights, and the recompute takes the result of the forward pass."""
    transformer = tiny_transformer()
    streamer = prepare(transformer, config(modulation="stream")).streamer
    assert streamer and len(streamer._units) == BLOCKS
    copied = []
    for _ in steps(transformer, 4, checkpointing=True):
        copied.append(streamer.copied)
    assert 0 < copied[-1] - copied[-2] <= streamer.host_bytes


def test_another_embedding_gets_its_own_modulation() -> None:
    """What was remembered is of one tensor: neither another one nor the same one with new values gets it."""
    transformer, plain = tiny_transformer(), tiny_transformer()
    prepare(transformer, config(modulation="stream"))
    norm, exact = transformer.single_transformer_blocks[0].norm, plain.single_transformer_blocks[0].norm
    x, emb = torch.randn(2, 5, 32), torch.randn(2, 32)
    for _ in range(2):
        assert torch.equal(norm(x, emb=emb)[0], exact(x, emb=emb)[0])
        assert torch.equal(norm(x, emb=emb.clone())[0], exact(x, emb=emb)[0])
        emb += 1
    emb.requires_grad_()
    norm(x, emb=emb)[0].sum().backward()
    assert emb.grad is not None and emb.grad.abs().max() > 0


def test_two_slots_are_all_that_is_there() -> None:
    transformer = tiny_transformer()
    streamer = prepare(transformer, config(stream_blocks=BLOCKS)).streamer
    assert streamer
    kept: set[int] = set()
    velocity = next(iter(steps(transformer, 1, checkpointing=False)))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.add(t.untyped_storage().data_ptr()), t)[1], lambda t: t
    ):
        loss = velocity(*inputs(2)).square().mean()
    slots = {slot.room.untyped_storage().data_ptr() for slot in streamer._slots}
    hosts = {unit.host.untyped_storage().data_ptr() for unit in streamer._units}
    assert len(slots) == savings.SLOTS and not kept & (slots | hosts)
    assert sum(slot.room.numel() for slot in streamer._slots) == 2 * max(u.host.numel() for u in streamer._units)
    layers = [module for module in transformer.modules() if isinstance(module, FrozenLinear)]
    assert layers and all(layer.store is None for layer in layers)
    # What the slots hold when the backward pass begins does not matter either: it brings what it needs.
    wanted = {name: p.grad.clone() for name, p in transformer.named_parameters() if p.requires_grad}
    transformer.zero_grad()
    for slot in streamer._slots:
        slot.room.fill_(255)
        slot.unit = None
    streamer._recent = (None, None)
    loss.backward()
    assert all(torch.equal(p.grad, wanted[name]) for name, p in transformer.named_parameters() if p.requires_grad)


def test_sampling_between_steps_learns_anew_and_stays_right() -> None:
    transformer, plain = tiny_transformer(), tiny_transformer()
    streamer = prepare(transformer, config(stream_blocks=3)).streamer
    assert streamer
    exact = Velocity(plain, guidance=True)(*inputs(3))
    for velocity in steps(transformer, 3, checkpointing=True):
        with torch.no_grad():
            assert torch.equal(velocity(*inputs(3)), exact)  # lora_B is zero
            before = streamer.copied
            assert torch.equal(velocity(*inputs(3)), exact)
            assert streamer.copied - before <= streamer.host_bytes + max(u.host.numel() for u in streamer._units)


def test_the_host_s_copy_is_neither_moved_nor_changed() -> None:
    transformer = tiny_transformer()
    weights = {name: module.weight.clone() for name, module in transformer.named_modules() if name.endswith("to_q")}
    streamer = prepare(transformer, config(stream_blocks=BLOCKS)).streamer
    assert streamer
    before = [(unit.host.data_ptr(), unit.host.clone()) for unit in streamer._units]
    list(steps(transformer, 1, checkpointing=True))
    transformer.to(torch.bfloat16).requires_grad_(False)
    for unit, (place, values) in zip(streamer._units, before, strict=True):
        assert unit.host.data_ptr() == place and torch.equal(unit.host, values)
    for name, weight in weights.items():
        layer = transformer.get_submodule(name)
        assert torch.equal(getattr(layer, "base_layer", layer).weight, weight)
    assert not [
        name for name, _ in transformer.named_parameters() if name.endswith("proj_out.weight") and "_blocks" in name
    ]
    copy.deepcopy(transformer)  # shares the host's copy
    assert sum(unit.host.numel() for unit in streamer._units) == streamer.host_bytes


def test_spread() -> None:
    """Evenly over FLUX.1's 57 blocks: gaps differ by at most one, and the ends are half a gap away."""
    names = [f"transformer_blocks.{k}" for k in range(19)] + [f"single_transformer_blocks.{k}" for k in range(38)]
    assert savings.streamed_blocks(19, 38, 0) == ()
    assert savings.streamed_blocks(19, 38, 1000) == tuple(names)
    for count in range(1, 58):
        chosen = [names.index(name) for name in savings.streamed_blocks(19, 38, count)]
        gaps = [b - a for a, b in itertools.pairwise(chosen)]
        assert len(set(chosen)) == count
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert abs(chosen[0] - (56 - chosen[-1])) <= 1


def test_pinned_memory_has_the_size_that_was_asked_for() -> None:
    store = stream.pinned(680_000_001, CPU)
    assert store.numel() == store.untyped_storage().nbytes() == 680_000_001


def test_layers_leave_only_before_the_first_use() -> None:
    """A later and larger unit would not fit the slots."""
    transformer = tiny_transformer()
    made = quantize.preparer(config(stream_blocks=BLOCKS), CPU, (2, 2))
    assert made and made.streamer
    made("single_transformer_blocks.0", transformer.single_transformer_blocks[0])
    transformer.single_transformer_blocks[0].proj_mlp(torch.zeros(1, 32))
    with pytest.raises(AssertionError, match="largest unit"):
        made("transformer_blocks.0", transformer.transformer_blocks[0])
