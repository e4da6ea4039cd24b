"""The quantised base: values, gradients, which layers, and what must not break."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_kit import tiny_flux
from trainer_model import TINY, tiny_transformer
from xflux_trainer import frozen, lora, model, quantize, savings
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported
from xflux_trainer.frozen import FrozenLinear
from xflux_trainer.model import Velocity

CPU = torch.device("cpu")
QUANTO = ("int8", "fp8", "int4")
BOUNDS = {"int8": 0.012, "torchao-int8": 0.012, "fp8": 0.032, "torchao-fp8": 0.032, "int4": 0.125, "nf4": 0.105}
"""Relative error of normal values, largest of all rows: half a step of each format, and bf16's own rounding."""


ADAPTED = (
    "attn.to_q",
    "attn.to_v",
    "attn.add_k_proj",
    "attn.to_out.0",
    "ff.net.2",
    "single:proj_mlp",
    "single:proj_out",
)


def need(name: str) -> None:
    pytest.importorskip(quantize.PACKAGES[name][0])


def config(**changes: Any) -> TrainConfig:
    return TrainConfig("images", **changes)


def prepare(transformer: Any, settings: TrainConfig) -> quantize.Preparer:
    """What the loader does, block by block."""
    made = quantize.preparer(settings, CPU, (len(transformer.transformer_blocks), TINY.single_blocks))
    assert made is not None
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(transformer, kind)):
            made(f"{kind}.{index}", block)
    for end in ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"):
        made(end, transformer.get_submodule(end))
    return made


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Tokens of a 4 x 4 latent, three text tokens, and what else the model is called with."""
    dice = torch.Generator().manual_seed(7)
    x, text = (torch.randn(batch, n, d, generator=dice).to(dtype) for n, d in ((4, 64), (3, TINY.text_dim)))
    pooled = torch.randn(batch, TINY.pooled_dim, generator=dice).to(dtype)
    t = torch.linspace(0.2, 0.9, batch)
    ids = torch.tensor([[0.0, row, column] for row in range(2) for column in range(2)])
    return x, t, text, pooled, ids, torch.zeros(3, 3), 1.0


def gradients(transformer: Any, batch: int, checkpointing: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction and the gradients of adapters on every kind of layer, the first blocks' among them."""
    adapters = lora.attach(transformer, config(rank=2, lora_targets=ADAPTED))
    for name, parameter in adapters.items():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=lora.generator(name)) * 0.1)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    v = Velocity(transformer, guidance=True)(*inputs(batch))
    v.square().mean().backward()
    return v.detach(), {name: parameter.grad for name, parameter in adapters.items()}


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_each_row_has_its_own_scale(name: str) -> None:
    """Rows of very different size come back within the format's bound, which an unscaled cast does not manage."""
    need(name)
    dice = torch.Generator().manual_seed(0)
    spread = 1 if name == "nf4" else 100  # nf4's scales of 256 groups share one scale of their own
    sizes = torch.logspace(0, 1, 64)[:, None] ** torch.tensor(spread).log10() / 5 / spread
    weight = (torch.randn(64, 256, generator=dice) * sizes).bfloat16()
    layer = FrozenLinear(linear(weight), quantize.form(name, CPU))
    assert error(layer.weight, weight).max() < BOUNDS[name]
    x = torch.randn(256, 256, generator=dice).bfloat16()
    assert error(layer(x).T, F.linear(x, weight).T).max() < 1.3 * BOUNDS[name]
    small = len(layer._places) * frozen.ALIGNMENT + 1400  # padding, nf4's tables
    assert (layer.size - small) * 8 / weight.numel() < {"int4": 4.3, "nf4": 4.2}.get(name, 8.4)
    if spread > 1:
        assert error(weight.to(torch.float8_e4m3fn).bfloat16(), weight).max() > 0.1


