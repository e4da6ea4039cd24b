"""A file that lost its indentation, as blog posts print it, is rebuilt: nothing of it is thrown away."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml
from conftest import XFLUX_ACCELERATE, case, findings, job, machine, record

from xflux_doctor.check import examine
from xflux_doctor.checks import ALL, words
from xflux_doctor.cli import main
from xflux_doctor.finding import Nest
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import make
from xflux_doctor.yamlnodes import CannotEdit
from xflux_doctor.yamltext import apply

FLAT = "\n".join(line.strip() for line in XFLUX_ACCELERATE.splitlines()) + "\n"
FSDP = """\
distributed_type: FSDP
fsdp_config:  # from the web
fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
# how it shards

fsdp_sharding_strategy: FULL_SHARD
mixed_precision: bf16
num_processes: 2
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_whole_file_comes_back(matrix: Matrix, newline: str) -> None:
    work = msgspec.structs.replace(job(FLAT), accelerate_text=FLAT.replace("\n", newline))
    subject = case(matrix, machine(matrix, count=8), work)
    (finding,) = findings(subject, words.sections_indented)
    assert "deepspeed_config has no value" in finding.seen and "zero_stage stand below it" in finding.seen
    plan = make(subject, lambda mended: examine(mended, ALL))
    assert [type(edit) for edit in plan.edits if edit.file == "accelerate"] == [Nest]
    text = apply(work.accelerate_text, [edit for edit in plan.edits if edit.file == "accelerate"])
    assert text == XFLUX_ACCELERATE.replace("\n", newline)
    assert (plan.job.zero_stage, plan.job.num_processes) == (2, 8)


def test_its_other_faults_are_mended_too(matrix: Matrix) -> None:
    plan = make(case(matrix, machine(matrix, count=2), job(FLAT)), lambda mended: examine(mended, ALL))
    text = apply(FLAT, [edit for edit in plan.edits if edit.file == "accelerate"])
    assert text == XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2")


def test_comments_and_blank_lines_stay(matrix: Matrix) -> None:
    subject = case(matrix, machine(matrix, count=2), job(FSDP))
    (finding,) = findings(subject, words.sections_indented)
    text = apply(FSDP, finding.edits)
    assert text == FSDP.replace("\nfsdp_", "\n  fsdp_").replace("\n  fsdp_config", "\nfsdp_config").replace(
        "# how", "  # how")  # fmt: skip
    assert yaml.safe_load(text)["fsdp_config"] == {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                                                   "fsdp_sharding_strategy": "FULL_SHARD"}  # fmt: skip
    assert apply(text, finding.edits) == text  # a second time changes nothing


@pytest.mark.parametrize("text", [
    XFLUX_ACCELERATE,
    "distributed_type: NO\ndeepspeed_config:\nnum_processes: 1\n",  # empty, and nothing of its own below it
    "distributed_type: NO\nzero_stage: 2\ndeepspeed_config:\n",  # above it: not a lost indentation
    "distributed_type: NO\ndeepspeed_config: {}\nzero_stage: 2\n",
])  # fmt: skip
def test_right_files_are_left_alone(matrix: Matrix, text: str) -> None:
    assert findings(case(matrix, machine(matrix), job(text)), words.sections_indented) == ()


def test_what_cannot_be_indented_is_refused() -> None:
    edit = Nest("accelerate", ("a",), ("b", "c"))
    with pytest.raises(CannotEdit, match="do not follow it line by line"):
        apply("{a: , b: 1, c: 2}", [edit])
    with pytest.raises(CannotEdit, match="do not follow it line by line"):
        apply("a:\nd: 0\nb: 1\nc: 2\n", [edit])
    with pytest.raises(CannotEdit, match="has a value already"):
        apply("a: 5\nb: 1\nc: 2\n", [edit])
    assert apply("a:\nb: 1\n", [edit]) == "a:\nb: 1\n"


def test_the_rebuilt_file_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: Matrix) -> None:
    """From the blog post's text to ranks under DeepSpeed: by `fix` and by the installed accelerate's own launcher."""
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(FLAT)
    record(tmp_path / "facts.json", machine(matrix, count=2))
    fix = ["fix", "--write-config", "--yes", "--facts", "facts.json", "--accelerate-config", "a.yaml"]
    assert main(fix) == 0
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    words_ = ["accelerate", "launch", "--config_file", "accelerate_config.yaml", "--main_process_port", str(port)]
    text = (tmp_path / "a.yaml").read_text()
    launched = {"name": "flat", "text": text, "environment": {}, "nodes": [[*words_, "train.py"]]}
    (tmp_path / "cases.json").write_text(json.dumps([launched]))
    probe = Path(__file__).with_name("launch_probe.py")
    argv = [sys.executable, str(probe), str(tmp_path / "cases.json"), str(tmp_path / "out")]
    subprocess.run(argv, check=True, timeout=120, capture_output=True)
    ranks = [json.loads(file.read_text()) for file in (tmp_path / "out/flat/0").glob("rank-*.json")]
    assert sorted(rank["RANK"] for rank in ranks) == ["0", "1"]
    assert {(r["WORLD_SIZE"], r["ACCELERATE_USE_DEEPSPEED"], r["ACCELERATE_MIXED_PRECISION"]) for r in ranks} == {
        ("2", "true", "bf16")}  # fmt: skip


@pytest.mark.parametrize("word", ["null", "~"])
def test_a_section_that_says_null(word: str) -> None:
    edit = Nest("accelerate", ("a",), ("b",))
    assert apply(f"a: {word}  # why\nb: 1\nd: 2\n", [edit]) == "a:  # why\n  b: 1\nd: 2\n"
