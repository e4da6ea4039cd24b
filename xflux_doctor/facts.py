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


class GpuHealth(msgspec.Struct, frozen=True):
    """What NVML says of a card's condition. None or empty: the driver or the card does not tell; never a pass."""

    ecc: bool | None = None
    ecc_pending: bool | None = None
    """The ECC mode that the next reboot brings."""
    ecc_uncorrected: int | None = None
    """Uncorrected memory errors since the driver was loaded."""
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    retirement_pending: bool | None = None
    """Page retirement, which cards before Ampere have in place of row remapping."""
    recovery_action: str = ""
    """What the driver asks for: none, gpu_reset, node_reboot, drain_p2p, drain_and_reset …"""
    throttle: tuple[str, ...] = ()
    """Why clocks are held down at this moment: hw_slowdown, hw_thermal, hw_power_brake, sw_thermal, sw_power_cap …"""
    persistence: bool | None = None
    fabric: str = ""
    """State of the NVSwitch fabric: not_supported, not_started, in_progress, completed."""
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    temperature: int | None = None
    """Degrees Celsius."""


class MigSlice(msgspec.Struct, frozen=True):
    """One MIG device of a card: what CUDA_VISIBLE_DEVICES can name instead of the card."""

    uuid: str
    name: str
    memory_total: int
    memory_free: int


class LostGpu(msgspec.Struct, frozen=True):
    """A GPU that the driver counts and cannot open."""

    index: int
    reason: str
    pci: str = ""


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
    health: GpuHealth = GpuHealth()
    slices: tuple[MigSlice, ...] = ()
    nvlinks: int | None = None
    """NVLinks that are up."""

    @property
    def memory_used(self) -> int:
        return self.memory_total - self.memory_free


class Driver(msgspec.Struct, frozen=True):
    """The NVIDIA driver; `cuda` is the newest CUDA that it speaks, for example "13.0"."""

    version: str
    cuda: str = ""
    module: str = ""
    """The version of the loaded kernel module, by /proc/driver/nvidia/version."""
    library: str = ""
    """The version in the file name behind libnvidia-ml.so.1 or libcuda.so.1."""


class Xid(msgspec.Struct, frozen=True):
    """One of the driver's error reports in the kernel log."""

    number: int
    pci: str
    seconds: float
    """Age of the line."""
    text: str = ""


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
    requires: tuple[str, ...] = ()
    """Its Requires-Dist lines without those of extras, as the metadata has them."""
    editable: bool = False
    origin: str = "site"
    """Where it lies: site (the interpreter's own), user (~/.local), path (PYTHONPATH), system (below a venv)."""
    installer: str = ""
    """Who installed it, by the INSTALLER file: pip, uv, conda …"""
    conda: str = ""
    """The version that conda's own records name, in a conda environment."""
    damaged: tuple[str, ...] = ()
    """Files of its RECORD that are missing or have another size; only libraries and the first modules are looked at."""
    module_version: str = ""
    """For torch and torchvision: the version that `version.py` names, without the build."""
    archs: tuple[str, ...] = ()
    """For torch: the GPU architectures that its library names, for example sm_90."""


class PythonFacts(msgspec.Struct, frozen=True):
    """The interpreter that would run the training."""

    executable: str
    version: str
    prefix: str
    externally_managed: bool = False
    conda: bool = False
    """Whether the prefix is a conda environment."""
    free_threaded: bool = False
    venv: bool = False


class Toolchain(msgspec.Struct, frozen=True):
    """What compiling a CUDA operator would find, read from files; nothing is started."""

    cuda_home: str = ""
    """By torch's order: CUDA_HOME, CUDA_PATH, the nvcc on PATH, /usr/local/cuda; empty: none of them."""
    cuda_home_from: str = ""
    nvcc: str = ""
    """Path of nvcc below cuda_home; empty: not there."""
    cuda_version: str = ""
    """The toolkit's release, for example 12.1, from its version.json or headers."""
    cxx: str = ""
    """The C++ compiler that torch would take: CXX, or c++ on PATH; empty: none."""
    gcc_version: str = ""
    ninja: str = ""
    python_headers: bool = False
    """Whether Python.h of the interpreter is there."""
    libaio: bool = False
    """Whether libaio.h and a libaio.so to link are there."""
    stale_locks: dict[str, float] = {}
    """Lock files of torch's extension builds, with their age in seconds."""


