"""SW: each check fires on the fault and stays silent beside it."""

from __future__ import annotations

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, findings, job, machine, packages, verdict

from xflux_doctor.checks import software
from xflux_doctor.facts import Package, TorchFacts
from xflux_doctor.matrix import Matrix

DDP = XFLUX_ACCELERATE.replace("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU")


def test_stack(matrix: Matrix) -> None:
    facts = machine(matrix, card="B200", driver="535.0")
    subject = case(matrix, facts, job(), None, stack_because="No stack fits 1 × NVIDIA B200 here: …")
    assert findings(subject, software.stack_fits)[0].seen.startswith("No stack fits 1 × NVIDIA B200")
    assert findings(case(matrix, machine(matrix), job()), software.stack_fits) == ()


def test_python(matrix: Matrix) -> None:
    facts = machine(matrix, python="3.13.0")
    (finding,) = findings(case(matrix, facts, job(), "xflux-2024"), software.python_in_range)
    assert "Python is 3.13.0" in finding.seen
    assert findings(case(matrix, facts, job(), "cuda13"), software.python_in_range) == ()


@pytest.mark.parametrize("stack", ["xflux-2024", "cuda12", "cuda13", "cpu"])
def test_exact_pins(matrix: Matrix, stack: str) -> None:
    facts = machine(matrix, packages=packages(matrix, stack))
    assert findings(case(matrix, facts, job(), stack), software.pins) == ()


@pytest.mark.parametrize(("change", "words", "severity"), [
    ({"torch": "2.5.1+cu124"}, "too new", "error"),
    ({"torch": "2.3.1+cu121"}, "too old", "error"),
    ({"torch": "2.4.0+cpu"}, "A CPU build cannot use a GPU", "error"),
    ({"torch": "2.4.0+cu118"}, "paired with the stack's build", "warning"),
    ({"torchvision": "0.20.0+cu121"}, "too new", "error"),
    ({"deepspeed": "0.15.4"}, "too new", "error"),
    ({"transformers": "4.57.6"}, "too new", "error"),
    ({"transformers": ""}, "Missing of stack xflux-2024: transformers 4.43.3", "error"),
    ({"optimum_quanto": "0.2.7"}, "too new", "warning"),
    ({"transformers": "what"}, "cannot be judged", "error"),
])  # fmt: skip
def test_wrong_pins(matrix: Matrix, change: dict[str, str], words: str, severity: str) -> None:
    facts = machine(matrix, packages=packages(matrix, "xflux-2024", **change))
    (finding,) = findings(case(matrix, facts, job(), "xflux-2024"), software.pins)
    assert words in finding.seen + finding.because and finding.severity == severity


def test_the_public_index_names_no_build(matrix: Matrix) -> None:
    """Its wheel calls itself 2.4.0; the PyTorch index calls the same wheel 2.4.0+cu121; both are exact."""
    for metadata in ("2.4.0", "2.4.0+cu121"):
        found = packages(matrix, "xflux-2024")
        found["torch"] = Package("torch", metadata, "cu121", "/venv/site-packages")
        assert findings(case(matrix, machine(matrix, packages=found), job(), "xflux-2024"), software.pins) == ()


def test_deepspeed_only_when_the_job_uses_it(matrix: Matrix) -> None:
    without = machine(matrix, packages=packages(matrix, "cuda13", deepspeed=""))
    assert findings(case(matrix, without, job(DDP)), software.pins) == ()
    assert "deepspeed" in findings(case(matrix, without, job()), software.pins)[0].seen


def test_half_removed(matrix: Matrix) -> None:
    found = packages(matrix, "cuda13")
    found["torch"] = msgspec.structs.replace(found["torch"], files=False)
    (finding,) = findings(case(matrix, machine(matrix, packages=found), job()), software.pins)
    assert "no module beside it" in finding.seen


def test_shadowed(matrix: Matrix) -> None:
    found = packages(matrix, "cuda13")
    found["torch"] = msgspec.structs.replace(found["torch"], copies=2)
    (finding,) = findings(case(matrix, machine(matrix, packages=found), job()), software.shadowed)
    assert "torch is installed 2 times" in finding.seen
    assert findings(case(matrix, machine(matrix), job()), software.shadowed) == ()


@pytest.mark.parametrize("stack", ["xflux-2024", "cuda12", "cuda13", "cpu"])
def test_stacks_keep_all_rules(matrix: Matrix, stack: str) -> None:
    facts = machine(matrix, packages=packages(matrix, stack))
    assert findings(case(matrix, facts, job(), stack), software.rules) == ()


def test_every_rule_can_break(matrix: Matrix) -> None:
    """For each row: a version outside `need` beside versions inside `when` breaks it, one inside keeps it."""
    candidates = [f"{a}.{b}.{c}" for a in range(14) for b in range(60) for c in (0, 2, 99)]
    candidates += ["525.60.13", "470.1", "580.65.06", "600.0"]
    for rule in matrix.rules:
        beside = {}
        for name, need in rule.when.items():
            inside = next((v for v in candidates if software._within(v, need)), None)
            assert inside, (rule.id, name, need)
            beside[name] = inside
        outside = next((v for v in candidates if not software._within(v, rule.need)), None)
        assert outside, rule.id
        assert software.broken(rule, {**beside, rule.what: outside}), rule.id
        assert not software.broken(rule, {rule.what: outside}) or not rule.when, rule.id
        kept = next((v for v in candidates if software._within(v, rule.need)), None)
        if kept:
            assert not software.broken(rule, {**beside, rule.what: kept}), rule.id


def test_resume_rule(matrix: Matrix) -> None:
    """deepspeed before 0.16 cannot resume under torch 2.6: the best known skew must be in the matrix."""
    found = packages(matrix, "xflux-2024", torch="2.6.0+cu124")
    subject = case(matrix, machine(matrix, packages=found), job(), "xflux-2024")
    assert any("deepspeed 0.14.4" in f.seen and "torch 2.6.0" in f.seen for f in findings(subject, software.rules))


def test_torch_import(matrix: Matrix) -> None:
    subject = case(matrix, machine(matrix), job())
    assert verdict(subject, software.torch_imports).status == "skipped"
    dead = machine(matrix, unknown={"torch": "import torch died by SIGSEGV"})
    assert "died by SIGSEGV" in findings(case(matrix, dead, job()), software.torch_imports)[0].seen
    fine = machine(matrix, torch=TorchFacts("2.11.0+cu130", "13.0", ("NVIDIA H100 80GB HBM3",)))
    assert findings(case(matrix, fine, job()), software.torch_imports) == ()


def test_torch_sees_gpus(matrix: Matrix) -> None:
    blind = machine(matrix, torch=TorchFacts("2.11.0+cu130", "13.0", ()))
    assert "torch 2.11.0+cu130 sees none" in findings(case(matrix, blind, job()), software.torch_sees_gpus)[0].seen
    fine = machine(matrix, torch=TorchFacts("2.11.0+cu130", "13.0", ("NVIDIA H100 80GB HBM3",)))
    assert findings(case(matrix, fine, job()), software.torch_sees_gpus) == ()