def linear(weight: Tensor, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype).requires_grad_(False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def error(found: Tensor, wanted: Tensor) -> Tensor:
    """The relative error of each row."""
    return (found.float() - wanted.float()).norm(dim=1) / wanted.float().norm(dim=1)


def test_int8_is_nearest() -> None:
    """Every value is within half a step; a division in bf16 would put some a whole step off."""
    need("int8")
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    parts, _ = quantize.form("int8", CPU)(weight)
    steps = weight.double() / parts["scale"].double()
    inside = steps.abs() <= 127
    assert (parts["data"].double() - steps)[inside].abs().max() <= 0.5 + 1e-6


@pytest.mark.parametrize("inputs_", [32, 96, 20])
def test_int4_packs_what_128_does_not_divide(inputs_: int) -> None:
    need("int4")
    weight = torch.randn(5, inputs_, generator=torch.Generator().manual_seed(1))  # an odd number of groups
    layer = FrozenLinear(linear(weight), quantize.form("int4", CPU))
    groups = weight.view(-1, savings.group_size(inputs_))
    step = (groups.amax(1) - groups.amin(1)) / 15
    off = (layer.weight.view_as(groups) - groups).abs() / step[:, None]
    assert off.max() < 0.51


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_zeros_stay_zeros(name: str) -> None:
    """A row without a largest value has no scale to divide by."""
    need(name)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    found = FrozenLinear(linear(weight), quantize.form(name, CPU)).weight
    assert torch.isfinite(found).all()
    assert found[1].abs().max() < 1e-5


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_gradient_passes_and_nothing_dense_is_kept(name: str) -> None:
    need(name)
    dice = torch.Generator().manual_seed(0)
    plain = linear(torch.randn(48, 64, generator=dice), bias=True)
    layer = FrozenLinear(plain, quantize.form(name, CPU))
    dense = layer.weight
    kept: list[Tensor] = []
    for batch in (1, 2, 3):
        x = torch.randn(batch, 5, 64, generator=dice).requires_grad_()
        dy = torch.randn(batch, 5, 48, generator=dice)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            y = layer(x)
        y.backward(dy)
        assert torch.allclose(y, F.linear(x, dense, layer.bias), atol=1e-5)
        assert torch.allclose(x.grad, dy @ dense, atol=1e-5)
    assert not kept


def test_the_bias_may_be_trained() -> None:
    plain = linear(torch.randn(3, 4), bias=True)
    plain.bias.requires_grad_()
    layer = FrozenLinear(plain)
    layer(torch.ones(2, 5, 4)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((3,), 10.0))


@pytest.mark.parametrize(("name", "modulation"), [("int8", "keep"), ("fp8", "quantize"), ("int4", "keep")])
def test_model_equals_one_with_the_rounded_weights(name: str, modulation: str) -> None:
    """The whole model, forward and backward: it differs from a dense one by the rounding of its weights alone."""
    need(name)
    quantised, dense = tiny_transformer(), tiny_transformer()
    prepare(quantised, config(quantization=name, modulation=modulation))
    for path, layer in quantised.named_modules():
        if isinstance(layer, FrozenLinear):
            dense.get_submodule(path).weight.data = layer.weight
    for batch in (1, 2, 3):
        checkpointing = batch == 2
        v, found = gradients(quantised if batch == 3 else twin(quantised), batch, checkpointing)
        expected_v, expected = gradients(twin(dense), batch)
        assert torch.equal(v, expected_v)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert gradient.abs().max() > 0
            assert torch.allclose(found[key], gradient, rtol=1e-4, atol=1e-7), key


def twin(transformer: Any) -> Any:
    """A copy that adapters can be put on."""
    import copy

    return copy.deepcopy(transformer)


def test_the_effect_on_the_prediction_follows_the_bits() -> None:
    need("int8")
    exact = Velocity(tiny_transformer(), guidance=True)(*inputs(2))
    off = {}
    for name in QUANTO:
        transformer = tiny_transformer()
        prepare(transformer, config(quantization=name))
        v = Velocity(transformer, guidance=True)(*inputs(2))
        off[name] = float((v - exact).norm() / exact.norm())
    assert 0 < off["int8"] < off["fp8"] < off["int4"] < 0.5


def test_which_layers() -> None:
    """Linear layers of the blocks; the modulation by choice; norms, embedders and ends never."""
    need("int8")
    for choice in ("keep", "quantize"):
        transformer = tiny_transformer()
        linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
        before = {name: value.clone() for name, value in transformer.named_parameters()}
        prepare(transformer, config(quantization="int8", modulation=choice))
        modules = dict(transformer.named_modules())
        changed = {name for name in linears if isinstance(modules[name], FrozenLinear)}
        blocks = {name for name in linears if "transformer_blocks." in name}
        modulation = {name for name in blocks if name.rsplit(".", 2)[-2].startswith("norm")}
        assert len(modulation) == 2 * TINY.double_blocks + TINY.single_blocks
        assert changed == (blocks if choice == "quantize" else blocks - modulation)
        after = dict(transformer.named_parameters())
        assert set(before) - set(after) == {f"{name}.weight" for name in changed}
        assert all(torch.equal(after[name], before[name]) for name in after)
        # Sequentials and lists give the new layers as well.
        assert isinstance(transformer.transformer_blocks[0].ff.net[2], FrozenLinear)
        assert isinstance(transformer.transformer_blocks[0].attn.to_out[0], FrozenLinear)


def test_a_block_s_own_weights_are_gone() -> None:
    need("int8")
    transformer = tiny_transformer()
    old = [
        weakref.ref(module.weight)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "_blocks." in name
    ]
    prepare(transformer, config(quantization="int8", modulation="quantize"))
    gc.collect()
    assert not [ref for ref in old if ref() is not None]


def test_moving_and_switching_leave_it_as_it_was() -> None:
    need("fp8")
    transformer = tiny_transformer()
    prepare(transformer, config(quantization="fp8"))
    layer = transformer.transformer_blocks[1].attn.to_q
    before = layer.weight
    transformer.requires_grad_(True).requires_grad_(False)
    transformer.train().eval().train()
    transformer.to(torch.bfloat16).to(torch.float32).to("cpu")  # DeepSpeed does the first
    assert torch.equal(layer.weight, before)
    assert not [name for name in transformer.state_dict() if name.endswith("attn.to_q.weight")]
    layer.to("meta")
    assert layer.store.device.type == "meta" and layer.weight.shape == (32, 32)


def test_an_adapter_s_layer_keeps_its_sizes_and_name() -> None:
    need("int4")
    transformer = tiny_transformer()
    prepare(transformer, config(quantization="int4"))
    layer = transformer.single_transformer_blocks[0].proj_mlp
    assert (layer.in_features, layer.out_features) == (32, 128)
    assert isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32
    assert "bytes=" in repr(layer)


def test_nothing_to_do_is_no_preparer() -> None:
    assert quantize.preparer(config(), CPU) is None


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantize.PACKAGES, "nf4", ("nobody_has_this.functional", "bitsandbytes"))
    with pytest.raises(Unsupported, match=r"needs bitsandbytes, which is not installed\. .*pip install bitsandbytes"):
        quantize.preparer(config(quantization="nf4"), CPU)


