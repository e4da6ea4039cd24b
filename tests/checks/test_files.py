"""DA, WE, NE: the dataset, the output folder, the weights, the collective."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import ROOT, case, findings, job, machine, on_this_disk, verdict
from xflux_trainer import samples

from xflux_doctor.bill import model_place, spec_of
from xflux_doctor.check import Case
from xflux_doctor.checks import data, network, weights
from xflux_doctor.facts import AllReduce, Folder, HubAccess
from xflux_doctor.finding import Verdict
from xflux_doctor.gather.hub_cache import PARTS
from xflux_doctor.matrix import Matrix

BMP = struct.pack("<2sIHHI", b"BM", 58, 0, 0, 54) + struct.pack("<IiiHH", 40, 1, 1, 1, 24) + bytes(28)
PHOTO = sorted((ROOT / "examples/demo/photos").glob("*.jpg"))[0]


def dataset(folder: Path, *, cut: bool = False, caption: str | None = '{"caption": "a cat"}') -> Path:
    folder.mkdir()
    content = PHOTO.read_bytes()
    (folder / "a.jpg").write_bytes(content[: len(content) // 2] if cut else content)
    if caption is not None:
        (folder / "a.json").write_text(caption)
    return folder


def test_whole_dataset(matrix: Matrix, tmp_path: Path) -> None:
    work = job(None, img_dir=str(dataset(tmp_path / "v1.2")))
    assert findings(case(matrix, machine(matrix), work), data.dataset) == ()


@pytest.mark.parametrize(("options", "words"), [
    ({"cut": True}, "a.jpg"),
    ({"caption": None}, "a.json"),
    ({"caption": "{}"}, "caption"),
    ({"caption": "{"}, "a.json"),
])  # fmt: skip
def test_broken_dataset(matrix: Matrix, tmp_path: Path, options: dict[str, object], words: str) -> None:
    work = job(None, img_dir=str(dataset(tmp_path / "set", **options)))  # type: ignore[arg-type]
    found = findings(case(matrix, machine(matrix), work), data.dataset)
    assert found and words in found[0].seen and found[0].severity == "error" and found[0].hint


def test_missing_dataset(matrix: Matrix, tmp_path: Path) -> None:
    found = findings(case(matrix, machine(matrix), job(None, img_dir=str(tmp_path / "none"))), data.dataset)
    assert found and str(tmp_path / "none") in found[0].seen


def test_more_ranks_than_images(matrix: Matrix, tmp_path: Path) -> None:
    work = job(img_dir=str(dataset(tmp_path / "set")))
    (finding,) = findings(case(matrix, machine(matrix, count=8), work), data.dataset)
    assert "1 images; one step over all ranks takes 8" in finding.seen and finding.severity == "warning"


def output(matrix: Matrix, **train: Any) -> Verdict:
    return verdict(on_this_disk(case(matrix, machine(matrix), job(None, **train))), data.output_writable)


def test_output(matrix: Matrix, tmp_path: Path) -> None:
    assert output(matrix, output_dir=str(tmp_path / "new" / "deep")).status == "ok"
    (tmp_path / "file").write_text("")
    assert "is a file" in output(matrix, output_dir=str(tmp_path / "file" / "run")).findings[0].seen


def test_output_on_a_read_only_file_system(matrix: Matrix) -> None:
    """/proc lets nobody make a folder, root included."""
    if os.access("/proc", os.W_OK):
        pytest.skip("root may write anywhere on this kernel's /proc by access(2)")
    assert "cannot be written" in output(matrix, output_dir="/proc/run").findings[0].seen


def test_output_on_a_read_only_mount(matrix: Matrix) -> None:
    folder = Folder("/data/run", "/data", "/data", "ext4", read_only=True, total=1 << 40, free=1 << 40)
    subject = case(matrix, machine(matrix, folders={"output": folder}), job(None))
    (finding,) = findings(subject, data.output_writable)
    assert finding.seen == "/data cannot be written: /data is mounted read-only."


def test_output_without_room(matrix: Matrix, tmp_path: Path) -> None:
    huge = output(matrix, output_dir=str(tmp_path), rank=4096, checkpointing_steps=1, checkpoints_total_limit=None,
                  max_train_steps=1_000_000)  # fmt: skip
    assert "GiB free" in huge.findings[0].seen


def test_output_that_was_not_looked_at(matrix: Matrix) -> None:
    """A recorded machine without the fact, a mount that is silent, one that does not tell its room: never a pass."""
    assert verdict(case(matrix, machine(matrix), job(None)), data.output_writable).status == "skipped"
    for folder in (Folder("/data", "", error="did not answer within 1.5 s"), Folder("/data", "/data", writable=True)):
        subject = case(matrix, machine(matrix, folders={"output": folder}), job(None))
        assert verdict(subject, data.output_writable).status == "skipped"


def test_a_large_dataset_is_opened_in_part(matrix: Matrix, tmp_path: Path) -> None:
    """All names are looked at, and an even spread of files is opened; the trainer looks at all."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3000):
        (folder / f"{number:05}.bmp").write_bytes(BMP if number % 2 else b"")
        if number != 1777:
            (folder / f"{number:05}.json").write_text('{"caption": "a cat"}')
    found = findings(case(matrix, machine(matrix), job(None, img_dir=str(folder))), data.dataset)
    assert "1,000 of 3,000 images were opened" in found[-1].seen
    survey = samples.survey(folder, "json")
    assert survey.opened == 1000 and survey.count == 3000 - len(survey.problems)
    kinds = [problem.kind for problem in survey.problems]
    assert kinds.count("zero-byte") == 500 and kinds.count("no-caption") == 1