class Folder(msgspec.Struct, frozen=True):
    """A place that the job reads or writes, and the mount under it. Sizes in bytes."""

    path: str
    """As the job names it, made absolute."""
    existing: str
    """The nearest parent that exists."""
    mount: str = ""
    kind: str = ""
    """File system type, for example ext4, overlay, tmpfs, nfs4."""
    read_only: bool = False
    writable: bool = False
    total: int = 0
    free: int = 0
    inodes_free: int | None = None
    """None where the file system has no fixed number."""
    device: str = ""
    """The mount's device number: folders with one number share their free room."""
    error: str = ""
    """Why it could not be looked at, for example a mount that does not answer."""
    is_file: bool = False
    """Whether `existing` is no folder."""
    no_exec: bool = False
    """Whether the mount forbids to load or start a program from it."""
    entries: int = 0
    """Of the cache: images that are encoded already; of the output: checkpoints that are there."""
    leftovers: int = 0
    """Parts of broken-off writes, older than an hour: our own in the cache, `*.incomplete` in the hub's."""
    leftover_bytes: int = 0


class HubCache(msgspec.Struct, frozen=True):
    """What the hub library's cache holds of the job's repository, as far as the trainer reads it."""

    repository: str
    snapshot: str = ""
    """The snapshot's folder that an offline start would take; empty: there is none."""
    missing: tuple[str, ...] = ()
    """Files and folders that the snapshot lacks, by their names in the repository."""
    present: int = 0
    """Bytes that need not be downloaded again, unfinished downloads among them."""

    @property
    def complete(self) -> bool:
        return bool(self.snapshot) and not self.missing


class Listener(msgspec.Struct, frozen=True):
    """A TCP port on which some process of this network namespace listens."""

    port: int
    address: str = ""
    pid: int | None = None
    """None where the process is another user's, or outside this container."""
    name: str = ""
    seconds: float | None = None


class HubAccess(msgspec.Struct, frozen=True):
    """What the model hub answered when it was asked for one small file of the job's repository."""

    repository: str
    endpoint: str
    status: int | None = None
    """HTTP status; None: no answer."""
    detail: str = ""
    seconds: float = 0.0


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
    wsl: bool = False
    swap_total: int = 0
    swap_free: int = 0
    cgroup: int | None = None
    """1 or 2."""
    cpu_quota: float | None = None
    """Cores that the cgroup grants; None: no quota."""
    pids_limit: int | None = None
    limits: dict[str, int | None] = {}
    """Soft limits of this process: memlock, stack (bytes), nofile, nproc; None: unlimited."""
    device_nodes: dict[str, str] = {}
    """/dev/nvidia* and /dev/dxg: ok, or denied."""
    interfaces: dict[str, str] = {}
    """Network interfaces and their operational state."""
    infiniband: tuple[str, ...] = ()
    """Devices under /sys/class/infiniband."""
    named: bool | None = None
    """Whether /etc/hosts knows this host's own name."""
    memory_held: int | None = None
    """What the processes of the group that sets `memory_limit` hold and the kernel cannot drop."""
    name: str = ""
    """The host's own name; a fleet's reports are told apart by it."""


class TorchFacts(msgspec.Struct, frozen=True):
    """What torch itself says in a child process started with the job's environment."""

    version: str
    cuda: str = ""
    devices: tuple[str, ...] = ()
    """Names of the devices that torch sees, in torch's order."""
    capabilities: tuple[tuple[int, int], ...] = ()
    nccl: str = ""
    seconds: float = 0.0


class Bandwidth(msgspec.Struct, frozen=True):
    """One size of the timed sweep."""

    bytes: int
    seconds: float
    """Of one all-reduce, by the slowest rank's clock."""
    busbw: float
    """GB/s as nccl-tests has it: bytes / seconds · 2(n-1)/n."""


