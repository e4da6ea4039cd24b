"""A file that lost its indentation, as blog posts print it, is rebuilt: nothing of it is thrown away."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from conftest import XFLUX_ACCELERATE, case, findings, job, machine

from xflux_doctor.check import examine
from xflux_doctor.checks import ALL, words
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
    work = dataclasses.replace(job(FLAT), accelerate_text=FLAT.replace("\n", newline))
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
