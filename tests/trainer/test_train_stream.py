"""Streamed weights: the same numbers, no more room than the slots, and each unit copied before its turn comes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from test_train_quantize import ADAPTED, CPU, config, gradients, inputs, prepare
from torch import Tensor
from trainer_model import TINY, tiny_transformer
from xflux_trainer import fast, lora, quantize, savings, stream
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
        patch.setattr(stream.Streamer, "take", lambda self, parts: None)
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
    assert made.streamer and made.streamer.copied


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_blocks(checkpointing: bool) -> None:
    """The trainer's own blocks ask in an order of their own; it is learned, and the modulation travels once a step."""
    settings = config(
        stream_blocks=BLOCKS, modulation="stream", kernels="fused", gradient_checkpointing=checkpointing, rank=2,
        lora_targets=ADAPTED, mixed_precision="no",
    )  # fmt: skip
    exact_v, exact = fused(tiny_transformer(), settings, 1)
    transformer = tiny_transformer()
    streamer = prepare(transformer, settings).streamer
    assert streamer
    copied, missed = [], []
    for count in range(1, 5):
        v, found = fused(transformer, settings, count)
        copied.append(streamer.copied)
        missed.append(streamer.missed)
        assert torch.allclose(v, exact_v, rtol=1e-5, atol=1e-6)
        for name, gradient in exact.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-7), name
    assert missed[0] > 0 and missed[1] == missed[-1]
    assert 0 < copied[-1] - copied[-2] <= savings.held(settings, TINY, width=4).traffic


