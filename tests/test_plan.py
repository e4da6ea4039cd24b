"""Plans: edits are laid, everything is looked at again, blockers stay."""

from __future__ import annotations

import pytest
from conftest import XFLUX_ACCELERATE, case, job, machine

from xflux_doctor.batch import accumulation
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


@pytest.mark.parametrize("word", ["'8'", '"8"', "8.0", "eight"])
def test_edits_of_one_finding_are_laid_together_or_not_at_all(matrix: Matrix, word: str) -> None:
    """LA104 wants a number in the key that LA105 lowers: the passes belong to the lowered number alone."""
    text = XFLUX_ACCELERATE.replace("num_processes: 8", f"num_processes: {word}")
    plan = make(case(matrix, machine(matrix, count=2), job(text, gradient_accumulation_steps=2)), looked)
    values = {(e.file, e.key[-1]): e.value for e in plan.edits if isinstance(e, Edit)}
    assert values[("accelerate", "num_processes")] == 2 and plan.blockers == ()
    steps = 8 if word.strip("'\"") == "8" else 2  # what is no number says nothing of the samples
    assert values.get(("accelerate", "gradient_accumulation_steps"), 2) == steps
    assert values.get(("train", "gradient_accumulation_steps"), 2) == steps


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


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MULTI_GPU"])
@pytest.mark.parametrize("processes", ["3", "'4'", "6", "16"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_sees_as_many_samples_after_the_plan(
    matrix: Matrix, kind: str, processes: str, count: int, steps: int
) -> None:
    """Whatever else is mended in the same plan: here a misspelt precision and another accumulation in the file."""
    text = XFLUX_ACCELERATE.replace("num_processes: 8", f"num_processes: {processes}").replace("DEEPSPEED", kind)
    text = text.replace("accumulation_steps: 2", f"accumulation_steps: {steps}").replace("bf16", "bfloat16")
    work = job(text, gradient_accumulation_steps=2, train_batch_size=2)
    plan = make(case(matrix, machine(matrix, count=count), work), looked)
    assert plan.blockers == () and plan.conflicts == ()
    before = int(processes.strip("'")) * 2 * (steps if kind == "DEEPSPEED" else 2)
    ranks = plan.job.num_processes
    after = ranks * 2 * accumulation(plan.job)
    assert ranks == min(int(processes.strip("'")), count)
    assert after == before or (before % (2 * ranks) and abs(after - before) <= ranks)
    if kind == "DEEPSPEED" and plan.job.train is not None:
        assert plan.job.train.gradient_accumulation_steps == accumulation(plan.job)
