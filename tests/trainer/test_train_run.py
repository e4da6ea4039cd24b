"""Whole runs on a tiny model, by the command line: what is left behind, exact resume, what must not matter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trainer_kit import DEMO, keep_signals, losses, metrics, png, put, squares, tiny_flux, write_config  # noqa: E402
from xflux_trainer import checkpoint, cli, lora, sample  # noqa: E402
from xflux_trainer.config import TrainConfig, load  # noqa: E402
from xflux_trainer.encoders import ImageCodec, TextEncoders  # noqa: E402
from xflux_trainer.errors import DataError  # noqa: E402
from xflux_trainer.layout import Base  # noqa: E402
from xflux_trainer.model import Velocity, load_transformer, read_spec  # noqa: E402
from xflux_trainer.run import find_sets  # noqa: E402

__all__ = ["keep_signals"]  # a fixture, used by being here


def run(path: Path, command: str = "train", *more: object) -> None:
    assert cli.main([command, "--config", str(path), *map(str, more)]) == 0


def weights(folder: Path) -> dict:
    return load_file(folder / lora.ADAPTER_FILE)


def test_what_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(
        tmp_path, disable_sampling=False, sample_width=64, sample_height=48, sample_steps=2, sample_every=2,
        sample_prompts=["a cat", "a dog"], heldout_samples=2, report_to="tensorboard", checkpointing_steps=2,
        mixed_precision="bf16", train_batch_size=2, gradient_accumulation_steps=2, cache_dir=None,
    )  # fmt: skip
    run(path)
    out, said = tmp_path / "out", capsys.readouterr().out
    assert "batch 4 = 2 images x 1 ranks x 2 accumulated; 4 steps, 4.0 passes" in said
    assert "step 4/4" in said
    assert "\x1b" not in said  # not a terminal: plain lines
    assert {path.name for path in out.iterdir()} == {
        "cache", "logs", "samples", "checkpoint-2", "checkpoint-4", "config.yaml", "metrics.json", "metrics.jsonl",
        "heldout.jsonl", "loss.svg", "README.md", lora.ADAPTER_FILE, "lora.safetensors",
    }  # fmt: skip
    assert load(out / "config.yaml") == load(path)
    assert len(list((out / "logs").glob("events*"))) == 1
    from PIL import Image

    names = {image.name for image in (out / "samples").iterdir()}
    names.remove("contact-sheet.png")
    assert names == {"step-000002-0.png", "step-000002-1.png", "final-0.png", "final-1.png"}
    assert {Image.open(out / "samples" / name).size for name in names} == {(64, 48)}

    told = metrics(out)
    assert (told["status"], told["steps"], told["world_size"], told["strategy"]) == ("finished", 4, 1, "single")
    assert told["loss"]["first"] == losses(out)[0]
    assert told["loss"]["last"] == losses(out)[-1]
    assert told["loss"]["mean"] == pytest.approx(sum(losses(out)) / 4)
    assert told["heldout_loss"]["after"] < told["heldout_loss"]["before"]
    assert set(told["heldout_loss"]["before_by_time"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"}
    assert told["seconds_per_step"] > 0 and told["tflops"] > 0 and 0 <= told["data_wait"] < 1
    assert told["samples_per_second"] == pytest.approx(4 / told["seconds_per_step"], rel=0.5)
    held = [json.loads(line) for line in (out / "heldout.jsonl").read_text().splitlines()]
    assert [line["step"] for line in held] == [0, 4]
    assert held[1]["by_time"] == told["heldout_loss"]["after_by_time"]
    assert "samples/final-1.png" in (out / "README.md").read_text()
    start = told["start"]
    phases = {"launch", "between", "list", "cache", "load", "train"}
    assert set(start) >= {"seconds", "first_step", *phases} and start["first_step"] <= start["train"] + start["between"]
    assert start["seconds"] == pytest.approx(sum(start[name] for name in set(start) - {"seconds", "first_step"}))
    assert 0.2 < start["launch"] < start["seconds"]
    assert set(told["peak_host_bytes"]) >= {"cache", "load", "train", "sample", "overall"}
    assert told["peak_host_bytes"]["overall"] == max(told["peak_host_bytes"].values()) > 50e6
    assert told["versions"]["torch"] == torch.__version__

    tensors = weights(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(float(tensor.abs().max()) > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert all(name.startswith("transformer.") for name in tensors)


def test_resume_is_exact(tmp_path: Path) -> None:
    """Three steps, a new process's worth of state, three more: bit for bit the six of one run."""
    more = {
        "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5, "gradient_accumulation_steps": 2,
        "train_batch_size": 3, "checkpointing_steps": 3, "heldout_samples": 1,
    }  # fmt: skip
    squares(tmp_path / "images", ((64, 64), (96, 48)))
    whole = write_config(tmp_path, "a.yaml", max_train_steps=6, output_dir=str(tmp_path / "a"), **more)
    run(whole)
    parts = {"output_dir": str(tmp_path / "b")}
    run(write_config(tmp_path, "b.yaml", max_train_steps=3, **parts, **more))
    torch.manual_seed(99)  # what else happened in between must not matter
    torch.rand(100)
    run(write_config(tmp_path, "c.yaml", max_train_steps=6, resume_from_checkpoint="latest", **parts, **more))

    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for name in ("weights-00001.safetensors", "optimizer-00001.safetensors"):
        a, b = (tmp_path / run_ / "checkpoint-6" / name for run_ in "ab")
        assert a.read_bytes() == b.read_bytes()
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert a["loss"] == b["loss"]
    assert a["heldout_loss"] == b["heldout_loss"]  # `before` is that of the start, not of the resume
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resuming_a_finished_run_trains_no_more(tmp_path: Path) -> None:
    path = write_config(tmp_path, resume_from_checkpoint="latest")
    run(path)
    before = weights(tmp_path / "out")
    run(path)
    after = weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics(tmp_path / "out")["loss"]["first"] == losses(tmp_path / "out")[0]
    assert len(losses(tmp_path / "out")) == 4


