"""The container's memory limit, and what is held of it, from files as kernels write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tree

from xflux_doctor.gather.host import host_facts

GIB = 1 << 30
V2_STAT = "anon 3221225472\nfile 9000000000\nkernel 1000000\nshmem 1073741824\nfile_mapped 5000\n"
V1_STAT = (
    "cache 9000000000\nrss 1000\nshmem 2000\nmapped_file 5000\nhierarchical_memory_limit 17179869184\n"
    "total_cache 9000000000\ntotal_rss 3221225472\ntotal_shmem 1073741824\n"
)


@pytest.mark.parametrize(("files", "limit", "held"), [
    # cgroup 2 in a container: the root folder is its own
    ({"cgroup.controllers": "memory", "memory.max": f"{16 * GIB}\n", "memory.stat": V2_STAT}, 16, 4),
    # under Slurm: the step has no limit of its own, the job has; what counts is held in the whole job
    ({"cgroup.controllers": "memory", "slurm/job_7/memory.max": f"{16 * GIB}\n", "slurm/job_7/memory.stat": V2_STAT,
      "slurm/job_7/step_0/memory.max": "max\n", "slurm/job_7/step_0/memory.stat": "anon 5\nshmem 6\n"}, 16, 4),
    # cgroup 1, whose shmem is without the groups inside
    ({"memory/slurm/job_7/step_0/memory.limit_in_bytes": f"{16 * GIB}\n",
      "memory/slurm/job_7/step_0/memory.stat": V1_STAT, "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, 16, 4),
    # an older kernel counts no shmem
    ({"memory/memory.limit_in_bytes": f"{16 * GIB}\n", "memory/memory.stat": "total_rss 4294967296\n"}, 16, 4),
    # the tighter of two
    ({"cgroup.controllers": "", "memory.max": f"{16 * GIB}\n", "memory.stat": V2_STAT,
      "slurm/job_7/memory.max": f"{8 * GIB}\n", "slurm/job_7/memory.stat": "anon 1073741824\nshmem 0\n"}, 8, 1),
    ({"cgroup.controllers": "", "memory.max": "max\n", "memory.stat": V2_STAT}, None, None),
    ({"cgroup.controllers": "", "memory.max": f"{16 * GIB}\n"}, 16, None),
])  # fmt: skip
def test_what_a_group_allows_and_holds(
    tmp_path: Path, files: dict[str, str], limit: int | None, held: int | None
) -> None:
    own = "0::/slurm/job_7/step_0\n" if "cgroup.controllers" in files else "4:memory:/slurm/job_7/step_0\n0::/\n"
    found = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    host = host_facts(tree(tmp_path, {**found, "proc/self/cgroup": own}))
    assert host.memory_limit == (limit and limit * GIB) and host.memory_held == (held and held * GIB)
