"""Recorded machines: what the doctor says of each today."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import case, job

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
