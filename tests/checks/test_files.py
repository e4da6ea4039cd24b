"""DA, WE, NE: the dataset, the output folder, the weights, the collective."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import msgspec
import pytest
from conftest import ROOT, case, findings, job, machine, verdict

from xflux_doctor.checks import data, network, weights
from xflux_doctor.facts import AllReduce
from xflux_doctor.matrix import Matrix

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


def test_output(matrix: Matrix, tmp_path: Path) -> None:
    good = job(None, output_dir=str(tmp_path / "new" / "deep"))
    assert findings(case(matrix, machine(matrix), good), data.output_writable) == ()
    (tmp_path / "file").write_text("")
    below_a_file = job(None, output_dir=str(tmp_path / "file" / "run"))
    assert "is a file" in findings(case(matrix, machine(matrix), below_a_file), data.output_writable)[0].seen


def test_output_on_a_read_only_file_system(matrix: Matrix) -> None:
    """/proc lets nobody make a folder, root included."""
    if os.access("/proc", os.W_OK):
        pytest.skip("root may write anywhere on this kernel's /proc by access(2)")
    work = job(None, output_dir="/proc/run")
    assert "cannot be written" in findings(case(matrix, machine(matrix), work), data.output_writable)[0].seen


def test_output_without_room(matrix: Matrix, tmp_path: Path) -> None:
    huge = job(None, output_dir=str(tmp_path), rank=4096, checkpointing_steps=1, checkpoints_total_limit=None,
               max_train_steps=1_000_000)  # fmt: skip
    assert "GiB free" in findings(case(matrix, machine(matrix), huge), data.output_writable)[0].seen


def model(folder: Path) -> Path:
    """A folder with the parts of a pipeline and one true safetensors file in each weight part."""
    for part in weights.PARTS:
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
    shutil.rmtree(folder / "scheduler")
    assert "lacks scheduler" in findings(subject, weights.folder_complete)[0].seen


def test_model_folder_that_is_not_there(matrix: Matrix) -> None:
    work = job(None, pretrained_model="./no/such/folder")
    assert "There is no model folder" in findings(case(matrix, machine(matrix), work), weights.folder_complete)[0].seen


def test_hub(matrix: Matrix, tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path)}
    work = job(None)
    without_token = machine(matrix, environment=home, hub_token=False)
    assert "gated" in findings(case(matrix, without_token, work), weights.hub_access)[0].seen
    with_token = machine(matrix, environment=home)
    assert findings(case(matrix, with_token, work), weights.hub_access)[0].severity == "warning"
    offline = machine(matrix, environment={**home, "HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE is set" in findings(case(matrix, offline, work), weights.hub_access)[0].seen
    model(tmp_path / "hub" / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "abc")
    assert findings(case(matrix, offline, work), weights.hub_access) == ()


def test_all_reduce(matrix: Matrix) -> None:
    facts = machine(matrix)
    good = msgspec.structs.replace(facts, allreduce=AllReduce("nccl", 2, True, "done"))
    assert findings(case(matrix, good, job()), network.all_reduce) == ()
    silent = AllReduce("nccl", 2, False, "rendezvous", 1, "did not end within 60 s and was killed", 60.0)
    (finding,) = findings(case(matrix, msgspec.structs.replace(facts, allreduce=silent), job()), network.all_reduce)
    assert finding.seen.startswith("Rank 1 of 2 failed a nccl all-reduce after stage 'rendezvous'")
    assert verdict(case(matrix, facts, job()), network.all_reduce).status == "skipped"
