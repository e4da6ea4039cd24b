"""EN4: variables of the launcher, of Python and of the hub library."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, findings, job, machine, packages, verdict

from xflux_doctor.checks import job_variables
from xflux_doctor.facts import Package, Toolchain
from xflux_doctor.job import Job
from xflux_doctor.matrix import Matrix

ALONE = job(XFLUX_ACCELERATE.replace("distributed_type: DEEPSPEED", "distributed_type: 'NO'"))
DDP = job(XFLUX_ACCELERATE.replace("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU"))


def found(matrix: Matrix, check: Any, environment: dict[str, str], work: Job | None = None, **facts: Any) -> str:
    subject = case(matrix, machine(matrix, environment=environment, **facts), work or job())
    said = findings(subject, check)
    return " ".join(" ".join((f.severity, f.seen, f.because, f.hint, *f.commands)) for f in said)


def test_omp_threads(matrix: Matrix) -> None:
    check = job_variables.omp_threads
    for value in ("4,2", "", "all"):
        assert f"invalid literal for int() with base 10: {value!r}" in found(matrix, check, {"OMP_NUM_THREADS": value})
    text = found(matrix, check, {"OMP_NUM_THREADS": "16"})
    assert "8 ranks start and there are 16 cores" in text and "export OMP_NUM_THREADS=2" in text
    assert found(matrix, check, {"OMP_NUM_THREADS": "4"}) == "" == found(matrix, check, {})


def test_ranks_of_another_run(matrix: Matrix) -> None:
    check, left = job_variables.no_leftover_ranks, {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    text = found(matrix, check, left, ALONE)
    assert "WORLD_SIZE is 8 in this environment, RANK 3" in text and "waits for the others" in text
    assert "error WORLD_SIZE is 'eight'" in found(matrix, check, {"WORLD_SIZE": "eight"}, ALONE)
    assert found(matrix, check, {"RANK": "0", "WORLD_SIZE": "1"}, ALONE) == ""
    for environment, work in ((left, DDP), ({**left, "TORCHELASTIC_RUN_ID": "x"}, ALONE)):
        assert verdict(case(matrix, machine(matrix, environment=environment), work), check).status == "skipped"


def test_settings_of_another_run(matrix: Matrix) -> None:
    check = job_variables.no_leftover_settings
    assert "set up DEEPSPEED as well" in found(matrix, check, {"ACCELERATE_USE_DEEPSPEED": "true"}, DDP)
    assert found(matrix, check, {"ACCELERATE_USE_DEEPSPEED": "true"}) == ""
    assert "train on the CPU" in found(matrix, check, {"ACCELERATE_USE_CPU": "true"}, DDP)
    assert found(matrix, check, {"ACCELERATE_USE_CPU": "true"}, job(cpu=True)) == ""
    assert found(matrix, check, {"ACCELERATE_USE_CPU": "False", "ACCELERATE_USE_FSDP": "false"}, DDP) == ""


def test_transformers_cache(matrix: Matrix) -> None:
    check, old = job_variables.cache_variable, {"TRANSFORMERS_CACHE": "/data/models"}
    text = found(matrix, check, old, packages=packages(matrix, "cuda13", transformers="5.2.0"))
    assert "not read any more" in text and "export HF_HUB_CACHE=/data/models" in text
    assert found(matrix, check, old, packages=packages(matrix, "cuda13", transformers="4.57.1")) == ""
    both = old | {"HF_HOME": "/data/hf"}
    assert found(matrix, check, both, packages=packages(matrix, "cuda13", transformers="5.2.0")) == ""


def test_hf_transfer(matrix: Matrix) -> None:
    check, on = job_variables.hf_transfer, {"HF_HUB_ENABLE_HF_TRANSFER": "1"}
    old = packages(matrix, "xflux-2024")
    assert "package is not available in your environment" in found(matrix, check, on, packages=old)
    there = old | {"hf-transfer": Package("hf-transfer", "0.1.9")}
    assert found(matrix, check, on, packages=there) == ""
    assert found(matrix, check, on, packages=packages(matrix, "cuda13", huggingface_hub="1.3.0")) == ""
    assert found(matrix, check, {"HF_HUB_ENABLE_HF_TRANSFER": "0"}, packages=old) == ""


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HF_HUB_OFFLINE", "y", "takes it for off"),
        ("TRANSFORMERS_OFFLINE", "enabled", "takes it for off"),
        ("HF_ENDPOINT", "hf-mirror.com", "error HF_ENDPOINT is 'hf-mirror.com'. It is no URL"),
        ("HF_ENDPOINT", "http://mirror.example.org", "in the clear"),
    ],
)
def test_hub_words(matrix: Matrix, name: str, value: str, words: str) -> None:
    assert words in found(matrix, job_variables.hub_words, {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_HUB_OFFLINE", "true"),
        ("HF_HUB_OFFLINE", "0"),
        ("HF_HUB_OFFLINE", ""),
        ("HF_ENDPOINT", "https://mirror.example.org"),
        ("HF_ENDPOINT", "http://localhost:8080"),
    ],
)
def test_hub_words_that_are_right(matrix: Matrix, name: str, value: str) -> None:
    assert found(matrix, job_variables.hub_words, {name: value}) == ""


def test_python_home(matrix: Matrix) -> None:
    check = job_variables.python_home
    assert "job's Python is /venv/bin/python" in found(matrix, check, {"PYTHONHOME": "/usr"})
    assert found(matrix, check, {"PYTHONHOME": "/venv"}) == ""


def test_cuda_guard(matrix: Matrix) -> None:
    check, off = job_variables.cuda_guard_on, {"DS_SKIP_CUDA_CHECK": "1"}
    offload = XFLUX_ACCELERATE.replace("offload_optimizer_device: none", "offload_optimizer_device: cpu")
    work = msgspec.structs.replace(job(offload), train=None)  # the bundled trainer offloads nothing
    assert "nvcc is 12.4" in found(matrix, check, off, work, toolchain=Toolchain(cuda_version="12.4"))
    assert found(matrix, check, off, work, toolchain=Toolchain(cuda_version="13.1")) == ""
    facts = machine(matrix, environment=off, toolchain=Toolchain(cuda_version="12.4"))
    assert verdict(case(matrix, facts, job()), check).status == "skipped"


def test_cuda_spelling(matrix: Matrix) -> None:
    check = job_variables.cuda_spelling
    text = found(matrix, check, {"CUDA_VISIBLE_DEVICE": "1"})
    assert "not CUDA_VISIBLE_DEVICES" in text and "Did you mean CUDA_VISIBLE_DEVICES?" in text
    known = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_MODULE_DATA_LOADING": "LAZY", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert found(matrix, check, known) == ""
