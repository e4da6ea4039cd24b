"""The command line as people and programs meet it: exit codes, words, JSON, files. Every call is a process."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import GIB, ROOT, XFLUX_ACCELERATE, gpus, machine, packages

from xflux_doctor.facts import Facts, to_json
from xflux_doctor.matrix import Matrix

SCHEMA = json.loads((ROOT / "xflux_doctor/report/check.schema.json").read_text())
PHOTOS = ROOT / "examples/demo/photos"
TRAIN = f"model_name: flux-dev\ngradient_accumulation_steps: 2\ndata_config:\n  img_dir: {PHOTOS}\n  img_size: 512\n"


def doctor(*arguments: str, cwd: Path, code: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "xflux_doctor.cli", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HOME": str(cwd / "hf"), "XDG_CACHE_HOME": str(cwd / "cache"), **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    if code is not None:
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def place(tmp_path: Path, matrix: Matrix) -> Path:
    """A folder with a job and recorded machines with 0, 1, 2 and 8 devices, for two stacks."""
    (tmp_path / "accelerate.yaml").write_text("# X-Flux's own\n" + XFLUX_ACCELERATE)
    (tmp_path / "train.yaml").write_text(TRAIN)
    for stack in ("xflux-2024", "cuda13"):
        for count in (0, 1, 2, 8):
            facts = machine(matrix, card="H100" if count else None, count=count or 1, stack=stack)
            record(tmp_path / f"{stack}-{count}.json", facts)
    return tmp_path


def record(path: Path, facts: Facts) -> None:
    path.write_text(to_json(facts))


def job_of(place: Path, machine_file: str, stack: str) -> list[str]:
    return [
        "--config",
        "train.yaml",
        "--accelerate-config",
        "accelerate.yaml",
        "--facts",
        machine_file,
        "--stack",
        stack,
    ]


def check_json(place: Path, *arguments: str) -> dict[str, Any]:
    done = doctor("check", "--format", "json", *arguments, cwd=place)
    report = json.loads(done.stdout)
    jsonschema.validate(report, SCHEMA)
    assert report["exit_code"] == done.returncode
    return report  # type: ignore[no-any-return]


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
    old = (place / "accelerate.yaml").read_text()

    doctor("fix", "--write-config", *inputs, cwd=place, code=2)  # nobody to ask
    assert (place / "accelerate.yaml").read_text() == old
    doctor("fix", "--write-config", "--yes", *inputs, cwd=place, code=0)
    new = (place / "accelerate.yaml").read_text()
    assert new == old.replace("num_processes: 8", f"num_processes: {count}")
    assert check_json(place, *inputs)["exit_code"] == 0
    doctor("fix", *inputs, cwd=place, code=0)  # nothing is left to do

    doctor("fix", "--undo", *inputs, cwd=place, code=0)
    assert (place / "accelerate.yaml").read_text() == old


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


ACCELERATE_FAULTS = {
    "empty": (b"", "is empty"),
    "tabs": (b"num_processes: 2\ndeepspeed_config:\n\tzero_stage: 2\n", "tab"),
    "binary": (bytes(range(256)), "binary"),
    "nul": (b"a: 1\0", "binary"),
    "a list": (b"- 1\n- 2\n", "list"),
    "not yaml": (b"a: [1, 2\n", "not YAML"),
    "unknown key": (XFLUX_ACCELERATE.encode() + b"num_gpus: 2\n", "num_gpus"),
    "wrong type": (XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: many").encode(), "'many'"),
}


@pytest.mark.parametrize("name", ACCELERATE_FAULTS)
def test_broken_accelerate_file(place: Path, name: str) -> None:
    content, words = ACCELERATE_FAULTS[name]
    (place / "accelerate.yaml").write_bytes(content)
    inputs = job_of(place, "cuda13-8.json", "cuda13")
    done = doctor("check", *inputs, cwd=place, code=1)
    assert words in " ".join(done.stdout.split())
    before = (place / "accelerate.yaml").read_bytes()
    doctor("fix", *inputs, cwd=place, code=1)
    assert (place / "accelerate.yaml").read_bytes() == before


TRAIN_FAULTS = {
    "empty": (b"", "empty"),
    "tabs": (b"data_config:\n\timg_dir: x\n", "tab"),
    "binary": (bytes(range(256)), "is not a text file"),
    "unknown key": (TRAIN.encode() + b"learning_rat: 1.0\n", "learning_rate"),
    "wrong type": (TRAIN.encode() + b"rank: many\n", "rank"),
    "no dataset": (b"data_config: {img_dir: /no/such/folder}\n", "/no/such/folder"),
}


@pytest.mark.parametrize("name", TRAIN_FAULTS)
def test_broken_train_file(place: Path, name: str) -> None:
    content, words = TRAIN_FAULTS[name]
    (place / "train.yaml").write_bytes(content)
    inputs = job_of(place, "cuda13-8.json", "cuda13")
    done = doctor("check", *inputs, cwd=place, code=1)
    assert words in " ".join(done.stdout.split()), done.stdout
    doctor("run", "--dry-run", "--yes", *inputs, cwd=place, code=1)


@pytest.mark.parametrize("arguments", [
    ["check", "--config", "none.yaml"],
    ["check", "--accelerate-config", "none.yaml"],
    ["check", "--facts", "none.json"],
    ["check", "--python", "none/bin/python"],
    ["check", "--stack", "none"],
    ["check", "--config", "."],
    ["check", "--no-such-option"],
    ["check", "--format", "xml"],
    ["no-such-command"],
    ["explain", "none.log"],
    ["matrix", "show", "none"],
    ["matrix", "check", "none.yaml"],
    ["plan", "--gpu", "H100"],
    ["run"],
])  # fmt: skip
def test_usage(tmp_path: Path, arguments: list[str]) -> None:
    done = doctor(*arguments, cwd=tmp_path, code=2)
    assert done.stderr.strip()


def test_facts_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text('{"schema": 1, "gpus": "many"}')
    done = doctor("check", "--facts", "facts.json", cwd=tmp_path, code=1)
    assert "does not hold facts" in done.stderr


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    done = doctor("check", "--quick", "--cpu", "--output", "/proc/report", cwd=tmp_path, code=1)
    assert "could not be written" in done.stderr


def test_a_full_disk(tmp_path: Path) -> None:
    """A file system of 64 KiB: the report does not fit, one sentence says so, and no part of it stays."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        (small / "filler").write_bytes(bytes(60 << 10))
        done = doctor("check", "--quick", "--cpu", "--format", "json", "--output", str(small / "r.json"), cwd=tmp_path)
        assert done.returncode == 1 and "No space left" in done.stderr
        assert [path.name for path in small.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


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
    ("H100:80", 0, "fits"), ("RTX 4090:24", 0, "tight"), ("T4:15", 1, "Nothing fits this card"),
])  # fmt: skip
def test_plan(place: Path, gpu: str, code: int, words: str) -> None:
    inputs = job_of(place, "cuda13-1.json", "cuda13")
    done = doctor("plan", "--gpu", gpu, *inputs, cwd=place, code=code)
    assert words in done.stdout and "transformer" in done.stdout


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


