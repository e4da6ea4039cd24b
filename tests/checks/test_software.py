"""SW: each check fires on the fault and stays silent beside it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, findings, job, machine, packages, verdict

from xflux_doctor.checks import software
from xflux_doctor.commands import install
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
    ({"torch": "2.13.0+cpu"}, "Torch not compiled with CUDA enabled", "error"),
    ({"torch": "2.4.0+cu118"}, "paired with the stack's build", "warning"),
    ({"torchvision": "0.20.0+cu121"}, "too new", "error"),
    ({"deepspeed": "0.15.4"}, "too new", "error"),
    ({"transformers": "4.57.6"}, "too new", "error"),
    ({"transformers": ""}, "Missing of stack xflux-2024: transformers 4.43.3", "error"),
    ({"optimum_quanto": "0.2.7"}, "too new", "warning"),
    ({"transformers": "what"}, "cannot be judged", "error"),
    ({"pydantic": "2.14.4"}, "a later patch than what was tested", "warning"),
    ({"pydantic": "2.15.0"}, "too new", "error"),
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


def test_fewer_devices_in_torch_than_the_driver_has(matrix: Matrix) -> None:
    three = TorchFacts("2.11.0+cu130", "13.0", ("NVIDIA H100 80GB HBM3",) * 3)
    eight = machine(matrix, count=8, torch=three)
    assert "8 GPUs should be visible" in findings(case(matrix, eight, job()), software.torch_sees_gpus)[0].seen
    chosen = machine(matrix, count=8, torch=three, environment={"CUDA_VISIBLE_DEVICES": "0,1,2"})
    assert findings(case(matrix, chosen, job()), software.torch_sees_gpus) == ()


def test_a_cpu_build_is_enough_for_cpu_ranks(matrix: Matrix) -> None:
    facts = machine(matrix, packages=packages(matrix, "xflux-2024", torch="2.4.0+cpu"))
    on_gpu = findings(case(matrix, facts, job(), "xflux-2024"), software.pins)
    on_cpu = findings(case(matrix, facts, job(cpu=True), "xflux-2024"), software.pins)
    assert [f.severity for f in on_gpu] == ["error"] and [f.severity for f in on_cpu] == ["warning"]


def test_pip_is_forced_where_it_would_be_content(matrix: Matrix, tmp_path: Path) -> None:
    """pip takes 2.4.0+cpu for torch==2.4.0, and metadata without files for an install."""
    found = packages(matrix, "xflux-2024", torch="2.4.0+cpu")
    found["peft"] = msgspec.structs.replace(found["peft"], files=False)
    subject = case(matrix, machine(matrix, packages=found), job(), "xflux-2024")
    anew = install.broken(subject)
    assert anew == {"torch": "2.4.0", "peft": "0.13.2"}
    shown = [line for _, line in install.pip_commands(matrix.stack("xflux-2024"), "python", tmp_path, anew)]
    assert len(shown) == 3 and all("--force-reinstall" in line and "--no-deps" in line for line in shown[:2])
    assert "--force-reinstall" not in shown[2]


def test_torn_files_are_installed_again(matrix: Matrix, tmp_path: Path) -> None:
    """pip is content with metadata; a library that the stack does not name comes back at its own version."""
    found = packages(matrix, "xflux-2024", nvidia_nccl_cu12="2.20.5")
    found["nvidia-nccl-cu12"] = msgspec.structs.replace(found["nvidia-nccl-cu12"], damaged=("nvidia/nccl/lib/x.so.2",))
    found["torch"] = msgspec.structs.replace(found["torch"], module_version="2.3.1")
    subject = case(matrix, machine(matrix, packages=found), job(), "xflux-2024")
    anew = install.broken(subject)
    assert anew == {"torch": "2.4.0", "nvidia-nccl-cu12": "2.20.5"}
    shown = [line for _, line in install.pip_commands(matrix.stack("xflux-2024"), "python", tmp_path, anew)]
    assert any(line.endswith("--no-deps --force-reinstall nvidia-nccl-cu12==2.20.5") for line in shown)
