"""Black Forest Labs' single files: the names, by diffusers' own converter; the loading, by diffusers' own folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from bfl_kit import FILE, TEXT, bfl_folder, diffusers_converter, ldm_vae  # noqa: E402
from diffusers.loaders import single_file_utils  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from trainer_kit import tiny_flux  # noqa: E402
from xflux_trainer import bfl, find, model  # noqa: E402
from xflux_trainer.bfl_spec import read_local, read_single_file, transformer_config  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.encoders import ImageCodec, TextEncoders  # noqa: E402
from xflux_trainer.errors import ModelError  # noqa: E402
from xflux_trainer.layout import Base  # noqa: E402
from xflux_trainer.spec import FLUX_DEV, FLUX_SCHNELL, FluxSpec, read_folder  # noqa: E402

CPU = torch.device("cpu")
TRANSFORMER = "flux1-dev.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bfl_folder(tmp_path_factory.mktemp("bfl") / "flux")


@pytest.mark.parametrize("spec", [FLUX_DEV, FLUX_SCHNELL], ids=lambda spec: spec.name)
def test_the_names_are_those_of_diffusers_converter(spec: FluxSpec, tmp_path: Path) -> None:
    """FLUX.1's own rows, which the converter cuts by, in matrices of two columns."""
    with torch.device("meta"):
        module = diffusers.FluxTransformer2DModel(
            num_layers=2, num_single_layers=2, guidance_embeds=spec.guidance_embeds
        )
    shapes = {name: (*p.shape[:1], 2)[: p.dim()] for name, p in module.named_parameters()}
    dice = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=dice).bfloat16() for name, shape in shapes.items()}
    bfl.write_single(tmp_path / "x.safetensors", reversed(tensors.items()), shapes)
    stored = load_file(tmp_path / "x.safetensors")
    assert {"img_in.bias", "double_blocks.1.txt_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight"} <= set(
        stored
    )
    assert ("guidance_in.in_layer.bias" in stored) == spec.guidance_embeds
    theirs = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(dict(stored))
    assert theirs.keys() == tensors.keys()
    for name, value in theirs.items():
        assert torch.equal(value, tensors[name]), name


def test_every_name_of_the_model_has_a_place_and_no_other() -> None:
    with torch.device("meta"):
        module = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    assert all(bfl.place(name) for name, _ in module.named_parameters())
    for name in ("x_embedder", "norm1.linear.weight", "transformer_blocks.0.proj_mlp.weight", "proj_in.weight"):
        assert bfl.place(name) is None


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_is_the_model_of_the_folder(place: Path, tmp_path: Path, prefix: str) -> None:
    file = place / TRANSFORMER
    if prefix:
        file = tmp_path / "prefixed.safetensors"
        save_file({prefix + name: tensor for name, tensor in load_file(place / TRANSFORMER).items()}, file)
        shutil.copy(place / "ae.safetensors", tmp_path)
        for part in TEXT:
            (tmp_path / part).symlink_to(place / part)
    base = model.resolve(str(file))
    ours, theirs = (model.load_transformer(each, torch.float32, CPU) for each in (base, Base.of(tiny_flux())))
    settings = [{key: value for key, value in each.config.items() if key[0] != "_"} for each in (ours, theirs)]
    assert settings[0] == settings[1]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_the_spec_of_a_single_file(place: Path, tmp_path: Path) -> None:
    folder, single = model.read_spec(Base.of(tiny_flux())), model.read_spec(model.resolve(str(place)))
    assert single == FluxSpec(**{**vars(folder), "name": "flux1-dev"})
    assert folder == read_folder(tiny_flux()) == read_local(tiny_flux())
    assert single == read_local(place) == read_local(place / TRANSFORMER)
    with pytest.raises(ValueError, match="it has no transformer"):
        read_local(place / "tokenizer")
    tensors = load_file(place / TRANSFORMER)
    save_file({k: v for k, v in tensors.items() if "guidance" not in k}, tmp_path / "flux1-schnell.safetensors")
    schnell = read_single_file(tmp_path / "flux1-schnell.safetensors")
    assert not schnell.guidance_embeds
    assert not schnell.dynamic_shift
    config = transformer_config(schnell)
    assert diffusers.FluxTransformer2DModel.from_config(config).config.axes_dims_rope == [4, 14, 14]
    assert transformer_config(FLUX_DEV)["axes_dims_rope"] == [16, 56, 56]