class AllReduce(msgspec.Struct, frozen=True):
    """The outcome of the collectives over the job's ranks."""

    backend: str
    ranks: int
    ok: bool
    stage: str = ""
    """The last stage that `rank` reached: start, import, rendezvous, versions, init, tiny, values, collectives,
    sweep, done."""
    rank: int | None = None
    """The rank that is the cause, or the first that failed or fell silent; None: none of them, or not known."""
    detail: str = ""
    seconds: float = 0.0
    doing: str = ""
    """What that rank was at, after its stage."""
    frame: str = ""
    """Where its Python stood when it fell silent."""
    said: str = ""
    """What the libraries of that rank wrote: the end of it."""
    stages: tuple[str, ...] = ()
    """The last stage of each rank."""
    versions: tuple[str, ...] = ()
    """The libraries of each rank, as far as it came to say."""
    skipped: tuple[str, ...] = ()
    """Collectives that the backend does not have, sizes for which no time was left."""
    bandwidth: tuple[Bandwidth, ...] = ()
    """The timed sweep (deep level)."""
    tried: tuple[str, ...] = ()
    """After a failure, each alone: variables that did not help (deep level)."""
    helped: tuple[str, ...] = ()
    """The variable under which all stages passed."""


class Reading(msgspec.Struct, frozen=True):
    """A card's clocks and heat at one moment; None or empty: the driver does not tell."""

    sm_clock: int | None = None
    """MHz of the multiprocessors, and the highest that the card has."""
    sm_clock_max: int | None = None
    temperature: int | None = None
    """Degrees Celsius."""
    power: float | None = None
    """Watts, and the limit that is set."""
    power_limit: float | None = None
    throttle: tuple[str, ...] = ()
    """As `GpuHealth.throttle`."""


class Product(msgspec.Struct, frozen=True):
    """Matrix products of one type on one GPU, held against float64, and how fast they are."""

    kind: str
    """bfloat16, float16, float32 or float8_e4m3fn."""
    error: float
    """The largest error of an element as a share of what rounding may make of it: above 1 it is wrong."""
    repeated: bool = True
    """Whether the same product gave the same bits every time."""
    rates: dict[str, float] = {}
    """TFLOP/s by shape, `MxNxK`."""


class AttentionTrial(msgspec.Struct, frozen=True):
    """One attention, forward and backward at the job's shapes."""

    name: str
    """`trainer NAME`, as the train config's `attention` has it; `torch NAME`, as torch's own call takes it; or a
    package's name."""
    ok: bool
    errors: dict[str, float] = {}
    """Relative errors of out, dq, dk and dv against float32; the gradients' by the layout of the output's gradient."""
    forward: float = 0.0
    """Seconds."""
    backward: float = 0.0
    detail: str = ""
    """Why it is not right, or does not work."""
    absent: bool = False
    """Whether it is not to be had here at all, which is no fault."""


class BlockTrial(msgspec.Struct, frozen=True):
    """One double and one single block, forward and backward at the job's shapes, against diffusers' own in float32."""

    name: str
    """`trainer`: its own blocks; `diffusers`: as the trainer runs them; `torch's choice`: with every attention."""
    ok: bool
    output: float = 0.0
    """Relative error of the output, and the largest one of a gradient."""
    gradient: float = 0.0
    seconds: float = 0.0
    """Of both passes."""
    attention: str = ""
    detail: str = ""