def model(folder: Path) -> Path:
    """A folder with the parts of a pipeline and one true safetensors file in each weight part."""
    for part in PARTS:
        (folder / part).mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (folder / part / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        (folder / part / "config.json").write_text("{}")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    for part in ("tokenizer", "tokenizer_2"):
        (folder / part / "tokenizer_config.json").write_text("{}")
    return folder


def test_whole_model(matrix: Matrix, tmp_path: Path) -> None:
    work = job(None, pretrained_model=str(model(tmp_path / "flux")))
    assert findings(case(matrix, machine(matrix), work), weights.folder_complete) == ()


def test_model_faults(matrix: Matrix, tmp_path: Path) -> None:
    folder = model(tmp_path / "flux")
    subject = case(matrix, machine(matrix), job(None, pretrained_model=str(folder)))
    shard = folder / "transformer" / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    assert "its header declares" in findings(subject, weights.folder_complete)[0].seen
    shard.write_bytes(b"<html>not found</html>" * 3)
    assert "is not a safetensors file" in findings(subject, weights.folder_complete)[0].seen
    shard.write_bytes(b"")
    assert "is empty" in findings(subject, weights.folder_complete)[0].seen
    shard.write_bytes(whole)
    index = folder / "transformer" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}))
    assert "model-2.safetensors is missing" in findings(subject, weights.folder_complete)[0].seen
    index.write_text("{")
    assert "cannot be read" in findings(subject, weights.folder_complete)[0].seen
    index.unlink()
    for text, words in (("{", "is not a JSON object"), ("[]", "is not a JSON object"), (None, "is missing")):
        (folder / "vae" / "config.json").unlink()
        if text is not None:
            (folder / "vae" / "config.json").write_text(text)
        assert words in findings(subject, weights.folder_complete)[0].seen
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    assert "tokenizer is empty" in findings(subject, weights.folder_complete)[0].seen
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    shutil.rmtree(folder / "scheduler")  # the trainer does without (trainer/layout.py)
    assert findings(subject, weights.folder_complete) == ()
    shutil.rmtree(folder / "vae")
    assert "lacks vae" in findings(subject, weights.folder_complete)[0].seen


def test_model_folder_that_is_not_there(matrix: Matrix) -> None:
    work = job(None, pretrained_model="./no/such/folder")
    assert "There is no model folder" in findings(case(matrix, machine(matrix), work), weights.folder_complete)[0].seen


# --- Black Forest Labs' single files ----------------------------------------------------------------------------


