"""The command line as people and programs meet it: exit codes, words, JSON, files. Every call is a process."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import jsonschema
import pytest
import yaml
from cli_kit import SCHEMA, check_json, doctor, job_of
from conftest import GIB, ROOT, TRAIN, XFLUX_ACCELERATE, gpus, machine, packages, record

from xflux_doctor.matrix import Matrix


@pytest.mark.parametrize(("stack", "count", "error"), [
    ("xflux-2024", 1, "invalid device ordinal"),
    ("xflux-2024", 2, "invalid device ordinal"),
    ("cuda13", 1, "Duplicate GPU detected"),
    ("cuda13", 2, "Duplicate GPU detected"),
])  # fmt: skip
def test_eight_processes_are_found_repaired_and_then_right(place: Path, stack: str, count: int, error: str) -> None:
    inputs = job_of(place, f"{stack}-{count}.json", stack)
    before = check_json(place, *inputs)
    found = {f["code"]: f for r in before["results"] for f in r["findings"] if f["severity"] == "error"}
    assert set(found) == {"LA105"} and before["exit_code"] == 1
    assert "num_processes is 8" in found["LA105"]["seen"] and error in found["LA105"]["because"]
    assert "NVIDIA H100" in found["LA105"]["seen"]

    shown = doctor("fix", *inputs, cwd=place, code=1).stdout  # edits are pending
    assert "-num_processes: 8" in shown and f"+num_processes: {count}" in shown
    old, train = (place / "accelerate.yaml").read_text(), (place / "train.yaml").read_text()

    doctor("fix", "--write-config", *inputs, cwd=place, code=2)  # nobody to ask
    assert (place / "accelerate.yaml").read_text() == old
    doctor("fix", "--write-config", "--yes", *inputs, cwd=place, code=0)
    new = (place / "accelerate.yaml").read_text()
    passes = ("gradient_accumulation_steps: 2", f"gradient_accumulation_steps: {16 // count}")
    assert new == old.replace("num_processes: 8", f"num_processes: {count}").replace(*passes)
    assert (place / "train.yaml").read_text() == train.replace(*passes)
    assert check_json(place, *inputs)["exit_code"] == 0
    doctor("fix", *inputs, cwd=place, code=0)  # nothing is left to do

    doctor("fix", "--undo", *inputs, cwd=place, code=0)
    assert (place / "accelerate.yaml").read_text() == old and (place / "train.yaml").read_text() == train


def test_no_gpu_writes_nothing(place: Path) -> None:
    inputs = job_of(place, "cuda13-0.json", "cuda13")
    before = (place / "accelerate.yaml").read_bytes()
    done = doctor("fix", "--write-config", "--yes", *inputs, cwd=place, code=1)
    assert "No GPU can be seen" in done.stdout and "Nothing was written" in done.stdout
    assert (place / "accelerate.yaml").read_bytes() == before
    assert not list(place.glob("*.bak-*"))


def test_cpu_is_written_when_it_is_asked_for(place: Path) -> None:
    inputs = [*job_of(place, "xflux-2024-0.json", "xflux-2024"), "--cpu", "--accept", "ME102", "--accept", "WE102"]
    (place / "train.yaml").write_text(TRAIN)
    doctor("fix", "--write-config", "--yes", *inputs, cwd=place)
    written = yaml.safe_load((place / "accelerate.yaml").read_text())
    assert written["use_cpu"] is True and written["distributed_type"] == "DEEPSPEED"


def test_fix_json(place: Path) -> None:
    inputs = job_of(place, "cuda13-2.json", "cuda13")
    done = doctor("fix", "--format", "json", *inputs, cwd=place, code=1)
    report = json.loads(done.stdout)
    jsonschema.validate(report, SCHEMA)
    assert report["edits"][0]["key"] == ["num_processes"] and report["written"] == []
    assert "+num_processes: 2" in report["files"]["accelerate.yaml"]


def test_healthy_machine(place: Path) -> None:
    report = check_json(place, *job_of(place, "cuda13-8.json", "cuda13"))
    assert report["exit_code"] == 0 and report["summary"]["error"] == 0
    warned = {f["code"] for r in report["results"] for f in r["findings"]}
    assert warned <= {"DA101", "WE102"}  # few photos, and a hub model that is not in the cache
    strict = doctor("check", "--strict", *job_of(place, "cuda13-8.json", "cuda13"), cwd=place)
    assert strict.returncode == (1 if warned else 0)


def test_output_file(place: Path) -> None:
    inputs = job_of(place, "cuda13-2.json", "cuda13")
    done = doctor("check", "--format", "json", "--output", "report.json", *inputs, cwd=place, code=1)
    assert done.stdout == ""
    jsonschema.validate(json.loads((place / "report.json").read_text()), SCHEMA)


def test_secrets_are_never_printed(tmp_path: Path) -> None:
    done = doctor("facts", cwd=tmp_path, code=0, HF_TOKEN="hf_secret_value", NCCL_TOKEN="hush", NCCL_DEBUG="INFO")
    facts = json.loads(done.stdout)
    assert "hf_secret_value" not in done.stdout and "hush" not in done.stdout
    assert facts["hub_token"] is True and facts["environment"]["NCCL_DEBUG"] == "INFO"


def test_matrix_commands(tmp_path: Path) -> None:
    doctor("matrix", "list", "--cpu", cwd=tmp_path, code=0)
    doctor("matrix", "check", cwd=tmp_path, code=0)
    assert "torch==2.4.0" in doctor("matrix", "export", "xflux-2024", cwd=tmp_path, code=0).stdout
    cpu = doctor("matrix", "export", "cpu", cwd=tmp_path, code=0).stdout
    assert "--find-links https://download.pytorch.org/whl/cpu/torch/\ntorch==2.13.0+cpu\n" in cpu
    shown = yaml.safe_load(doctor("matrix", "show", "cuda13", cwd=tmp_path, code=0).stdout)
    assert shown["packages"]["torch"]["version"] == "2.11.0"


@pytest.mark.parametrize(("gpu", "code", "words"), [
    ("H100:80", 0, "fits"), ("RTX 5090:27.2", 0, "tight"), ("T4:15", 0, "base in int4"),
    ("RTX 3050:8", 1, "Nothing fits this card"),  # the text encoders alone take 9.4 GiB
])  # fmt: skip
def test_plan(place: Path, gpu: str, code: int, words: str) -> None:
    inputs = job_of(place, "cuda13-1.json", "cuda13")
    done = doctor("plan", "--gpu", gpu, *inputs, cwd=place, code=code)
    assert words in done.stdout and "transformer" in done.stdout


@pytest.mark.parametrize(("gpu", "known"), [("H200:141", True), ("RTX 4090:24", False)])
def test_plan_says_how_long_it_takes_on_a_card_that_it_knows(place: Path, gpu: str, known: bool) -> None:
    done = doctor("plan", "--gpu", gpu, *job_of(place, "cuda13-1.json", "cuda13"), cwd=place, code=0)
    found = re.search(r"about (\S+) s a step, (\S+) hours in all \(± \d+%\) on H200", done.stdout)
    assert bool(found) is known
    if found:
        steps = yaml.safe_load((place / "train.yaml").read_text()).get("max_train_steps", 1000)
        assert float(found[2]) == pytest.approx(float(found[1]) * steps / 3600, abs=0.06 + 0.005 * steps / 3600)


def test_held_memory_is_named(place: Path, matrix: Matrix) -> None:
    busy = machine(matrix, gpus=gpus("H100", 1, memory_free=2 * GIB), packages=packages(matrix, "cuda13"))
    record(place / "busy.json", busy)
    done = doctor("check", *job_of(place, "busy.json", "cuda13"), cwd=place, code=1)
    assert "held outside this container" in " ".join(done.stdout.split())
    taken = doctor("check", "--accept", "ME101", *job_of(place, "busy.json", "cuda13"), cwd=place)
    assert "accepted by --accept ME101" in " ".join(taken.stdout.split())


def test_explain(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("step 1\nRuntimeError: CUDA error: invalid device ordinal\n")
    done = doctor("explain", "x.log", cwd=tmp_path, code=1)
    assert "invalid-device-ordinal" in done.stdout and "line 2" in done.stdout
    (tmp_path / "y.log").write_text("step 1 loss 0.3\nstep 2 loss 0.2\n")
    doctor("explain", "y.log", cwd=tmp_path, code=0)
    found = json.loads(doctor("explain", "x.log", "--format", "json", cwd=tmp_path, code=1).stdout)
    assert found["cause"] == "invalid-device-ordinal" and found["evidence"][0]["line"] == 2
    assert found["remedy"]["hint"] and found["schema"] == 1
    healthy = json.loads(doctor("explain", "y.log", "--format", "json", cwd=tmp_path, code=0).stdout)
    assert healthy["cause"] == "none" and set(healthy) == set(found)


def test_output_writes_to_a_device_and_through_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    doctor("check", "--quick", "--cpu", "--output", "pipe", cwd=tmp_path)
    assert b"xflux-doctor" in os.read(reader, 1 << 16) and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link").symlink_to("target")
    doctor("check", "--quick", "--cpu", "--output", "link", cwd=tmp_path)
    assert (tmp_path / "link").is_symlink() and "xflux-doctor" in (tmp_path / "target").read_text()


def test_logins_in_urls_and_odd_secrets_stay_out(tmp_path: Path) -> None:
    done = doctor("facts", cwd=tmp_path, code=0, TORCH_HOME="https://u:pw1@host/x", NCCL_AUTH="pw2", DS_DBPASS="pw3")
    assert "pw" not in done.stdout and json.loads(done.stdout)["environment"]["TORCH_HOME"] == "https://***@host/x"


def test_strict_says_what_it_did(place: Path, matrix: Matrix) -> None:
    text = (place / "accelerate.yaml").read_text() if (place / "accelerate.yaml").exists() else XFLUX_ACCELERATE
    (place / "accelerate.yaml").write_text(text.replace("num_processes: 8", "num_processes: 4"))
    inputs = job_of(place, "cuda13-8.json", "cuda13")
    done = doctor("check", "--strict", *inputs, cwd=place, code=1)
    assert "--strict" in done.stdout and "Nothing stops this job" not in done.stdout


@pytest.mark.parametrize(("recorded", "count"), [("h100", 1), ("h100-two", 2)])
def test_the_readme_s_file_on_recorded_machines(place: Path, recorded: str, count: int) -> None:
    """X-Flux's own file, eight processes and DeepSpeed: found, repaired, found no more, and not repaired again."""
    (place / "machine.json").write_bytes((ROOT / "tests/machines" / f"{recorded}.json").read_bytes())
    model = place / "hf/hub/models--black-forest-labs--FLUX.1-dev/snapshots/1"
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        (model / part).mkdir(parents=True)
    recorded_facts = json.loads((place / "machine.json").read_text())
    recorded_facts["environment"]["HF_HOME"] = str(place / "hf")
    (place / "machine.json").write_text(json.dumps(recorded_facts))
    inputs = job_of(place, "machine.json", "cuda13")
    found = " ".join(doctor("check", *inputs, cwd=place, code=1).stdout.split())
    assert f"num_processes is 8 (8 on this machine) and {count} device" in found
    assert "NVIDIA H100 80GB HBM3" in found and "Duplicate GPU detected" in found
    doctor("fix", "--write-config", "--yes", *inputs, cwd=place, code=0)
    doctor("check", *inputs, cwd=place, code=0)
    after = (place / "accelerate.yaml").read_bytes()
    doctor("fix", "--write-config", "--yes", *inputs, cwd=place, code=0)
    assert (place / "accelerate.yaml").read_bytes() == after
    mended = XFLUX_ACCELERATE.replace("num_processes: 8", f"num_processes: {count}")
    mended = mended.replace("accumulation_steps: 2", f"accumulation_steps: {16 // count}")
    assert after.decode() == "# X-Flux's own\n" + mended