def test_schnell_needs_no_guidance(place: Path, tmp_path: Path) -> None:
    flux = tmp_path / "flux1-schnell.safetensors"
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    save_file({k: v for k, v in load_file(place / TRANSFORMER).items() if "guidance" not in k}, flux)
    with pytest.raises(ModelError, match=r"holds flux1-dev.safetensors and flux1-schnell.safetensors"):
        model.resolve(str(tmp_path))
    (tmp_path / TRANSFORMER).unlink()
    base = model.resolve(str(tmp_path))
    assert base.transformer == flux
    velocity = model.Velocity(model.load_transformer(base, torch.float32, CPU), guidance=False)
    v = velocity(
        torch.randn(2, 4, 64), torch.rand(2), torch.randn(2, 3, 64), torch.randn(2, 64), torch.zeros(4, 3),
        torch.zeros(3, 3), 1.0,
    )  # fmt: skip
    assert v.shape == (2, 4, 64)


@pytest.mark.parametrize("single", [False, True])
def test_prepare_sees_block_after_block(place: Path, single: bool) -> None:
    base = model.resolve(str(place)) if single else Base.of(tiny_flux())
    seen: list[str] = []

    def prepare(name: str, module: nn.Module) -> None:
        seen.append(name)
        assert not any(parameter.is_meta or parameter.requires_grad for parameter in module.parameters()), name
        module.half()  # what it does with a block stays

    transformer = model.load_transformer(base, torch.float32, CPU, prepare)
    assert seen == [
        "time_text_embed", "context_embedder", "x_embedder", "transformer_blocks.0", "transformer_blocks.1",
        *(f"single_transformer_blocks.{k}" for k in range(4)), "norm_out", "proj_out",
    ]  # fmt: skip
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.float16}


def test_at_most_one_block_waits_for_prepare(place: Path) -> None:
    whole = model.empty_transformer(model.resolve(str(place)))
    left = {name for name, _ in whole.named_parameters()}
    made: list[nn.Module] = []

    def prepare(name: str, module: nn.Module) -> None:
        left.difference_update(f"{name}.{each}" for each, _ in module.named_parameters())
        made.append(module)
        module.to("meta")
        assert all(parameter.is_meta for each in made for parameter in each.parameters())

    model.load_transformer(model.resolve(str(place)), torch.bfloat16, CPU, prepare)
    assert not left


def test_the_vae_of_a_single_file(place: Path) -> None:
    """The tiny VAE has other groups than FLUX's 32, which no tensor tells: compared at 32."""
    codec = ImageCodec(model.resolve(str(place)), CPU, torch.float32)
    config = json.loads((tiny_flux() / "vae" / "config.json").read_text())
    theirs = diffusers.AutoencoderKL.from_config({**config, "norm_num_groups": 32})
    theirs.load_state_dict({k: v.float() for k, v in load_file(tiny_flux() / "vae" / FILE).items()})
    assert (codec.scale, codec.shift) == (0.3611, 0.1159)
    image = torch.rand(3, 32, 48) * 2 - 1
    with torch.no_grad():
        z = theirs.encode(image[None]).latent_dist.mode()[0]
        assert torch.equal(codec.encode(image), (z - 0.1159) * 0.3611)
        decoded = theirs.decode(z[None]).sample[0]
    assert torch.allclose(codec.decode((z - 0.1159) * 0.3611), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_the_vaes_full_size() -> None:
    from xflux_trainer.vae_file import vae_config

    with torch.device("meta"):
        real = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024,
        )  # fmt: skip
    names = ldm_vae({name: torch.empty(p.shape, device="meta") for name, p in real.named_parameters()})
    config = vae_config({name: tuple(tensor.shape) for name, tensor in names.items()})
    for key, value in config.items():
        assert list(real.config[key]) == value if isinstance(value, list) else real.config[key] == value, key