class GpuProbe(msgspec.Struct, frozen=True, kw_only=True):
    """What one visible GPU did in the deep level. Stages: context, memory, products, bandwidth, link, `attention NAME`,
    `blocks NAME`. Rates are of this moment."""

    device: int
    """Its number in the job's own processes."""
    name: str = ""
    uuid: str = ""
    """As the driver has it, without NVML's prefix `GPU-` or `MIG-`; empty: it does not tell."""
    pci: str = ""
    done: dict[str, float] = {}
    """Stages that ended well, with their seconds."""
    failed: dict[str, str] = {}
    """Stages that did not, and how they ended."""
    skipped: dict[str, str] = {}
    """Stages that were left out, and why."""
    context_seconds: float | None = None
    """Of the context's seconds, those behind the import of torch: CUDA's own start."""
    context_bytes: int | None = None
    """What the context took of the card."""
    wanted: int = 0
    """Bytes of the job's forecast that were asked for; 0: there is none."""
    free: int | None = None
    """Bytes that CUDA called free just before."""
    total: int | None = None
    whole: bool | None = None
    """Whether they came in one piece; None: not tried."""
    pieces: bool | None = None
    """Whether they came in the trainer's pieces, freed and taken again."""
    taken: int = 0
    """Bytes that came in pieces."""
    free_after: int | None = None
    products: tuple[Product, ...] = ()
    copy_gbs: float | None = None
    """GB/s read and written on the card."""
    h2d_gbs: float | None = None
    """GB/s from pinned host memory, and to it."""
    d2h_gbs: float | None = None
    shapes: str = ""
    """What attention was tried on, in words."""
    attention: tuple[AttentionTrial, ...] = ()
    blocks: tuple[BlockTrial, ...] = ()
    before: Reading | None = None
    loaded: Reading | None = None
    """While products were timed."""
    after: Reading | None = None
    seconds: float = 0.0


class DcgmFailure(msgspec.Struct, frozen=True):
    """One test of DCGM's that ended in Fail."""

    test: str
    gpus: tuple[int, ...] = ()
    """DCGM's own numbers of the cards, see `DcgmResult.cards`; empty: it named none."""
    detail: str = ""
    severity: int | None = None
    """DCGM's dcgmErrorSeverity_t: 1 monitor, 2 isolate, 4 triage, 5 config, 6 reset; None: not told."""


class DcgmResult(msgspec.Struct, frozen=True):
    """What `dcgmi diag -r 1 -j` said (deep level)."""

    version: str = ""
    passed: int = 0
    """Results that are Pass or Warn; a test may have one for each card."""
    failures: tuple[DcgmFailure, ...] = ()
    cards: dict[str, str] = {}
    """UUIDs by DCGM's numbers, asked for after a failure; empty: not known."""
    seconds: float = 0.0


class NcclTests(msgspec.Struct, frozen=True):
    """What nccl-tests' all_reduce_perf said over the job's cards of this machine (deep level)."""

    ranks: int
    bytes: int
    busbw: float | None = None
    """GB/s, out of place; None: it came to no result."""
    wrong: int = 0
    """Values that were wrong."""
    failed: str = ""
    """What CUDA or NCCL said where it failed."""
    seconds: float = 0.0


class Cluster(msgspec.Struct, frozen=True):
    """This machine's names and addresses, and where the job's main_process_ip leads."""

    names: tuple[str, ...] = ()
    addresses: tuple[str, ...] | None = None
    """None: they cannot be read here."""
    own_addresses: tuple[str, ...] | None = None
    """Where this host's own name leads; None: not known, or not asked for."""
    main: str = ""
    """The job's main_process_ip as it was looked up."""
    main_addresses: tuple[str, ...] | None = None
    """None: it was not looked up, see `main_error`."""
    main_error: str = ""

    @property
    def here(self) -> bool | None:
        """Whether the job's main machine is this one; None: unknown."""
        if self.main_addresses is None or self.addresses is None or not self.main:
            return None
        return any(address in self.addresses or address.startswith("127.") for address in self.main_addresses)


class Peer(msgspec.Struct, frozen=True):
    """What one of the others said of itself when the machines met."""

    rank: int
    host: str = ""
    devices: int | None = None


class Meeting(msgspec.Struct, frozen=True):
    """How the job's machines, or its ranks, met before the launch."""

    kind: str
    """`machine` or `rank`: whose numbers these are."""
    rank: int
    count: int
    address: str
    """Where number 0 listens, `host:port`."""
    trouble: str = ""
    """Why there was no meeting: refused, timeout, no route, unknown name, other service, busy, gone; empty: met."""
    detail: str = ""
    missing: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    """Who came and went before all were ready."""
    stopped: tuple[int, ...] = ()
    """Whose own checks say no."""
    twice: tuple[int, ...] = ()
    """Numbers that two came with."""
    unlike: dict[str, dict[str, tuple[str, str]]] = {}
    """{number: {key: (number 0's value, its own)}}, of those who would run something else."""
    peers: tuple[Peer, ...] = ()
    seconds: float = 0.0

    @property
    def met(self) -> bool:
        """Whether they came together, alike or not."""
        return not (self.trouble or self.missing or self.left or self.stopped or self.twice)

    @property
    def together(self) -> bool:
        return self.met and not self.unlike


