"""SW108 to SW115, and SW117: each check fires on the fault and stays silent beside it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from conftest import case, findings, job, machine, packages, verdict

from xflux_doctor.check import Case, Check
from xflux_doctor.checks import packages as checks
from xflux_doctor.commands.plan import faster_attention
from xflux_doctor.facts import Package, PythonFacts
from xflux_doctor.finding import Finding
from xflux_doctor.matrix import Matrix

LINKS = (
    "nvidia-nccl-cu12==2.20.5; platform_system == 'Linux' and platform_machine == 'x86_64'",
    "nvidia-cudnn-cu12==9.1.0.70; platform_system == 'Linux'",
    "nvidia-nvtx-cu12==12.1.105; platform_system == 'Linux'",
    "triton==3.0.0; python_version < '3.13'",
    "filelock",
)
WHEELS = {"nvidia-nccl-cu12": "2.20.5", "nvidia-cudnn-cu12": "9.1.0.70", "nvidia-nvtx-cu12": "12.1.105",
          "triton": "3.0.0", "filelock": "3.19.1"}  # fmt: skip


def with_links(matrix: Matrix, python: str = "3.11.7", **versions: str) -> Case:
    """The 2024 stack with torch's wheels beside it; `versions` changes one or removes it ("")."""
    found = packages(matrix, "xflux-2024")
    found["torch"] = msgspec.structs.replace(found["torch"], requires=LINKS)
    for name, version in {**WHEELS, **{k.replace("_", "-"): v for k, v in versions.items()}}.items():
        if version:
            found[name] = Package(name, version, location="/venv/site-packages")
    return case(matrix, machine(matrix, packages=found, python=python), job(), "xflux-2024")


def changed(matrix: Matrix, name: str, **values: Any) -> Case:
    found = packages(matrix, "cuda13")
    found[name] = msgspec.structs.replace(found[name], **values)
    return case(matrix, machine(matrix, packages=found), job())


def one(subject: Case, check: Check) -> Finding:
    (finding,) = findings(subject, check)
    return finding


@pytest.mark.parametrize(("change", "words", "severity"), [
    ({"nvidia_nccl_cu12": "2.18.1"}, "undefined symbol", "error"),
    ({"nvidia_nccl_cu12": "2.21.5"}, "never tested", "warning"),
    ({"nvidia_cudnn_cu12": "8.9.2.26"}, "file name carries the major release", "error"),
    ({"nvidia_cudnn_cu12": "9.5.1.17"}, "never tested", "warning"),
    ({"nvidia_nvtx_cu12": ""}, "cannot open shared object file", "error"),
    ({"triton": "3.2.0"}, "never tested", "warning"),
])  # fmt: skip
def test_linked_wheels(matrix: Matrix, change: dict[str, str], words: str, severity: str) -> None:
    finding = one(with_links(matrix, **change), checks.linked_wheels)
    assert words in finding.because and finding.severity == severity


def test_the_wheels_that_torch_names(matrix: Matrix) -> None:
    assert findings(with_links(matrix), checks.linked_wheels) == ()
    # the marker keeps triton out of Python 3.13
    assert findings(with_links(matrix, python="3.13.0", triton=""), checks.linked_wheels) == ()
    assert verdict(case(matrix, machine(matrix), job()), checks.linked_wheels).status == "skipped"


def test_declared(matrix: Matrix) -> None:
    needs_more = changed(matrix, "accelerate", requires=("numpy>=3",))
    finding = one(needs_more, checks.declared)
    assert "declares numpy>=3; 2.4.6 is installed" in finding.seen and finding.severity == "warning"
    missing = one(changed(matrix, "transformers", requires=("regex!=2019.12.17",)), checks.declared)
    assert "transformers 5.17.0 requires regex, which is not installed" in missing.seen
    assert missing.severity == "error"
    # what only a log or a later job would import stops nothing now
    assert one(changed(matrix, "tensorboard", requires=("grpcio",)), checks.declared).severity == "warning"
    fine = changed(matrix, "accelerate", requires=("numpy>=1.17", "pyyaml; extra == 'x'", "no such line ??"))
    assert findings(fine, checks.declared) == ()


def test_what_a_rule_says_is_not_said_again(matrix: Matrix) -> None:
    found = packages(matrix, "xflux-2024", tokenizers="0.22.2")
    found["transformers"] = msgspec.structs.replace(found["transformers"], requires=("tokenizers>=0.19,<0.20",))
    subject = case(matrix, machine(matrix, packages=found), job(), "xflux-2024")
    assert findings(subject, checks.declared) == ()


def test_whole(matrix: Matrix) -> None:
    torn = one(changed(matrix, "torch", damaged=("torch/lib/libtorch_cuda.so", "torch/_C.so")), checks.whole)
    assert "torch/lib/libtorch_cuda.so and 1 more" in torn.seen and torn.severity == "error"
    assert torn.commands == ("pip install --force-reinstall --no-deps torch==2.11.0",)
    assert one(changed(matrix, "tensorboard", damaged=("tensorboard/x.so",)), checks.whole).severity == "warning"
    assert findings(case(matrix, machine(matrix), job()), checks.whole) == ()


@pytest.mark.parametrize(("origin", "words"), [("path", "PYTHONPATH"), ("user", "PYTHONNOUSERSITE")])
def test_own_folder(matrix: Matrix, origin: str, words: str) -> None:
    finding = one(changed(matrix, "torch", origin=origin, location="/home/me/lib"), checks.own_folder)
    assert "torch of /venv/bin/python" in finding.seen and "/home/me/lib" in finding.seen and words in finding.hint
    # a venv made with --system-site-packages over an image's torch is a usual thing
    assert findings(changed(matrix, "torch", origin="system"), checks.own_folder) == ()