def test_a_fresh_run_in_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    run(path)
    first = weights(tmp_path / "out")
    capsys.readouterr()
    run(path)
    assert "moved to" in capsys.readouterr().out
    assert (tmp_path / "out" / "previous-1" / "checkpoint-4").is_dir()
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(tmp_path / "out").items())


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(folder)]


def test_a_branch_from_an_earlier_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the abandoned branch saved is put aside, so that neither the limit nor `latest` takes it for this run's."""
    out = tmp_path / "out"
    run(write_config(tmp_path, max_train_steps=12, checkpointing_steps=3))
    capsys.readouterr()
    branch = {"max_train_steps": 8, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    run(write_config(tmp_path, resume_from_checkpoint=str(out / "checkpoint-3"), **branch))
    assert f"note: later checkpoints were moved to {out / 'previous-1'}." in capsys.readouterr().out
    assert names(out) == ["checkpoint-6", "checkpoint-8"]
    assert names(out / "previous-1") == ["checkpoint-6", "checkpoint-9", "checkpoint-12"]
    assert len(losses(out)) == 8
    run(write_config(tmp_path, resume_from_checkpoint="latest", **branch))
    said = capsys.readouterr().out
    assert f"resumed from {out / 'checkpoint-8'} at step 8" in said
    assert "moved to" not in said


def test_one_too_many_is_removed_by_a_run_that_saves_none(tmp_path: Path) -> None:
    """A run that was killed between writing its last checkpoint and removing the oldest."""
    run(write_config(tmp_path, max_train_steps=4, checkpointing_steps=1))
    run(write_config(tmp_path, max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2,
                     resume_from_checkpoint="latest"))  # fmt: skip
    assert names(tmp_path / "out") == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("name", ["out/checkpoint-2", "out/best"])
def test_the_one_that_is_gone_on_from_stays_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run(write_config(tmp_path, max_train_steps=2, checkpointing_steps=1))
    monkeypatch.chdir(tmp_path)
    Path("out/best").symlink_to("checkpoint-2")
    run(write_config(tmp_path, max_train_steps=2, checkpointing_steps=1, checkpoints_total_limit=1,
                     resume_from_checkpoint=name))  # fmt: skip
    assert names(tmp_path / "out") == ["checkpoint-2"]


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(write_config(tmp_path, max_train_steps=4, checkpointing_steps=2))
    before = weights(tmp_path / "out")
    path = write_config(tmp_path, max_train_steps=3, resume_from_checkpoint="latest")
    assert cli.main(["train", "--config", str(path)]) == 1
    said = capsys.readouterr().err
    assert "checkpoint-4 is at step 4, beyond the 3 steps of this run" in said
    assert "max_train_steps" in said
    assert names(tmp_path / "out") == ["checkpoint-2", "checkpoint-4"]
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "out").items())


