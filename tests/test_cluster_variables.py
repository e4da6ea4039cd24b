"""Slurm's and torchrun's variables: who is a task, who is a rank, and what they say in place of accelerate's file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from conftest import job, tree

from xflux_doctor.cluster import Task, hosts_of, port_of, task, tasks_per_node, under
from xflux_doctor.gather.cluster import cluster_facts
from xflux_doctor.job import Job, Override

# Of a running Slurm 22.05: `srun -n1`, an sbatch script with -n2, and the shell of salloc.
STEP = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
        "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n1",
        "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NNODES": "1"}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "2",
         "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "vm"}  # fmt: skip
SALLOC = {"SLURM_JOB_ID": "4", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "vm"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
            "MASTER_ADDR": "n1", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
ONE = "distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 8\n"


def step(nodes: int = 1, tasks: int = 1, rank: int = 0, **more: str) -> dict[str, str]:
    each = tasks // nodes
    return {
        **STEP,
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{nodes})",
        "SLURM_STEP_NODELIST": f"n[1-{nodes}]" if nodes > 1 else "n1",
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank // max(1, each)),
        "SLURM_LOCALID": str(rank % max(1, each)),
        **more,
    }


@pytest.mark.parametrize(("text", "hosts"), [
    ("vm", ("vm",)),
    ("n[001-003,7],gpu-a", ("n001", "n002", "n003", "n7", "gpu-a")),
    ("n[8-11]", ("n8", "n9", "n10", "n11")),
    ("n[09-10]", ("n09", "n10")),
    ("r[1-2]n[1-2]", ("r1n1", "r1n2", "r2n1", "r2n2")),
    ("a[1]b,c", ("a1b", "c")),
    (" n1,n2 ", ("n1", "n2")),
    ("", ()),
    ("n[1-", ()),
    ("n[a-b]", ()),
    ("n[1,x]", ()),
    ("n[]", ()),
    ("n[5-1]", ()),
    ("n[0-999999]", ()),
    ("n[1-999]m[1-999]", ()),
])  # fmt: skip
def test_host_lists(text: str, hosts: tuple[str, ...]) -> None:
    """Slurm's manual, hostlist expressions; what is none, or more than any cluster has, is empty."""
    assert hosts_of(text) == hosts


