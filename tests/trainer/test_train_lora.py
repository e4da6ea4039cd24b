"""Adapters: fp32 on a bf16 model, the same numbers as peft's, X-Flux's fused form, started from files."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from safetensors.torch import save_file  # noqa: E402
from trainer_model import TINY, tiny_transformer  # noqa: E402
from xflux_trainer import fused, lora, lora_files  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import CheckpointError, ConfigError  # noqa: E402
from xflux_trainer.memory import adapter_parameters  # noqa: E402
from xflux_trainer.spec import LORA_TARGETS  # noqa: E402
from xflux_trainer.targets import parts_of  # noqa: E402

CONFIG = TrainConfig(img_dir="x", rank=4, lora_targets="attn")


def shake(adapters: dict) -> None:
    """B is nought at the start; give it values, so that the adapter does something."""
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(torch.randn(parameter.shape, generator=lora.generator("shake", name)) * 0.1)


def inputs(dtype: torch.dtype = torch.float32) -> dict:
    dice = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 24, 64, generator=dice).to(dtype),
        "encoder_hidden_states": torch.randn(2, 5, TINY.text_dim, generator=dice).to(dtype),
        "pooled_projections": torch.randn(2, TINY.pooled_dim, generator=dice).to(dtype),
        "timestep": torch.tensor([0.25, 0.75]),
        "guidance": torch.ones(2),
        "img_ids": torch.zeros(24, 3),
        "txt_ids": torch.zeros(5, 3),
    }


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_the_number_of_parameters_is_the_forecasts(targets: str) -> None:
    config = replace(CONFIG, lora_targets=targets, single_blocks=(1,))
    adapters = lora.attach(tiny_transformer(), config)
    assert sum(parameter.numel() for parameter in adapters.values()) == adapter_parameters(config, TINY)


def test_only_adapters_are_trained_and_they_are_fp32_on_bf16() -> None:
    transformer = tiny_transformer().to(torch.bfloat16)
    adapters = lora.attach(transformer, CONFIG)
    assert {p for p in transformer.parameters() if p.requires_grad} == set(adapters.values())
    assert {parameter.dtype for parameter in adapters.values()} == {torch.float32}
    out = transformer(**inputs(torch.bfloat16), return_dict=False)[0]
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in adapters.values())


def forward(transformer: Any, dtype: torch.dtype = torch.float32, batch: int = 2) -> torch.Tensor:
    given = {key: value[:1].expand(batch, *value.shape[1:]) for key, value in inputs(dtype).items() if "ids" not in key}
    ids = {key: value for key, value in inputs().items() if "ids" in key}
    return transformer(**given, **ids, return_dict=False)[0]


def gradients(transformer: Any, adapters: dict, **how: Any) -> tuple[torch.Tensor, dict]:
    """The output, and every adapter's gradient of its mean square."""
    out = forward(transformer, **how)
    out.float().square().mean().backward()
    return out.detach(), {name: parameter.grad.clone() for name, parameter in adapters.items()}


@pytest.mark.parametrize("targets", ["attn", "all-linear"])
def test_our_layer_computes_what_pefts_does(targets: str) -> None:
    """Outputs and gradients, with a scale that is not 1."""
    ours, theirs = tiny_transformer(), tiny_transformer()
    config = replace(CONFIG, lora_alpha=10.0, lora_targets=targets)
    adapters = lora.attach(ours, config)
    shake(adapters)
    names = [name.removesuffix(".lora_A.weight") for name in adapters if ".lora_A." in name]
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=10.0, target_modules="|".join(map(re.escape, names))))
    copies = {
        name.replace(".default.weight", ".weight"): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert list(copies) == list(adapters)  # in the same order, too
    shake(copies)
    (a, grads), (b, wanted) = gradients(ours, adapters), gradients(theirs, copies)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.allclose(grads[name], wanted[name], rtol=1e-4, atol=1e-7) for name in adapters)
    assert not torch.allclose(a, forward(tiny_transformer()), atol=1e-3)


