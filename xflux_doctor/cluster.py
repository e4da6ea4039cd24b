"""Who starts this job's processes besides accelerate's file: a Slurm step or torchrun, by their variables. Pure.

Sources: Slurm's srun and sbatch manuals, "OUTPUT ENVIRONMENT VARIABLES"; torch's elastic/run manual, "Environment
Variables". Both were looked at on a running Slurm 22.05: a batch script has SLURM_PROCID 0 beside the whole job's
SLURM_NTASKS, and is no task; only what srun starts has SLURM_STEP_ID.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from xflux_doctor.job import Job, Override

_SPECIAL = 0xFFFF_FFF0
"""Steps from here on are no user's: the interactive, the batch and the extern step (slurm.h: SLURM_BATCH_SCRIPT)."""
_MOST_HOSTS = 65536
_PORTS = (20000, 10000)
"""First port and how many: below Linux's ephemeral range (32768 on), which a client could hold."""


class Task(msgspec.Struct, frozen=True):
    """This process among those that Slurm or torchrun started."""

    source: str
    """`Slurm` or `torchrun`, or `the environment` where RANK and its like were set by another hand."""
    rank: int
    count: int
    local_rank: int
    local_count: int
    node: int
    nodes: int
    host: str
    """Where rank 0 is: the first host, or MASTER_ADDR."""
    port: int
    gpus: int | None = None
    """GPUs of this node that Slurm gave the job."""
    uneven: bool = False
    """Whether the nodes have different numbers of tasks."""

    @property
    def a_rank(self) -> bool:
        """Whether the process is a rank itself; else it is the one of its node, and launches the node's ranks."""
        return self.source != "Slurm" or self.count > self.nodes

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def meets_by_itself(self) -> bool:
        """torchrun's agents have met already, and listen on the port themselves."""
        return self.source == "torchrun"


def task(environment: Mapping[str, str]) -> Task | None:
    """This process's place, where somebody gave it one. Left-overs of a shell are none."""
    return _torchrun(environment) or _slurm(environment)


