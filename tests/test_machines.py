"""Recorded machines and hand-made ones: what the doctor says of each today."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import case, job
from machines import make as hand_made

from xflux_doctor.check import examine
from xflux_doctor.checks import ALL
from xflux_doctor.choose import choose
from xflux_doctor.facts import Facts, from_json
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import make

FOLDER = Path(__file__).parent / "machines"
DDP = "distributed_type: MULTI_GPU\nmixed_precision: bf16\nnum_machines: 1\nnum_processes: 8\nuse_cpu: false\n"


def recorded(name: str) -> Facts:
    return from_json((FOLDER / f"{name}.json").read_bytes())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_no_check_crashes(matrix: Matrix, path: Path) -> None:
    facts = from_json(path.read_bytes())
    for work in (job(), job(None), job(DDP), job(cpu=True)):
        for stack in (*(s.name for s in matrix.stacks), None):
            verdicts = examine(case(matrix, facts, work, stack), ALL)
            assert [v for v in verdicts if v.status == "crashed"] == []


def test_stack_of_the_h200(matrix: Matrix) -> None:
    choice = choose(matrix, recorded("h200"))
    assert choice.stack == "cuda13"
    assert "CPU build" in choice.refused["cpu"]


@pytest.mark.parametrize(("name", "count"), [("h200", 1), ("h200-two", 2)])
def test_eight_processes(matrix: Matrix, name: str, count: int) -> None:
    facts = recorded(name)
    plan = make(case(matrix, facts, job(DDP, gradient_accumulation_steps=2)), lambda subject: examine(subject, ALL))
    assert plan.job.num_processes == count
    assert {finding.code for finding in plan.blockers} <= {"WE102"}  # the hub model, without a token


@pytest.mark.parametrize("name", hand_made.MACHINES)
def test_the_files_are_what_the_script_makes(name: str) -> None:
    """Else run `python tests/machines/make.py`."""
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == hand_made.text(name)


OTHER_TORCH = {"SW103", "SW105"}
"""These carry the recorded machine's torch for CUDA 13, which they cannot run."""


@pytest.mark.parametrize(("name", "stack", "errors", "warnings"), [
    ("h100", "cuda13", {"LA105"}, set()),
    ("h100-two", "cuda13", {"LA105"}, set()),
    ("h200", "cuda13", {"LA105"}, set()),
    ("h200-two", "cuda13", {"LA105"}, set()),
    ("a100-eight", "cuda12", OTHER_TORCH, set()),
    ("rtx4090-two", "cuda12", {*OTHER_TORCH, "LA105", "ME101"}, {"HW120"}),
    ("v100", "cuda12", {*OTHER_TORCH, "HW104", "LA105"}, set()),
    ("b200-eight", "cuda13", set(), set()),
    ("a100-mig", "cuda13", {"HW118"}, set()),
    ("wsl2-two", "cuda13", {"LA105", "ME101"}, {"HW123"}),
    ("nvml-mismatch", None, {"SW101", "HW101"}, set()),
    ("h100-eight-one-lost", "cuda13", {"HW106", "LA105"}, set()),
    ("h100-eight-shared", "cuda13", {"ME101"}, {"HW121"}),
])  # fmt: skip
def test_a_plain_job(matrix: Matrix, name: str, stack: str | None, errors: set[str], warnings: set[str]) -> None:
    """DDP over eight ranks, as people copy it, with the demo's pictures."""
    facts = recorded(name)
    assert choose(matrix, facts).stack == stack
    work = job(DDP, gradient_accumulation_steps=2)
    found = [finding for verdict in examine(case(matrix, facts, work, stack), ALL) for finding in verdict.findings]
    assert {finding.code for finding in found if finding.severity == "error"} == errors
    assert {finding.code for finding in found if finding.severity == "warning"} == warnings


def test_seven_of_eight(matrix: Matrix) -> None:
    """The plan leaves the lost card out, and nothing about the cards is in its way."""
    facts = recorded("h100-eight-one-lost")
    plan = make(case(matrix, facts, job(DDP, gradient_accumulation_steps=2)), lambda subject: examine(subject, ALL))
    assert plan.job.num_processes == 7 and plan.blockers == ()
    assert plan.job.gpu_ids == ",".join(gpu.uuid for gpu in facts.gpus or ())
