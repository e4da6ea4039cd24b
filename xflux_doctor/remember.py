"""Remembers that the probes passed on this machine, stack and config, so that `run` does not repeat them.

Only passes are kept, each under a hash of everything that could change the answer. A machine's, for the deep level:
driver, GPUs by UUID and their health, package versions and places, interpreter, which devices and how many ranks, and
the environment that reaches these. A job's, for the default level: all of that, and the job's files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from xflux_trainer.config import to_dict

from xflux_doctor.check import Case
from xflux_doctor.errors import DoctorError
from xflux_doctor.facts import Facts
from xflux_doctor.files import write_atomic

_LOADING = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX")
"""Variables that decide which libraries a rank loads; they enter the key, and no fact."""


_OF_ONE_START = frozenset(
    "SLURM_JOB_ID SLURM_STEPID SLURM_STEP_ID SLURM_PROCID SLURM_LOCALID SLURM_JOB_NODELIST SLURM_STEP_NODELIST "
    "SLURM_STEP_LAUNCHER_PORT SLURM_STEP_RESV_PORTS MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID".split()
)
"""Variables of the allow-list that are others at each start, and change no answer of a probe on one machine."""
_NOT_PROBED = frozenset({"unknown", "timings", "created", "hub", "meeting"})
"""Facts that are not a probe's, or that may be others in a minute."""


def folder(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".cache")
    return Path(base) / "xflux-doctor" / "passes"


def machine_key(case: Case) -> str:
    """The hash under which a pass of the deep level is kept: this machine and stack, whatever is trained."""
    return _hash(_machine(case))


def key(case: Case) -> str:
    """The hash under which a pass of exactly this case is kept."""
    job = case.job
    files = {
        "accelerate": repr(job.accelerate),  # YAML's keys need not be text, nor its values end
        "overrides": repr({name: one.value for name, one in job.overrides.items()}),
        "deepspeed": job.zero_text,
        "train": to_dict(job.train) if job.train is not None else None,
    }
    return _hash({**_machine(case), **files})


def _machine(case: Case) -> dict[str, Any]:
    facts, host = case.facts, case.facts.host
    environment = {k: v for k, v in facts.environment.items() if k not in _OF_ONE_START}
    return {
        "version": facts.version,
        "driver": msgspec.to_builtins(facts.driver),
        "gpus": [
            (gpu.uuid, gpu.pci, gpu.mig, gpu.compute_mode, gpu.nvlinks, gpu.health.ecc_uncorrected,
             gpu.health.remap_pending, gpu.health.remap_failed, gpu.health.recovery_action, gpu.health.fabric)
            for gpu in facts.gpus or ()
        ],
        "xids": sorted({(xid.number, xid.pci) for xid in facts.xids or ()}),
        "packages": {n: (p.version, p.build, p.location) for n, p in (facts.packages or {}).items()},
        "python": msgspec.to_builtins(facts.python),
        "system": (host.kernel, host.glibc, _interfaces(host.interfaces), host.infiniband) if host else None,
        "boot": _boot_id(),
        "ranks": (case.job.use_cpu, case.job.local_processes, case.job.gpu_ids),
        "environment": {**environment, **{name: os.environ.get(name, "") for name in _LOADING}},
        "stack": case.stack.name if case.stack else None,
    }  # fmt: skip


def _interfaces(found: Mapping[str, str]) -> dict[str, str]:
    """Without those that containers come and go with."""
    return {name: state for name, state in found.items() if not name.startswith(("veth", "br-", "cali", "cni"))}


def _hash(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _boot_id() -> str:
    """A rebooted machine is looked at again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def recall(facts: Facts, name: str) -> Facts | None:
    """The facts with what the probes had found when they passed, if a pass is kept under that hash."""
    try:
        found = json.loads((folder(os.environ) / f"{name}.json").read_bytes())
        known = {key: value for key, value in found.items() if key in Facts.__struct_fields__}
        whole = msgspec.convert({**msgspec.to_builtins(facts), **known}, Facts)
    except (OSError, ValueError, AttributeError, msgspec.ValidationError):
        return None
    return whole if known else None


def remember(before: Facts, after: Facts, name: str) -> None:
    """Keep a pass: what the probes added. A folder that cannot be written only costs the next run time."""
    first, last = msgspec.to_builtins(before), msgspec.to_builtins(after)
    added = {key: last[key] for key in last if key not in _NOT_PROBED and last[key] != first[key]}
    path = folder(os.environ) / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(added))
    except (OSError, DoctorError):
        return
