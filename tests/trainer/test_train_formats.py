"""Adapter files: every format read and written, against diffusers' own loader and X-Flux's names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")  # diffusers' loader wants it

from diffusers.loaders import lora_conversion_utils as converters  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save, save_file  # noqa: E402
from test_train_lora import CONFIG, forward, saved  # noqa: E402
from trainer_kit import keep_signals  # noqa: E402, F401
from trainer_model import TINY, tiny_transformer  # noqa: E402
from xflux_trainer import cli, fused, lora, lora_files  # noqa: E402
from xflux_trainer.errors import CheckpointError  # noqa: E402
from xflux_trainer.spec import FLUX_DEV, adapters_of  # noqa: E402
from xflux_trainer.targets import FILES, Adapter  # noqa: E402
from xflux_trainer.tensorfile import write_whole  # noqa: E402

FORMS = list(FILES)
HIDDEN = TINY.hidden


def noise(*shape: int, key: object = 0) -> torch.Tensor:
    return torch.randn(shape, generator=lora.generator("noise", key, shape)) * 0.1


def theirs(path: Path) -> Any:
    """A tiny transformer with a file's adapters, put there by diffusers' own loader."""
    transformer = tiny_transformer()
    loader = diffusers.FluxPipeline
    state, alphas = loader.lora_state_dict(path.parent, weight_name=path.name, return_alphas=True)
    assert all(name.startswith("transformer.") for name in state)
    loader.load_lora_into_transformer(state, alphas, transformer)
    return transformer


def ours(path: Path) -> Any:
    transformer = tiny_transformer()
    lora.attach_file(transformer, path)
    return transformer


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize(
    ("form", "targets", "single_blocks"),
    [
        ("diffusers", "xflux", None),
        ("diffusers", "diffusers", None),
        ("xlabs", "xflux", None),
        ("xlabs", "attn", (1,)),
        ("xlabs", ("attn.to_k", "single:proj_out"), None),
        # diffusers' converter has the sizes of FLUX.1-dev's single blocks written into it: see below.
        ("kohya", "xflux", ()),
        ("kohya", "diffusers", ()),
        (
            "kohya",
            (
                "transformer_blocks.1.attn.to_v",
                "attn.add_k_proj",
                "norm1.linear",
                "single:norm.linear",
                "single:proj_out",
            ),
            None,
        ),
    ],
)
def test_diffusers_loads_the_file_and_computes_the_same(
    tmp_path: Path, form: str, targets: Any, single_blocks: Any, alpha: float | None
) -> None:
    config = replace(CONFIG, lora_targets=targets, lora_alpha=alpha, single_blocks=single_blocks)
    path = tmp_path / FILES[form]
    weights = saved(path, config, form)
    trained = tiny_transformer()
    lora.fill(lora.attach(trained, config), weights, path)
    wanted = forward(trained)
    assert not torch.allclose(wanted, forward(tiny_transformer()), atol=1e-2)
    for batch in (1, 3):
        wanted = forward(trained, batch=batch)
        assert torch.allclose(forward(theirs(path), batch=batch), wanted, rtol=1e-4, atol=1e-5)
        assert torch.allclose(forward(ours(path), batch=batch), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "targets",
    ["xflux", "attn", "all-linear", ("attn.to_q",), ("to_k", "proj_mlp", "to_add_out"), ("to_q", "to_k", "to_v")],
    ids=str,
)
def test_what_is_written_is_read_again(tmp_path: Path, form: str, targets: Any) -> None:
    """The same adapters of the same ranks, to the bit, whatever stands beside them in the file."""
    if form == "xlabs" and (targets == "all-linear" or "proj_mlp" in targets):
        with pytest.raises(CheckpointError, match="no place for an adapter of"):
            saved(tmp_path / "a", replace(CONFIG, lora_targets=targets), form)
        return
    weights = saved(tmp_path / "a", replace(CONFIG, lora_targets=targets), form)
    read = lora_files.read(tmp_path / "a")
    assert set(read) == set(weights)
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    with safe_open(tmp_path / "a", framework="pt") as file:
        rank = max(file.get_tensor(name).shape[0] for name in file.keys() if "down" in name or "_A" in name)  # noqa: SIM118
        assert file.metadata()["rank"] == str(rank)


@pytest.mark.parametrize("form", FORMS)
def test_fresh_adapters_are_read_again(tmp_path: Path, form: str) -> None:
    """All B are zero, and no column shows whose it is: the fused form keeps them all."""
    adapters = lora.attach(tiny_transformer(), replace(CONFIG, lora_targets="xflux"))
    weights = {name: parameter.detach() for name, parameter in adapters.items()}
    lora_files.write(tmp_path / "a", weights, form)
    read = lora_files.read(tmp_path / "a")
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    assert set(read) == set(weights)


def test_a_run_writes_every_format_that_it_is_asked_for(tmp_path: Path) -> None:
    config = replace(CONFIG, lora_targets="xflux", lora_formats=("xlabs", "kohya", "diffusers"), lora_alpha=8.0)
    weights = saved(tmp_path / "x", config)
    paths = lora_files.write_all(tmp_path / "out", weights, config)
    assert [path.name for path in paths] == [FILES[form] for form in config.formats]
    outputs = [forward(ours(path)) for path in paths]
    assert all(torch.allclose(output, outputs[0], rtol=1e-5, atol=1e-6) for output in outputs)
    usual = lora_files.write_all(tmp_path / "b", weights, replace(config, lora_formats=None))
    assert [path.name for path in usual] == ["pytorch_lora_weights.safetensors", "lora.safetensors"]
    with safe_open(paths[1], framework="pt") as file:
        about = file.metadata()
    assert about["base_model"] == config.base_model
    assert about["alpha"] == "8"
    assert about["ss_network_dim"] == about["rank"] == "4"


def xlabs_names(double: tuple[int, ...], single: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every matrix pair of X-Flux's file, as its two processors name them."""
    h = HIDDEN
    sizes = {"qkv_lora1": (h, 3 * h), "proj_lora1": (h, h), "qkv_lora2": (h, 3 * h), "proj_lora2": (h, h)}
    names = {f"double_blocks.{n}.processor.{part}": size for n in double for part, size in sizes.items()}
    for n in single:
        names[f"single_blocks.{n}.processor.qkv_lora"] = (h, 3 * h)
        names[f"single_blocks.{n}.processor.proj_lora"] = (5 * h, h)
    return names


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_file_of_xflux(tmp_path: Path, prefix: str) -> None:
    """Built by hand after X-Flux's names; diffusers' converter says which stream is which."""
    tensors = {}
    for name, (inputs, outputs) in xlabs_names((0, 1), (1,)).items():
        tensors[f"{prefix}{name}.down.weight"] = noise(3, inputs, key=name)
        tensors[f"{prefix}{name}.up.weight"] = noise(outputs, 3, key=name)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    output = forward(ours(path))
    assert torch.allclose(output, forward(theirs(path)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output, forward(tiny_transformer()), atol=1e-2)
    weights = lora_files.read(path)
    wanted = adapters_of(TINY.linears(), "xflux", single_blocks=(1,))
    assert set(fused.pairs(weights)) == {adapter.name for adapter in wanted}
    # A run goes on from it, and writes it again as it was.
    config = replace(CONFIG, lora_targets="xflux", rank=3, single_blocks=(1,), lora_init=str(path))
    adapters = lora.attach(tiny_transformer(), config)
    lora_files.write(tmp_path / "again", {name: p.detach() for name, p in adapters.items()}, "xlabs")
    again = load_file(tmp_path / "again")
    assert {prefix + name for name in again} == set(tensors)
    assert all(torch.equal(tensor, tensors[prefix + name]) for name, tensor in again.items())


@pytest.mark.parametrize(
    ("targets", "rank"), [("xflux", 4), ("attn", 12), (("attn.to_q",), 4), (("to_k", "to_v", "to_add_out"), 8)], ids=str
)
def test_xfluxs_loader_finds_whole_blocks_of_one_rank(tmp_path: Path, targets: Any, rank: int) -> None:
    """It takes the rank from the first matrix, and loads every block strictly."""
    saved(tmp_path / "a", replace(CONFIG, lora_targets=targets, single_blocks=(1,)), "xlabs")
    tensors = load_file(tmp_path / "a")
    wanted = {}
    for name, (inputs, outputs) in xlabs_names((0, 1), (1,)).items():
        wanted |= {f"{name}.down.weight": (rank, inputs), f"{name}.up.weight": (outputs, rank)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == wanted


def single_block(names: tuple[str, ...], rank: int) -> dict[str, torch.Tensor]:
    """Adapters of FLUX.1-dev's own sizes in one single block."""
    layers = {layer.name: layer for layer in FLUX_DEV.linears()}
    weights = {}
    for name in (f"single_transformer_blocks.5.{name}" for name in names):
        layer = layers.get(name) or Adapter(name, (), FLUX_DEV.hidden, 3 * FLUX_DEV.hidden)
        weights[f"{name}.lora_A.weight"] = noise(rank, layer.inputs, key=name)
        weights[f"{name}.lora_B.weight"] = noise(layer.outputs, rank, key=name)
    return weights


def products(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each layer's adapter makes of a few vectors; layers that it leaves alone are left out."""
    parts = fused.explode(fused.pairs(weights))
    made = {name: up @ (down @ noise(down.shape[1], 3)) for name, (down, up) in parts.items()}
    return {name: product for name, product in made.items() if product.any()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(two)
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5) for name in one)


def converted(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """kohya's tensors as diffusers' converter understands them, by inner names."""
    state = converters._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize(
    "names",
    [
        ("attn.to_qkv",),
        ("attn.to_qkv", "proj_mlp"),
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn.to_k",),
        ("attn.to_v", "proj_mlp"),
    ],
    ids=str,
)
def test_kohyas_linear1(names: tuple[str, ...], rank: int) -> None:
    """q, k, v and the feed-forward layer of a single block in one matrix, written for diffusers' converter and back."""
    weights = single_block(names, rank)
    tensors = lora_files.to_format(fused.pairs(weights), "kohya")
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(tensors) == {f"lora_unet_single_blocks_5_linear1.{end}" for end in ends}
    assert tensors["lora_unet_single_blocks_5_linear1.lora_up.weight"].shape == (21504, rank * len(names))
    same(products(converted(tensors)), products(weights))
    read = fused.flat(fused.fuse(lora_files.kohya.read(tensors)))
    same(products(read), products(weights))
    if names != ("attn.to_qkv", "proj_mlp"):  # these two share a matrix of dense columns: read as such
        assert {name: tensor.shape for name, tensor in read.items()} == {n: t.shape for n, t in weights.items()}


@pytest.mark.parametrize("alpha", [1.0, 8.0, None])
def test_a_file_of_sd_scripts(tmp_path: Path, alpha: float | None) -> None:
    """Dense matrices and an alpha of its own, as its default file has them."""
    h, mlp = FLUX_DEV.hidden, FLUX_DEV.mlp
    sizes = {
        "double_blocks_3_img_attn_qkv": (h, 3 * h), "double_blocks_3_txt_attn_qkv": (h, 3 * h),
        "double_blocks_3_img_attn_proj": (h, h), "double_blocks_3_txt_mlp_0": (h, mlp),
        "double_blocks_3_img_mlp_2": (mlp, h), "double_blocks_3_txt_mod_lin": (h, 6 * h),
        "single_blocks_7_linear1": (h, 3 * h + mlp), "single_blocks_7_linear2": (h + mlp, h),
        "single_blocks_7_modulation_lin": (h, 3 * h),
    }  # fmt: skip
    tensors = {}
    for name, (inputs, outputs) in sizes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = noise(2, inputs, key=name).bfloat16()
        tensors[f"lora_unet_{name}.lora_up.weight"] = noise(outputs, 2, key=name).bfloat16()
        if alpha is not None:
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "a")
    # In fp32 on both sides: the converter's own products would be rounded to bf16.
    # diffusers 0.32 wants an alpha; one of the rank's size stands for none.
    known = {f"lora_unet_{name}.alpha": torch.tensor(2.0) for name in sizes}
    whole = converted({name: tensor.float() for name, tensor in {**known, **tensors}.items()})
    same(products(lora_files.read(tmp_path / "a")), products(whole))


def test_the_layers_outside_the_blocks(tmp_path: Path) -> None:
    """In Black Forest Labs' model the last modulation has shift and scale the other way round."""
    ends = tuple(layer.name for layer in TINY.linears() if "blocks" not in layer.name)
    weights = saved(tmp_path / "a", replace(CONFIG, lora_targets=ends), "kohya")
    tensors = load_file(tmp_path / "a")
    up = weights["norm_out.linear.lora_B.weight"]
    assert torch.equal(
        tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"], torch.cat([up[HIDDEN:], up[:HIDDEN]])
    )
    same(products(lora_files.read(tmp_path / "a")), products(weights))
    try:
        told = converted(tensors)
    except ValueError as error:  # diffusers 0.32 knows none of these layers
        assert "Incompatible keys" in str(error)
        return
    same(products(told), products(weights))


def test_scales_that_diffusers_writes_beside_the_tensors(tmp_path: Path) -> None:
    """Its scripts leave alpha in the metadata; others leave it as a tensor. A pattern is for layers by their ends."""
    weights = {name: noise(*shape) for name, shape in (("A", (4, HIDDEN)), ("B", (HIDDEN, 4)))}
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v")
    tensors = {f"transformer.{layer}.lora_{n}.weight": w.clone() for layer in layers for n, w in weights.items()}
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.to_k": 2}, "target_modules": ["to_q"]}
    about = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}

    def ups(tensors: dict[str, torch.Tensor], about: dict[str, str] | None) -> list[float]:
        save_file(tensors, tmp_path / "a", about)
        parts = fused.explode(fused.pairs(lora_files.read(tmp_path / "a")))
        return [float((parts[layer][1] / weights["B"]).mean()) for layer in layers]

    assert ups(tensors, about) == pytest.approx([2, 0.5, 2])
    assert ups(tensors, None) == pytest.approx([1, 1, 1])
    own = {f"transformer.{layers[2]}.alpha": torch.tensor(1.0)}
    assert ups({**tensors, **own}, about) == pytest.approx([2, 0.5, 0.25])
    about["lora_adapter_metadata"] = json.dumps({"transformer.lora_alpha": 8, "transformer.use_rslora": True})
    assert ups(tensors, about) == pytest.approx([4, 4, 4])
    for broken in ("{", "[]", '{"transformer.lora_alpha": "x"}'):
        with pytest.raises(CheckpointError, match="lora_adapter_metadata cannot be read"):
            ups(tensors, {"lora_adapter_metadata": broken})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "has one factor only"),
        (["lora_unet_double_blocks_0_img_attn_what.lora_down.weight"], "img_attn_what"),
        (["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"], "dora_scale"),
        (["lora_unet_img_in.alpha", "lora_te1_text_model.lora_down.weight"], "text encoders are not trained here"),
        (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "ip_adapter"),
        (["double_blocks.0.processor.qkv_lora1.up.weight"], "has one factor only"),
        (["transformer.x_embedder.lora_A.weight"], "has one factor only"),
        (["transformer.x_embedder.lora_magnitude_vector"], "it holds transformer.x_embedder.lora_magnitude_vector"),
        (["double_blocks.0.img_attn.qkv.weight"], "it holds double_blocks"),
        ([], "it holds nothing"),
    ],
    ids=str,
)
def test_files_that_are_something_else(tmp_path: Path, names: list[str], said: str) -> None:
    save_file({name: torch.zeros(3, 3) if "alpha" not in name else torch.ones(()) for name in names}, tmp_path / "a")
    with pytest.raises(CheckpointError, match=said):
        lora_files.read(tmp_path / "a")


