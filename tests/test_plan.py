"""Plans: edits are laid, everything is looked at again, blockers stay."""

from __future__ import annotations

import pytest
from conftest import XFLUX_ACCELERATE, case, job, machine

from xflux_doctor.check import examine
from xflux_doctor.checks import ALL
from xflux_doctor.finding import Edit, Remove, Rename
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import lay, make


def looked(subject):  # type: ignore[no-untyped-def]
    return examine(subject, ALL)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_eight_processes(matrix: Matrix, count: int) -> None:
    plan = make(case(matrix, machine(matrix, count=count), job(gradient_accumulation_steps=2)), looked)
    steps = 16 // count  # 8 ranks x 2 passes of one image, as before
    assert {(e.file, e.key[-1], e.value) for e in plan.edits if isinstance(e, Edit)} == {
        ("accelerate", "num_processes", count),
        ("accelerate", "gradient_accumulation_steps", steps),
        ("train", "gradient_accumulation_steps", steps),
    }
    assert plan.blockers == () and plan.job.num_processes == count


def test_healthy_job_has_no_edits(matrix: Matrix) -> None:
    plan = make(case(matrix, machine(matrix, count=8), job(gradient_accumulation_steps=2)), looked)
    assert plan.edits == () and plan.blockers == ()


def test_no_gpu_blocks_and_edits_nothing_of_the_launch(matrix: Matrix) -> None:
    plan = make(case(matrix, machine(matrix, card=None), job(gradient_accumulation_steps=2)), looked)
    assert plan.edits == ()
    assert {finding.code for finding in plan.blockers} == {"HW101"}


def test_a_repair_that_needs_another(matrix: Matrix) -> None:
    """A misspelled num_processes is renamed first; only then can it be too large."""
    text = XFLUX_ACCELERATE.replace("num_processes: 8", "num_procesess: 8")
    plan = make(case(matrix, machine(matrix, count=2), job(text, gradient_accumulation_steps=2)), looked)
    assert plan.blockers == () and plan.job.num_processes == 2
    assert any(isinstance(edit, Rename) for edit in plan.edits)


def test_lay_leaves_the_job_alone() -> None:
    before = job()
    edits = [
        Edit("accelerate", ("deepspeed_config", "zero_stage"), 1),
        Remove("accelerate", ("debug",)),
        Rename("accelerate", ("same_network",), "other"),
        Edit("train", ("rank",), 4),
    ]
    after = lay(before, edits)
    assert before.zero_stage == 2 and before.train and before.train.rank == 16
    assert after.zero_stage == 1 and after.train and after.train.rank == 4
    assert "debug" not in (after.accelerate or {}) and (after.accelerate or {})["other"] is True
