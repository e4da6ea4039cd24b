"""The cache: an entry depends on all that it should, is made once, and is never another sample's."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from cache_kit import config, older  # noqa: E402
from trainer_kit import png, put, squares, tiny_flux  # noqa: E402
from xflux_trainer import cache, files, imagework  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.data import list_samples, load_image  # noqa: E402
from xflux_trainer.digests import Digests  # noqa: E402
from xflux_trainer.encoders import ImageCodec, TextEncoders  # noqa: E402
from xflux_trainer.errors import DataError  # noqa: E402
from xflux_trainer.layout import Base  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402

CPU = torch.device("cpu")


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


def test_a_second_start_reads_no_image_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are known by length, time and inode; one that was changed just now is read again to be sure."""
    run = config(tmp_path)
    images = sorted(squares(Path(run.img_dir)).glob("*.png"))
    older(*images[:3])
    os.utime(images[3], (time.time() + 60, time.time() + 60))  # just now, however long the first start takes
    fill(run)
    read: list[str] = []
    real = imagework._read
    monkeypatch.setattr(imagework, "_read", lambda path: read.append(path.name) or real(path))
    first = fill(run)[0]
    assert read == [images[3].name]
    older(images[3])
    fill(run)
    read.clear()
    assert fill(run)[0] == first
    assert read == []
    images[0].write_bytes(png(64, 64, (1, 2, 3)))
    older(images[0])
    assert fill(run)[0] != first
    assert read == [images[0].name]


def test_weights_are_hashed_whole_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte anywhere makes another encoder; a file that is what it was is not read again."""
    part = tmp_path / "vae"
    part.mkdir()
    weights = part / "model.safetensors"
    weights.write_bytes(bytes(3_000_000))
    (part / "config.json").write_text("{}")
    older(weights, part / "config.json")
    known = Digests(tmp_path, "weights")
    first = known.weights(part)
    known.write()
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert Digests(tmp_path, "weights").weights(part) == first
    monkeypatch.undo()
    data = bytearray(3_000_000)
    data[1_234_567] = 1  # between the pages that an even spread would read
    weights.write_bytes(data)
    assert Digests(tmp_path, "weights").weights(part) != first
    single = tmp_path / "ae.safetensors"
    single.write_bytes(data)
    assert known.weights(single) != known.weights(part)


def test_what_is_remembered_may_be_lost_or_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path)
    older(*squares(Path(run.img_dir)).glob("*.png"))
    first = fill(run)[0]
    for text in ("", "{", '{"version": 1, "files": 3}', '{"version": 1, "files": {"x": [1]}}', "[]"):
        for path in run.cache_path.glob("digests-*.json"):
            path.write_text(text)
        capsys.readouterr()
        assert fill(run)[0] == first
        assert capsys.readouterr().out == ""


def test_a_turned_bit_is_noticed_when_it_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its length is right, so only the checksum tells; the next start encodes it anew."""
    run = config(tmp_path)
    entries, _ = fill(run)
    for place in (entries[0].latents, entries[1].text):
        good = place.read_bytes()
        place.write_bytes(good[:-5] + bytes([good[-5] ^ 16]) + good[-4:])
    with pytest.raises(DataError, match="checksum"):
        cache.read_batch(entries[:1])
    with pytest.raises(DataError, match="Start again"):
        cache.read_batch(entries[1:2])
    capsys.readouterr()
    again, _ = fill(run)
    assert counts(capsys) == (1, 1)
    cache.read_batch(again[:2])


def test_text_without_padding_is_t5s_masked_output(tmp_path: Path) -> None:
    """What T5 says under its attention mask of the real tokens of a padded caption, and no padding after them."""
    base = Base.of(tiny_flux())
    bare, full = TextEncoders(base, CPU, 16, "none"), TextEncoders(base, CPU, 16)
    bare.t5, full.t5 = bare.t5.float(), full.t5.float()
    for caption in ("a red square", "a", "", "a red square " * 9):
        text, pooled = bare.encode(caption)
        tokens = full.t5_tokenizer(
            caption, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        )  # fmt: skip
        length = int(tokens.attention_mask.sum())
        masked = full.t5(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0, :length]
        assert text.shape == masked.shape
        assert torch.allclose(text.float(), masked.bfloat16().float(), atol=1e-2)
        # The padding does say something to T5, which is why `full` is the other thing that FLUX knows.
        if length < 16:
            unmasked = full.encode(caption)[0][:length]
            assert not torch.allclose(text.float(), unmasked.float(), atol=1e-2)
        assert torch.equal(pooled, full.encode(caption)[1])