def test_a_package_that_fails_here_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    need("int8")

    def broken(weight: Tensor) -> Any:
        raise RuntimeError("no kernel for this card\nat line 3")

    monkeypatch.setitem(quantize._FORMATS, "int8", broken)
    with pytest.raises(Unsupported, match="cannot quantise to int8 on cpu: no kernel for this card"):
        quantize.preparer(config(quantization="int8"), CPU)
    wrong = lambda weight: ({"weight": -weight}, frozen.plain(weight)[1])  # noqa: E731
    monkeypatch.setitem(quantize._FORMATS, "int8", wrong)
    with pytest.raises(Unsupported, match="came back with an error of 200%"):
        quantize.preparer(config(quantization="int8"), CPU)


@pytest.mark.parametrize(
    ("changes", "strategy", "word"),
    [
        ({"stream_blocks": 2}, "zero2", "stream_blocks"),
        ({"modulation": "stream"}, "fsdp", "modulation: stream"),
        ({"quantization": "int8"}, "fsdp", "quantization is int8"),
        ({"quantization": "nf4"}, "zero3", "quantization is nf4"),
        ({"quantization": "int8"}, "zero2", None),
        ({"quantization": "int8", "stream_blocks": 2, "modulation": "stream"}, "ddp", None),
    ],
)
def test_refusals(changes: dict[str, Any], strategy: str, word: str | None) -> None:
    if word is None:
        quantize.refuse(config(**changes), strategy)
        return
    with pytest.raises(Unsupported, match=word):
        quantize.refuse(config(**changes), strategy)


