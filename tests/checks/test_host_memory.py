"""ME102: the container's limit against all ranks of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import GIB, XFLUX_ACCELERATE, case, findings, job, machine, tree
from xflux_trainer.memory_host import RECORDING

from xflux_doctor.bill import need
from xflux_doctor.check import Case
from xflux_doctor.checks.memory import host_memory
from xflux_doctor.gather.host import host_facts
from xflux_doctor.matrix import Matrix

ONE = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 1").replace("DEEPSPEED", "NO")
LAUNCHER = 250 << 20


def limited(matrix: Matrix, text: str, count: int, **host: Any) -> Case:
    facts = machine(matrix, count=count)
    assert facts.host
    return case(matrix, msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, **host)), job(text))


def wanted(matrix: Matrix, text: str, count: int) -> int:
    subject = limited(matrix, text, count)
    return need(subject).host_together(subject.job.local_processes) + LAUNCHER


@pytest.mark.parametrize(("text", "count", "ranks"), [(ONE, 1, "1 rank"), (XFLUX_ACCELERATE, 8, "8 ranks")])
def test_ranks_count_together(matrix: Matrix, text: str, count: int, ranks: str) -> None:
    most = wanted(matrix, text, count)
    (finding,) = findings(limited(matrix, text, count, memory_limit=int(most * 0.89)), host_memory)
    assert finding.severity == "error" and finding.seen.startswith(ranks) and "exit code -9" in finding.because
    (finding,) = findings(limited(matrix, text, count, memory_limit=int(most * 0.99)), host_memory)
    assert finding.severity == "warning" and "tight" in finding.because
    assert findings(limited(matrix, text, count, memory_limit=int(most * 1.01)), host_memory) == ()


def test_eight_ranks_need_what_one_does_eight_times(matrix: Matrix) -> None:
    """And each what NCCL and DeepSpeed hold, 530 MiB; but one of them alone writes and draws, and under DeepSpeed no
    step is recorded, so that it does not write where that was."""
    one, eight = wanted(matrix, ONE, 1) - LAUNCHER, wanted(matrix, XFLUX_ACCELERATE, 8) - LAUNCHER
    others = need(limited(matrix, ONE, 1)).host_together(2) - one
    assert others < one and eight == one + 7 * others + 8 * 530 * 2**20 + RECORDING


def test_what_others_hold_of_the_limit_is_not_there(matrix: Matrix) -> None:
    most = wanted(matrix, ONE, 1)
    assert findings(limited(matrix, ONE, 1, memory_limit=most + GIB, memory_held=GIB // 2), host_memory) == ()
    subject = limited(matrix, ONE, 1, memory_limit=most + GIB, memory_held=2 * GIB)
    (finding,) = findings(subject, host_memory)
    assert finding.severity == "error" and finding.seen.endswith("of which 2 are in use.")
    # Where the machine has less than its group may take, the group's count says nothing of it.
    total = msgspec.structs.replace(subject, facts=machine(matrix)).facts.host
    assert total
    roomy = limited(matrix, ONE, 1, memory_limit=total.memory_total * 2, memory_held=total.memory_total)
    assert findings(roomy, host_memory) == ()


@pytest.mark.parametrize("files", [
    {"cgroup.controllers": "memory", "job/memory.max": "1073741824\n"},
    {"memory/job/memory.limit_in_bytes": "1073741824\n"},
])  # fmt: skip
def test_a_limit_as_the_kernel_writes_it_is_found(matrix: Matrix, tmp_path: Path, files: dict[str, str]) -> None:
    own = "0::/job\n" if "cgroup.controllers" in files else "4:memory:/job\n"
    root = tree(tmp_path, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    tree(root, {"proc/self/cgroup": own, "proc/meminfo": "MemTotal: 134217728 kB\nMemAvailable: 134217728 kB\n"})
    subject = msgspec.structs.replace(
        limited(matrix, ONE, 1), facts=msgspec.structs.replace(machine(matrix), host=host_facts(root))
    )
    (finding,) = findings(subject, host_memory)
    assert finding.severity == "error" and "the container's limit is 1 GiB" in finding.seen