def test_captions_of_several_lengths_are_a_batch_with_a_mask(tmp_path: Path) -> None:
    run = config(tmp_path, text_padding="none")
    put(Path(run.img_dir), "red.png", "red", png(64, 64))
    put(Path(run.img_dir), "white.png", "a white square with a caption of its own", png(64, 64, (250, 250, 250)))
    entries, _ = fill(run)
    batch = cache.read_batch(entries[:])
    lengths = [len(cache.read_text(entry.text)[0][0]) for entry in entries]
    assert batch.text.shape[1] == max(lengths) > min(lengths)
    assert batch.mask is not None
    assert batch.mask.dtype == torch.bool
    assert batch.mask.sum(1).tolist() == lengths
    assert not batch.text[~batch.mask].any()
    assert cache.read_batch(entries[:1]).mask is None
    assert cache.read_batch(fill(config(tmp_path))[0][:]).mask is None


def test_images_that_are_enlarged_and_copies_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path)
    put(Path(run.img_dir), "small.png", "x", png(16, 8))
    put(Path(run.img_dir), "copy.png", "y", png(16, 8))
    for _ in range(2):  # a second start says it again
        fill(run)
        out = capsys.readouterr().out
        assert "2 images have fewer pixels than they are trained at and are enlarged" in out
        assert "16 x 8, 4.0 times" in out
        assert "1 images are copies" in out


def test_repeats_follow_the_nearest_folder_that_is_named(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number, name in enumerate(("a.png", "faces/b.png", "faces/close/c.png", "faces.d/d.png")):
        put(images, name, "x", png(64, 64, (number, 0, 0)))
    run = config(tmp_path, repeats=(("faces", 3), ("faces/close", 5)))
    entries, _ = fill(run)
    assert entries.repeats is not None
    assert entries.repeats.tolist() == [1, 1, 3, 5]  # a, faces.d/d, faces/b, faces/close/c
    assert [len(bucket) for bucket in entries.buckets] == [10]
    assert fill(config(tmp_path, repeats=(("faces", 3), ("faces/close", 4))))[0].digest() != entries.digest()
    # What is sampled has no part in what is trained on.
    assert fill(run, "a cat")[0].digest() == entries.digest()
    assert fill(config(tmp_path, repeats=((".", 2), ("faces", 3))))[0].repeats.tolist() == [2, 2, 3, 3]
    with pytest.raises(DataError, match="repeats names face,"):
        fill(config(tmp_path, repeats=(("face", 3),)))


def test_views_and_sizes(tmp_path: Path) -> None:
    """Entry numbers above the images' are their views; the mirror image's latents are of their own."""
    run = config(tmp_path, random_flip=True, caption_dropout=0.5, resolutions=(32,))
    squares(tmp_path / "images", ((64, 64), (96, 48)))
    entries, _ = fill(run)
    assert len(entries) == len(list(entries)) == 8
    assert [entry.shape for entry in entries[:2]] == [(16, 8, 8), (16, 4, 8)]
    assert [entry.shape for entry in entries[4:6]] == [(16, 4, 4), (16, 2, 4)]
    plain, mirrored, silent, both = (entries[3 + 8 * view] for view in range(4))
    assert plain.text == mirrored.text != silent.text == both.text
    assert plain.latents == silent.latents != mirrored.latents == both.latents
    assert len({entry.text for entry in map(entries.__getitem__, range(16, 32))}) == 1
    for number in (32, -9):
        with pytest.raises(IndexError):
            entries[number]
    codec = ImageCodec(Base.of(tiny_flux()), CPU, torch.float32)
    image = load_image(sorted(Path(run.img_dir).glob("*.png"))[3], 64, None, flip=True)
    assert torch.equal(cache.read_batch([mirrored]).latents[0], codec.encode(image))


def test_ranks_that_list_other_images_are_stopped(tmp_path: Path) -> None:
    run = config(tmp_path)
    squares(Path(run.img_dir))
    samples, _ = list_samples(run.img_dir, "json")
    ranks = Ranks(Launch(world_size=2))
    ranks.gather = lambda value: [value, "of another rank"] if isinstance(value, str) else [value]
    with pytest.raises(DataError, match="Rank 1 lists other images"):
        cache._same_sets(ranks, {run.img_dir: samples})