def three_for_one(adapters: dict) -> dict:
    """What separate adapters must hold to do the same as fused ones."""
    return fused.flat(fused.explode(fused.pairs({name: p.detach() for name, p in adapters.items()})))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_fused_adapter_is_three_with_one_a(batch: int) -> None:
    """Outputs, and gradients: of A their sum, of B their rows."""
    config = replace(CONFIG, lora_targets="xflux", lora_alpha=10.0)
    one, three = tiny_transformer(), tiny_transformer()
    together = lora.attach(one, config)
    shake(together)
    apart = lora.attach(three, replace(config, lora_targets=LORA_TARGETS["xflux"]))
    lora.fill(apart, three_for_one(together), Path("x"))
    (a, grads), (b, wanted) = gradients(one, together, batch=batch), gradients(three, apart, batch=batch)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        stem, _, end = name.partition(".lora_")
        parts = [wanted[f"{layer}.lora_{end}"] for layer in parts_of(stem)]
        whole = torch.stack(parts).sum(0) if end.startswith("A") else torch.cat(parts)
        assert torch.allclose(grad, whole, rtol=1e-4, atol=1e-7), name
    assert len(together) < len(apart)


def test_a_fused_product_is_computed_once_a_pass_and_not_kept() -> None:
    """Also where blocks are recomputed; and the gradients are those without recomputation."""
    config = replace(CONFIG, lora_targets="xflux")
    plain, checkpointed = tiny_transformer(), tiny_transformer()
    checkpointed.enable_gradient_checkpointing()
    results = []
    for transformer, passes in ((plain, 1), (checkpointed, 2)):
        adapters = lora.attach(transformer, config)
        shake(adapters)
        shared = [module for module in transformer.modules() if isinstance(module, lora.FusedAdapter)]
        calls: list[int] = []
        for module in shared:
            module.lora_A.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append(gradients(transformer, adapters))
        assert len(shared) == 2 * TINY.double_blocks + TINY.single_blocks
        assert len(calls) == passes * len(shared)
        assert all(module._held is None for module in shared)
    (a, grads), (b, again) = results
    assert torch.equal(a, b)
    assert all(torch.equal(grads[name], again[name]) for name in grads)


def test_another_input_gets_its_own_product() -> None:
    """However the layers are called: nothing of the first part's input is taken for another's."""
    adapter = lora.FusedAdapter(3, [2, 2, 2], 2, 0.5, None)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=lora.generator(parameter.shape)))
        x, y = torch.randn(1, 3), torch.randn(1, 3)
        whole = adapter.lora_B.weight @ adapter.lora_A.weight * 0.5
        for given, part in ((x, 0), (y, 1), (y, 2), (x, 2), (y, 0), (x, 0), (x, 1), (x.clone(), 2)):
            assert torch.allclose(adapter(given, part), given @ whole[2 * part : 2 * part + 2].T, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_takes_the_adapters_in_one_graph() -> None:
    transformer = tiny_transformer()
    adapters = lora.attach(transformer, replace(CONFIG, lora_targets="xflux"))
    shake(adapters)
    attention = transformer.single_transformer_blocks[0].attn
    x = torch.randn(2, 5, TINY.hidden)

    def qkv(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([attention.to_q(x), attention.to_k(x), attention.to_v(x)], dim=-1)

    compiled = torch.compile(qkv, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), qkv(x), atol=1e-6)


@pytest.mark.parametrize("targets", ["xflux", "all-linear"])
def test_a_quantised_base_is_adapted_all_the_same(targets: str) -> None:
    """optimum-quanto's layers: the adapter adds what it adds to a plain layer of the same, rounded weights."""
    quanto = pytest.importorskip("optimum.quanto")
    transformer = tiny_transformer()
    quanto.quantize(transformer, weights=quanto.qint8)
    quanto.freeze(transformer)
    rounded = tiny_transformer()
    with torch.no_grad():
        for name, module in transformer.named_modules():
            if isinstance(module, quanto.nn.QLinear):
                rounded.get_submodule(name).weight.copy_(module.weight.dequantize())
    before = forward(transformer)
    config = replace(CONFIG, lora_targets=targets)
    adapters, plain = lora.attach(transformer, config), lora.attach(rounded, config)
    assert torch.equal(forward(transformer), before)
    shake(adapters)
    shake(plain)
    (a, grads), (b, wanted) = gradients(transformer, adapters), gradients(rounded, plain)
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(grads[name], wanted[name], rtol=1e-3, atol=1e-6) for name in adapters)


def test_layers_of_other_libraries_are_told_by_their_sizes() -> None:
    class Packed(torch.nn.Module):
        """A linear layer that is no nn.Linear, with one inside, and no weight of its own."""

        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.inner = inner.in_features, inner.out_features, inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    transformer = tiny_transformer()
    names = list(lora.layers_of(transformer))
    attention = transformer.transformer_blocks[0].attn
    attention.to_q = Packed(attention.to_q)
    assert list(lora.layers_of(transformer)) == names
    assert "transformer_blocks.0.attn.to_q.lora_A.weight" in lora.attach(transformer, CONFIG)
    assert forward(transformer).shape == (2, 24, 64)


