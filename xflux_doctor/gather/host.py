"""The host as this process may use it: cores, memory and limits of its cgroup, device nodes, interfaces.

Places are text here, because pathlib takes longer to put them together than the kernel to answer.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

from xflux_doctor.facts import Host

_NO_LIMIT = 1 << 60
"""cgroup v1 writes a number near 2**63 where there is no limit."""
_MEMORY = ("memory.max", "memory.limit_in_bytes")
_HELD = ("total_rss", "total_shmem"), ("anon", "shmem")
"""Of memory.stat, with the groups inside: in cgroup 1, whose plain `shmem` is without them, and in cgroup 2."""
_LIMITS = {"memlock": "RLIMIT_MEMLOCK", "stack": "RLIMIT_STACK", "nofile": "RLIMIT_NOFILE", "nproc": "RLIMIT_NPROC"}


def host_facts(root: Path = Path("/")) -> Host:
    """Read the host below `root` (another root is for recorded trees)."""
    base, system = str(root).rstrip("/"), os.uname()
    memory = _meminfo(base)
    shm = _statvfs(f"{base}/dev/shm")  # noqa: S108 - looked at, not written to
    groups = _cgroup_folders(base)
    quota = _cpu_quota(groups)
    limit, held = _memory_limit(groups)
    return Host(
        system=system.sysname,
        machine=system.machine,
        kernel=system.release,
        glibc=_glibc(),
        cpus=_cpus(quota),
        memory_total=memory.get("MemTotal", 0),
        memory_available=memory.get("MemAvailable", 0),
        memory_limit=limit,
        memory_held=held,
        shm_total=shm[0] if shm else None,
        shm_free=shm[1] if shm else None,
        container=_container(base),
        wsl="microsoft" in _read(f"{base}/proc/version").lower(),
        swap_total=memory.get("SwapTotal", 0),
        swap_free=memory.get("SwapFree", 0),
        cgroup=_cgroup_version(base),
        cpu_quota=quota,
        pids_limit=_least(groups, ("pids.max",)),
        limits={name: _limit(getattr(resource, number)) for name, number in _LIMITS.items()},
        device_nodes=_device_nodes(base),
        interfaces={name: _read(f"{base}/sys/class/net/{name}/operstate").strip() for name in _names(base, "net")},
        infiniband=tuple(_names(base, "infiniband")),
        named=_is_named(base, system.nodename),
        name=system.nodename,
    )


def _meminfo(base: str) -> dict[str, int]:
    lines = _read(f"{base}/proc/meminfo").splitlines()
    pairs = (line.split() for line in lines)
    return {p[0].rstrip(":"): int(p[1]) * 1024 for p in pairs if len(p) >= 2 and p[1].isdigit()}


def _cgroup_version(base: str) -> int | None:
    groups = f"{base}/sys/fs/cgroup"
    if _is_there(f"{groups}/cgroup.controllers"):
        return 2
    return 1 if _is_folder(f"{groups}/memory") or _is_folder(f"{groups}/cpu") else None


def _cgroup_folders(base: str) -> list[str]:
    """The folders of this process's groups and of all their parents: a limit may stand at any of them.

    Under Slurm and systemd the limit is on an inner folder; in a container the root folder is the container's own.
    """
    groups = f"{base}/sys/fs/cgroup"
    folders: dict[str, None] = {}
    for line in _read(f"{base}/proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        inner = path.strip("/")
        parts = inner.split("/") if inner else []
        for controller in controllers.split(",") if controllers else [""]:
            for depth in range(len(parts), -1, -1):
                folders["/".join([groups, *filter(None, [controller]), *parts[:depth]])] = None
    for controller in ("", "/memory", "/cpu", "/pids"):
        folders[f"{groups}{controller}"] = None
    return [folder for folder in folders if _is_folder(folder)]


def _memory_limit(folders: list[str]) -> tuple[int | None, int | None]:
    """The tightest group's limit, and what its processes hold beside caches of files."""
    found = [(limit, folder) for folder in folders if (limit := _least([folder], _MEMORY)) is not None]
    if not found:
        return None, None
    limit, folder = min(found, key=lambda pair: pair[0])
    lines = (line.split() for line in _read(f"{folder}/memory.stat").splitlines())
    counts = {pair[0]: int(pair[1]) for pair in lines if len(pair) == 2 and pair[1].isdigit()}
    return limit, next((sum(counts.get(name, 0) for name in names) for names in _HELD if names[0] in counts), None)


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes of this one's own group the kernel has killed since the group was made because memory ran out;
    None where the kernel does not count them (before 4.13, or without groups)."""
    for folder in _cgroup_folders(str(root).rstrip("/")):
        for name in ("memory.events", "memory.oom_control"):
            for line in _read(f"{folder}/{name}").splitlines():
                word, _, count = line.partition(" ")
                if word == "oom_kill" and count.strip().isdigit():
                    return int(count)
    return None


def _least(folders: list[str], names: tuple[str, ...]) -> int | None:
    """The smallest number that any of the groups sets; None: no limit."""
    texts = [_read(f"{folder}/{name}").strip() for folder in folders for name in names]
    return min((int(text) for text in texts if text.isdigit() and int(text) < _NO_LIMIT), default=None)


def _cpu_quota(folders: list[str]) -> float | None:
    """Cores that the tightest group grants: cpu.max of cgroup 2, cpu.cfs_* of cgroup 1."""
    found = []
    for folder in folders:
        quota, _, period = _read(f"{folder}/cpu.max").strip().partition(" ")
        if not quota:
            quota, period = (_read(f"{folder}/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _cpus(quota: float | None) -> int:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return affinity if quota is None else max(1, min(affinity, -int(-quota // 1)))


def _container(base: str) -> str:
    if _is_there(f"{base}/.dockerenv"):
        return "docker"
    if _is_there(f"{base}/run/.containerenv"):
        return "podman"
    if "kubepods" in _read(f"{base}/proc/1/cgroup") or _is_folder(f"{base}/var/run/secrets/kubernetes.io"):
        return "kubernetes"
    if _is_folder(f"{base}/.singularity.d"):
        return "apptainer"
    return "lxc" if "container=lxc" in _read(f"{base}/proc/1/environ") else ""


def _limit(number: int) -> int | None:
    soft = resource.getrlimit(number)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _device_nodes(base: str) -> dict[str, str]:
    """The driver's device nodes, and whether this user may open them for reading and writing."""
    found = _listed(f"{base}/dev")
    names = [name for name in found if name == "dxg" or (name.startswith("nvidia") and name != "nvidia-caps")]
    return {n: "ok" if os.access(f"{base}/dev/{n}", os.R_OK | os.W_OK) else "denied" for n in names}


def _names(base: str, kind: str) -> list[str]:
    return _listed(f"{base}/sys/class/{kind}")


def _is_named(base: str, name: str) -> bool | None:
    lines = _read(f"{base}/etc/hosts").splitlines()
    if not lines:
        return None
    return any(name in line.partition("#")[0].split()[1:] for line in lines)


def _glibc() -> str:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
    except (ValueError, OSError, AttributeError):
        return ""


def _statvfs(path: str) -> tuple[int, int] | None:
    try:
        stat = os.statvfs(path)
    except OSError:
        return None
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - see above, here and below
    except OSError:
        return []


def _is_folder(path: str) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - places are text here


def _is_there(path: str) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - places are text here


def _read(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - places are text here
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