def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    import huggingface_hub._snapshot_download
    import huggingface_hub.constants
    import huggingface_hub.file_download

    for module in ("constants", "file_download", "_snapshot_download"):  # older releases have it in each
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(folder), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("FLUX_DEV", "FLUX_SCHNELL", "AE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def cached(cache: Path, repo: str) -> Path:
    """The folder of a repository in the hub's cache."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def text_repos(cache: Path) -> None:
    """X-Flux's two: each has weights and tokenizer in one folder, and CLIP's has the image half too."""
    t5, clip = cached(cache, find.T5_REPO), cached(cache, find.CLIP_REPO)
    for source, folder in (("text_encoder_2", t5), ("tokenizer_2", t5), ("text_encoder", clip), ("tokenizer", clip)):
        shutil.copytree(tiny_flux() / source, folder, dirs_exist_ok=True)
    config = json.loads((tiny_flux() / "text_encoder" / "config.json").read_text())
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    both = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": config, "vision_config": vision}
    (clip / "config.json").write_text(json.dumps(both))
    tensors = load_file(tiny_flux() / "text_encoder" / "model.safetensors")
    extra = {"logit_scale": torch.zeros(()), "vision_model.embeddings.class_embedding": torch.zeros(8)}
    save_file({**{k: v.clone() for k, v in tensors.items()}, **extra}, clip / "model.safetensors", {"format": "pt"})


CONFIG = TrainConfig(img_dir="images")


def test_xfluxs_variables(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that X-Flux trained on: its variables name the files, and the text encoders lie in the hub's cache."""
    cache = hub(tmp_path / "hub", monkeypatch)
    text_repos(cache)
    shutil.copy(place / TRANSFORMER, tmp_path / "mine.safetensors")
    monkeypatch.setenv("FLUX_DEV", str(tmp_path / "mine.safetensors"))
    with pytest.raises(ModelError, match=r"has no ae.safetensors beside it. black-forest-labs/FLUX.1-dev"):
        model.locate(CONFIG)
    monkeypatch.setenv("AE", str(place / "ae.safetensors"))
    base, notes = model.locate(CONFIG)
    assert base.transformer == tmp_path / "mine.safetensors"
    assert base.vae == place / "ae.safetensors"
    assert base.text_encoder == base.tokenizer
    assert len(notes) == 2
    assert "FLUX_DEV is" in notes[0]
    spec = model.read_spec(base)
    assert spec == FluxSpec(**{**vars(model.read_spec(Base.of(tiny_flux()))), "name": "mine"})
    for ours, theirs in zip(
        *(TextEncoders(b, CPU, 16).encode("a red square") for b in (base, Base.of(tiny_flux()))), strict=True
    ):
        assert torch.equal(ours, theirs)
    monkeypatch.setenv("FLUX_DEV", str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(ModelError, match=r"FLUX_DEV names .*nowhere"):
        model.locate(CONFIG)
    # A model that the config names itself is that one.
    assert model.locate(TrainConfig(img_dir="images", pretrained_model=str(tiny_flux()))) == (Base.of(tiny_flux()), ())


def test_what_xflux_left_in_the_hubs_cache(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = hub(tmp_path / "hub", monkeypatch)
    snapshot = cached(cache, "black-forest-labs/FLUX.1-dev")
    (snapshot / TRANSFORMER).symlink_to(place / TRANSFORMER)
    (snapshot / "ae.safetensors").symlink_to(place / "ae.safetensors")
    with pytest.raises(ModelError, match="openai/clip-vit-large-patch14"):
        model.locate(CONFIG)
    text_repos(cache)
    base, notes = model.locate(CONFIG)
    assert (base.transformer, base.vae) == (snapshot / TRANSFORMER, snapshot / "ae.safetensors")
    assert "X-Flux left in the cache" in notes[0]
    assert model.fingerprint(base.vae) == model.fingerprint(place / "ae.safetensors")
    with pytest.raises(ModelError, match="is not on this machine"):
        model.locate(TrainConfig(img_dir="images", model_name="flux-schnell"))
    # A download in diffusers' layout that was broken off.
    half = cached(cache, "somebody/flux")
    (half / "vae").mkdir()
    with pytest.raises(ModelError, match="it has no transformer, text_encoder"):
        model.resolve("somebody/flux")


def test_broken_single_files(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    file, whole = tmp_path / TRANSFORMER, (place / TRANSFORMER).read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(place / TRANSFORMER).items()}

    def refuse(text: str) -> None:
        with pytest.raises(ModelError, match=text) as caught:
            base = model.resolve(str(tmp_path))
            model.read_spec(base)
            model.load_transformer(base, torch.bfloat16, CPU)
        assert caught.value.hint

    file.write_bytes(whole[: len(whole) // 2])
    refuse("broken or cut short")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuse("not a safetensors file")
    save_file({"x": torch.zeros(2)}, file)
    refuse("its tensors are not those of Black Forest Labs' layout")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, file)
    refuse("float8_e4m3fn weights, which cannot be trained")
    save_file({**tensors, "text_encoders.x": torch.zeros(2)}, file)
    refuse("holds a tensor text_encoders.x")
    save_file({k: v for k, v in tensors.items() if k != "single_blocks.1.linear1.weight"}, file)
    refuse("lacks 4 tensors, the first is single_transformer_blocks.1")
    save_file({**tensors, "img_in.weight": torch.zeros(128, 384)}, file)
    refuse("it takes 384 channels and gives 64")
    file.write_bytes(whole)
    vae = tmp_path / "ae.safetensors"
    for content, text in ((vae.read_bytes()[:-9], "broken or cut short"), (whole, "is not FLUX.1's VAE")):
        vae.write_bytes(content)
        with pytest.raises(ModelError, match=text):
            ImageCodec(model.resolve(str(tmp_path)), CPU, torch.float32)
    vae.unlink()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"notes.txt is not a safetensors file"):
        model.resolve(str(tmp_path / "notes.txt"))


def test_diffusers_converter_at_the_tiny_size(place: Path) -> None:
    theirs = diffusers_converter(128)(load_file(place / TRANSFORMER))
    own = load_file(tiny_flux() / "transformer" / FILE)
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], own[name]) for name in own)