def test_xfluxs_own_counts_on_flux_dev() -> None:
    """What X-Flux prints for its default file, and for all blocks; counted on diffusers' module, without weights."""
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    layers = lora.layers_of(transformer)
    assert [(name, m.in_features, m.out_features) for name, m in layers.items()] != []
    config = replace(CONFIG, rank=16, lora_targets="xflux", single_blocks=(1, 2, 3, 4))
    adapters = lora.attach(transformer, config)
    assert sum(parameter.numel() for parameter in adapters.values()) == 13_172_736
    assert all(parameter.is_meta for parameter in adapters.values())
    assert adapters["transformer_blocks.18.attn.to_added_qkv.lora_B.weight"].shape == (9216, 16)
    assert set(adapters) == {name for name, parameter in transformer.named_parameters() if ".lora_" in name}


def test_the_trainer_does_without_peft() -> None:
    for path in Path(lora.__file__).parent.glob("*.py"):
        found = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        names = {getattr(node, "module", None) or "" for node in found}
        names |= {alias.name for node in found for alias in node.names}
        assert not any(name.split(".")[0] == "peft" for name in names), path.name


def test_a_fresh_adapter_changes_nothing() -> None:
    transformer = tiny_transformer()
    before = transformer(**inputs(), return_dict=False)[0]
    lora.attach(transformer, CONFIG)
    assert torch.equal(before, transformer(**inputs(), return_dict=False)[0])


def test_the_seed_alone_decides_the_start() -> None:
    def start(seed: int, noise: int) -> dict:
        torch.manual_seed(noise)
        return lora.attach(tiny_transformer(), replace(CONFIG, seed=seed))

    one, two, other = start(1, 5), start(1, 6), start(2, 5)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_targets_that_match_nothing_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="matches no layer"):
        lora.attach(tiny_transformer(), replace(CONFIG, lora_targets=("attn.to_z",)))


def test_every_block_and_ending_that_the_model_has_not_is_named() -> None:
    """None is dropped silently, though the others would do."""
    changes = {"lora_targets": ("attn.to_q", "to_z", "*", "x:y"), "single_blocks": (1, 2, 99), "double_blocks": (0, 7)}
    with pytest.raises(ConfigError) as caught:
        lora.attach(tiny_transformer(single_blocks=2), replace(CONFIG, **changes))
    assert [(problem.key, problem.seen.split(" of ")[0], problem.hint) for problem in caught.value.problems] == [
        ("single_blocks", f"names 2, 99, which {CONFIG.base_model} does not have", "Its single blocks are 0 to 1."),
        ("double_blocks", f"names 7, which {CONFIG.base_model} does not have", "Its double blocks are 0 to 1."),
        ("lora_targets", '"to_z" matches no layer', "Name endings such as attn.to_q."),
        ("lora_targets", '"x:y" matches no layer', "Name endings such as attn.to_q."),
    ]


def test_a_model_without_single_blocks() -> None:
    with pytest.raises(ConfigError, match="It has no single blocks"):
        lora.attach(tiny_transformer(single_blocks=0), replace(CONFIG, single_blocks=(0,)))
    assert lora.attach(tiny_transformer(single_blocks=0), replace(CONFIG, lora_targets="xflux"))


def test_an_ending_of_blocks_that_are_not_chosen_is_no_mistake() -> None:
    config = replace(CONFIG, lora_targets=("attn.to_q", "single:proj_out"), single_blocks=())
    assert all(name.startswith("transformer_blocks.") for name in lora.attach(tiny_transformer(), config))


def saved(path: Path, config: TrainConfig, form: str = "diffusers") -> dict:
    """An adapter file as a run with that config writes it, and the weights that are in it."""
    adapters = lora.attach(tiny_transformer(), config)
    shake(adapters)
    weights = {name: p.detach() for name, p in adapters.items()}
    lora_files.write(path, weights, form, scale=config.alpha / config.rank)
    return weights


def started(path: Path, config: TrainConfig) -> Any:
    transformer = tiny_transformer()
    lora.attach(transformer, replace(config, lora_init=str(path)))
    return transformer


