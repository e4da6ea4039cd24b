"""Adapters: fp32 on a bf16 model, the same numbers as peft's, files that diffusers loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from peft.tuners.lora import layer as peft_layer  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from trainer_kit import tiny_flux  # noqa: E402
from trainer_model import TINY, tiny_transformer  # noqa: E402
from xflux_trainer import lora  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import CheckpointError, ConfigError  # noqa: E402
from xflux_trainer.memory import adapter_parameters  # noqa: E402
from xflux_trainer.spec import LORA_TARGETS  # noqa: E402

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


def test_our_layer_computes_what_pefts_does() -> None:
    ours, theirs = tiny_transformer(), tiny_transformer()
    config = replace(CONFIG, lora_alpha=10.0)
    shake(lora.attach(ours, config))
    shake(lora.attach(theirs, config))
    for module in theirs.modules():
        if isinstance(module, lora.AdapterLinear):
            module.__class__ = peft_layer.Linear
    a, b = ours(**inputs(), return_dict=False)[0], theirs(**inputs(), return_dict=False)[0]
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(a, tiny_transformer()(**inputs(), return_dict=False)[0], atol=1e-3)


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


@pytest.mark.parametrize("alpha", [None, 1.0, 16.0])
def test_a_file_gives_the_same_outputs_again(tmp_path: Path, alpha: float | None) -> None:
    config = replace(CONFIG, lora_targets="all-linear", lora_alpha=alpha)
    trained = tiny_transformer()
    adapters = lora.attach(trained, config)
    shake(adapters)
    path = tmp_path / lora.ADAPTER_FILE
    lora.write(path, {name: p.detach() for name, p in adapters.items()}, config)
    loaded = tiny_transformer()
    lora.attach_file(loaded, path)
    a, b = trained(**inputs(), return_dict=False)[0], loaded(**inputs(), return_dict=False)[0]
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["rank"] == "4"
        assert file.metadata()["base_model"] == config.base_model
        assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_diffusers_loads_the_file_and_computes_the_same(tmp_path: Path, alpha: float | None) -> None:
    config = replace(CONFIG, lora_alpha=alpha, lora_targets="diffusers")
    pipeline = diffusers.FluxPipeline.from_pretrained(tiny_flux())
    width = pipeline.transformer.config
    given = inputs() | {
        "encoder_hidden_states": torch.randn(2, 5, width.joint_attention_dim),
        "pooled_projections": torch.randn(2, width.pooled_projection_dim),
    }
    before = pipeline.transformer(**given, return_dict=False)[0].detach()
    ours = diffusers.FluxTransformer2DModel.from_pretrained(tiny_flux() / "transformer").requires_grad_(False)
    adapters = lora.attach(ours, config)
    shake(adapters)
    lora.write(tmp_path / lora.ADAPTER_FILE, {name: p.detach() for name, p in adapters.items()}, config)

    pipeline.load_lora_weights(tmp_path, weight_name=lora.ADAPTER_FILE)
    theirs = pipeline.transformer(**given, return_dict=False)[0]
    assert torch.allclose(theirs, ours(**given, return_dict=False)[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(theirs, before, atol=1e-2)


def test_bf16_files_are_half_as_large(tmp_path: Path) -> None:
    adapters = {name: p.detach() for name, p in lora.attach(tiny_transformer(), replace(CONFIG, rank=64)).items()}
    lora.write(tmp_path / "a", adapters, CONFIG)
    lora.write(tmp_path / "b", adapters, CONFIG, torch.bfloat16)
    assert (tmp_path / "b").stat().st_size < 0.55 * (tmp_path / "a").stat().st_size


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"<html>" * 100)
    save_file({"lora_unet_double_blocks_0.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "kohya")
    save_file({"transformer.no.such.layer.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other")
    for name in ("page", "kohya", "other", "missing"):
        with pytest.raises(CheckpointError):
            lora.attach_file(tiny_transformer(), tmp_path / name)


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    adapters = lora.attach(tiny_transformer(), CONFIG)
    other = {name: torch.zeros(p.shape[0] + 1, *p.shape[1:]) for name, p in adapters.items()}
    with pytest.raises(CheckpointError, match=r"lora_A\.weight is \(5, 32\), not \(4, 32\)"):
        lora.fill(adapters, other, tmp_path)
