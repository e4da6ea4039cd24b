"""HW: each check fires on the fault and stays silent beside it."""

from __future__ import annotations

from conftest import XFLUX_ACCELERATE, case, findings, gpus, job, machine, verdict

from xflux_doctor.checks import hardware
from xflux_doctor.facts import Driver, GpuProcess
from xflux_doctor.finding import Edit
from xflux_doctor.matrix import Matrix


def test_driver_answers(matrix: Matrix) -> None:
    (finding,) = findings(case(matrix, machine(matrix, card=None), job()), hardware.driver_answers)
    assert "there is no NVIDIA driver library" in finding.seen
    assert findings(case(matrix, machine(matrix), job()), hardware.driver_answers) == ()


def test_version_mismatch_says_reboot_and_not_reinstall(matrix: Matrix) -> None:
    why = "driver and library versions differ (the driver was upgraded without a reboot)"
    facts = machine(matrix, card=None, unknown={"gpus": why})
    (finding,) = findings(case(matrix, facts, job()), hardware.driver_answers)
    assert finding.hint.startswith("Reboot")


def test_cpu_job_needs_no_driver(matrix: Matrix) -> None:
    assert verdict(case(matrix, machine(matrix, card=None), job(cpu=True)), hardware.driver_answers).status == "skipped"


def test_driver_against_stack(matrix: Matrix) -> None:
    old = machine(matrix, driver="550.127.05")
    (finding,) = findings(case(matrix, old, job()), hardware.driver_new_enough)
    assert "The driver is 550.127.05; stack cuda13 wants" in finding.seen
    assert findings(case(matrix, old, job(), "cuda12"), hardware.driver_new_enough) == ()


def test_blackwell_wants_a_newer_driver(matrix: Matrix) -> None:
    facts = machine(matrix, card="B200", driver="550.127.05")
    assert len(findings(case(matrix, facts, job(), "cuda12"), hardware.driver_new_enough)) == 1
    newer = machine(matrix, card="B200", driver="570.86.15")
    assert findings(case(matrix, newer, job(), "cuda12"), hardware.driver_new_enough) == ()


def test_newer_driver_runs_older_cuda(matrix: Matrix) -> None:
    facts = machine(matrix, driver="595.58.03")
    assert findings(case(matrix, facts, job(), "xflux-2024"), hardware.driver_new_enough) == ()


def test_kernels(matrix: Matrix) -> None:
    (finding,) = findings(case(matrix, machine(matrix, card="5090"), job(), "xflux-2024"), hardware.kernels_for_cards)
    assert "sm_120" in finding.seen and "sm_90" in finding.seen
    # 8.9 runs code for 8.6
    assert findings(case(matrix, machine(matrix, card="L40S"), job(), "xflux-2024"), hardware.kernels_for_cards) == ()


def test_kernels_of_hidden_cards_do_not_matter(matrix: Matrix) -> None:
    mixed = (*gpus("H100", 1), *gpus("V100", 1, index=1, uuid="GPU-1"))
    facts = machine(matrix, gpus=mixed, environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert findings(case(matrix, facts, job()), hardware.kernels_for_cards) == ()
    assert len(findings(case(matrix, machine(matrix, gpus=mixed), job()), hardware.kernels_for_cards)) == 1


def test_precision(matrix: Matrix) -> None:
    (finding,) = findings(case(matrix, machine(matrix, card="V100"), job(), "cuda12"), hardware.precision_supported)
    edits = tuple(Edit(n, ("mixed_precision",), "fp16", "bf16 wants capability 8.0") for n in ("train", "accelerate"))
    assert finding.edits == edits
    # what accelerate's file says alone changes nothing: the trainer goes by its own
    half = job(XFLUX_ACCELERATE.replace("mixed_precision: bf16", "mixed_precision: fp16"))
    assert findings(case(matrix, machine(matrix, card="V100"), half, "cuda12"), hardware.precision_supported)
    fp16 = job(mixed_precision="fp16")
    assert findings(case(matrix, machine(matrix, card="V100"), fp16, "cuda12"), hardware.precision_supported) == ()
    assert findings(case(matrix, machine(matrix, card="A100"), job()), hardware.precision_supported) == ()


def test_compute_mode(matrix: Matrix) -> None:
    closed = machine(matrix, gpus=gpus("H100", 1, compute_mode="prohibited"))
    assert findings(case(matrix, closed, job()), hardware.compute_mode)[0].severity == "error"
    held = machine(
        matrix, gpus=gpus("H100", 1, compute_mode="exclusive_process", processes=(GpuProcess(4711, 1 << 30),))
    )
    assert "process 4711 holds it" in findings(case(matrix, held, job()), hardware.compute_mode)[0].seen
    alone = machine(matrix, gpus=gpus("H100", 1, compute_mode="exclusive_process"))
    assert findings(case(matrix, alone, job()), hardware.compute_mode) == ()


def test_driver_fact_is_needed(matrix: Matrix) -> None:
    facts = machine(matrix, driver="580.159.04")
    assert facts.driver == Driver("580.159.04", "13.0")