def test_samples_do_not_change_the_training(tmp_path: Path) -> None:
    """X-Flux reseeds torch when it samples, and trains on the same noise after every sample."""
    run(write_config(tmp_path, output_dir=str(tmp_path / "a")))
    shared = {"output_dir": str(tmp_path / "b"), "heldout_samples": 2}
    small = {"sample_width": 64, "sample_height": 64, "sample_steps": 1}
    run(write_config(tmp_path, disable_sampling=False, sample_every=1, **small, **shared))
    assert len(list((tmp_path / "b" / "samples").glob("*-0.png"))) == 4
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_checkpointing_recomputes_the_same_gradients(tmp_path: Path) -> None:
    run(write_config(tmp_path, output_dir=str(tmp_path / "a"), gradient_checkpointing=True))
    shared = {"output_dir": str(tmp_path / "b")}
    run(write_config(tmp_path, gradient_checkpointing=False, **shared))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"learning_rate": 5e-3}, {"guidance": 4.0}, {"timestep_shift": 2.0}])
def test_settings_have_their_effect(tmp_path: Path, changes: dict) -> None:
    run(write_config(tmp_path, output_dir=str(tmp_path / "a"), max_train_steps=2))
    shared = {"output_dir": str(tmp_path / "b"), "max_train_steps": 2}
    run(write_config(tmp_path, **shared, **changes))
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_a_start_that_fails_says_so_over_an_earlier_end(tmp_path: Path) -> None:
    path = write_config(tmp_path, max_train_steps=1)
    run(path)
    assert metrics(tmp_path / "out")["status"] == "finished"
    put(tmp_path / "images", "broken.png", "half a square", png()[:60])
    assert cli.main(["train", "--config", str(write_config(tmp_path, max_train_steps=1))]) == 1
    told = metrics(tmp_path / "out")
    assert (told["status"], told["earlier"]["status"]) == ("failed", "finished")
    assert "broken.png" in told["error"]


def test_stratified_and_deterministic_runs_repeat_and_resume(tmp_path: Path) -> None:
    more = {"stratified_timesteps": True, "deterministic": True, "train_batch_size": 2, "checkpointing_steps": 2}
    run(write_config(tmp_path, output_dir=str(tmp_path / "a"), **more))
    run(write_config(tmp_path, output_dir=str(tmp_path / "b"), max_train_steps=2, **more))
    run(write_config(tmp_path, output_dir=str(tmp_path / "b"), resume_from_checkpoint="latest", **more))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert not torch.are_deterministic_algorithms_enabled()


def test_epochs_instead_of_steps(tmp_path: Path) -> None:
    run(write_config(tmp_path, max_train_steps=None, num_train_epochs=3, gradient_accumulation_steps=2))
    assert metrics(tmp_path / "out")["steps"] == 6


def test_heldout_images_of_their_own(tmp_path: Path) -> None:
    put(tmp_path / "held", "x.png", "another square")
    run(write_config(tmp_path, heldout_dir=str(tmp_path / "held"), heldout_samples=5, max_train_steps=1))
    told = metrics(tmp_path / "out")["heldout_loss"]
    assert told["images"] == 1
    assert told["of"] == str(tmp_path / "held")