def single_file(path: Path, *, blocks: int = 3) -> Path:
    """A safetensors file whose header has the tensors of a small transformer in Black Forest Labs' layout."""
    shapes = {
        "img_in.weight": [64, 64], "txt_in.weight": [64, 48], "vector_in.in_layer.weight": [64, 32],
        "final_layer.linear.weight": [64, 64], "guidance_in.in_layer.weight": [64, 256],
        **{f"double_blocks.{k}.img_attn.norm.query_norm.scale": [16] for k in range(blocks)},
        "single_blocks.0.linear1.weight": [448, 64],
    }  # fmt: skip
    header = json.dumps({n: {"dtype": "BF16", "shape": s, "data_offsets": [0, 8]} for n, s in shapes.items()}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return path


def single_folder(folder: Path) -> Path:
    """The single files of transformer and VAE beside diffusers' folders of the text encoders."""
    model(folder)
    for part in ("transformer", "vae", "scheduler"):
        shutil.rmtree(folder / part)
    single_file(folder / "flux1-dev.safetensors")
    shutil.copy(folder / "text_encoder" / "model.safetensors", folder / "ae.safetensors")
    return folder


def test_a_single_file_and_its_folder_are_a_model(matrix: Matrix, tmp_path: Path) -> None:
    """Named as a file, as a folder, and by X-Flux's variable where pretrained_model is null."""
    folder = single_folder(tmp_path / "bfl")
    environment = {"FLUX_DEV": str(folder / "flux1-dev.safetensors"), "HF_HOME": str(tmp_path / "hf")}
    for name, told in ((str(folder), {}), (str(folder / "flux1-dev.safetensors"), {}), (None, environment)):
        facts = machine(matrix, environment=told)
        subject = on_this_disk(case(matrix, facts, job(None, pretrained_model=name)))
        assert findings(subject, weights.folder_complete) == ()
        assert spec_of(subject).double_blocks == 3 and spec_of(subject).hidden == 64
        assert subject.facts.folders and "model" in subject.facts.folders and subject.facts.hub_cache is None
        assert verdict(subject, weights.hub_access).status == "skipped"


def test_x_flux_s_variables_count_for_its_own_model_alone(matrix: Matrix, tmp_path: Path) -> None:
    folder = single_folder(tmp_path / "bfl")
    told = {"FLUX_DEV": str(folder / "flux1-dev.safetensors")}
    facts = machine(matrix, environment=told)
    assert model_place(case(matrix, facts, job(None, model_name="flux-schnell"))) is None
    assert model_place(case(matrix, facts, job(None, pretrained_model=str(folder)))) == folder


@pytest.mark.parametrize("variable", ["FLUX_DEV", "AE"])
def test_a_variable_that_names_no_file(matrix: Matrix, tmp_path: Path, variable: str) -> None:
    facts = machine(matrix, environment={variable: str(tmp_path / "none.safetensors")})
    result = verdict(case(matrix, facts, job(None)), weights.folder_complete)
    assert f"The environment variable {variable} names" in result.findings[0].seen
    assert result.findings[0].severity == "error" and variable in result.findings[0].hint


def test_faults_of_a_single_file(matrix: Matrix, tmp_path: Path) -> None:
    folder = single_folder(tmp_path / "bfl")
    file = folder / "flux1-dev.safetensors"
    subject = case(matrix, machine(matrix), job(None, pretrained_model=str(file)))
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert "its header declares" in findings(subject, weights.folder_complete)[0].seen
    shutil.copy(folder / "ae.safetensors", file)
    assert "Black Forest Labs' layout" in findings(subject, weights.folder_complete)[0].seen
    file.write_bytes(whole)
    single_file(folder / "flux1-schnell.safetensors")
    both = case(matrix, machine(matrix), job(None, pretrained_model=str(folder)))
    assert (
        "holds flux1-dev.safetensors and flux1-schnell.safetensors" in findings(both, weights.folder_complete)[0].seen
    )
    assert findings(subject, weights.folder_complete) == ()
    other = tmp_path / "model.bin"
    other.write_bytes(whole)
    (finding,) = findings(
        case(matrix, machine(matrix), job(None, pretrained_model=str(other))), weights.folder_complete
    )
    assert "is not a safetensors file" in finding.seen


def test_what_a_single_file_has_not_beside_it(matrix: Matrix, tmp_path: Path) -> None:
    """It comes from the hub: said before, and an error where nothing can be fetched."""
    file = single_file(tmp_path / "alone" / "flux1-dev.safetensors")
    hub = {"HF_HOME": str(tmp_path / "hf")}
    work = job(None, pretrained_model=str(file))
    subject = on_this_disk(case(matrix, machine(matrix, environment=hub), work))
    (finding,) = findings(subject, weights.folder_complete)
    assert finding.severity == "warning" and "xlabs-ai/xflux_text_encoders" in finding.because
    off = on_this_disk(case(matrix, machine(matrix, environment={**hub, "HF_HUB_OFFLINE": "1"}), work))
    (finding,) = findings(off, weights.folder_complete)
    assert finding.severity == "error" and "not in the hub cache" in finding.seen
    for name in ("openai/clip-vit-large-patch14", "xlabs-ai/xflux_text_encoders", NAME):
        place = tmp_path / "hf" / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
        place.mkdir(parents=True)
        (place / "ae.safetensors").write_bytes(b"x")
    assert findings(off, weights.folder_complete) == ()


def test_the_file_that_x_flux_left_in_the_hub_cache(matrix: Matrix, tmp_path: Path) -> None:
    """The trainer takes it, with the text encoders that X-Flux has: nothing of diffusers' folder is missing then."""
    base = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    single_file(base / "snapshots" / "abc" / "flux1-dev.safetensors")
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("abc")
    (finding,) = findings(cached(matrix, tmp_path, **OFFLINE), weights.snapshot_complete)
    assert "lacks ae.safetensors, openai/clip-vit-large-patch14, xlabs-ai/xflux_text_encoders" in finding.seen
    (base / "snapshots" / "abc" / "ae.safetensors").write_bytes(b"x")
    for name in ("openai/clip-vit-large-patch14", "xlabs-ai/xflux_text_encoders"):
        (tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "abc").mkdir(parents=True)
    assert findings(cached(matrix, tmp_path, **OFFLINE), weights.snapshot_complete) == ()


NAME = "black-forest-labs/FLUX.1-dev"


def snapshot(home: Path, name: str = NAME) -> Path:
    """A hub cache with a whole snapshot of the repository, its files links into blobs as the library makes them."""
    base = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = model(base / "snapshots" / "abc")
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "tokenizer" / "merges.txt").write_text("a b")
    (folder / "tokenizer_2" / "spiece.model").write_text("x")
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("abc")
    (base / "blobs").mkdir()
    shard = folder / "transformer" / "model.safetensors"
    shard.rename(base / "blobs" / "123")
    shard.symlink_to("../../../blobs/123")
    return folder


