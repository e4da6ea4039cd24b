"""What is known of one machine: frozen values, to and from JSON.

`unknown` says of every fact that could not be had why not; a check that needs it is skipped with that reason.
Sizes are bytes. Times are seconds. GPU indices are NVML's (PCI order) unless a name says otherwise.
"""

from __future__ import annotations

import msgspec

SCHEMA = 1


class GpuProcess(msgspec.Struct, frozen=True):
    """One process that holds memory of a GPU, as far as this container may see it."""

    pid: int
    used: int | None = None
    name: str = ""
    user: str = ""
    seconds: float | None = None
    """Age of the process."""


class Gpu(msgspec.Struct, frozen=True):
    """One GPU as NVML sees it, whatever CUDA_VISIBLE_DEVICES says."""

    index: int
    uuid: str
    name: str
    memory_total: int
    memory_free: int
    capability: tuple[int, int]
    """Compute capability, for example (9, 0)."""
    pci: str = ""
    mig: bool | None = None
    compute_mode: str = ""
    processes: tuple[GpuProcess, ...] = ()

    @property
    def memory_used(self) -> int:
        return self.memory_total - self.memory_free


class Driver(msgspec.Struct, frozen=True):
    """The NVIDIA driver; `cuda` is the newest CUDA that it speaks, for example "13.0"."""

    version: str
    cuda: str = ""


class Package(msgspec.Struct, frozen=True):
    """One installed distribution, read from its metadata without importing it."""

    name: str
    version: str
    """As the metadata calls it: the public index's torch says `2.4.0`."""
    build: str = ""
    """For torch and torchvision: the build that `version.py` names, for example `cu121` or `cpu`."""
    location: str = ""
    copies: int = 1
    """How many dist-info folders of this name are on the path; more than one is a shadowed install."""
    files: bool = True
    """Whether the top-level module that the metadata promises is there."""


class PythonFacts(msgspec.Struct, frozen=True):
    """The interpreter that would run the training."""

    executable: str
    version: str
    prefix: str
    externally_managed: bool = False


class Host(msgspec.Struct, frozen=True):
    """The machine around the GPUs, as this process may use it."""

    system: str
    machine: str
    kernel: str = ""
    glibc: str = ""
    cpus: int = 1
    """Cores that this process may run on (affinity and cgroup quota), not the host's count."""
    memory_total: int = 0
    memory_available: int = 0
    memory_limit: int | None = None
    """The cgroup's limit, where there is one."""
    shm_total: int | None = None
    shm_free: int | None = None
    container: str = ""


class TorchFacts(msgspec.Struct, frozen=True):
    """What torch itself says in a child process started with the job's environment."""

    version: str
    cuda: str = ""
    devices: tuple[str, ...] = ()
    """Names of the devices that torch sees, in torch's order."""
    capabilities: tuple[tuple[int, int], ...] = ()
    nccl: str = ""
    seconds: float = 0.0


class AllReduce(msgspec.Struct, frozen=True):
    """The outcome of one all-reduce over the job's ranks."""

    backend: str
    ranks: int
    ok: bool
    stage: str = ""
    """The last stage reached: import, rendezvous, init, tiny, values, done."""
    rank: int | None = None
    """The first rank that failed or fell silent."""
    detail: str = ""
    seconds: float = 0.0


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the doctor saw. `None` or an absent key means: look in `unknown`."""

    schema: int = SCHEMA
    created: str = ""
    version: str = ""
    """The doctor's own version."""
    python: PythonFacts | None = None
    host: Host | None = None
    driver: Driver | None = None
    gpus: tuple[Gpu, ...] | None = None
    packages: dict[str, Package] | None = None
    environment: dict[str, str] = {}
    """Variables that change how a job runs, by an allow-list; never tokens."""
    hub_token: bool = False
    """Whether a hub token is set; its value is never read into a fact."""
    default_accelerate_config: str = ""
    torch: TorchFacts | None = None
    allreduce: AllReduce | None = None
    unknown: dict[str, str] = {}
    timings: dict[str, float] = {}


def to_json(facts: Facts) -> str:
    return msgspec.json.format(msgspec.json.encode(facts), indent=2).decode()


def from_json(text: bytes) -> Facts:
    """Read facts that `xflux-doctor facts` wrote. Raises msgspec.DecodeError with the place of the fault."""
    return msgspec.json.decode(text, type=Facts)