@pytest.mark.parametrize(("text", "counts"), [
    ("2(x3),1", (2, 2, 2, 1)), ("1", (1,)), ("4(x2)", (4, 4)), ("", ()), ("x", ()), ("2(x", ()),
])  # fmt: skip
def test_tasks_per_node(text: str, counts: tuple[int, ...]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize("environment", [
    {},
    BATCH,
    SALLOC,
    {**BATCH, "SLURM_STEP_ID": "4294967291"},  # the batch step's own number
    {**STEP, "SLURM_STEP_ID": "4294967290"},  # salloc's interactive step
    {**STEP, "SLURM_STEP_ID": "x"},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "n1"},  # a group of one, no launcher named
    {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "1"},  # a pod: its process launches the ranks
    {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n1"},
])  # fmt: skip
def test_left_over_variables_make_no_task(environment: dict[str, str]) -> None:
    assert task(environment) is None
    work = job(ONE)
    assert under(work, environment) == work


def test_a_task_of_slurm() -> None:
    found = task(step(2, 4, 3, SLURM_GPUS_ON_NODE="2"))
    assert found == Task("Slurm", 3, 4, 1, 2, 1, 2, "n1", port_of(41, 0), gpus=2)
    assert found.a_rank and not found.meets_by_itself
    launcher = task(step(2, 2, 1))
    assert launcher is not None and not launcher.a_rank and launcher.node == 1
    alone = task(STEP)
    assert alone is not None and alone.host == "127.0.0.1" and not alone.a_rank


def test_ports_of_neighbors_differ() -> None:
    ports = {port_of(job_id, number) for job_id in range(1000, 1100) for number in range(7)}
    assert len(ports) == 700 and min(ports) >= 20000 and max(ports) < 30000


def test_a_rank_of_torchrun() -> None:
    found = task(TORCHRUN)
    assert found == Task("torchrun", 3, 4, 1, 2, 1, 2, "n1", 29400)
    by_hand = {k: v for k, v in TORCHRUN.items() if not k.startswith(("TORCHELASTIC", "GROUP", "LOCAL_WORLD"))}
    other = task(by_hand)
    assert other is not None and (other.source, other.local_count, other.nodes) == ("the environment", 4, 1)


@pytest.mark.parametrize(("file", "nodes", "total"), [
    (ONE, 2, 16),  # for one machine: each node gets its 8
    ("distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 16\n", 2, 16),  # as many machines: the total stays
    ("distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 16\n", 4, 32),
    ("distributed_type: MULTI_GPU\nnum_processes: 4\n", 3, 12),
])  # fmt: skip
def test_one_task_on_each_node(file: str, nodes: int, total: int) -> None:
    work = under(job(file), step(nodes, nodes, 1))
    assert work.num_processes == total and work.num_machines == nodes and work.machine_rank == 1
    assert work.get("main_process_ip") == "n1" and work.main_process_port == port_of(41, 0)
    assert work.source("num_machines") == "SLURM_NNODES" and work.source("machine_rank") == "SLURM_NODEID"
    assert bool(work.source("num_processes")) == (f"num_machines: {nodes}" not in file)


def test_a_port_of_the_file_stays() -> None:
    assert under(job(ONE + "main_process_port: 4000\n"), step(2, 2)).main_process_port == 4000
    assert under(job(ONE), STEP).main_process_port == port_of(41, 0)  # two jobs on one node do not meet
    assert under(job("distributed_type: 'NO'\nnum_processes: 1\n"), STEP).overrides == {}


def test_a_task_for_each_rank() -> None:
    work = under(job("distributed_type: 'NO'\n"), step(2, 4, 2))
    assert (work.num_processes, work.num_machines, work.machine_rank) == (4, 2, 1)
    assert work.distributed_type == "MULTI_GPU" and work.source("distributed_type") == "SLURM_NTASKS"
    work = under(job(ONE), TORCHRUN)
    assert (work.num_processes, work.get("main_process_ip"), work.main_process_port) == (4, "n1", 29400)
    assert work.source("num_processes") == "WORLD_SIZE"


def test_the_command_wins() -> None:
    flagged = msgspec.structs.replace(job(ONE), overrides={"num_machines": Override(3, "--num_machines")})
    assert under(flagged, step(2, 2)).num_machines == 3
    assert under(msgspec.structs.replace(job(ONE), launcher="torchrun"), step(2, 2)).overrides == {}
    assert under(Job(), step(2, 2)).num_machines == 2  # no file at all


# --- facts --------------------------------------------------------------------------------------------------

TRIE = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.0.0.0/24 2 0 2
        |-- 10.0.0.0
           /24 link UNICAST
        |-- 10.0.0.7
           /32 host LOCAL
     |-- 127.0.0.1
        /32 host LOCAL
     |-- 10.0.0.255
        /32 link BROADCAST
"""
FILES = {
    "proc/net/fib_trie": TRIE,
    "proc/net/if_inet6": "fd000000000000000000000000000007 02 40 00 80 eth0\n",
    "etc/hosts": "127.0.0.1 localhost\n10.0.0.9  Head head.cluster # the first\n127.0.1.1 own\n",
}


def test_addresses_and_names(tmp_path: Path) -> None:
    root = tree(tmp_path, FILES)
    found = cluster_facts("head", ask=False, root=root)
    assert found.addresses == ("10.0.0.7", "127.0.0.1", "fd00::7")
    assert (found.main_addresses, found.main_error, found.here) == (("10.0.0.9",), "", False)
    assert cluster_facts("10.0.0.7", ask=False, root=root).here is True
    assert cluster_facts("[fd00::7]", ask=False, root=root).here is True
    unasked = cluster_facts("elsewhere", ask=False, root=root)
    assert unasked.main_addresses is None and "not looked up" in unasked.main_error and unasked.here is None
    assert cluster_facts("head", ask=False, root=tmp_path / "nothing").addresses is None


@pytest.mark.parametrize("name", ["nosuch.invalid", "a..b", "x" * 70 + ".invalid"])
def test_names_that_nobody_knows(name: str) -> None:
    """The top domain `invalid` never is (RFC 6761); a resolver that is silent leaves it open."""
    found = cluster_facts(name, ask=True, seconds=5)
    assert found.main_addresses == () or (found.main_addresses is None and found.main_error)


def test_this_machine_knows_itself() -> None:
    found = cluster_facts("localhost", ask=True)
    assert found.here in (True, None) and found.names