def fused(transformer: Any, settings: Any, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction and the adapters' gradients of the trainer's own blocks; adapters are attached the first time."""
    if count == 1:
        lora.attach(transformer, settings)
    adapters = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    velocity = Velocity(transformer, guidance=True)
    velocity.fast, _ = fast.build(transformer, settings, CPU)
    assert velocity.fast
    transformer.zero_grad()
    v = velocity(*inputs(2))
    v.square().mean().backward()
    return v.detach(), {name: weight.grad for name, weight in adapters.items() if weight.grad is not None}


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
    """After the first step no layer waits for an unforeseen copy; what is there when the pass turns round stays."""
    transformer = tiny_transformer()
    sizes = {name: module.weight.numel() * 4 for name, module in transformer.named_modules() if is_linear(name, module)}
    streamer = prepare(transformer, config(stream_blocks=BLOCKS)).streamer
    assert streamer and len(streamer._units) == 5 * TINY.double_blocks + 3 * TINY.single_blocks
    copied, missed = [], []
    for _ in steps(transformer, 4, checkpointing=checkpointing):
        copied.append(streamer.copied)
        missed.append(streamer.missed)
    assert missed[0] > 0
    assert missed[-1] == missed[1]
    # The pass turns round on the two single blocks, and at its end on the first double block.
    again = [name for name in sizes if name.startswith("transformer_blocks.1.") and not savings.is_modulation(name)]
    assert copied[-1] - copied[-2] == sum(sizes.values()) + sum(sizes[name] for name in again)


def is_linear(name: str, module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and "_blocks." in name


@pytest.mark.parametrize("stream_blocks", [0, 1, 3])
def test_the_modulation_travels_once_a_step(stream_blocks: int) -> None:
    """Its backward pass needs no weights, and the recompute takes the result of the forward pass."""
    transformer = tiny_transformer()
    settings = config(modulation="stream", stream_blocks=stream_blocks)
    streamer = prepare(transformer, settings).streamer
    assert streamer
    bodies = [layer for name, layer in frozen_layers(transformer).items() if not savings.is_modulation(name)]
    assert len(streamer._units) > 2 * TINY.double_blocks + TINY.single_blocks or not bodies
    copied = []
    for _ in steps(transformer, 4, checkpointing=True):
        copied.append(streamer.copied)
    most = streamer.host_bytes + sum(layer.size for layer in bodies)
    assert 0 < copied[-1] - copied[-2] <= most == savings.held(settings, TINY, width=4).traffic


def frozen_layers(transformer: Any) -> dict[str, FrozenLinear]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, FrozenLinear)}


def small_units(count: int) -> tuple[stream.Streamer, list[FrozenLinear], list[Tensor]]:
    """Units of one layer each, of different sizes, and their weights."""
    streamer = stream.Streamer(CPU)
    layers = [FrozenLinear(torch.nn.Linear(64, 4 + number % 3)) for number in range(count)]
    weights = [layer.weight.clone() for layer in layers]
    streamer.take([[layer] for layer in layers])
    return streamer, layers, weights


ORDERS = {
    "there and back": [*range(8), *reversed(range(8))],
    "recomputed": [*range(9), *(n for block in (2, 1, 0) for n in (0, 1, 2, 1, 0) for n in [3 * block + n])],
    "fused blocks": [
        *(5 * block + n for block in range(3) for n in (1, 0, 2, 4, 2, 3)),
        *(5 * block + n for block in (2, 1, 0) for n in (2, 4, 2, 3, 4, 2, 3, 2)),
    ],
    "one way": [*range(7)],
    "recomputed with what was needed once": [0, 1, 2, 3, 4, 5, 6, 7, 6, 5, 7, 6, 5, 2, 3, 4, 3, 2],
    "fewer than there are slots": [0, 1, 2, 1, 0],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_the_order_of_copies(order: list[int]) -> None:
    """Once learned: the next units, as many as there are slots, are there, and nothing more is copied for that."""
    streamer, layers, wanted = small_units(max(order) + 1)
    there: list[set[int]] = []
    copied, missed = [], []
    for _ in range(4):
        for number in order:
            assert torch.equal(layers[number].dense(torch.float32), wanted[number])
            there.append({slot.unit.number for slot in streamer._slots if slot.unit})
        copied.append(streamer.copied)
        missed.append(streamer.missed)
    assert missed[0] > 0 and missed[1] == missed[-1]
    slots = min(savings.SLOTS, max(order) + 1)
    future = order * 6
    needed = 0
    for place, found in enumerate(there[2 * len(order) : 3 * len(order)]):
        coming = list(dict.fromkeys(future[place : place + 4 * slots]))[:slots]
        assert found >= set(coming)
        held_before = there[2 * len(order) + place - 1]
        needed += sum(layers[number].size for number in set(coming) - held_before)
    assert copied[3] - copied[2] == needed


def test_a_wrong_guess_costs_time_only() -> None:
    """An order that changes all the time gives the right weights, and one that comes back is known again."""
    streamer, layers, wanted = small_units(9)
    dice = torch.Generator().manual_seed(0)
    for number in torch.randint(9, (300,), generator=dice).tolist():
        assert torch.equal(layers[number].dense(torch.float32), wanted[number])
    for _ in range(3):
        missed = streamer.missed
        for number in (*range(9), *reversed(range(9))):
            assert torch.equal(layers[number].dense(torch.float32), wanted[number])
    assert streamer.missed == missed


def test_layers_of_one_input_are_one_matrix() -> None:
    """q, k and v lie next to each other, with a single block's first MLP layer, in either direction's slot."""
    transformer = tiny_transformer()
    groups = [["transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k", "transformer_blocks.1.attn.to_v"]]
    groups += [[f"transformer_blocks.1.attn.add_{letter}_proj" for letter in "qkv"]]
    single = "single_transformer_blocks.0."
    groups += [[*(f"{single}attn.to_{letter}" for letter in "qkv"), f"{single}proj_mlp"]]
    wanted = [torch.cat([transformer.get_submodule(name).weight for name in names]) for names in groups]
    prepare(transformer, config(stream_blocks=BLOCKS))
    for names, whole in zip(groups, wanted):  # noqa: B905
        weights = [transformer.get_submodule(name).dense(torch.float32) for name in names]
        assert all(transformer.get_submodule(name).as_stored for name in names)
        ends = [weight.data_ptr() + weight.numel() * 4 for weight in weights]
        assert [weight.data_ptr() for weight in weights[1:]] == ends[:-1]
        assert torch.equal(weights[0].as_strided(whole.shape, (whole.shape[1], 1)), whole)


@pytest.mark.parametrize("modulation", ["keep", "stream"])
@pytest.mark.parametrize("stream_blocks", [0, 1, 3, BLOCKS])
def test_the_forecast_is_what_is_there(stream_blocks: int, modulation: str) -> None:
    settings = config(stream_blocks=stream_blocks, modulation=modulation)
    if stream_blocks == 0 and modulation == "keep":
        assert savings.held(settings, TINY, width=4).slots == 0
        return
    transformer = tiny_transformer()
    streamer = prepare(transformer, settings).streamer
    assert streamer
    Velocity(transformer, guidance=True)(*inputs(1))
    resident = sum(parameter.numel() * 4 for parameter in transformer.parameters())
    resident += sum(layer.size for layer in frozen_layers(transformer).values() if layer.store is not None)
    held = savings.held(settings, TINY, width=4)
    assert held.device == resident + streamer.slot_bytes
    assert (held.slots, held.host) == (streamer.slot_bytes, streamer.host_bytes)


def test_the_fewest_blocks_that_fit() -> None:
    spec, settings = savings.FluxSpec("flux-dev"), config(modulation="stream")
    device = [savings.held(config(modulation="stream", stream_blocks=count), spec).device for count in range(58)]
    for budget in (int(device[0]), device[0] - 1, 9 << 30, 8 << 30, device[57], device[57] - 1, 0):
        found = savings.blocks_to_stream(settings, spec, budget)
        fitting = [count for count, size in enumerate(device) if size <= budget]
        assert found == (fitting[0] if fitting else None)
    assert savings.blocks_to_stream(settings, spec, device[57]) == 57
    assert savings.blocks_to_stream(settings, spec, device[57] - 1) is None


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


def test_the_slots_are_all_that_is_there() -> None:
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
    assert len(streamer._slots) == savings.SLOTS and len(slots) == 1 and not kept & (slots | hosts)
    assert streamer.slot_bytes == savings.SLOTS * max(unit.host.numel() for unit in streamer._units)
    layers = [module for module in transformer.modules() if isinstance(module, FrozenLinear)]
    assert layers and all(layer.store is None for layer in layers)
    # What the slots hold when the backward pass begins does not matter either: it brings what it needs.
    wanted = {name: p.grad.clone() for name, p in transformer.named_parameters() if p.requires_grad}
    transformer.zero_grad()
    for slot in streamer._slots:
        slot.room.fill_(255)
        slot.unit.slot = slot.unit = None
    streamer._current = None
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
            # Each unit once, and what is brought for the step that came after the passes so far.
            assert streamer.copied - before <= streamer.host_bytes + streamer.slot_bytes


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