def test_an_xflux_file_of_zeros_and_a_qkv_of_odd_height(tmp_path: Path) -> None:
    name = "single_blocks.0.processor.qkv_lora"
    for down, up, said in (
        (torch.zeros(2, 4), torch.zeros(12, 2), "nothing but zeros"),
        (torch.ones(2, 4), torch.ones(10, 2), "has 10 rows"),
        (torch.ones(2, 4), torch.ones(12, 3), "the factors of .* are"),
        (torch.ones(4), torch.ones(12, 4), "the factors of .* are"),
    ):
        save_file({f"{name}.down.weight": down, f"{name}.up.weight": up}, tmp_path / "a")
        with pytest.raises(CheckpointError, match=said):
            lora_files.read(tmp_path / "a")


def test_half_precision_files_are_half_as_large(tmp_path: Path) -> None:
    weights = saved(tmp_path / "x", replace(CONFIG, rank=64))
    lora_files.write(tmp_path / "a", weights)
    lora_files.write(tmp_path / "b", weights, dtype=torch.bfloat16)
    assert (tmp_path / "b").stat().st_size < 0.55 * (tmp_path / "a").stat().st_size


@pytest.mark.usefixtures("keep_signals")
def test_convert_from_format_to_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path / "a.safetensors", replace(CONFIG, lora_targets="attn"))
    path = tmp_path / "a.safetensors"

    def convert(*arguments: str) -> tuple[int, str]:
        code = cli.main(["convert", *arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, text = convert("--lora", str(path), "--format", "xlabs")
    assert code == 0
    assert "the rank grows from 4 to 12" in text
    assert str(tmp_path / "a_xlabs.safetensors") in text
    code, text = convert("--lora", str(tmp_path / "a_xlabs.safetensors"), "--output", str(tmp_path / "b"))
    assert (code, "note" in text) == (0, False)
    read = lora_files.read(tmp_path / "b")
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    with safe_open(tmp_path / "b", framework="pt") as file:
        assert file.metadata()["rank"] == "4"
    code, text = convert("--lora", str(path), "--format", "kohya", "--dtype", "bf16", "--output", str(tmp_path / "c"))
    assert code == 0
    assert {t.dtype for n, t in load_file(tmp_path / "c").items() if "alpha" not in n} == {torch.bfloat16}

    saved(path, replace(CONFIG, lora_targets="all-linear"))
    code, text = convert("--lora", str(path), "--format", "xlabs")
    assert code == 1
    assert "no place for an adapter of" in text
    assert convert("--lora", str(tmp_path / "none"))[0] == 1
    for arguments in (
        [],
        ["--lora", str(path), "--checkpoint", "x"],
        ["--lora", str(tmp_path)],
        ["--checkpoint", str(path)],
    ):
        assert convert(*arguments)[0] == 2


@pytest.mark.usefixtures("keep_signals")
def test_sample_takes_the_first_format_that_the_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("img_dir: x\nlora_formats: [kohya, diffusers]\n", encoding="utf-8")
    assert cli.main(["sample", "--config", str(path)]) == 1
    assert "pytorch_lora_weights_kohya.safetensors does not exist" in capsys.readouterr().err


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    """safetensors' writer shuffles the metadata anew in every process, so that two runs of one seed had two hashes."""
    layer = "transformer_blocks.0.attn.to_qkv"
    weights = {f"{layer}.lora_A.weight": noise(4, 8), f"{layer}.lora_B.weight": noise(18, 4)}
    about = {str(number): "x" for number in range(30)}
    for form, dtype in (("diffusers", torch.float32), ("kohya", torch.bfloat16), ("xlabs", torch.bfloat16)):
        path = tmp_path / f"{form}.safetensors"
        lora_files.write(path, weights, form, about=about, dtype=dtype)
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert list(header["__metadata__"]) == sorted(header["__metadata__"])
        assert len(header["__metadata__"]) > 30
        # Besides that order they are the bytes that safetensors writes.
        tensors = load_file(path)
        write_whole(tmp_path / "own", tensors, {"format": "pt"})
        assert (tmp_path / "own").read_bytes() == save(tensors, {"format": "pt"})
        lora_files.write(path, dict(reversed(weights.items())), form, about=dict(reversed(about.items())), dtype=dtype)
        assert path.read_bytes() == raw