def _torchrun(environment: Mapping[str, str]) -> Task | None:
    """All of RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR: an operator for Kubernetes sets no LOCAL_RANK for a pod,
    whose one process launches the pod's ranks."""
    rank, count, local = (_whole(environment.get(name)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    host, elastic = environment.get("MASTER_ADDR", ""), "TORCHELASTIC_RUN_ID" in environment
    if rank is None or count is None or local is None or not host or (count < 2 and not elastic):
        return None
    local_count = _whole(environment.get("LOCAL_WORLD_SIZE")) or count
    node = _whole(environment.get("GROUP_RANK"))
    return Task(
        source="torchrun" if elastic else "the environment",
        rank=rank,
        count=count,
        local_rank=local,
        local_count=local_count,
        node=rank // local_count if node is None else node,
        nodes=max(1, count // local_count),
        host=host,
        port=_whole(environment.get("MASTER_PORT")) or 29500,
    )


def _slurm(environment: Mapping[str, str]) -> Task | None:
    def whole(*names: str) -> int | None:
        return next((value for name in names if (value := _whole(environment.get(name))) is not None), None)

    step, rank, job = whole("SLURM_STEP_ID", "SLURM_STEPID"), whole("SLURM_PROCID"), whole("SLURM_JOB_ID")
    if step is None or step >= _SPECIAL or rank is None or job is None:
        return None
    count = whole("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") or 1
    nodes = whole("SLURM_STEP_NUM_NODES", "SLURM_NNODES") or 1
    node = whole("SLURM_NODEID") or 0
    hosts = hosts_of(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "")
    local = whole("SLURM_LOCALID") or 0
    each = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "")
    return Task(
        source="Slurm",
        rank=rank,
        count=count,
        local_rank=local,
        local_count=each[node] if node < len(each) else max(1, count // nodes),
        node=node,
        nodes=nodes,
        host=hosts[0] if hosts and nodes > 1 else "127.0.0.1",
        port=port_of(job, step),
        gpus=whole("SLURM_GPUS_ON_NODE"),
        uneven=len(set(each)) > 1,
    )


def port_of(job: int, step: int) -> int:
    """One port for all tasks of a step that two jobs, or two steps, of one node do not share."""
    first, size = _PORTS
    return first + (job * 7 + step) % size


def under(job: Job, environment: Mapping[str, str]) -> Job:
    """The job as it starts here: what the task's place says wins over the file, what --launch says over both."""
    found = task(environment)
    if found is None or job.launcher:
        return job
    values = _as_rank(job, found) if found.a_rank else _as_launcher(job, found)
    overrides = {key: Override(value, source) for key, (value, source) in values.items()}
    return msgspec.structs.replace(job, overrides={**overrides, **job.overrides})


def _as_rank(job: Job, found: Task) -> dict[str, tuple[Any, str]]:
    """Every process is there already: the file's numbers are not asked."""
    slurm = found.source == "Slurm"
    values: dict[str, tuple[Any, str]] = {
        "num_processes": (found.count, "SLURM_NTASKS" if slurm else "WORLD_SIZE"),
        "num_machines": (found.nodes, "SLURM_NNODES" if slurm else "LOCAL_WORLD_SIZE"),
        "machine_rank": (found.node, "SLURM_NODEID" if slurm else "RANK"),
        "main_process_ip": (found.host, "SLURM_STEP_NODELIST" if slurm else "MASTER_ADDR"),
        "main_process_port": (found.port, "SLURM_JOB_ID" if slurm else "MASTER_PORT"),
    }
    if job.distributed_type == "NO" and found.several and found.source != "the environment":
        # N ranks started on purpose are one run; left-over variables are judged as the file stands (EN402).
        values["distributed_type"] = ("MULTI_GPU", values["num_processes"][1])
    return values


def _as_launcher(job: Job, found: Task) -> dict[str, tuple[Any, str]]:
    """One task for each node. The file's num_processes is the total over its num_machines, as accelerate reads it:
    a file for one machine gives each node its number, and a file for as many machines as there are nodes is kept."""
    values: dict[str, tuple[Any, str]] = {}
    own = job.accelerate or {}
    if found.nodes > 1:
        machines = max(1, _whole(own.get("num_machines")) or 1)
        total = _whole(own.get("num_processes"))
        values = {
            "num_machines": (found.nodes, "SLURM_NNODES"),
            "machine_rank": (found.node, "SLURM_NODEID"),
            "main_process_ip": (found.host, "SLURM_STEP_NODELIST"),
        }
        if total is not None and machines != found.nodes:
            values["num_processes"] = (max(1, total // machines) * found.nodes, "SLURM_NNODES")
    if own.get("main_process_port") is None and (found.nodes > 1 or job.num_processes > 1):
        values["main_process_port"] = (found.port, "SLURM_JOB_ID")
    return values


# --- Slurm's own notations ----------------------------------------------------------------------------------


def hosts_of(text: str) -> tuple[str, ...]:
    """`n[001-003,7],gpu-a` → n001 n002 n003 n7 gpu-a; empty where it is none.

    Source: Slurm's manual, "hostlist expressions" (scontrol show hostnames): ranges keep their leading zeros, and a
    name may hold several brackets, of which the last counts fastest.
    """
    hosts: list[str] = []
    for part in _parts(text.strip()):
        pieces = re.split(r"\[([^][]*)\]", part)
        choices = [[piece] if at % 2 == 0 else _ranges(piece) for at, piece in enumerate(pieces)]
        if any("[" in piece or "]" in piece for piece in pieces) or not all(choices):
            return ()
        for names in itertools.product(*choices):
            hosts.append("".join(names))
            if len(hosts) > _MOST_HOSTS:
                return ()
    return tuple(hosts)


def _parts(text: str) -> Iterator[str]:
    """The text at the commas outside of brackets."""
    yield from (part for part in re.findall(r"(?:[^,\[]|\[[^\]]*\]?)+", text) if part.strip())


def _ranges(text: str) -> list[str]:
    """The numbers of one bracket; none where a part of it is no number or range."""
    numbers: list[str] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if found is None:
            return []
        first, last = found[1], found[2] or found[1]
        upto = min(int(last), int(first) + _MOST_HOSTS)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), upto + 1)]
    return numbers


def tasks_per_node(text: str) -> tuple[int, ...]:
    """`2(x3),1` → 2 2 2 1. Source: sbatch's manual, SLURM_TASKS_PER_NODE."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part.strip())
        if match is None or len(found) > _MOST_HOSTS:
            return ()
        found += [int(match[1])] * min(int(match[2] or 1), _MOST_HOSTS)
    return tuple(found)


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value).strip()
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None