def cached(matrix: Matrix, home: Path, **facts: Any) -> Case:
    environment = {"HF_HOME": str(home), **facts.pop("environment", {})}
    return on_this_disk(case(matrix, machine(matrix, environment=environment, **facts), job(None)))


OFFLINE = {"environment": {"HF_HUB_OFFLINE": "1"}}


def test_hub(matrix: Matrix, tmp_path: Path) -> None:
    assert "gated" in findings(cached(matrix, tmp_path, hub_token=False), weights.hub_access)[0].seen
    (finding,) = findings(cached(matrix, tmp_path), weights.hub_access)
    assert finding.severity == "warning" and "About 34 GB" in finding.because
    assert "HF_HUB_OFFLINE is set" in findings(cached(matrix, tmp_path, **OFFLINE), weights.hub_access)[0].seen
    other = {"environment": {"TRANSFORMERS_OFFLINE": "1"}}
    assert "TRANSFORMERS_OFFLINE is set" in findings(cached(matrix, tmp_path, **other), weights.hub_access)[0].seen
    snapshot(tmp_path)
    assert findings(cached(matrix, tmp_path, **OFFLINE), weights.hub_access) == ()
    assert findings(cached(matrix, tmp_path, **OFFLINE), weights.snapshot_complete) == ()


def test_a_mirror_that_gives_a_gated_model_without_a_token(matrix: Matrix, tmp_path: Path) -> None:
    subject = cached(matrix, tmp_path, hub_token=False, hub=HubAccess(NAME, "http://mirror", 200))
    assert findings(subject, weights.hub_access)[0].severity == "warning"


def test_offline_by_option(matrix: Matrix, tmp_path: Path) -> None:
    subject = cached(matrix, tmp_path)
    subject = msgspec.structs.replace(subject, job=msgspec.structs.replace(subject.job, offline=True))
    assert "--offline was given" in findings(subject, weights.hub_access)[0].seen


@pytest.mark.parametrize(("path", "word"), [
    ("blobs/123", "transformer/model.safetensors"),  # a link whose blob is gone
    ("snapshots/abc/vae/config.json", "vae/config.json"),
    ("snapshots/abc/tokenizer_2/spiece.model", "tokenizer_2/spiece.model"),
    ("snapshots/abc/text_encoder_2/model.safetensors", "text_encoder_2/*.safetensors"),
    ("snapshots/abc/scheduler/scheduler_config.json", "scheduler/scheduler_config.json"),
    ("refs/main", "refs/main"),
])  # fmt: skip
def test_half_downloaded_snapshot(matrix: Matrix, tmp_path: Path, path: str, word: str) -> None:
    base = snapshot(tmp_path).parent.parent
    (base / path).unlink()
    (finding,) = findings(cached(matrix, tmp_path, **OFFLINE), weights.snapshot_complete)
    assert f"lacks {word}." in finding.seen and finding.severity == "error"
    assert findings(cached(matrix, tmp_path, **OFFLINE), weights.hub_access) == ()
    (finding,) = findings(cached(matrix, tmp_path), weights.snapshot_complete)
    assert finding.severity == "warning" and "GB will be downloaded" in finding.because


