"""What will run where: rank → machine → device, as the launcher in use would place it. Pure.

Source: accelerate 0.30.1 and 1.15.0, commands/launch.py (`launch_command`, `_validate_launch_command`) and
utils/launch.py (`prepare_simple_launcher_cmd_env`, `prepare_multi_gpu_env`, `prepare_deepspeed_cmd_env`); a table of
real launches holds the two together (tests/test_launch_table.py).
"""

from __future__ import annotations

import msgspec
from packaging.version import Version

from xflux_doctor import cluster
from xflux_doctor.facts import Facts, Gpu
from xflux_doctor.job import Job
from xflux_doctor.versions import version_of
from xflux_doctor.visible import choice, visible

WRAPS = Version("0.33.0")
"""First accelerate whose ranks take device `rank % device_count` (huggingface/accelerate#2916)."""
STANDALONE = Version("1.8.0")
"""First accelerate that looks for a free port by itself, on one machine (huggingface/accelerate#3576)."""
_MOST = 4096
"""Ranks of one machine that are listed: a slip of the finger must not fill the memory."""
_TORCHRUN = ("MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU", "MULTI_HPU", "MULTI_MUSA", "MULTI_SDAA",
             "MULTI_NEURON", "FSDP", "MEGATRON_LM")  # fmt: skip


class Rank(msgspec.Struct, frozen=True):
    """One process of this machine."""

    rank: int
    local_rank: int
    device: Gpu | None = None
    """None: it computes on the CPU, or finds no device."""


class Placement(msgspec.Struct, frozen=True):
    """What the launcher starts on this machine, or its own words for not starting."""

    launcher: str
    """`python` (one process), `torchrun`, `deepspeed` or `srun`: what the ranks are started by."""
    world_size: int = 1
    machines: int = 1
    machine_rank: int = 0
    ranks: tuple[Rank, ...] = ()
    """This machine's."""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the ranks; None: not set."""
    address: str = ""
    """Where the ranks meet, `host:port`; empty: one process meets nobody."""
    idle: tuple[Gpu, ...] = ()
    """Visible devices without a rank."""
    refusal: str = ""
    """The launcher's own sentence, where it starts nothing."""
    failure: str = ""
    """The ranks' own sentence, where they start and cannot go on."""


def launcher_of(job: Job, facts: Facts) -> str:
    """Which program starts the ranks: Slurm or torchrun has already, or `accelerate launch` will, by one of these."""
    kind, task = job.distributed_type, cluster.task(facts.environment)
    if job.launcher:
        return job.launcher
    if task is not None and task.a_rank and task.several:
        return "srun" if task.source == "Slurm" else "torchrun"
    if kind == "DEEPSPEED":
        remote = str(job.section("deepspeed_config").get("deepspeed_multinode_launcher") or "pdsh") != "standard"
        return "deepspeed" if job.num_machines > 1 and remote else "torchrun"
    return "torchrun" if kind in _TORCHRUN else "python"


def place(job: Job, facts: Facts) -> Placement:
    """What starts on this machine. GPUs that are unknown leave the ranks without a device and without a failure."""
    version = version_of(facts, "accelerate")
    launcher = launcher_of(job, facts)
    machines = max(1, job.num_machines)
    count = 1 if launcher == "python" else max(1, job.num_processes // machines)
    first = job.machine_rank * count
    devices = () if job.use_cpu or facts.gpus is None else visible(facts.gpus, choice(facts.environment, job.gpu_ids))
    single = launcher == "python"
    return Placement(
        launcher=launcher,
        world_size=1 if single else count * machines,
        machines=machines,
        machine_rank=job.machine_rank,
        ranks=tuple(Rank(first + i, i, _device(job, i, devices, version)) for i in range(min(count, _MOST))),
        visible_devices=choice(facts.environment, job.gpu_ids),
        address="" if single else _address(job),
        idle=devices[count:] if devices else (),
        refusal=_refusal(job, version),
        failure=_failure(job, count, devices, version) if facts.gpus is not None else "",
    )


def _device(job: Job, local_rank: int, devices: tuple[Gpu, ...], version: Version | None) -> Gpu | None:
    if local_rank < len(devices):
        return devices[local_rank]
    wraps = version is not None and version >= WRAPS and not job.bundled
    return devices[local_rank % len(devices)] if devices and wraps else None


def _refusal(job: Job, version: Version | None) -> str:
    """accelerate counts gpu_ids for MULTI_GPU only, on one machine, and where it reads a file (seen on an H100)."""
    ids = job.gpu_ids
    if (
        job.launcher
        or job.accelerate is None
        or job.distributed_type not in _TORCHRUN[:8]
        or ids in (None, "all")
        or job.num_machines > 1
    ):
        return ""
    assert ids is not None
    if len(ids.split(",")) > 1:
        return ""
    on = "on on" if version is not None and version < Version("1.15") else "on"  # read in 0.30.1 to 1.15.0
    return f"ValueError: Less than two GPU ids were configured and tried to run {on} multiple GPUs."


def _failure(job: Job, count: int, devices: tuple[Gpu, ...], version: Version | None) -> str:
    """What the first rank without a device of its own says."""
    first = len(devices)
    if job.use_cpu or count <= first:
        return ""
    if devices and job.bundled:
        return trainer_words(first, count)
    return script_words(first, version, job.machine_rank * count)


def trainer_words(devices: int, count: int) -> str:
    """The bundled trainer's own (xflux_trainer/ranks.py)."""
    return f"Process {devices} of {count} finds only {devices} GPU(s) here."


def script_words(devices: int, version: Version | None, first_rank: int = 0) -> str:
    """What a script on accelerate says: local rank `devices` is the first without a device of its own."""
    if not devices:
        return "torch finds no CUDA device"
    if version is None or version < WRAPS:
        return "RuntimeError: CUDA error: invalid device ordinal"
    return f"Duplicate GPU detected : rank {first_rank} and rank {first_rank + devices} both on CUDA device"


def _address(job: Job) -> str:
    ip = job.get("main_process_ip")
    return f"{ip if isinstance(ip, str) and ip else '127.0.0.1'}:{job.main_process_port}"
