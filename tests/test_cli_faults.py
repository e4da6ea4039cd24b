"""The command line on broken files, wrong arguments, full disks and closed pipes: one sentence, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from cli_kit import doctor, job_of
from conftest import TRAIN, XFLUX_ACCELERATE, machine, record

from xflux_doctor.matrix import Matrix

ACCELERATE_FAULTS = {
    "empty": (b"", "is empty"),
    "tabs": (b"num_processes: 2\ndeepspeed_config:\n\tzero_stage: 2\n", "tab"),
    "binary": (bytes(range(256)), "binary"),
    "latin-1": (b"# caf\xe9\nnum_processes: 2\n", "not UTF-8 text (line 1)"),
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


def test_a_pipe_that_closes(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m xflux_doctor.cli facts | head -c 1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr


def test_a_reader_that_left_before_the_first_word(tmp_path: Path) -> None:
    there, here = os.pipe()
    os.close(there)
    with os.fdopen(here, "wb") as gone:
        argv = [sys.executable, "-m", "xflux_doctor.cli", "matrix", "list", "--cpu"]
        done = subprocess.run(argv, cwd=tmp_path, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and not done.stderr  # click ends so


def test_a_full_device(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        argv = [sys.executable, "-m", "xflux_doctor.cli", "matrix", "list", "--cpu"]
        done = subprocess.run(argv, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0 and "No space left" in done.stderr and "Traceback" not in done.stderr


_PROGRAM = """
import atexit, os, sys, threading, time

class Taken:
    def __del__(self, write=os.write):
        write(1, b"taken down\\n")

kept = Taken()
atexit.register(print, "at exit")
{first}
from xflux_doctor.program import entry
entry(["matrix", "check", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ("", ["at exit"]),
        ("sys.settrace(lambda *_: None)", ["at exit", "taken down"]),
        ("sys.setprofile(lambda *_: None)", ["at exit", "taken down"]),
        (
            "threading.Thread(target=lambda: (time.sleep(3), print('thread'))).start()",
            ["thread", "at exit", "taken down"],
        ),
        ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", ["at exit"]),
    ],
)
def test_the_end_of_the_program(tmp_path: Path, first: str, words: list[str]) -> None:
    """At once, with what was said and registered, unless somebody looks on or a thread is still at work."""
    argv = [sys.executable, "-c", _PROGRAM.format(first=first)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.splitlines()[1:] == words
    done = subprocess.run([*argv, "no such file"], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 2 and done.stdout.splitlines() == words


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
        "import os, sys; from xflux_doctor.cli import main; import xflux_doctor.commands.check; "
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


def test_run_says_so_when_a_repair_cannot_be_laid_into_the_text(place: Path) -> None:
    """Its copy of accelerate's file is made before anything starts, and before other machines are asked."""
    text = (place / "accelerate.yaml").read_text()
    (place / "accelerate.yaml").write_text(text.replace("num_processes: 8", 'num_processes: !!int "8"'))
    inputs = job_of(place, "cuda13-2.json", "cuda13")
    for command in (["run", "--dry-run", "--yes"], ["fix", "--write-config", "--yes"]):
        done = doctor(*command, *inputs, cwd=place, code=1)
        assert "accelerate.yaml cannot be edited safely" in done.stderr and "by hand" in done.stderr


def test_run_keeps_a_json_file_json(place: Path) -> None:
    """With tabs, which YAML does not take: under another name accelerate could not read the copy."""
    values = yaml.safe_load((place / "accelerate.yaml").read_text())
    (place / "accelerate.json").write_text(json.dumps(values, indent="\t"))
    (place / "accelerate.yaml").unlink()
    inputs = [word.replace("accelerate.yaml", "accelerate.json") for word in job_of(place, "cuda13-2.json", "cuda13")]
    done = doctor("run", "--dry-run", "--yes", *inputs, cwd=place, code=0)
    assert "output/accelerate.json" in done.stdout.replace("out/", "output/") and "num_processes: 2" in done.stdout
