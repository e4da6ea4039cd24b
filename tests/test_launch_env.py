"""The launch: the user's environment whole, and what a pass of the probes is remembered by."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
from conftest import case, job, machine

from xflux_doctor import remember
from xflux_doctor.facts import AllReduce, TorchFacts
from xflux_doctor.launch import build
from xflux_doctor.matrix import Matrix
from xflux_doctor.probes.level import job_environment

# The last three keep NVLink multicast off on hosts where it would put the GPUs out of service.
USERS = {
    "PATH": "/usr/bin", "HF_TOKEN": "secret", "NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "eth0", "TORCH_LOGS": "+all",
    "CUDA_VISIBLE_DEVICES": "0,1", "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}  # fmt: skip


def test_the_environment_reaches_the_ranks_whole() -> None:
    launch = build("python", job(), Path("a.yaml"), Path("t.yaml"), USERS)
    assert launch.env == USERS and launch.added == {}
    assert build("python", job(None, cpu=True), Path("a"), Path("t"), USERS).added == {}


def test_cpu_ranks_under_deepspeed_are_told_so() -> None:
    """accelerate's DeepSpeed launcher does not hand use_cpu on: beside a GPU the ranks would take it."""
    launch = build("python", job(cpu=True), Path("a.yaml"), Path("t.yaml"), USERS)
    assert launch.added == {"ACCELERATE_USE_CPU": "true"} and launch.env == {**USERS, **launch.added}
    assert launch.shell.startswith("ACCELERATE_USE_CPU=true ")


def test_offline_reaches_the_ranks() -> None:
    work = dataclasses.replace(job(), offline=True)
    assert build("python", work, Path("a.yaml"), Path("t.yaml"), USERS).added == {"HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(("work", "devices"), [
    (job(), "0,1"), (job(cpu=True), ""), (job("distributed_type: NO\ngpu_ids: '1'\n"), "1"),
])  # fmt: skip
def test_the_environment_reaches_the_probes_but_for_the_job_s_devices(work: object, devices: str) -> None:
    assert job_environment(work, USERS) == {**USERS, "CUDA_VISIBLE_DEVICES": devices}  # type: ignore[arg-type]


TORCH = TorchFacts("2.11.0", "13.0", ("NVIDIA H100",), ((9, 0),), "2.28.9")


def test_a_pass_is_remembered_for_exactly_its_case(
    matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    facts = machine(matrix, count=2)
    quick = case(matrix, facts, job())
    assert remember.recall(quick) is None
    passed = msgspec.structs.replace(facts, torch=TORCH, allreduce=AllReduce("nccl", 2, True, "done"))
    remember.remember(dataclasses.replace(quick, facts=passed))
    known = remember.recall(quick)
    assert known is not None and known.torch == TORCH and known.allreduce and known.allreduce.ok

    others = (
        dataclasses.replace(quick, facts=machine(matrix, count=2, driver="590.1")),
        dataclasses.replace(quick, facts=machine(matrix, count=2, environment={"NCCL_P2P_DISABLE": "1"})),
        dataclasses.replace(quick, facts=machine(matrix, count=1)),
        dataclasses.replace(quick, job=job("distributed_type: NO\n")),
        dataclasses.replace(quick, job=job(rank=8)),
        dataclasses.replace(quick, stack=matrix.stack("cuda12")),
    )
    assert [remember.recall(other) for other in others] == [None] * len(others)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/other")
    assert remember.recall(quick) is None


def test_a_failure_is_not_remembered(matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = machine(matrix, count=2)
    failed = msgspec.structs.replace(facts, torch=TORCH, allreduce=AllReduce("nccl", 2, False, "init", 1))
    remember.remember(case(matrix, failed, job()))
    assert remember.recall(case(matrix, facts, job())) is None