def test_conda(matrix: Matrix) -> None:
    def subject(**values: Any) -> Case:
        found = packages(matrix, "cuda13")
        found["torch"] = msgspec.structs.replace(found["torch"], **values)
        python = PythonFacts("/opt/conda/bin/python", "3.12.3", "/opt/conda", conda=True)
        return case(matrix, machine(matrix, packages=found, python_facts=python), job())

    finding = one(subject(conda="2.1.0", installer="pip"), checks.conda)
    assert finding.seen == "conda installed torch 2.1.0; pip put 2.11.0 over it."
    assert findings(subject(conda="2.11.0", installer="conda"), checks.conda) == ()
    assert findings(subject(installer="pip"), checks.conda) == ()
    assert verdict(case(matrix, machine(matrix), job()), checks.conda).status == "skipped"


def test_editable(matrix: Matrix) -> None:
    assert "diffusers 0.42.1 is an editable install" in one(changed(matrix, "diffusers", editable=True),
                                                           checks.no_editable).seen  # fmt: skip
    assert findings(changed(matrix, "xflux-doctor", editable=True), checks.no_editable) == ()


def test_free_threaded(matrix: Matrix) -> None:
    python = PythonFacts("/venv/bin/python", "3.13.0", "/venv", free_threaded=True)
    assert "free-threaded" in one(case(matrix, machine(matrix, python_facts=python), job()), checks.with_gil).seen
    assert findings(case(matrix, machine(matrix), job()), checks.with_gil) == ()


def test_one_version(matrix: Matrix) -> None:
    finding = one(changed(matrix, "torch", module_version="2.10.0"), checks.one_version)
    assert finding.seen == "torch's metadata says 2.11.0 and its version.py 2.10.0."
    assert findings(changed(matrix, "torch", module_version="2.11.0"), checks.one_version) == ()
    assert findings(changed(matrix, "torch", version="2.11.0+cu130", module_version="2.11.0"), checks.one_version) == ()


ONE_GPU = "distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: false\n"


@pytest.mark.parametrize(("train", "card", "installed", "words", "edit"), [
    ({}, "A100", "", "", None),
    ({"attention": "flash-attn-4"}, "H100", "4.0.0b10", "", None),
    ({"attention": "flash-attn-4"}, "B200", "4.0.0b10", "", None),
    ({"attention": "flash-attn-4"}, "H100", "", "it is not installed", ("attention", "auto")),
    ({"attention": "flash-attn-4"}, "A100", "4.0.0b10", "GPU 0 (NVIDIA A100-SXM4-80GB) has compute capability 8.0: it "
     "is for 9.0", ("attention", "auto")),
    ({"attention": "flash-attn-4", "kernels": "diffusers"}, "A100", "", "", None),  # nobody reads it
    ({"checkpointed_blocks": 20}, "A100", "", "", None),
    ({"checkpointed_blocks": 20, "gradient_checkpointing": False, "mixed_precision": "no"}, "A100", "", "", None),
    ({"checkpointed_blocks": 20, "mixed_precision": "no"}, "A100", "", "which fused kernels alone do, and "
     "mixed_precision is no", ("checkpointed_blocks", None)),
])  # fmt: skip
def test_kernels_asked(
    matrix: Matrix, train: dict[str, Any], card: str, installed: str, words: str, edit: tuple[str, Any] | None
) -> None:
    facts = machine(matrix, card=card, packages=packages(matrix, "cuda13", flash_attn_4=installed))
    found = findings(case(matrix, facts, job(ONE_GPU, **train)), checks.kernels_asked)
    assert [words in finding.seen for finding in found] == ([True] if edit else [])
    for finding in found:
        assert edit == (finding.edits[0].key[0], getattr(finding.edits[0], "value", ""))
        assert finding.commands == (("pip install flash-attn-4",) if "installed" in words else ())


def test_kernels_asked_of_a_cpu_and_without_triton(matrix: Matrix) -> None:
    some = {"checkpointed_blocks": 20}
    on_cpu = one(case(matrix, machine(matrix, card=None), job(ONE_GPU, cpu=True, **some)), checks.kernels_asked)
    assert on_cpu.seen.endswith("and the job runs on the CPU.")
    bare = packages(matrix, "cuda13")
    bare["torch"] = msgspec.structs.replace(bare["torch"], requires=("triton==3.6.0",))
    without = case(matrix, machine(matrix, packages=bare), job(ONE_GPU, **some))
    assert one(without, checks.kernels_asked).seen.endswith("Triton is not installed.")


@pytest.mark.parametrize(("card", "installed", "train", "told"), [
    ("H100", "", {}, True),
    ("H100", "4.0.0b10", {}, False),
    ("A100", "", {}, False),
    ("H100", "", {"kernels": "diffusers"}, False),
    ("H100", "", {"attention": "flash"}, False),
    ("H100", "", {"deterministic": True}, False),
])  # fmt: skip
def test_a_faster_attention_is_named(
    matrix: Matrix, card: str, installed: str, train: dict[str, Any], told: bool
) -> None:
    facts = machine(matrix, card=card, packages=packages(matrix, "cuda13", flash_attn_4=installed))
    advice = faster_attention(case(matrix, facts, job(ONE_GPU, **train)), facts.gpus or ())
    assert ("pip install flash-attn-4" in advice) == told