@pytest.mark.parametrize("stream_blocks", [0, 3])
@pytest.mark.parametrize("modulation", ["keep", "quantize", "stream"])
@pytest.mark.parametrize("name", ["none", *sorted(BOUNDS)])
def test_forecast_of_bytes(name: str, modulation: str, stream_blocks: int) -> None:
    """What `savings.held` foretells is what is there, but for the padding between tensors this small."""
    if name != "none":
        need(name)
    settings = config(quantization=name, modulation=modulation, stream_blocks=stream_blocks)
    if name == "none" and modulation == "quantize":
        pytest.skip("refused by the config's rules")
    transformer = tiny_transformer()
    made = prepare(transformer, settings) if quantize.preparer(settings, CPU) else None
    layers = [module for module in transformer.modules() if isinstance(module, FrozenLinear)]
    padding = sum(len(layer._places) for layer in layers) * frozen.ALIGNMENT + len(layers) * 1400  # nf4's tables
    device = sum(parameter.numel() * 4 for parameter in transformer.parameters())
    device += sum(layer.size for layer in layers if layer.store is not None)
    streamer = made.streamer if made else None
    held = savings.held(settings, TINY, width=4)
    assert 0 <= device - (held.device - held.slots) <= padding
    host = streamer.host_bytes if streamer else 0
    assert 0 <= host - held.host <= padding
    assert (held.host > 0) == bool(streamer)


def test_while_loading_one_block_after_the_other() -> None:
    """The loader's own order: when a block is quantised, the later ones have no weights yet."""
    need("int8")
    base = model.resolve(str(tiny_flux()))
    spec = model.read_spec(base)
    made = quantize.preparer(
        config(quantization="int8", stream_blocks=2), CPU, (spec.double_blocks, spec.single_blocks)
    )
    assert made is not None and made.streamer is not None
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(name: str, module: nn.Module) -> None:
        nonlocal most
        before = [m.weight for m in module.modules() if type(m) is nn.Linear] if savings.is_block(name) else []
        alive.extend(weakref.ref(weight) for weight in before)
        most = max(most, sum(ref() is not None for ref in alive) - len(before))
        del before
        made(name, module)

    transformer = model.load_transformer(base, torch.bfloat16, CPU, watched)
    assert alive and most <= 2 * spec.double_blocks + spec.single_blocks  # the modulation's, which are kept
    layers = {name: m for name, m in transformer.named_modules() if isinstance(m, FrozenLinear)}
    assert any(layer.store is None for layer in layers.values()) and any(
        layer.store is not None for layer in layers.values()
    )
    plain = model.load_transformer(base, torch.bfloat16, CPU)
    for name, layer in layers.items():
        assert error(layer.weight, plain.get_submodule(name).weight).max() < 0.02, name
    kept = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear)} - set(layers)
    assert all(torch.equal(plain.get_submodule(n).weight, transformer.get_submodule(n).weight) for n in kept)


@pytest.mark.long  # importing the compiler takes seconds
@pytest.mark.parametrize("changes", [{}, {"modulation": "stream"}, {"stream_blocks": 2}])
def test_compiled_blocks_give_the_same(changes: dict[str, Any]) -> None:
    need("int8")
    transformer = tiny_transformer()
    prepare(transformer, config(quantization="int8", **changes))
    args = inputs(2)
    args[0].requires_grad_()
    exact = Velocity(transformer, guidance=True)(*args)
    (wanted,) = torch.autograd.grad(exact.square().sum(), args[0])
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile(backend="aot_eager", fullgraph=not changes)
    for _ in range(2):
        v = Velocity(transformer, guidance=True)(*args)
        (found,) = torch.autograd.grad(v.square().sum(), args[0])
        assert torch.allclose(v, exact, atol=1e-6) and torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
