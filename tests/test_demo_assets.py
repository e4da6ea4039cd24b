"""The demo's photos and captions, the tiny FLUX, and the writer of full-size weights."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from xflux_trainer import config as train_config
from xflux_trainer.samples import find_samples

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo"
PHOTOS = sorted((DEMO / "photos").glob("*.jpg")) + sorted((DEMO / "heldout").glob("*.jpg"))
FREE = {"public domain", "CC0", "CC BY 2.0"}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): digest(file) for file in sorted(folder.rglob("*")) if file.is_file()}


# Photos, captions, licences ------------------------------------------------------------------------------


@pytest.mark.parametrize("folder, count", [("photos", 8), ("heldout", 2)])
def test_the_trainer_finds_every_photo_and_nothing_else(folder: str, count: int) -> None:
    index = find_samples(DEMO / folder, "json")
    assert (len(index.samples), index.problems, index.ignored) == (count, (), ())


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo.stem)
def test_photos_open_and_have_captions(photo: Path) -> None:
    image = pytest.importorskip("PIL.Image").open(photo)
    image.load()
    assert image.mode == "RGB" and image.format == "JPEG" and 256 <= max(image.size) <= 512
    caption = json.loads(photo.with_suffix(".json").read_text("utf-8"))
    assert list(caption) == ["caption"]
    assert 20 <= len(caption["caption"]) <= 300 and caption["caption"] == caption["caption"].strip()


def test_photos_are_few_small_and_different() -> None:
    assert sum(photo.stat().st_size for photo in PHOTOS) < 600_000
    assert len({digest(photo) for photo in PHOTOS}) == len(PHOTOS)
    captions = {photo.with_suffix(".json").read_text("utf-8") for photo in PHOTOS}
    assert len(captions) == len(PHOTOS)


def test_every_photo_has_its_licence_and_every_row_its_photo() -> None:
    rows = {}
    for line in (DEMO / "LICENSES.md").read_text("utf-8").splitlines():
        if match := re.match(r"\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", line):
            file, package, author, licence = (cell.strip() for cell in match.groups())
            rows[file] = licence.lstrip("[").split("]")[0]
            assert re.search(r"scikit-(image|learn) \d+\.\d+\.\d+, `\w+/", package) and author, line
    assert sorted(rows) == sorted(str(photo.relative_to(DEMO)) for photo in PHOTOS)
    assert set(rows.values()) <= FREE


def test_the_training_file_is_what_the_trainer_reads() -> None:
    config, notes = train_config.load_with_notes(DEMO / "train.yaml")
    assert notes == ()
    for folder in (config.img_dir, config.heldout_dir):
        assert folder is not None and (ROOT / folder).is_dir()
    assert config.pretrained_model in (ROOT / "Makefile").read_text("utf-8")


def test_the_accelerate_file_is_x_flux_own_with_comments() -> None:
    text = (DEMO / "accelerate_config.yaml").read_text("utf-8")
    content = yaml.safe_load(text)
    assert content["num_processes"] == 8 and content["distributed_type"] == "DEEPSPEED"
    assert content["deepspeed_config"]["zero_stage"] == 2
    assert text.count("#") >= 3


# Tiny FLUX -----------------------------------------------------------------------------------------------


def make(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(DEMO / "make_tiny_flux.py"), str(folder), *options]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("torch", "diffusers", "transformers"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("tiny") / "flux"
    done = make(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_tiny_flux_follows_from_its_seed(tiny: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "same").returncode == 0
    assert make(tmp_path / "other", "--seed", "1").returncode == 0
    first, same, other = (contents(folder) for folder in (tiny, tmp_path / "same", tmp_path / "other"))
    assert first == same
    changed = {name for name in first if first[name] != other[name]}
    weights = {name for name in first if name.endswith(".safetensors") and not name.startswith("vae/")}
    assert changed == weights | {"tiny_flux.json"}
    assert sum(file.stat().st_size for file in tiny.rglob("*") if file.is_file()) < 30e6


def test_a_complete_folder_is_kept_and_a_broken_one_made_again(tiny: Path) -> None:
    before = contents(tiny)
    part = tiny / "vae" / "diffusion_pytorch_model.safetensors"
    made = part.stat().st_mtime_ns
    assert make(tiny).stdout.startswith("kept")
    assert part.stat().st_mtime_ns == made
    part.write_bytes(part.read_bytes()[:-1])
    assert make(tiny).stdout.startswith("wrote")
    assert contents(tiny) == before
    assert [path.name for path in tiny.parent.iterdir()] == [tiny.name]  # nothing temporary is left


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "mine.txt").write_text("mine")
    done = make(tmp_path / "flux")
    assert done.returncode == 1 and done.stderr.startswith("error:") and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "flux").iterdir()] == ["mine.txt"]


def test_tiny_flux_draws_and_listens_to_the_prompt(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import numpy
    import torch
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(tiny, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.config.guidance_embeds and pipeline.transformer.config.in_channels == 64

    def draw(prompt: str) -> Any:
        noise = torch.Generator().manual_seed(0)
        settings = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 32}
        return pipeline(prompt, generator=noise, output_type="np", **settings).images[0]

    cat, again, flower = draw("a tabby cat"), draw("a tabby cat"), draw("an orange dahlia flower")
    assert cat.shape == (64, 64, 3) and numpy.isfinite(cat).all()
    assert (cat == again).all()
    assert numpy.abs(cat - flower).mean() > 1e-3


def test_tokenizers_know_every_caption(tiny: Path) -> None:
    from transformers import CLIPTokenizer, T5TokenizerFast

    clip = CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(tiny / "tokenizer_2")
    for photo in DEMO.glob("photos/*.json"):
        caption = json.loads(photo.read_text("utf-8"))["caption"]
        ids = t5(caption).input_ids
        assert t5.unk_token_id not in ids and ids[-1] == t5.eos_token_id
        assert t5.decode(ids, skip_special_tokens=True) == caption
        ids = clip(caption).input_ids
        assert (ids[0], ids[-1]) == (clip.bos_token_id, clip.eos_token_id) and len(ids) <= 77
        letters = clip.decode(ids, skip_special_tokens=True).replace(" ", "")
        assert letters == caption.lower().replace(" ", "")


def test_latents_of_the_photos_are_standard_and_decode_to_the_photos(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from diffusers import AutoencoderKL
    from torch.nn.functional import avg_pool2d

    monkeypatch.syspath_prepend(str(DEMO))
    photos = importlib.import_module("tiny_flux").read_photos()
    vae = AutoencoderKL.from_pretrained(tiny / "vae", torch_dtype=torch.float32)
    latents, likeness = [], []
    with torch.no_grad():
        for photo in photos:
            raw = vae.encode(photo[None]).latent_dist.mode()
            latents.append((raw - vae.config.shift_factor) * vae.config.scaling_factor)
            small, decoded = (avg_pool2d(image, 8).flatten() for image in (photo[None], vae.decode(raw).sample))
            likeness.append(float(torch.corrcoef(torch.stack([small, decoded]))[0, 1]))
    likeness.sort()
    assert likeness[0] > 0.7 and likeness[1] > 0.9  # the first is the galaxies: points, which blur away
    values = torch.cat([latent.flatten(2)[0] for latent in latents], dim=1)  # (16, positions)
    assert values.mean(1).abs().max() < 0.05
    assert (values.std(1) - 1).abs().max() < 0.05


# Full-size weights ----------------------------------------------------------------------------------------


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("torch", "diffusers", "tokenizers"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "path", [str(DEMO), *sys.path])
    return importlib.import_module("write_flux_weights")


def test_full_size_shards_are_flux_own(writer: ModuleType) -> None:
    counts, sizes = {}, {}
    for part in writer.full_size():
        files = part.files()
        assert {name: shape for shapes in files.values() for name, shape in shapes.items()} == part.shapes
        counts[part.folder] = sum(prod(shape) for shape in part.shapes.values())
        sizes[part.folder] = {name: sum(prod(s) * 2 for s in shapes.values()) for name, shapes in files.items()}
    assert counts == {
        "transformer": 11_901_408_320,
        "text_encoder_2": 4_762_310_656,
        "text_encoder": 123_060_480,
        "vae": 83_819_683,
    }
    shards = [f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert list(sizes["transformer"]) == shards
    assert max(sizes["transformer"].values()) < 10e9
    assert list(sizes["text_encoder_2"]) == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert list(sizes["text_encoder"]) == ["model.safetensors"]
    assert list(sizes["vae"]) == ["diffusion_pytorch_model.safetensors"]


def test_written_shards_load_are_kept_and_guard_foreign_weights(writer: ModuleType, tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open

    shapes = {"norm.weight": (6,), "a.weight": (6, 5), "a.bias": (6,), "b.weight": (300, 200)}
    part = writer.Part("transformer", {"_class_name": "Any"}, shapes, "diffusion_pytorch_model", 100_000)
    writer.write_part(tmp_path, part, "cpu")
    folder = tmp_path / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == 2 * (6 + 30 + 6 + 60_000)
    for name, shape in shapes.items():
        with safe_open(folder / index["weight_map"][name], framework="pt") as file:
            tensor = file.get_tensor(name)
        assert tuple(tensor.shape) == shape and tensor.dtype == torch.bfloat16
        if len(shape) == 1:
            assert (tensor == (0 if name.endswith("bias") else 1)).all()
        else:
            assert 0.01 < tensor.float().std() < 0.03
    assert len(set(index["weight_map"].values())) == 2
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    writer.write_part(tmp_path, part, "cpu")
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")} == before
    other = writer.Part("transformer", {}, {"x.weight": (2, 2)}, "diffusion_pytorch_model", 10**9)
    with pytest.raises(ValueError, match="other weights"):
        writer._check(tmp_path, [other], "cpu")


def test_slices_make_up_the_whole_tensor(writer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(writer, "SLICE", 1000)
    slices = list(writer.values("a.weight", (70, 50), "cpu"))
    assert [len(part) for part in slices] == [1000, 1000, 1000, 500]
    whole = torch.cat(slices)
    assert not torch.equal(whole[:1000], whole[1000:2000])
    assert torch.equal(whole, torch.cat(list(writer.values("a.weight", (70, 50), "cpu"))))


# Full-size benchmark --------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("full_size_lora")


def test_the_benchmark_writes_files_that_the_trainer_reads(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.write_dataset(tmp_path / "images")
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(benchmark.train_config(tmp_path, tmp_path / "model", 20)), "utf-8")
    config, notes = train_config.load_with_notes(file)
    assert (config.img_size, config.rank, config.gradient_checkpointing, notes) == (1024, 16, True, ())
    index = find_samples(config.img_dir, config.caption_type)
    assert len(index.samples) == 8 and index.problems == ()
    from PIL import Image

    with Image.open(index.samples[0].image) as image:
        assert image.size == (1024, 1024)


@pytest.mark.parametrize(
    "device, load, words",
    [
        (26.0, 7.99, []),
        (26.1, 1.0, ["allocated peak is 26.10 GiB"]),
        (20.0, 8.0, ["held 8.00 GiB while loading"]),
        (None, None, ["no device memory", "not measured"]),
    ],
)
def test_the_benchmark_judges_its_limits(
    benchmark: ModuleType, device: float | None, load: float | None, words: list[str]
) -> None:
    numbers = {
        "device_allocated_gib": {} if device is None else {"overall": device},
        "host_own_gib": {} if load is None else {"load": load},
    }
    over = benchmark.judge(numbers)
    assert len(over) == len(words)
    assert all(word in sentence for word, sentence in zip(words, over, strict=True))


def test_a_command_that_runs_too_long_is_ended(benchmark: ModuleType, tmp_path: Path) -> None:
    alive = tmp_path / "pid"
    code = f"import os, time; open({str(alive)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    assert benchmark.run([sys.executable, "-c", code], 2) == 124
    with pytest.raises(ProcessLookupError):
        os.kill(int(alive.read_text()), 0)
