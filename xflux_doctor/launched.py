"""The job as a launch command starts it: the command's flags over accelerate's file. Pure."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

import msgspec
from packaging.version import Version

from xflux_doctor.job import Job, Override

if TYPE_CHECKING:
    from xflux_doctor.command import Command


def under_command(job: Job, command: Command, version: Version | None, devices: int | None) -> Job:
    """The job under its command. torchrun and DeepSpeed's launcher do not read accelerate's file.

    `version` is the installed accelerate's; `devices` the number of GPUs that a process here sees (None: unknown).
    """
    found = command.overrides(job.accelerate or {}, version)
    if command.launcher == "accelerate":
        if job.accelerate is None and devices is not None:  # accelerate's own defaults without any file
            found.setdefault("num_processes", (max(1, devices), "the number of visible GPUs"))
            kind = "MULTI_GPU" if found["num_processes"][0] > 1 and devices > 1 else "NO"
            found.setdefault("distributed_type", (kind, "accelerate, without a file"))
    else:
        job = msgspec.structs.replace(job, accelerate=None, accelerate_path=None, accelerate_text="",
                                  problems=tuple(p for p in job.problems if p.file == "train"))  # fmt: skip
        if "num_processes" not in found and devices is not None:
            each = str(command.flags.get("nproc_per_node", ""))
            count = max(1, devices) * int(found.get("num_machines", (1, ""))[0])
            if command.launcher == "deepspeed" or each in ("gpu", "auto"):
                found["num_processes"] = (count, "the number of visible GPUs")
    overrides = {key: Override(value, source) for key, (value, source) in found.items()}
    launcher = "" if command.launcher == "accelerate" else command.launcher
    return msgspec.structs.replace(job, overrides={**job.overrides, **overrides}, launcher=launcher)


def xflux_script(command: Command, scripts: tuple[str, ...]) -> str | None:
    """The command's script where it is one of X-Flux's."""
    return command.script if PurePath(command.script).name in scripts else None
