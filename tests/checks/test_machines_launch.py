"""LA4: several machines. Each check on a job that is wrong, and on the healthy one beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xflux_kit
import yaml
from conftest import ROOT, case, job, machine, verdict

from xflux_doctor.check import Check, examine
from xflux_doctor.checks import ALL, machines
from xflux_doctor.cluster import under
from xflux_doctor.facts import Cluster, Facts
from xflux_doctor.finding import Finding
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import make
from xflux_doctor.yamltext import apply

TWO = """\
# two machines
distributed_type: MULTI_GPU
machine_rank: 0  # this one
main_process_ip: 10.0.0.1
main_process_port: 29500
mixed_precision: bf16
num_machines: 2
num_processes: 4
rdzv_backend: static
same_network: true
"""
HERE = Cluster(("n1",), ("127.0.0.1", "10.0.0.1", "fe80::1"), ("10.0.0.1",), "10.0.0.1", ("10.0.0.1",))
THERE = msgspec.structs.replace(HERE, addresses=("127.0.0.1", "10.0.0.2"), own_addresses=("10.0.0.2",))
STEP = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n1",
        "SLURM_STEP_TASKS_PER_NODE": "2"}  # fmt: skip


def look(
    matrix: Matrix, check: Check, text: str, *, cluster: Cluster | None = HERE,
    environment: dict[str, str] | None = None, stack: str = "cuda13", count: int = 2, cpu: bool = False, **facts: Any,
) -> tuple[Finding, ...]:  # fmt: skip
    """The findings of one check; a skip is none, a crash fails the test."""
    machine_facts: Facts = machine(matrix, count=count, stack=stack, environment=environment, cluster=cluster, **facts)
    work = under(job(text, cpu=cpu), environment or {})
    result = verdict(case(matrix, machine_facts, work, stack), check)
    assert result.status != "crashed", result.reason
    return result.findings


def edited(text: str, found: tuple[Finding, ...]) -> str:
    return apply(text, [edit for finding in found for edit in finding.edits])


def test_a_healthy_job_is_left_alone(matrix: Matrix) -> None:
    for cluster, rank in ((HERE, 0), (THERE, 1)):
        text = TWO.replace("machine_rank: 0", f"machine_rank: {rank}")
        for check in machines.MACHINES:
            for stack in ("cuda13", "xflux-2024"):
                assert look(matrix, check, text, cluster=cluster, stack=stack) == (), check.code
    for check in machines.MACHINES:  # nor one of one machine
        assert look(matrix, check, "distributed_type: MULTI_GPU\nnum_processes: 2\n") == (), check.code


@pytest.mark.parametrize("text", [
    "num_machines: two\nmain_process_ip: [1]\nmain_process_port: {}\nmachine_rank: x\ndistributed_type: 5\n",
    "num_machines: 2\nmain_process_ip: 3\nmain_process_port: x\nnum_processes: {}\ndistributed_type: [a]\n",
    "num_machines: 2\ndeepspeed_config: 7\ndistributed_type: DEEPSPEED\nrdzv_backend: [x]\nmain_process_ip: ''\n",
    "num_machines: 3\ndeepspeed_config: {deepspeed_hostfile: [1], deepspeed_multinode_launcher: {}}\n"
    "distributed_type: DEEPSPEED\nmain_process_ip: \"\\0\"\n",
    "num_machines: -4\nmachine_rank: -1\n",
])  # fmt: skip
def test_odd_values_crash_nothing(matrix: Matrix, text: str) -> None:
    for check in machines.MACHINES:
        look(matrix, check, text)
        look(matrix, check, text, cluster=None, environment=STEP)


def test_rank_within(matrix: Matrix) -> None:
    text = TWO.replace("machine_rank: 0 ", "machine_rank: 2 ")
    found = look(matrix, machines.rank_within, text)
    assert found[0].seen == "machine_rank is 2 and num_machines is 2." and edited(text, found) == TWO
    assert edited(text, look(matrix, machines.rank_within, text, cluster=THERE)) == TWO.replace("rank: 0", "rank: 1")
    assert look(matrix, machines.rank_within, text, cluster=None)[0].edits == ()
    assert look(matrix, machines.rank_within, text.replace("machines: 2", "machines: 4")) == ()


def test_place_given(matrix: Matrix) -> None:
    for text in (TWO.replace("10.0.0.1", "null"), TWO.replace("main_process_ip: 10.0.0.1\n", "")):
        (found,) = look(matrix, machines.place_given, text)
        assert found.severity == "error" and "None:29500" in found.because and found.edits == ()
    text = TWO.replace("main_process_port: 29500\n", "")
    found = look(matrix, machines.place_given, text, stack="xflux-2024")
    assert (
        "'10.0.0.1:None' must be an integer" in found[0].because
        and edited(text, found) == text + "main_process_port: 29500\n"
    )
    assert look(matrix, machines.place_given, text) == ()  # newer releases take 29500
    text = TWO.replace("29500", "0")
    assert edited(text, look(matrix, machines.place_given, text)) == TWO


def test_place_known(matrix: Matrix) -> None:
    text = TWO.replace("10.0.0.1", "hed")
    lost = msgspec.structs.replace(HERE, main="hed", main_addresses=(), main_error="Name or service not known")
    (found,) = look(matrix, machines.place_known, text, cluster=lost)
    assert found.seen == "main_process_ip is 'hed', which this machine cannot find (Name or service not known)."
    unasked = msgspec.structs.replace(lost, main_addresses=None, main_error="not looked up")
    assert look(matrix, machines.place_known, text, cluster=unasked) == ()


def test_place_is_zero(matrix: Matrix) -> None:
    (found,) = look(matrix, machines.place_is_zero, TWO, cluster=THERE)
    assert found.severity == "error"
    assert (
        found.seen == "machine_rank is 0 and main_process_ip 10.0.0.1 is none of this machine's addresses (10.0.0.2)."
    )
    host = machine(matrix).host
    assert host is not None
    boxed = look(
        matrix, machines.place_is_zero, TWO, cluster=THERE, host=msgspec.structs.replace(host, container="docker")
    )
    assert [finding.severity for finding in boxed] == ["warning"]  # its port may be published
    (found,) = look(matrix, machines.place_is_zero, TWO.replace("rank: 0", "rank: 1"))
    assert found.severity == "warning" and "this machine's own" in found.seen


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "127.1.2.3", "::1", "'[::1]'"])
def test_no_loopback(matrix: Matrix, address: str) -> None:
    (found,) = look(matrix, machines.no_loopback, TWO.replace("10.0.0.1", address), cluster=None)
    assert "every machine's own" in found.because and found.edits == ()


def test_a_name_that_leads_home(matrix: Matrix) -> None:
    text = TWO.replace("10.0.0.1", "n1")
    home = msgspec.structs.replace(HERE, main="n1", main_addresses=("127.0.1.1",))
    assert look(matrix, machines.no_loopback, text, cluster=home) == ()  # machine 0 listens on all addresses
    (found,) = look(matrix, machines.no_loopback, text.replace("rank: 0", "rank: 1"), cluster=home)
    assert "/etc/hosts leads to 127.0.1.1" in found.seen


def test_ranks_divide(matrix: Matrix) -> None:
    text = TWO.replace("num_processes: 4", "num_processes: 5")
    found = look(matrix, machines.ranks_divide, text)
    assert "5 // 2 = 2" in found[0].because and edited(text, found) == TWO
    text = TWO.replace("num_processes: 4", "num_processes: 1")
    found = look(matrix, machines.ranks_divide, text)
    assert "AssertionError" in found[0].because and edited(text, found) == text.replace("processes: 1", "processes: 2")


@pytest.mark.parametrize("kind", ["NO", "'NO'", "MULTI_CPU"])
def test_kind_is_distributed(matrix: Matrix, kind: str) -> None:
    text = TWO.replace("MULTI_GPU", kind)
    assert edited(text, look(matrix, machines.kind_is_distributed, text)) in (
        TWO,
        TWO.replace("MULTI_GPU", "'MULTI_GPU'"),
    )
    assert look(matrix, machines.kind_is_distributed, text + "mpirun_config: {mpirun_hostfile: h}\n") == ()


def test_one_repair_brings_the_next(matrix: Matrix) -> None:
    """NO with one process on two machines: a group, then a rank for each."""
    text = TWO.replace("MULTI_GPU", "'NO'").replace("num_processes: 4", "num_processes: 1")
    subject = case(matrix, machine(matrix, count=1, cluster=HERE), job(text))
    plan = make(subject, lambda mended: examine(mended, ALL))
    assert (plan.job.distributed_type, plan.job.num_processes) == ("MULTI_GPU", 2)


def test_deepspeed_launcher(matrix: Matrix, tmp_path: Path) -> None:
    text = TWO.replace("MULTI_GPU", "DEEPSPEED") + "deepspeed_config:\n  zero_stage: 2\n"
    found = look(matrix, machines.deepspeed_launcher, text)
    assert "pdsh, accelerate's default" in found[0].seen and "--hostfile None" in found[0].because
    mended = edited(text, found)
    assert yaml.safe_load(mended)["deepspeed_config"] == {"zero_stage": 2, "deepspeed_multinode_launcher": "standard"}
    assert look(matrix, machines.deepspeed_launcher, mended) == ()
    missing = text + "  deepspeed_multinode_launcher: pdsh\n  deepspeed_hostfile: /nowhere/hosts\n"
    assert (
        "no file at deepspeed_hostfile '/nowhere/hosts'" in look(matrix, machines.deepspeed_launcher, missing)[0].seen
    )
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    assert look(matrix, machines.deepspeed_launcher, missing.replace("/nowhere", str(tmp_path))) == ()


def test_meeting_keys_read(matrix: Matrix) -> None:
    (found,) = look(matrix, machines.meeting_keys_read, TWO.replace("static", "c10d"))
    assert found.severity == "warning" and found.edits == () and "'c10d'" in found.seen


def test_tasks_fit(matrix: Matrix) -> None:
    two = "distributed_type: MULTI_GPU\nnum_processes: 2\n"
    assert look(matrix, machines.tasks_fit, two, environment=STEP) == ()
    assert look(matrix, machines.tasks_fit, two, environment=STEP, count=1) == ()  # a card bound to each task
    (found,) = look(matrix, machines.tasks_fit, two.replace("2", "8"), environment=STEP)
    assert found.severity == "warning" and "0.25 times the samples" in found.because
    third = {**STEP, "SLURM_LOCALID": "2", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3",
             "SLURM_STEP_TASKS_PER_NODE": "3"}  # fmt: skip
    (found,) = look(matrix, machines.tasks_fit, two.replace("2", "3"), environment=third)
    assert "rank 2 of 3 on this machine, and 2 devices" in found.seen
    assert look(matrix, machines.tasks_fit, two.replace("2", "3"), environment=third, cpu=True) == ()
    few = {**STEP, "SLURM_STEP_NUM_NODES": "4"}
    assert "2 tasks on 4 nodes" in look(matrix, machines.tasks_fit, two, environment=few)[0].seen


def test_no_launcher_in_a_rank(matrix: Matrix, tmp_path: Path) -> None:
    text = "distributed_type: MULTI_GPU\nnum_processes: 2\n"
    assert look(matrix, machines.no_launcher_in_rank, text, environment=STEP) == ()  # run starts the trainer itself
    work = msgspec.structs.replace(under(job(text), STEP), xflux=xflux_kit.job(tmp_path).xflux)
    subject = case(matrix, machine(matrix, count=2, environment=STEP), work)
    (found,) = verdict(subject, machines.no_launcher_in_rank).findings
    assert found.seen == "srun started 2 tasks, and each of them would start accelerate's launcher."


def test_gloo_address(matrix: Matrix) -> None:
    loop = msgspec.structs.replace(HERE, own_addresses=("127.0.1.1",))
    (found,) = look(matrix, machines.gloo_address, TWO, cluster=loop, cpu=True)
    assert found.seen == "This host's name 'n1' is 127.0.1.1 in /etc/hosts."
    assert look(matrix, machines.gloo_address, TWO, cluster=loop) == ()  # NCCL looks for itself
    named = {"GLOO_SOCKET_IFNAME": "eth0"}
    assert look(matrix, machines.gloo_address, TWO, cluster=loop, cpu=True, environment=named) == ()


def test_ranks_of_slurm_are_judged_as_ranks(matrix: Matrix) -> None:
    """One card bound to each task is no missing card (LA105), and nothing else of the launch is found either."""
    work = under(job("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: bf16\n"), STEP)
    subject = case(matrix, machine(matrix, count=1, environment=STEP), work)
    found = [v.check for v in examine(subject, ALL) if v.status in ("error", "warning") and v.check.startswith("LA")]
    assert found == []


def test_what_accelerate_does(tmp_path: Path) -> None:
    """Each claim of these checks that needs no second machine, by the installed release's own functions."""
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("deepspeed")
    free = TWO.replace("29500", "29733")
    files = {
        "good": free,
        "floor": free.replace("processes: 4", "processes: 5"),
        "zero": free.replace("processes: 4", "processes: 1"),
        "c10d": free.replace("static", "c10d"),
        "no_ip": free.replace("10.0.0.1", "null"),
        "no_port": free.replace("main_process_port: 29733\n", "machine_rank: 1\n").replace(
            "machine_rank: 0  # this one\n", ""
        ),
        "no": free.replace("MULTI_GPU", "'NO'"),
        "pdsh": free.replace("MULTI_GPU", "DEEPSPEED") + "deepspeed_config: {zero_stage: 2}\n",
        "standard": free.replace("MULTI_GPU", "DEEPSPEED")
        + "deepspeed_config: {zero_stage: 2, deepspeed_multinode_launcher: standard}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    argv = [sys.executable, str(ROOT / "tests/accelerate_env.py"), *files]
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=clean)
    assert done.returncode == 0, done.stderr
    seen = yaml.safe_load(done.stdout.splitlines()[-1])
    assert (seen["good"]["each"], seen["good"]["where"], seen["good"]["backend"]) == ("2", "10.0.0.1:29733", "static")
    assert seen["floor"]["each"] == "2" and seen["zero"]["each"] == "0"
    assert seen["c10d"]["backend"] == "static"
    assert seen["no_ip"]["where"] == "None:29733"
    new = tuple(map(int, accelerate.__version__.split(".")[:2])) >= (1, 7)
    assert seen["no_port"]["where"] == ("10.0.0.1:29500" if new else "10.0.0.1:None")
    ranks = {name: seen["no"]["env"].get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    assert ranks == {"RANK": None, "WORLD_SIZE": None, "MASTER_ADDR": "10.0.0.1"}
    assert seen["pdsh"]["cmd"][:1] == ["deepspeed"] and "None" in seen["pdsh"]["cmd"] and "pdsh" in seen["pdsh"]["cmd"]
    assert seen["standard"]["cmd"] is None and seen["standard"]["where"] == "10.0.0.1:29733"
    assert seen["hostfile"] is None  # `proceed with training with local resources only`