def test_a_learned_caption_is_that_of_its_image(tmp_path: Path) -> None:
    """Mixed shapes and batches of two: what the model is given for an image is the image's own caption."""
    from xflux_trainer.cache import read_batch
    from xflux_trainer.meter import Meter
    from xflux_trainer.ranks import Launch, Ranks
    from xflux_trainer.run import prepare

    squares(tmp_path / "images", ((64, 64), (96, 48)))
    config = load(write_config(tmp_path, train_batch_size=2))
    ranks = Ranks(Launch())
    ready = prepare(config, (), ranks, Meter(ranks.device))
    codec = ImageCodec(Base.of(tiny_flux()), ranks.device, torch.float32)
    texts = TextEncoders(Base.of(tiny_flux()), ranks.device, config.max_text_tokens)
    expected = {color: texts.encode(f"a {color} square")[0] for color in ("red", "green", "blue", "white")}
    seen = set()
    for number in range(6):
        batch = read_batch([ready.entries[image] for image in ready.order[number]])
        for latents, text in zip(batch.latents, batch.text, strict=True):
            color = next(color for color, value in expected.items() if torch.equal(value, text))
            from xflux_trainer.data import load_image

            image = load_image(tmp_path / "images" / f"{color}.png", 64, None)
            assert torch.equal(codec.encode(image), latents)
            seen.add(color)
    assert seen == set(expected)


def test_training_lowers_the_loss_on_photographs(tmp_path: Path) -> None:
    """Thirty steps on the demo's photographs lower the held-out loss by a tenth at the least."""
    learning = {"lora_targets": "all-linear", "rank": 16, "learning_rate": 5e-3, "max_train_steps": 30}
    run(write_config(tmp_path, img_dir=str(DEMO / "photos"), heldout_samples=4, **learning))
    told = metrics(tmp_path / "out")["heldout_loss"]
    assert told["after"] < 0.9 * told["before"]


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, checkpointing_steps=2, lora_alpha=8)
    run(path)
    run(path, "convert", "--output", tmp_path / "x.safetensors")
    written, final = load_file(tmp_path / "x.safetensors"), weights(tmp_path / "out")
    assert written.keys() == final.keys()
    assert all(torch.equal(written[name], final[name]) for name in final)
    folder = tmp_path / "out" / "checkpoint-2"
    assert cli.main(["convert", "--checkpoint", str(folder), "--dtype", "bf16"]) == 0
    half = load_file(folder / lora.ADAPTER_FILE)
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    with safe_open(folder / lora.ADAPTER_FILE, framework="pt") as file:
        assert file.metadata()["alpha"] == "8"
    raw = dict(checkpoint.load(folder).weights())
    name = next(name for name in raw if "to_out.0.lora_B" in name)
    # alpha 8 at rank 4: the scale of 2 is inside B.
    assert torch.allclose(half[f"transformer.{name}"].float(), raw[name] * 2, rtol=1e-2)
    assert capsys.readouterr().err == ""