@pytest.mark.parametrize("form", ["diffusers", "kohya", "xlabs"])
@pytest.mark.parametrize(("source", "alpha"), [("xflux", None), ("xflux", 2.0), (LORA_TARGETS["xflux"], 2.0)])
def test_a_run_goes_on_from_a_file(tmp_path: Path, form: str, source: Any, alpha: float | None) -> None:
    """Of any format, fused or not, whatever the scales of both runs: the first output is that of the file."""
    config = replace(CONFIG, lora_targets=source, lora_alpha=alpha)
    path = tmp_path / "init.safetensors"
    saved(path, config, form)
    wanted = tiny_transformer()
    lora.attach_file(wanted, path)
    apart = started(path, replace(CONFIG, lora_targets=LORA_TARGETS["xflux"], lora_alpha=12.0))
    # q, k and v that are apart have three times the rank together.
    rank = 4 if source == "xflux" else 12
    together = started(path, replace(CONFIG, lora_targets="xflux", lora_alpha=12.0, rank=rank))
    for transformer in (apart, together):
        assert torch.allclose(forward(transformer), forward(wanted), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(forward(wanted), forward(tiny_transformer()), atol=1e-2)


def test_what_a_file_leaves_of_the_rank_is_fresh_and_can_be_trained(tmp_path: Path) -> None:
    saved(tmp_path / "a", replace(CONFIG, lora_targets=LORA_TARGETS["xflux"]))
    transformer = started(tmp_path / "a", replace(CONFIG, lora_targets="xflux", rank=12))
    adapter = transformer.transformer_blocks[0].attn.to_out[0]
    assert adapter.lora_A.weight.any(dim=1).all()
    assert adapter.lora_B.weight[:, :4].any()
    assert not adapter.lora_B.weight[:, 4:].any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 8}, "rank 4 in the form that this run has, not 8. Set rank to 4"),
        ({"lora_targets": "all-linear"}, "no adapter for .*, which this run trains"),
        ({"lora_targets": ("attn.to_q",)}, "an adapter for .*, which this run does not train"),
        ({"double_blocks": (1,)}, r"an adapter for transformer_blocks\.0\..*, which this run does not train"),
        ({"lora_targets": "xflux", "single_blocks": (), "rank": 4}, "an adapter for single_transformer_blocks"),
    ],
)
def test_files_that_a_run_cannot_go_on_from(tmp_path: Path, changes: dict, said: str) -> None:
    """Said before anything is encoded, from the sizes alone, and again by the model itself."""
    saved(tmp_path / "a", replace(CONFIG, lora_targets="attn"))
    config = replace(CONFIG, **{"lora_targets": "attn", **changes}, lora_init=str(tmp_path / "a"))
    for act in (lambda: lora.check(config, TINY.linears()), lambda: lora.attach(tiny_transformer(), config)):
        with pytest.raises(CheckpointError, match=said):
            act()


def test_a_file_of_a_wider_model(tmp_path: Path) -> None:
    saved(tmp_path / "a", CONFIG)
    wide = replace(TINY, heads=4)
    with pytest.raises(CheckpointError, match=r"maps 32 to 32 channels at .*, not 64 to 64"):
        lora.check(replace(CONFIG, lora_init=str(tmp_path / "a")), wide.linears())
    with pytest.raises(CheckpointError, match="does not exist"):
        lora.check(replace(CONFIG, lora_init=str(tmp_path / "b")), TINY.linears())


def test_a_format_without_a_place_for_a_target_is_said_before_the_run() -> None:
    config = replace(CONFIG, lora_targets="diffusers", lora_formats=("kohya", "xlabs"))
    with pytest.raises(ConfigError, match=r"lora_formats: names xlabs.*no place for .*\.ff\.net\.0\.proj"):
        lora.check(config, TINY.linears())
    lora.check(replace(config, lora_targets="xflux"), TINY.linears())
    lora.check(replace(config, lora_formats=("kohya",)), TINY.linears())


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"<html>" * 100)
    save_file({"lora_unet_double_blocks_0.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "kohya")
    both = {f"transformer.no.such.layer.lora_{factor}.weight": torch.zeros(2, 2) for factor in "AB"}
    save_file(both, tmp_path / "other")
    for name in ("page", "kohya", "other", "missing"):
        with pytest.raises(CheckpointError):
            lora.attach_file(tiny_transformer(), tmp_path / name)


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    adapters = lora.attach(tiny_transformer(), CONFIG)
    other = {name: torch.zeros(p.shape[0] + 1, *p.shape[1:]) for name, p in adapters.items()}
    with pytest.raises(CheckpointError, match=r"lora_A\.weight is \(5, 32\), not \(4, 32\)"):
        lora.fill(adapters, other, tmp_path)
