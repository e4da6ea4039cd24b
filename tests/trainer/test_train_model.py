"""Loading the base model: tensor by tensor, in the wanted format, with a sentence for every broken file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402
from trainer_kit import tiny_flux  # noqa: E402
from xflux_trainer import model  # noqa: E402
from xflux_trainer.encoders import TextEncoders  # noqa: E402
from xflux_trainer.errors import ModelError  # noqa: E402
from xflux_trainer.layout import Base  # noqa: E402

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shutil.copytree(tiny_flux(), tmp_path / "flux")
    return tmp_path / "flux"


def copies(file: Path) -> dict:
    """Tensors that stay what they are when the file under them is written anew: those of `load_file` are its pages."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def shard(base: Path) -> None:
    """Cut the transformer's file into two, as FLUX.1-dev's is into three."""
    place = base / "transformer"
    tensors = load_file(place / FILE)
    names = sorted(tensors)
    parts = {"00001-of-00002": names[::2], "00002-of-00002": names[1::2]}
    weight_map = {}
    for part, keys in parts.items():
        file = f"diffusion_pytorch_model-{part}.safetensors"
        save_file({key: tensors[key] for key in keys}, place / file)
        weight_map |= dict.fromkeys(keys, file)
    (place / FILE).unlink()
    (place / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_those_of_the_file(base: Path, sharded: bool, dtype: torch.dtype) -> None:
    if sharded:
        shard(base)
    ours = model.load_transformer(Base.of(base), dtype, CPU)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(tiny_flux() / "transformer", torch_dtype=dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))


def refuse(base: Path, text: str) -> None:
    with pytest.raises(ModelError) as caught:
        model.load_transformer(Base.of(base), torch.bfloat16, CPU)
    assert text in str(caught.value), caught.value
    assert caught.value.hint


def test_broken_weights(base: Path) -> None:
    file = base / "transformer" / FILE
    whole, tensors = file.read_bytes(), copies(file)
    file.write_bytes(whole[: len(whole) // 2])
    refuse(base, "broken or cut short")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuse(base, "broken or cut short")
    name = "proj_out.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    refuse(base, f"lacks 1 tensors, the first is {name}")
    save_file({**tensors, "extra": torch.zeros(2)}, file)
    refuse(base, "holds a tensor extra")
    save_file({**tensors, name: torch.zeros(2, 2)}, file)
    refuse(base, f"{name} in")
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}, file)
    refuse(base, "float8_e4m3fn weights, which cannot be trained")
    file.unlink()
    refuse(base, "holds neither")


def test_a_missing_shard(base: Path) -> None:
    shard(base)
    (base / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    refuse(base, "lacks diffusion_pytorch_model-00002-of-00002.safetensors")
    (base / "transformer" / f"{FILE}.index.json").write_text("[]")
    refuse(base, "is not a list of shards")


def test_resolve(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.resolve(str(base)) == Base.of(base)
    shutil.rmtree(base / "vae")
    with pytest.raises(ModelError, match="it has no vae"):
        model.resolve(str(base))
    for name in (str(tmp_path / "no"), "./no/where", "nowhere", "a/b/c"):
        with pytest.raises(ModelError, match="does not exist"):
            model.resolve(name)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/no-such-model"):
        model.resolve("nobody/no-such-model")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"num_layers": 1}'])
def test_a_config_that_describes_no_flux(base: Path, text: str) -> None:
    (base / "transformer" / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be read as a FLUX"):
        model.read_spec(Base.of(base))


def test_broken_encoders_are_named(base: Path) -> None:
    file = base / "text_encoder_2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="text_encoder_2"):
        TextEncoders(Base.of(base), CPU, 16)
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(ModelError, match="tokenizer"):
        TextEncoders(Base.of(base), CPU, 16)


def test_text_embeddings_are_the_pipelines() -> None:
    pipeline = diffusers.FluxPipeline.from_pretrained(tiny_flux(), torch_dtype=torch.bfloat16)
    with torch.no_grad():
        theirs, pooled, _ = pipeline.encode_prompt("a cat on a table", None, max_sequence_length=24)
    text, own_pooled = TextEncoders(Base.of(tiny_flux()), CPU, 24).encode("a cat on a table")
    assert torch.equal(text, theirs[0])
    assert torch.equal(own_pooled, pooled[0])


def test_the_fingerprint_follows_the_weights(base: Path) -> None:
    before = model.fingerprint(base / "vae")
    assert before == model.fingerprint(tiny_flux() / "vae")  # a copy is the same model
    file = base / "vae" / FILE
    tensors = copies(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, file)
    assert model.fingerprint(base / "vae") != before


def test_no_buffer_is_left_on_the_meta_device_by_full_size() -> None:
    """FLUX.1-dev's own sizes: everything that is not in the file would stay without values."""
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    assert list(transformer.buffers()) == []
    assert transformer.state_dict().keys() == dict(transformer.named_parameters()).keys()
