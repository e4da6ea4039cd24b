"""How the trainer is started: an argv list and an environment. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xflux_doctor.cluster import Task
from xflux_doctor.job import Job

_FLAGS = ("num_machines", "machine_rank", "main_process_ip", "main_process_port", "num_processes")
"""What Slurm may set in place of the file; each is a flag of `accelerate launch`, and a flag wins over the file."""


@dataclass(frozen=True)
class Launch:
    """One command, ready to be executed."""

    argv: tuple[str, ...]
    env: dict[str, str]
    """The user's environment, whole, and what `added` names."""
    added: dict[str, str]

    @property
    def shell(self) -> str:
        """The command as a person would type it."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.added.items()), shlex.join(self.argv)])

    def adding(self, variables: Mapping[str, str]) -> Launch:
        """The same with more variables."""
        return Launch(self.argv, {**self.env, **variables}, {**self.added, **variables})


def build(
    python: str, job: Job, accelerate: Path, train: Path, environ: Mapping[str, str], extra: tuple[str, ...] = ()
) -> Launch:
    """`accelerate launch --config_file … -m xflux_trainer train --config …` in the given interpreter.

    Nothing is removed from the environment. Added is what --offline asks for, and what the file says and
    accelerate's launcher for DeepSpeed drops: on a machine with GPUs its ranks would not learn of `use_cpu`
    (accelerate 0.30.1 and 1.15.0, utils/launch.py: `prepare_deepspeed_cmd_env` does not set it,
    `prepare_simple_launcher_cmd_env` does).
    """
    added = {"ACCELERATE_USE_CPU": "true"} if job.use_cpu and job.deepspeed else {}
    if job.offline:  # the hub library's own switch: what is not in its cache is an error at once, not after retries
        added["HF_HUB_OFFLINE"] = "1"
    flags = [word for key in _FLAGS if job.source(key) for word in (f"--{key}", str(job.get(key)))]
    argv = (python, "-m", "accelerate.commands.launch", "--config_file", str(accelerate), *flags,
            "-m", "xflux_trainer", "train", "--config", str(train), *extra)  # fmt: skip
    return Launch(argv, {**environ, **added}, added)


def build_rank(
    python: str, job: Job, task: Task, devices: int | None, train: Path, environ: Mapping[str, str],
    extra: tuple[str, ...] = (),
) -> Launch:  # fmt: skip
    """The trainer itself, for a process that Slurm or torchrun started as a rank: a launcher here would start N more.

    torchrun has set the ranks' variables already; for Slurm's they are made from the step's. With one GPU bound to
    each task (`srun --gpus-per-task=1`) every task sees its own as device 0, whatever SLURM_LOCALID is.
    """
    local = 0 if devices == 1 and task.source == "Slurm" else task.local_rank
    ranks = {
        "RANK": str(task.rank),
        "WORLD_SIZE": str(task.count),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(task.local_count),
        "MASTER_ADDR": task.host,
        "MASTER_PORT": str(task.port),
    }
    added = {**ranks, **accelerate_variables(job)}
    if job.offline:
        added["HF_HUB_OFFLINE"] = "1"
    if "OMP_NUM_THREADS" not in environ:  # as accelerate and torchrun do
        added["OMP_NUM_THREADS"] = environ.get("SLURM_CPUS_PER_TASK", "1")
    added = {name: value for name, value in added.items() if environ.get(name) != value}
    argv = (python, "-m", "xflux_trainer", "train", "--config", str(train), *extra)
    return Launch(argv, {**environ, **added}, added)


_DEEPSPEED = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "zero3_init_flag": "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "zero3_save_16bit_model": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
}
_LOWERED = frozenset(_DEEPSPEED) - {"zero_stage", "gradient_accumulation_steps", "deepspeed_config_file"}

_FSDP: dict[str, tuple[str | None, bool]] = {
    "fsdp_version": ("1", False),
    "fsdp_reshard_after_forward": ("true", True),
    "fsdp_offload_params": ("false", True),
    "fsdp_activation_checkpointing": ("false", True),
    "fsdp_auto_wrap_policy": (None, False),
    "fsdp_ignored_modules": (None, False),
}
"""What the trainer reads of FSDP: accelerate's default without the key, and whether it lowers the case."""
_SIZES = ("dp_replicate_size", "tp_size", "cp_size", "sp_size")


def accelerate_variables(job: Job) -> dict[str, str]:
    """What `accelerate launch` hands to a rank out of its file, of that which the trainer reads.

    Source: accelerate 0.30.1 and 1.15.0, utils/launch.py, `prepare_deepspeed_cmd_env` and `prepare_multi_gpu_env`
    (FSDP's second version: from 1.6.0 on);
    tests/test_launch_ranks.py holds both against this.
    """
    found: dict[str, str] = {}
    precision = job.get("mixed_precision")
    found["ACCELERATE_MIXED_PRECISION"] = precision.lower() if isinstance(precision, str) else "no"
    if job.use_cpu:
        found["ACCELERATE_USE_CPU"] = "true"
    if job.gpu_ids not in (None, "all") and not job.use_cpu:
        found["CUDA_VISIBLE_DEVICES"] = str(job.gpu_ids)
    if job.deepspeed:
        found["ACCELERATE_USE_DEEPSPEED"] = "true"
        section: dict[str, Any] = job.section("deepspeed_config")
        for key, name in _DEEPSPEED.items():
            value = section.get(key)
            if value is not None:
                found[name] = str(value).lower() if key in _LOWERED else str(value)
    elif job.distributed_type == "FSDP":
        found |= {"ACCELERATE_USE_FSDP": "true", **_fsdp(job)}
    elif job.distributed_type == "MEGATRON_LM":
        found["ACCELERATE_USE_MEGATRON_LM"] = "true"
    if sizes := job.section("parallelism_config"):
        found["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        for name in _SIZES:
            found[f"PARALLELISM_CONFIG_{name.upper()}"] = str(sizes.get(f"parallelism_config_{name}", 1))
    return found


def _fsdp(job: Job) -> dict[str, str]:
    """FSDP's own, as `prepare_multi_gpu_env` spells them."""
    told = {flag: value for flag, (_, value) in job.fsdp.items()}
    found = {}
    for flag, (default, lowered) in _FSDP.items():
        value = told.get(flag, default)
        if value is not None:
            found[flag.upper()] = str(value).lower() if lowered else str(value)
    return found
