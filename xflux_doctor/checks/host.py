"""HO: the machine under the job: its system, kernel, limits and network."""

from __future__ import annotations

import re
from collections.abc import Iterator

from packaging.version import Version

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.words import installed
from xflux_doctor.finding import Finding, warning

GIB = 1 << 30
MIB = 1 << 20
_SHM_WANTED = GIB
_NCCL_DOCS = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html"


@check("HO101", "the system is the one that the stacks were tested on", needs=("host",))
def system(case: Case) -> Iterator[Finding]:
    """Linux on x86_64; up to torch 2.10 the public index's wheels for aarch64 are CPU builds (their METADATA)."""
    host = case.facts.host
    assert host
    if (host.system, host.machine) != ("Linux", "x86_64"):
        yield warning(
            f"This is {host.system} on {host.machine}.",
            "No stack was tested there, and torch has CUDA wheels for Linux only.",
            "Train on a Linux machine with x86_64 cores.",
        )


@check("HO102", "the kernel is 5.5 or newer", needs=("host",))
def kernel(case: Case) -> Iterator[Finding]:
    """accelerate warns of hangs below Linux 5.5 (huggingface/accelerate@v1.15.0:src/accelerate/utils/other.py)."""
    assert case.facts.host
    number = re.match(r"(\d+)\.(\d+)", case.facts.host.kernel)
    if case.facts.host.system != "Linux" or number is None:
        raise SkipCheck("the kernel's version is unknown")
    if (int(number[1]), int(number[2])) < (5, 5):
        yield warning(
            f"The kernel is {case.facts.host.kernel}.",
            "accelerate: 'Detected kernel version …, which is below the recommended minimum of 5.5.0; this can cause "
            "the process to hang'.",
            "Run on a newer kernel; a container has its host's.",
        )


@check("HO103", "shared memory has room", needs=("host",))
def shared_memory(case: Case) -> Iterator[Finding]:
    """NCCL's ranks and the loader's workers exchange data in /dev/shm; Docker gives 64 MiB (NCCL user guide)."""
    host = case.facts.host
    assert host
    if host.shm_total is None or host.shm_free is None:
        raise SkipCheck("there is no /dev/shm to look at")
    ranks = case.job.local_processes
    if ranks <= 1 and not (case.job.train and case.job.train.num_workers):
        raise SkipCheck("one process without loader workers needs no shared memory")
    if host.shm_free >= _SHM_WANTED:
        return
    small = host.shm_total < _SHM_WANTED
    size = f"{host.shm_total / MIB:.0f} MiB in all" if small else f"{host.shm_free / MIB:.0f} MiB free"
    yield warning(
        f"Shared memory (/dev/shm) has {size}; {ranks} ranks and their loaders use it.",
        "'Error: failed to extend /dev/shm/nccl-…' at the first collective, or 'DataLoader worker is killed by signal: "
        "Bus error'.",
        "Start the container with --shm-size=16g or --ipc=host (Kubernetes: an emptyDir of medium Memory)."
        if small
        else "Remove what dead runs left there.",
        commands=() if small else ("ls -la /dev/shm",),
        docs=_NCCL_DOCS,
    )


@check("HO104", "memory can be locked for InfiniBand", needs=("host",))
def locked_memory(case: Case) -> Iterator[Finding]:
    """NCCL registers buffers with the adapter, which counts against memlock (NCCL user guide, networking)."""
    host = case.facts.host
    assert host
    if not host.infiniband or case.job.num_machines <= 1:
        raise SkipCheck("no InfiniBand between machines is used")
    limit = host.limits.get("memlock")
    if "memlock" in host.limits and limit is not None and limit < GIB:
        yield warning(
            f"The limit of locked memory is {limit / MIB:.0f} MiB and {', '.join(host.infiniband)} would be used.",
            "Registration with the adapter fails: 'Call to ibv_reg_mr failed'.",
            "Start the container with --ulimit memlock=-1, or raise memlock in /etc/security/limits.conf.",
            docs=_NCCL_DOCS,
        )


@check("HO105", "enough files can be open", needs=("host",))
def open_files(case: Case) -> Iterator[Finding]:
    """Each rank holds sockets and shared memory of every other, and each loader worker its own (NCCL user guide)."""
    host = case.facts.host
    assert host
    limit = host.limits.get("nofile")
    workers = case.job.train.num_workers if case.job.train else 0
    wanted = 256 + 32 * case.job.num_processes + 32 * workers
    if "nofile" in host.limits and limit is not None and limit < wanted:
        yield warning(
            f"A process may open {limit} files; {case.job.num_processes} ranks with {workers} loader workers each want "
            f"about {wanted}.",
            "'OSError: [Errno 24] Too many open files' in the middle of a run.",
            "Raise it in this shell before the start.",
            commands=(f"ulimit -n {max(4096, wanted)}",),
        )


@check("HO106", "the stack limit is a number", needs=("host",))
def stack_limit(case: Case) -> Iterator[Finding]:
    """NCCL before 2.28 crashes at init under `ulimit -s unlimited` (NCCL user guide, runtime issues)."""
    host = case.facts.host
    assert host
    if case.job.use_cpu or case.job.num_processes <= 1:
        raise SkipCheck("NCCL is not used")
    nccl = _nccl(case)
    unlimited = "stack" in host.limits and host.limits["stack"] is None
    if unlimited and nccl is not None and nccl < Version("2.28"):
        yield warning(
            f"The stack limit is unlimited and NCCL is {nccl}.",
            "NCCL's search of the topology can crash with SIGSEGV at the first collective.",
            "Give it a number in this shell before the start.",
            commands=("ulimit -s 8192",),
            docs=_NCCL_DOCS,
        )