def test_shards_that_are_missing(matrix: Matrix, tmp_path: Path) -> None:
    part = snapshot(tmp_path) / "transformer"
    (part / "model.safetensors").rename(part / "diffusion-00001-of-00002.safetensors")
    (finding,) = findings(cached(matrix, tmp_path), weights.snapshot_complete)
    assert "lacks transformer/diffusion.safetensors.index.json" in finding.seen
    names = {"a": "diffusion-00001-of-00002.safetensors", "b": "diffusion-00002-of-00002.safetensors"}
    (part / "diffusion.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (finding,) = findings(cached(matrix, tmp_path), weights.snapshot_complete)
    assert "lacks transformer/diffusion-00002-of-00002.safetensors." in finding.seen
    (part / "diffusion-00002-of-00002.safetensors").write_bytes(b"x")
    assert findings(cached(matrix, tmp_path), weights.snapshot_complete) == ()


def test_no_snapshot_is_not_a_broken_one(matrix: Matrix, tmp_path: Path) -> None:
    assert verdict(cached(matrix, tmp_path), weights.snapshot_complete).status == "skipped"
    assert verdict(case(matrix, machine(matrix), job(None)), weights.hub_access).status == "skipped"


@pytest.mark.parametrize(("status", "detail", "token", "severity", "words"), [
    (401, "", True, "error", "not valid any more"),
    (401, "RepoNotFound", False, "error", "gated, private, or not there"),
    (401, "GatedRepo: Access is restricted", True, "error", "has not been let in"),
    (403, "GatedRepo: not in the authorized list", True, "error", "has not been let in"),
    (404, "RepoNotFound", True, "error", "no such repository"),
    (407, "", True, "error", "proxy asks for a login"),
    (418, "", True, "warning", "may fail in the same way"),
    (429, "", True, "warning", "Too many requests"),
    (503, "", True, "warning", "has trouble"),
    (None, "timeout: no answer within 5 s", True, "warning", "slow or drops"),
    (None, "tls: certificate is not yet valid", True, "error", "clock that is wrong"),
    (None, "proxy: Tunnel connection failed: 403 Forbidden", True, "error", "HTTPS_PROXY refuses"),
    (None, "network: Connection refused", True, "error", "cannot be downloaded"),
])  # fmt: skip
def test_what_the_hub_answers(
    matrix: Matrix, tmp_path: Path, status: int | None, detail: str, token: bool, severity: str, words: str
) -> None:
    hub = HubAccess("some/model", "https://huggingface.co", status, detail)
    subject = cached(matrix, tmp_path, hub=hub, hub_token=token)
    (finding,) = findings(subject, weights.hub_answers)
    assert finding.severity == severity and words in finding.because and "some/model" in finding.seen and finding.hint


def test_the_hub_lets_in(matrix: Matrix, tmp_path: Path) -> None:
    for status in (200, 302):
        subject = cached(matrix, tmp_path, hub=HubAccess(NAME, "https://huggingface.co", status))
        assert findings(subject, weights.hub_answers) == ()
    assert verdict(cached(matrix, tmp_path), weights.hub_answers).status == "skipped"
    without = cached(matrix, tmp_path, hub=HubAccess(NAME, "https://huggingface.co", 401), hub_token=False)
    assert verdict(without, weights.hub_answers).status == "skipped"  # WE102 says it


def test_all_reduce(matrix: Matrix) -> None:
    facts = machine(matrix)
    good = msgspec.structs.replace(facts, allreduce=AllReduce("nccl", 2, True, "done"))
    assert findings(case(matrix, good, job()), network.all_reduce) == ()
    silent = AllReduce("nccl", 2, False, "rendezvous", 1, "did not end within 60 s and was killed", 60.0)
    (finding,) = findings(case(matrix, msgspec.structs.replace(facts, allreduce=silent), job()), network.all_reduce)
    assert finding.seen.startswith("Rank 1 of 2 failed a nccl all-reduce after stage 'rendezvous'")
    assert verdict(case(matrix, facts, job()), network.all_reduce).status == "skipped"