def test_sample_command(tmp_path: Path) -> None:
    """The file that diffusers reads gives the image that the run drew at its end; no adapter gives another."""
    small = {"sample_width": 64, "sample_height": 64, "sample_steps": 2, "sample_prompts": ["a cat"]}
    path = write_config(tmp_path, disable_sampling=False, sample_every=0, **small)
    run(path)
    run(path, "sample", "--output", tmp_path / "a.png")
    run(path, "sample", "--no-lora", "--output", tmp_path / "b.png")
    run(path, "sample", "--prompt", "a dog", "--output", tmp_path / "c.png")
    final = (tmp_path / "out" / "samples" / "final-0.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == final
    assert (tmp_path / "b.png").read_bytes() != final
    assert (tmp_path / "c.png").read_bytes() not in (final, (tmp_path / "b.png").read_bytes())


def test_our_sampler_is_the_pipelines(tmp_path: Path) -> None:
    """The same noise, embeddings and steps through `FluxPipeline` give the same latents."""
    diffusers = pytest.importorskip("diffusers")
    config = replace(
        load(write_config(tmp_path)), sample_width=96, sample_height=64, sample_steps=4, sample_guidance=2.5
    )
    base, cpu = tiny_flux(), torch.device("cpu")
    text, pooled = TextEncoders(Base.of(base), cpu, 16).encode("a cat")
    velocity = Velocity(load_transformer(Base.of(base), torch.float32, cpu), guidance=True)
    ours = sample.denoise(velocity, read_spec(Base.of(base)), config, cpu, text[None], pooled[None], 0)
    noise = torch.randn(1, 16, 8, 12, generator=lora.generator("sample", 0, 0))
    pipeline = diffusers.FluxPipeline.from_pretrained(base)
    theirs = pipeline(
        prompt_embeds=text[None].float(), pooled_prompt_embeds=pooled[None].float(), height=64, width=96,
        num_inference_steps=4, guidance_scale=2.5, output_type="latent",
        latents=diffusers.FluxPipeline._pack_latents(noise, 1, 16, 8, 12),
    ).images  # fmt: skip
    theirs = diffusers.FluxPipeline._unpack_latents(theirs, 64, 96, 8)[0]
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_decoding_in_tiles_is_decoding(tmp_path: Path) -> None:
    codec = ImageCodec(Base.of(tiny_flux()), torch.device("cpu"), torch.float32)
    image = torch.rand(3, 64, 96) * 2 - 1
    latents = codec.encode(image)
    assert latents.shape == (16, 8, 12)
    direct = codec.vae.decode(latents[None] / codec.scale + codec.shift, return_dict=False)[0][0] / 2 + 0.5
    assert torch.allclose(codec.decode(latents), direct.clamp(0, 1), atol=1e-6)
    large = torch.randn(16, 80, 72)  # 640 x 576 pixels: more than one tile
    assert codec.decode(large).shape == (3, 640, 576)


def test_cache_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, cache_dir=None)
    run(path, "cache")
    assert "4 images and their captions" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "cache").glob("*.safetensors"))) == 8


def test_every_line_of_metrics_has_its_step(tmp_path: Path) -> None:
    run(write_config(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    named = {"step", "loss", "learning_rate", "grad_norm", "seconds", "samples_per_second", "tflops", "data_wait"}
    assert all(set(line) == named for line in lines)


def test_heldout_images_inside_the_training_folder_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    squares(tmp_path / "images")
    held = tmp_path / "images" / "held"
    for number in range(3):
        put(held, f"{number}.png", "held out")
    monkeypatch.chdir(tmp_path)
    run(write_config(tmp_path, heldout_dir="images/held", heldout_samples=2, max_train_steps=None, num_train_epochs=1))
    assert "note: 3 images of img_dir lie in heldout_dir and are not trained on." in capsys.readouterr().out
    told = metrics(tmp_path / "out")
    assert told["steps"] == 4
    assert told["heldout_loss"]["images"] == 2


@pytest.mark.parametrize("name", ["images", "images/", "images/../images"])
def test_the_training_folder_may_be_the_heldout_one(tmp_path: Path, name: str) -> None:
    squares(tmp_path / "images")
    config = TrainConfig(img_dir=str(tmp_path / "images"), heldout_dir=f"{tmp_path}/{name}")
    sets, heldout_dir, notes = find_sets(config)
    assert [len(sets[config.img_dir]), len(sets[heldout_dir]), notes] == [4, 4, []]


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    squares(tmp_path / "images" / "train")
    config = TrainConfig(img_dir=str(tmp_path / "images" / "train"), heldout_dir=str(tmp_path / "images"))
    with pytest.raises(DataError, match=r"All 4 images .* lie in heldout_dir"):
        find_sets(config)


def test_a_block_that_the_model_has_not_is_told_before_the_cache_is_filled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, single_blocks="1,99", cache_dir=None)
    assert cli.main(["train", "--config", str(path)]) == 1
    said = capsys.readouterr().err
    assert "single_blocks: names 99, which" in said
    assert not (tmp_path / "out" / "cache").exists()


def test_sizes_and_repeats_count_as_passes_and_not_as_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four images at two sizes, each three times in a pass: 24 batches of one."""
    run(write_config(tmp_path, resolutions=[32], repeats={".": 3}, max_train_steps=6))
    said = capsys.readouterr().out
    assert "on 4 images" in said and "6 steps, 0.2 passes" in said
    assert metrics(tmp_path / "out")["images"] == 4
