"""The launch: the user's environment whole, and what a pass of the probes is remembered by."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, findings, gpus, job, machine

from xflux_doctor import remember
from xflux_doctor.check import Case
from xflux_doctor.checks import network
from xflux_doctor.commands import gate
from xflux_doctor.facts import AllReduce, GpuHealth, TorchFacts, Xid
from xflux_doctor.job import Override
from xflux_doctor.launch import build
from xflux_doctor.matrix import Matrix
from xflux_doctor.probes import retry
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
    work = msgspec.structs.replace(job(), offline=True)
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
    facts = machine(matrix, count=2, environment={"SLURM_JOB_ID": "1"})
    quick = case(matrix, facts, job())
    assert remember.recall(facts, remember.key(quick)) is None
    passed = msgspec.structs.replace(facts, torch=TORCH, allreduce=AllReduce("nccl", 2, True, "done"), speeds={"a": 1})
    for name in (remember.key(quick), remember.machine_key(quick)):
        remember.remember(facts, passed, name)
        assert remember.recall(facts, name) == passed  # whatever the probes had added

    of_the_machine = (
        msgspec.structs.replace(quick, facts=machine(matrix, count=2, driver="590.1")),
        msgspec.structs.replace(quick, facts=machine(matrix, count=2, environment={"NCCL_P2P_DISABLE": "1"})),
        msgspec.structs.replace(quick, facts=machine(matrix, count=1)),
        msgspec.structs.replace(quick, facts=machine(matrix, gpus=gpus(count=2, health=GpuHealth(ecc_uncorrected=1)))),
        msgspec.structs.replace(quick, facts=machine(matrix, count=2, xids=(Xid(79, "0000:1", 5.0),))),
        msgspec.structs.replace(quick, job=job(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2"))),
        msgspec.structs.replace(quick, stack=matrix.stack("cuda12")),
    )
    of_the_job = (
        msgspec.structs.replace(quick, job=job(XFLUX_ACCELERATE.replace("bf16", "fp16"))),
        msgspec.structs.replace(quick, job=job(rank=8)),
        msgspec.structs.replace(quick, job=msgspec.structs.replace(job(), zero_text="{}")),
        msgspec.structs.replace(
            quick, job=msgspec.structs.replace(job(), overrides={"x": Override(1, "SLURM_NNODES")})
        ),
    )
    assert [name for other in of_the_machine for name in _kept(other)] == []
    assert [_kept(other) for other in of_the_job] == [["machine"]] * len(of_the_job)
    # the same job by Slurm's next number, and a log line that is a minute older
    again = msgspec.structs.replace(quick, facts=machine(matrix, count=2, environment={"SLURM_JOB_ID": "2"}))
    assert _kept(again) == ["job", "machine"]
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/other")
    assert _kept(quick) == []


def _kept(one: Case) -> list[str]:
    names = {"job": remember.key(one), "machine": remember.machine_key(one)}
    return [what for what, name in names.items() if remember.recall(one.facts, name) is not None]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"torch": 1}', "\xff"])
def test_a_damaged_pass_is_none(matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = remember.folder({"XDG_CACHE_HOME": str(tmp_path)})
    folder.mkdir(parents=True)
    (folder / "name.json").write_bytes(text.encode("latin-1"))
    assert remember.recall(machine(matrix), "name") is None


def test_a_variable_that_a_probe_proved_is_added(matrix: Matrix) -> None:
    """Then the finding only warns, with its price; without it in the launch it is an error."""
    failed = AllReduce("nccl", 2, False, "init", 0, "did not end", helped=("NCCL_P2P_DISABLE=1",))
    facts = machine(matrix, count=2, allreduce=failed)
    (stops,) = findings(case(matrix, facts, job()), network.all_reduce)
    assert stops.severity == "error"
    given = msgspec.structs.replace(facts, environment={"NCCL_P2P_DISABLE": "1"})
    (warns,) = findings(case(matrix, given, job()), network.all_reduce)
    assert warns.severity == "warning" and "several times slower" in warns.because
    assert gate.added(case(matrix, given, job())) == {"NCCL_P2P_DISABLE": retry.COSTS["NCCL_P2P_DISABLE"]}
    launch = build("python", job(), Path("a.yaml"), Path("t.yaml"), USERS).adding(network.proven(failed))
    assert launch.added == {"NCCL_P2P_DISABLE": "1"} and launch.env == {**USERS, "NCCL_P2P_DISABLE": "1"}
    assert launch.shell.startswith("NCCL_P2P_DISABLE=1 python")
