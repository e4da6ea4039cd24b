"""One job on several machines: each machine's file, its command, and whether the files go together. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xflux_doctor.cluster import hosts_of
from xflux_doctor.errors import UsageError
from xflux_doctor.finding import Change, Edit
from xflux_doctor.yamltext import apply

LAUNCHERS = ("accelerate", "torchrun", "srun")
SAME = ("num_machines", "num_processes", "main_process_ip", "main_process_port", "distributed_type", "mixed_precision",
        "use_cpu", "deepspeed_config", "fsdp_config", "rdzv_backend")  # fmt: skip
"""What all machines' files must say alike."""


def hosts(text: str) -> tuple[str, ...]:
    """`--hosts`: names or addresses by commas, or Slurm's own notation."""
    found = hosts_of(text)
    if not found or any(not host.strip() or host.startswith("-") for host in found):
        raise UsageError(f"{text!r} names no hosts.", "Write them with commas, or as Slurm does: n[01-04].")
    if len(set(found)) < len(found):
        raise UsageError(f"{text!r} names a host twice.", "Name each machine once; the first is machine 0.")
    return found


def file_of(path: Path, number: int) -> Path:
    """accelerate_config.yaml → accelerate_config.node1.yaml."""
    return path.with_name(f"{path.stem}.node{number}{path.suffix or '.yaml'}")


def edits_for(machines: Sequence[str], number: int, values: Mapping[str, Any], port: int) -> tuple[Change, ...]:
    """What makes the job's file that of machine `number`. num_processes is the total over all machines: of a file for
    another number of machines each machine keeps its ranks."""
    count = len(machines)
    edits: list[Change] = [Edit("accelerate", ("machine_rank",), number, f"{machines[number]} is machine {number}")]
    before, ranks = _count(values.get("num_machines")) or 1, _count(values.get("num_processes"))
    if before != count:
        edits.append(Edit("accelerate", ("num_machines",), count, f"{count} hosts"))
        if ranks is not None:
            total = max(1, ranks // before) * count
            edits.append(Edit("accelerate", ("num_processes",), total, f"the ranks of {count} machines together"))
    if count > 1:
        edits.append(Edit("accelerate", ("main_process_ip",), machines[0], "machine 0"))
        if not _count(values.get("main_process_port")):
            edits.append(Edit("accelerate", ("main_process_port",), port, "the same on all machines"))
        kind = values.get("distributed_type")
        if kind is False or str(kind).upper() == "NO":
            edits.append(Edit("accelerate", ("distributed_type",), "MULTI_GPU", "several machines make one group"))
        section = values.get("deepspeed_config")
        if str(kind).upper() == "DEEPSPEED" and isinstance(section, dict):
            key = ("deepspeed_config", "deepspeed_multinode_launcher")
            edits.append(Edit("accelerate", key, "standard", "each machine starts its own ranks"))
    return tuple(edits)


def files(
    path: Path, text: str, values: Mapping[str, Any], machines: Sequence[str], port: int = 29500
) -> dict[Path, str]:
    """{each machine's file: its text}: the job's own with a few keys set, its comments and all else kept."""
    return {
        file_of(path, number): apply(text, edits_for(machines, number, values, port)) for number in range(len(machines))
    }


def unlike(first: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps the machines' files from being one job, a sentence each. `first` is the first named file."""
    faults = []
    for at, other in enumerate(others, start=2):
        for key in SAME:
            if _plain(first.get(key)) != _plain(other.get(key)):
                faults.append(f"{key} is {first.get(key)!r} in the first file and {other.get(key)!r} in file {at}.")
    ranks = [values.get("machine_rank", 0) for values in (first, *others)]
    wanted = list(range(len(ranks)))
    if sorted(map(repr, ranks)) != sorted(map(repr, wanted)):
        faults.append(
            f"machine_rank is {', '.join(map(repr, ranks))} in the {len(ranks)} files, not 0 to {wanted[-1]}."
        )
    machines = _count(first.get("num_machines")) or 1
    if machines != len(ranks):
        faults.append(f"num_machines is {machines} and {len(ranks)} files were given.")
    return faults


def commands(
    launcher: str,
    machines: Sequence[str],
    job_file: Path,
    train: Path,
    *,
    ranks: int,
    port: int,
    python: str = "python",
) -> list[tuple[str, str]]:
    """(host, command) of each machine; for srun one command for all, on the host that asks for them."""
    count, each = len(machines), max(1, ranks // max(1, len(machines)))
    doctor = ["xflux-doctor", "run", "--yes", "--config", str(train), "--accelerate-config"]
    if launcher == "srun":
        words = ["srun", f"--nodes={count}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", *doctor, str(job_file)]
        return [("", shlex.join(words))]
    found = []
    for number, host in enumerate(machines):
        if launcher == "accelerate":
            words = [*doctor, str(file_of(job_file, number) if count > 1 else job_file)]
        else:
            words = ["torchrun", f"--nnodes={count}", f"--node-rank={number}", f"--nproc-per-node={each}",
                     f"--master-addr={machines[0]}", f"--master-port={port}", "--no-python", *doctor,
                     str(job_file)]  # fmt: skip
        found.append((host, shlex.join(words)))
    return found


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
