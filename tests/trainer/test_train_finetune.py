"""The fine-tune: what is trained, by either family of names; and the model that comes out, as diffusers reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from bfl_kit import bfl_folder, diffusers_converter  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from trainer_kit import tiny_flux  # noqa: E402
from trainer_model import tiny_transformer  # noqa: E402
from xflux_trainer import bfl, finetune, flow, model  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import ConfigError, WriteError  # noqa: E402
from xflux_trainer.layout import Base  # noqa: E402

CPU = torch.device("cpu")


def config(*parts: str, **changes: Any) -> TrainConfig:
    return TrainConfig(img_dir="images", mode="finetune", train_parameters=parts, **changes)


@pytest.fixture(scope="module")
def full() -> nn.Module:
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(guidance_embeds=True)


@pytest.mark.parametrize(
    ("parts", "count"),
    [
        ((), 11_901_408_320),
        (("txt_attn",), 717_464_320),  # X-Flux's own choice: 717.5 M, as its trainer prints
        (("img_attn",), 717_464_320),
        (("txt_attn", "img_attn"), 19 * 75_522_560),
        (("txt_mlp",), 19 * 75_512_832),
        (("img_mlp", "txt_mlp"), 2 * 19 * 75_512_832),
        (("img_mod",), 19 * 56_641_536),
        (("double_blocks",), 6_456_794_624),
        (("transformer_blocks",), 6_456_794_624),
        (("single_blocks",), 5_380_488_704),
        (("single_blocks.1",), 141_591_808),  # and not 10 to 19
        (("single_transformer_blocks.1", "single_blocks.1.linear2"), 141_591_808),
        (("double_blocks.0", "transformer_blocks.1"), 2 * 339_831_296),
        (("linear1",), 38 * (28_321_024 - 256 + 37_761_024)),
        (("norm_added_q",), 19 * 128),
        (("query_norm.scale",), (2 * 19 + 38) * 128),
        (("guidance_in",), 10_229_760),
        (("time_text_embed.guidance_embedder",), 10_229_760),
        (("final_layer",), 18_880_512 + 196_672),
        (("img_in.bias",), 3072),
    ],
)
def test_what_is_trained_at_full_size(full: nn.Module, parts: tuple[str, ...], count: int) -> None:
    trained = finetune.select(full, config(*parts))
    assert sum(parameter.numel() for parameter in trained.values()) == count
    for name, parameter in full.named_parameters():
        assert parameter.requires_grad == (name in trained), name
        assert trained.get(name, parameter) is parameter


def test_txt_attn_is_what_xflux_calls_so(full: nn.Module) -> None:
    layers = {name.removeprefix("transformer_blocks.0.attn.") for name in finetune.select(full, config("txt_attn"))}
    linears = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    expected = {f"{layer}.{leaf}" for layer in linears for leaf in ("weight", "bias")}
    assert {name for name in layers if "." not in name.partition(".")[2]} == {
        *expected, "norm_added_q.weight", "norm_added_k.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ("txt_atn", "Did you mean txt_attn"),
        ("attn.to_w", "Did you mean attn.to_"),
        ("single_blocks.38", "Did you mean single_blocks."),
        ("to_", "Did you mean to_"),
        ("vae", "Names such as txt_attn"),
    ],
)
def test_a_name_of_nothing(full: nn.Module, part: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        finetune.select(full, config("img_attn", part, "neither"))
    assert [problem.key for problem in caught.value.problems] == ["train_parameters"] * 2
    assert f'"{part}" is in no name' in caught.value.problems[0].seen
    assert hint in caught.value.problems[0].hint


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_forward_and_backward_of_a_batch(batch: int) -> None:
    """An image does not see the others, checkpointing changes no gradient, padding is not attended to."""
    transformer = tiny_transformer()
    trained = finetune.select(transformer, config("txt_attn", "single_blocks.1"))
    velocity = model.Velocity(transformer, guidance=True)
    dice = torch.Generator().manual_seed(1)
    x_t, text, pooled = (torch.randn(batch, *shape, generator=dice) for shape in ((24, 64), (6, 24), (12,)))
    t, mask = torch.rand(batch, generator=dice), torch.ones(batch, 6, dtype=torch.bool)
    mask[0, 2:] = False

    def run(rows: slice, tokens: int = 6) -> Tensor:
        return velocity(
            x_t[rows], t[rows], text[rows, :tokens], pooled[rows], flow.image_ids(8, 12), flow.text_ids(tokens), 4.0,
            mask[rows, :tokens],
        )  # fmt: skip

    whole = run(slice(None))
    for k in range(batch):
        assert torch.allclose(whole[k : k + 1], run(slice(k, k + 1)), atol=1e-5)
    assert torch.allclose(whole[:1], run(slice(0, 1), tokens=2), atol=1e-5)
    assert not torch.allclose(whole[:1], velocity(
        x_t[:1], t[:1], text[:1], pooled[:1], flow.image_ids(8, 12), flow.text_ids(6), 4.0
    ), atol=1e-3)  # fmt: skip
    whole.square().mean().backward()
    plain = {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}
    assert plain.keys() == trained.keys()
    assert all(p.grad is None for name, p in transformer.named_parameters() if name not in trained)
    transformer.zero_grad()
    transformer.enable_gradient_checkpointing()
    run(slice(None)).square().mean().backward()
    for name, parameter in trained.items():
        assert torch.allclose(parameter.grad, plain[name], atol=1e-6), name


@pytest.fixture(scope="module")
def changed() -> dict[str, Tensor]:
    transformer = model.load_transformer(Base.of(tiny_flux()), torch.float32, CPU)
    trained = finetune.select(transformer, config("txt_attn"))
    return {name: parameter.detach() + 0.5 for name, parameter in trained.items()}


def outputs(transformer: nn.Module) -> Tensor:
    dice = torch.Generator().manual_seed(2)
    x_t, text, pooled = (torch.randn(2, *shape, generator=dice) for shape in ((24, 64), (6, 64), (64,)))
    with torch.no_grad():
        v: Tensor = model.Velocity(transformer.float(), guidance=True)(
            x_t, torch.tensor([0.2, 0.7]), text, pooled, flow.image_ids(8, 12), flow.text_ids(6), 4.0
        )
    return v


@pytest.mark.parametrize(("single", "sharded"), [(False, True), (True, False)])
def test_diffusers_reads_the_folder_and_the_single_file(
    changed: dict[str, Tensor], single: bool, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sharded:
        monkeypatch.setattr(finetune, "SHARD", 1_000_000)
    base = model.resolve(str(bfl_folder(tmp_path / "flux"))) if single else Base.of(tiny_flux())
    expected = model.load_transformer(base, torch.float32, CPU)
    expected.load_state_dict(changed, strict=False)
    folder = finetune.write(tmp_path / "out", iter(changed.items()), base, config(mixed_precision="no"))
    names = sorted(file.name for file in folder.glob("*.safetensors*"))
    assert len(names) > 4 if sharded else names == ["diffusion_pytorch_model.safetensors"]
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(folder)
    for name, value in expected.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    assert torch.equal(outputs(theirs), outputs(expected))
    # The same as BFL's single file, read by diffusers' own reader.
    file = bfl.write_single_of(folder, tmp_path / "tuned.safetensors", torch.float32)
    from diffusers.loaders import single_file_model

    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", diffusers_converter(128))
    read = diffusers.FluxTransformer2DModel.from_single_file(
        str(file), config=str(tmp_path / "out"), subfolder="transformer", local_files_only=True
    )
    assert torch.equal(outputs(read), outputs(expected))
    assert torch.equal(
        outputs(model.load_transformer(Base(**{**vars(base), "transformer": file}), torch.float32, CPU)),
        outputs(expected),
    )


def test_the_files_are_bf16_and_those_of_the_base_are_kept_to_the_bit(
    changed: dict[str, Tensor], tmp_path: Path
) -> None:
    base = Base.of(tiny_flux())
    stem = "diffusion_pytorch_model.safetensors"
    folder = finetune.write(tmp_path, iter(changed.items()), base, config())
    old, new = load_file(base.transformer / stem), load_file(folder / stem)
    assert old.keys() == new.keys()
    for name, value in new.items():
        assert torch.equal(value, changed[name].bfloat16() if name in changed else old[name]), name
    assert model.read_spec(Base(**{**vars(base), "transformer": folder})).heads == 4
    assert not list(tmp_path.glob(".xflux-tmp-*"))


def test_a_failed_write_leaves_nothing_and_uses_the_iterator_up(changed: dict[str, Tensor], tmp_path: Path) -> None:
    """Other ranks stand in the iterator's collectives: rank 0 must not leave them there."""
    given: list[str] = []

    def pieces() -> Iterator[tuple[str, Tensor]]:
        for number, (name, value) in enumerate(changed.items()):
            given.append(name)
            yield name, value[:1] if number == 3 else value

    with pytest.raises(ValueError, match="were not written"):
        finetune.write(tmp_path, pieces(), Base.of(tiny_flux()), config())
    assert given == list(changed)
    assert not list(tmp_path.iterdir())
    with pytest.raises(WriteError, match="would replace the base model's own"):
        finetune.write(tiny_flux(), pieces(), Base.of(tiny_flux()), config())
    assert given == 2 * list(changed)


def test_shards_hold_at_most_five_gigabytes(full: nn.Module) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in full.named_parameters()}
    plan = finetune.shards(shapes, 2)
    assert [name for members in plan.values() for name in members] == list(shapes)
    sizes = [sum(torch.Size(shapes[name]).numel() for name in members) * 2 for members in plan.values()]
    assert sum(sizes) == 2 * 11_901_408_320
    assert max(sizes) <= 5e9
    assert next(iter(plan)) == "diffusion_pytorch_model-00001-of-00005.safetensors"