def _nccl(case: Case) -> Version | None:
    found = installed(case, "nvidia-nccl-cu12") or installed(case, "nvidia-nccl-cu13")
    return found or (Version(case.stack.nccl) if case.stack and case.stack.nccl else None)


@check("HO107", "every rank has cores", needs=("host",))
def cores(case: Case) -> Iterator[Finding]:
    """A rank without a core of its own waits for others while its GPU idles; the cgroup's quota counts."""
    host = case.facts.host
    assert host
    if case.job.use_cpu:
        raise SkipCheck("CPU ranks are judged by LA107")
    ranks = case.job.local_processes
    if host.cpus < 2 * ranks:
        limit = f" (the container's quota: {host.cpu_quota:.1f})" if host.cpu_quota is not None else ""
        yield warning(
            f"{ranks} ranks share {host.cpus} cores{limit}.",
            "Each rank wants two: one launches kernels, one reads data. The GPUs wait.",
            "Give the container more cores, or start fewer ranks.",
        )


@check("HO108", "the host is not swapping", needs=("host",))
def swapping(case: Case) -> Iterator[Finding]:
    """Loading weights through swap takes minutes, and a rank that pages holds up all others."""
    host = case.facts.host
    assert host
    used = host.swap_total - host.swap_free
    if used > 2 * GIB and host.memory_available < 4 * GIB:
        yield warning(
            f"{used / GIB:.1f} GiB lie in swap and {host.memory_available / GIB:.1f} GiB of memory are available.",
            "The machine is short of memory now: loading slows to the disk's speed, or the kernel kills a rank.",
            "End what you do not need before the start.",
            commands=("ps -eo pid,user,rss,etime,comm --sort=-rss | head",),
        )


@check("HO109", "enough threads can be started", needs=("host",))
def threads(case: Case) -> Iterator[Finding]:
    """A rank starts some hundred threads (CUDA, NCCL, autograd, compile workers); pids.max and nproc count them."""
    host = case.facts.host
    assert host
    wanted = 256 * case.job.local_processes
    limits = {"the container's pids.max": host.pids_limit, "the user's nproc": host.limits.get("nproc")}
    for name, limit in limits.items():
        if limit is not None and limit < wanted:
            yield warning(
                f"{name} is {limit}; {case.job.local_processes} ranks start about {wanted} threads.",
                "'RuntimeError: can't start new thread', or 'Resource temporarily unavailable'.",
                "Start the container with a larger --pids-limit." if "pids" in name else "Raise `ulimit -u`.",
            )


@check("HO110", "the ranks have an interface to meet over", needs=("host",))
def interfaces(case: Case) -> Iterator[Finding]:
    """Ranks of one machine meet over the loopback interface, ranks of several over another that is up."""
    host = case.facts.host
    assert host
    if case.job.num_processes <= 1:
        raise SkipCheck("one process meets nobody")
    if not host.interfaces:
        raise SkipCheck("/sys/class/net cannot be read")
    others = [name for name, state in host.interfaces.items() if name != "lo" and state in ("up", "unknown")]
    if host.interfaces.get("lo", "down") == "down":
        yield warning(
            "The loopback interface is missing or down.",
            "The launcher's ranks cannot reach each other at 127.0.0.1.",
            "Bring it up, or start the container with a network.",
            commands=("sudo ip link set lo up",),
        )
    elif case.job.num_machines > 1 and not others:
        names = ", ".join(f"{name} {state}" for name, state in host.interfaces.items())
        yield warning(
            f"num_machines is {case.job.num_machines} and no interface is up beside the loopback ({names}).",
            "The other machines cannot be reached; NCCL waits until its timeout.",
            "Start the container with --network=host, or bring the interface up.",
        )


@check("HO111", "the GPUs reach the container", needs=("host",))
def container_has_gpus(case: Case) -> Iterator[Finding]:
    """A container sees the GPUs only when it was started with them (NVIDIA container toolkit)."""
    host = case.facts.host
    assert host
    if case.job.use_cpu or not host.container:
        raise SkipCheck("this is no container" if not host.container else "the job runs on the CPU")
    asked = case.facts.environment.get("NVIDIA_VISIBLE_DEVICES")
    if case.facts.gpus is None:
        raise SkipCheck("the driver does not answer (see HW101)")
    if case.facts.gpus or any(name.startswith("nvidia") for name in host.device_nodes) or host.wsl:
        return
    named = f"NVIDIA_VISIBLE_DEVICES is {asked!r}" if asked is not None else "NVIDIA_VISIBLE_DEVICES is not set"
    yield warning(
        f"This {host.container} container has no /dev/nvidia* node; {named}.",
        "It was started without GPUs, or with another runtime than NVIDIA's.",
        "Start it again with `--gpus all` (Kubernetes: a limit of nvidia.com/gpu). Nothing inside can change it.",
        docs="https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/",
    )
