"""The cache: an entry depends on all that it should, is made once, and is never another sample's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from trainer_kit import png, put, settings, squares, tiny_flux  # noqa: E402
from xflux_trainer import cache  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.data import list_samples, load_image  # noqa: E402
from xflux_trainer.encoders import ImageCodec, TextEncoders  # noqa: E402
from xflux_trainer.errors import DataError  # noqa: E402
from xflux_trainer.layout import Base  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402

CPU = torch.device("cpu")


def config(folder: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**settings(folder, cache_dir=str(folder / "cache"), **changes))


def fill(config: TrainConfig, *prompts: str) -> tuple[list[cache.Entry], list[Path]]:
    samples, _ = list_samples(config.img_dir, config.caption_type)
    entries, texts = cache.fill(config, Base.of(tiny_flux()), Ranks(Launch()), {config.img_dir: samples}, list(prompts))
    return entries[config.img_dir], texts


def counts(capsys: pytest.CaptureFixture[str]) -> tuple[int, int]:
    """Captions and images that were encoded since the last time it was asked."""
    out = capsys.readouterr().out
    captions, images = re.search(r"encoding (\d+) captions", out), re.search(r"encoded (\d+) images", out)
    return int(captions[1]) if captions else 0, int(images[1]) if images else 0


def state(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_an_entry_is_what_the_encoders_say_of_that_sample(tmp_path: Path) -> None:
    squares(tmp_path / "images", ((64, 64), (96, 48)))
    run = config(tmp_path)
    entries, _ = fill(run)
    samples, _ = list_samples(run.img_dir, "json")
    codec, texts = (
        ImageCodec(Base.of(tiny_flux()), CPU, torch.float32),
        TextEncoders(Base.of(tiny_flux()), CPU, run.max_text_tokens),
    )
    assert len({entry.latents for entry in entries}) == len({entry.text for entry in entries}) == 4
    for sample, entry in zip(samples, entries, strict=True):
        batch = cache.read_batch([entry])
        latents = codec.encode(load_image(sample.image, 64, None))
        text, pooled = texts.encode(sample.caption)
        assert torch.equal(batch.latents[0], latents)
        assert tuple(latents.shape) == entry.shape
        assert torch.equal(batch.text[0], text)
        assert torch.equal(batch.pooled[0], pooled)
    assert {entry.shape for entry in entries} == {(16, 8, 8), (16, 4, 8)}
    assert batch.text.dtype == batch.pooled.dtype == torch.bfloat16
    assert batch.latents.dtype == torch.float32


def test_the_second_time_nothing_is_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path)
    first = fill(run, "a cat")
    before = state(run.cache_path)
    assert counts(capsys) == (5, 4)
    assert fill(run, "a cat") == first
    assert capsys.readouterr().out == ""
    assert state(run.cache_path) == before
    assert len(before) == 9


def test_what_changes_is_encoded_anew_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path)
    fill(run)
    images = Path(run.img_dir)
    capsys.readouterr()

    put(images, "red.png", "a red square, freshly painted", (images / "red.png").read_bytes())
    fill(run)
    assert counts(capsys) == (1, 0)

    put(images, "red.png", "a red square, freshly painted", png(64, 64, (220, 0, 0)))
    fill(run)
    assert counts(capsys) == (0, 1)

    fill(config(tmp_path, img_size=48))
    assert counts(capsys) == (0, 4)
    fill(config(tmp_path, max_text_tokens=12))
    assert counts(capsys) == (4, 0)


def test_renaming_and_moving_images_encodes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path)
    before, _ = fill(run)
    moved = tmp_path / "images" / "deep.v2" / "x.png"
    moved.parent.mkdir()
    (tmp_path / "images" / "white.png").rename(moved)
    (tmp_path / "images" / "white.json").rename(moved.with_suffix(".json"))
    capsys.readouterr()
    after, _ = fill(run)
    assert capsys.readouterr().out == ""
    assert set(after) == set(before)


def test_another_encoder_has_other_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path)
    fill(run)
    capsys.readouterr()
    other = tmp_path / "other"
    shutil.copytree(tiny_flux(), other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-8:] = b"\0\0\x80\x3f\0\0\x80\x3f"  # one weight of the VAE is another
    weights.write_bytes(bytes(data))
    samples, _ = list_samples(run.img_dir, "json")
    cache.fill(run, Base.of(other), Ranks(Launch()), {run.img_dir: samples}, [])
    assert counts(capsys) == (0, 4)


def test_a_broken_entry_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path)
    entries, _ = fill(run)
    good = cache.read_batch(entries[:1])
    entries[0].latents.write_bytes(entries[0].latents.read_bytes()[:-10])
    entries[0].text.write_bytes(b"")
    capsys.readouterr()
    with pytest.raises(DataError, match="cannot be read"):
        cache.read_batch(entries[:1])
    assert fill(run)[0] == entries
    assert counts(capsys) == (1, 1)
    again = cache.read_batch(entries[:1])
    assert torch.equal(good.latents, again.latents)
    assert torch.equal(good.text, again.text)


def test_an_image_that_breaks_while_it_is_read_is_named(tmp_path: Path) -> None:
    run = config(tmp_path)
    put(Path(run.img_dir), "late.png", "x", png()[:60] + png()[-12:])  # its end is there, its middle is not
    with pytest.raises(DataError, match=r"late\.png"):
        fill(run)
    assert not list(run.cache_path.glob(".xflux-tmp-*"))


def test_a_caption_that_is_too_long_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path, max_text_tokens=8)
    put(Path(run.img_dir), "red.png", "a red square " * 30)
    fill(run)
    assert "longer than 8 T5 tokens" in capsys.readouterr().out


def test_two_images_of_one_caption_share_its_text(tmp_path: Path) -> None:
    run = config(tmp_path)
    for path in Path(run.img_dir).glob("*.json"):
        path.write_text(json.dumps({"caption": "a square"}))
    entries, _ = fill(run)
    assert len({entry.text for entry in entries}) == 1
    assert len({entry.latents for entry in entries}) == 4
