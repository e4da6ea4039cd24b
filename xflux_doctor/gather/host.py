"""The host as this process may use it: cores, memory under the cgroup's limit, /dev/shm, container."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from xflux_doctor.facts import Host

_NO_LIMIT = 1 << 60
"""cgroup v1 writes a number near 2**63 where there is no limit."""


def host_facts(root: Path = Path("/")) -> Host:
    """Read the host below `root` (another root is for recorded trees)."""
    memory = _meminfo(root)
    shm = _statvfs(root / "dev/shm")
    return Host(
        system=platform.system(),
        machine=platform.machine(),
        kernel=platform.release(),
        glibc=_glibc(),
        cpus=_cpus(root),
        memory_total=memory.get("MemTotal", 0),
        memory_available=memory.get("MemAvailable", 0),
        memory_limit=_memory_limit(root),
        shm_total=shm[0] if shm else None,
        shm_free=shm[1] if shm else None,
        container=_container(root),
    )


def _meminfo(root: Path) -> dict[str, int]:
    lines = _read(root / "proc/meminfo").splitlines()
    pairs = (line.split() for line in lines)
    return {p[0].rstrip(":"): int(p[1]) * 1024 for p in pairs if len(p) >= 2 and p[1].isdigit()}


def _memory_limit(root: Path) -> int | None:
    for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(root / name).strip()
        if text.isdigit() and int(text) < _NO_LIMIT:
            return int(text)
    return None


def _cpus(root: Path) -> int:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        return max(1, min(affinity, -(-int(quota) // int(period))))
    return affinity


def _container(root: Path) -> str:
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if "kubepods" in _read(root / "proc/1/cgroup"):
        return "kubernetes"
    if "microsoft" in _read(root / "proc/version").lower():
        return "wsl"
    return ""


def _glibc() -> str:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
    except (ValueError, OSError, AttributeError):
        return ""


def _statvfs(path: Path) -> tuple[int, int] | None:
    try:
        stat = os.statvfs(path)
    except OSError:
        return None
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