class CardPlace(msgspec.Struct, frozen=True):
    """Where one GPU sits in the machine."""

    index: int
    numa: int | None = None
    """The NUMA node beside it; None: not told."""
    cpus: str = ""
    """The cores beside it, for example `0-31,64-95`."""


class CardPair(msgspec.Struct, frozen=True):
    """What lies between two GPUs of this machine."""

    first: int
    second: int
    path: str = ""
    """The nearest that both hang on by PCIe: board, pix, pxb, phb, node, sys; empty: not told."""
    nvlinks: int = 0
    """NVLinks between them that are up; through switches the fewer of the two cards' own."""
    switched: bool = False
    """Whether the NVLinks go through NVSwitches."""


class Topology(msgspec.Struct, frozen=True):
    """How the GPUs are joined."""

    cards: tuple[CardPlace, ...]
    pairs: tuple[CardPair, ...]


class Clock(msgspec.Struct, frozen=True):
    """This host's clock held against one that other nodes were held against too."""

    offset: float
    """Seconds that this host is ahead of it."""
    error: float
    """Seconds by which the offset may be wrong."""
    reference: str
    """Whose clock it is: a shared folder's server, or node 0."""


class Link(msgspec.Struct, frozen=True):
    """What this node and one other reach between them."""

    peer: str
    """The other's host name."""
    gbps: float
    """Gbit/s; of two numbers for one pair the lower counts."""


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
    lost_gpus: tuple[LostGpu, ...] = ()
    topology: Topology | None = None
    """None: fewer than two GPUs, or a driver that does not tell."""
    xids: tuple[Xid, ...] | None = None
    packages: dict[str, Package] | None = None
    environment: dict[str, str] = {}
    """Variables that change how a job runs, by an allow-list; never tokens."""
    hub_token: bool = False
    """Whether a hub token is set; its value is never read into a fact."""
    default_accelerate_config: str = ""
    toolchain: Toolchain | None = None
    folders: dict[str, Folder] | None = None
    """By purpose: output, cache, images, model, hub, temporary, torch_extensions, triton, inductor, home; and
    `volume`, the largest other mount, where the output is on a container's own disk."""
    hub_cache: HubCache | None = None
    """None: the model is a local folder, or the cache does not answer."""
    listeners: tuple[Listener, ...] | None = None
    shadows: tuple[str, ...] = ()
    """Files and folders of the working folder that Python would import in a package's place."""
    cluster: Cluster | None = None
    """Only for a job of several machines."""
    meeting: Meeting | None = None
    """None: no launch of several machines was tried."""
    hub: HubAccess | None = None
    torch: TorchFacts | None = None
    allreduce: AllReduce | None = None
    gpu_probes: tuple[GpuProbe, ...] | None = None
    """Of each visible GPU (deep level)."""
    dcgm: DcgmResult | None = None
    """None: dcgmi is not there, or did not come to a result."""
    nccl_tests: NcclTests | None = None
    clock: Clock | None = None
    """None: the clock was held against no other; only a fleet's run does so."""
    speeds: dict[str, float] = {}
    """Measured rates, of the slowest card where there are several; more is better. Names: matmul_bf16_tflops, h2d_gbs,
    allreduce_busbw_gbs, nccl_tests_busbw_gbs (GB/s) and others; a fleet compares whatever is there."""
    links: tuple[Link, ...] = ()
    unknown: dict[str, str] = {}
    timings: dict[str, float] = {}


def to_json(facts: Facts) -> str:
    return msgspec.json.format(msgspec.json.encode(facts), indent=2).decode()


def from_json(text: bytes) -> Facts:
    """Read facts that `xflux-doctor facts` wrote. Raises msgspec.DecodeError with the place of the fault."""
    return msgspec.json.decode(text, type=Facts)