def test_a_pipe_that_closes(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m xflux_doctor.cli facts | head -c 1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr


def test_own_files_are_never_replaced(place: Path) -> None:
    """output_dir is where the user's own train.yaml lies."""
    (place / "train.yaml").write_text(TRAIN + f"output_dir: {place}\n")
    before = (place / "train.yaml").read_bytes()
    inputs = job_of(place, "cuda13-8.json", "cuda13")
    done = doctor("run", "--dry-run", "--yes", *inputs, cwd=place, code=1)
    assert "Set output_dir to a folder of its own" in done.stderr
    assert (place / "train.yaml").read_bytes() == before


def test_no_gpu_file_for_a_machine_without_one(tmp_path: Path, matrix: Matrix) -> None:
    record(tmp_path / "none.json", machine(matrix, gpus=()))
    done = doctor("fix", "--write-config", "--yes", "--facts", "none.json", "--stack", "cuda13", cwd=tmp_path, code=1)
    assert "Nothing was written" in done.stdout and not (tmp_path / "accelerate_config.yaml").exists()


@pytest.mark.parametrize("arguments", [
    ["check", "--accept", "FOO", "--quick"],
    ["check", "--accept", "la105", "--quick"],
    ["check", "--gpu-limit", "nan", "--quick"],
    ["check", "--gpu-limit", "1e300", "--quick"],
    ["check", "--timeout", "inf", "--quick"],
    ["check", "--quick", "--output", "no/such/folder/report"],
    ["check", "--quick", "--python", "/etc/passwd"],
    ["check", "--quick", "--accelerate-config", "pipe"],
    ["check", "--quick", "--config", "pipe"],
    ["fix", "--install", "--yes", "--facts", "facts.json"],
])  # fmt: skip
def test_more_usage(tmp_path: Path, arguments: list[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = doctor(*arguments, cwd=tmp_path, code=2)
    assert done.stderr.strip() and "Traceback" not in done.stderr


def test_output_writes_to_a_device_and_through_a_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    doctor("check", "--quick", "--cpu", "--output", "pipe", cwd=tmp_path)
    assert b"xflux-doctor" in os.read(reader, 1 << 16) and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link").symlink_to("target")
    doctor("check", "--quick", "--cpu", "--output", "link", cwd=tmp_path)
    assert (tmp_path / "link").is_symlink() and "xflux-doctor" in (tmp_path / "target").read_text()


def test_names_that_are_no_text(place: Path) -> None:
    images = place / "images"
    images.mkdir()
    (images / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    (place / "train.yaml").write_text(f"data_config: {{img_dir: {images}}}\n")
    inputs = job_of(place, "cuda13-8.json", "cuda13")
    report = json.loads(doctor("check", "--format", "json", *inputs, cwd=place, code=1).stdout)
    assert any("caf" in f["seen"] for r in report["results"] for f in r["findings"])
    assert "caf" in doctor("check", *inputs, cwd=place, code=1).stdout
    doctor("check", "--output", "report.txt", *inputs, cwd=place, code=1)
    assert "caf" in (place / "report.txt").read_text()


def test_a_pipe_among_the_images_does_not_wait(place: Path) -> None:
    images = place / "images"
    images.mkdir()
    os.mkfifo(images / "a.jpg")
    os.mkfifo(images / "a.json")
    (place / "train.yaml").write_text(f"data_config: {{img_dir: {images}}}\n")
    assert "a.jpg" in doctor("check", *job_of(place, "cuda13-8.json", "cuda13"), cwd=place, code=1).stdout


def test_a_path_too_long_is_a_finding(place: Path) -> None:
    (place / "train.yaml").write_text(TRAIN + f"pretrained_model: ./{'x' * 300}\n")
    inputs = job_of(place, "cuda13-8.json", "cuda13")
    assert "File name too long" in doctor("check", *inputs, cwd=place, code=1).stdout
    doctor("fix", *inputs, cwd=place, code=1)
    assert "too long" in doctor("check", "--config", "y" * 300, cwd=place, code=1).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody who may not enter")
def test_a_folder_that_may_not_be_entered(place: Path) -> None:
    entered = Path(tempfile.mkdtemp())  # pytest's own folders are root's alone
    entered.chmod(0o755)
    (entered / "machine.json").write_bytes((place / "cuda13-8.json").read_bytes())
    closed = entered / "closed"
    closed.mkdir(mode=0o700)
    (closed / "train.yaml").write_text(TRAIN)
    # All is imported before: nobody may not read root's packages.
    code = (
        "import os, sys; from xflux_doctor.cli import main; "
        "os.setgid(65534); os.setuid(65534); sys.exit(main(sys.argv[1:]))"
    )
    try:
        for word in ("--config", "--accelerate-config", "--facts"):
            facts = [] if word == "--facts" else ["--facts", str(entered / "machine.json")]
            done = subprocess.run(
                [sys.executable, "-c", code, "check", "--quick", *facts, word, str(closed / "train.yaml")],
                capture_output=True, text=True, cwd=entered, env={"PATH": os.environ["PATH"]},
            )  # fmt: skip
            assert done.returncode == 1 and "Permission denied" in done.stderr, done.stderr
            assert "Traceback" not in done.stderr
    finally:
        shutil.rmtree(entered)


def test_accept_cannot_conjure_a_file(place: Path) -> None:
    (place / "train.yaml").write_text("\tx")
    inputs = job_of(place, "cuda13-8.json", "cuda13")
    doctor("run", "--dry-run", "--yes", "--accept", "LA102", *inputs, cwd=place, code=1)


def test_closed_standard_streams(place: Path) -> None:
    inputs = " ".join(job_of(place, "cuda13-1.json", "cuda13"))
    for command, words in ((f"fix --write-config {inputs}", "--yes"), ("explain -", "closed")):
        done = subprocess.run(
            f"{sys.executable} -m xflux_doctor.cli {command} <&-", shell=True, cwd=place, capture_output=True, text=True
        )
        assert done.returncode == 2 and words in done.stderr, done.stderr


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
    assert after.decode() == "# X-Flux's own\n" + mended
