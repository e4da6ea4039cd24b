"""Remembers that the probes passed on this machine, stack and config, so that `run` does not repeat them.

Only passes are kept. The key is a hash of everything that could change the answer: driver, GPUs by UUID,
package versions and places, interpreter, the accelerate settings, and the environment that reaches the ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
from xflux_trainer.config import to_dict

from xflux_doctor.check import Case
from xflux_doctor.errors import DoctorError
from xflux_doctor.facts import AllReduce, Facts, TorchFacts
from xflux_doctor.files import write_atomic

_LOADING = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX")
"""Variables that decide which libraries a rank loads; they enter the key, and no fact."""


class Pass(msgspec.Struct, frozen=True):
    """What the probes said when they passed."""

    torch: TorchFacts
    allreduce: AllReduce


def folder(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".cache")
    return Path(base) / "xflux-doctor" / "passes"


def key(case: Case) -> str:
    """The hash under which a pass of this case is kept."""
    facts = case.facts
    parts = {
        "version": facts.version,
        "driver": msgspec.to_builtins(facts.driver),
        "gpus": [(gpu.uuid, gpu.pci) for gpu in facts.gpus or ()],
        "packages": {n: (p.version, p.build, p.location) for n, p in (facts.packages or {}).items()},
        "python": msgspec.to_builtins(facts.python),
        "kernel": facts.host.kernel if facts.host else "",
        "boot": _boot_id(),
        "accelerate": repr(case.job.accelerate),  # YAML's keys need not be text, nor its values end
        "cpu": case.job.use_cpu,
        "environment": {**facts.environment, **{name: os.environ.get(name, "") for name in _LOADING}},
        "train": to_dict(case.job.train) if case.job.train is not None else None,
        "stack": case.stack.name if case.stack else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _boot_id() -> str:
    """A rebooted machine is looked at again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def recall(case: Case) -> Facts | None:
    """The facts with a remembered pass in them, if there is one for exactly this case."""
    path = folder(os.environ) / f"{key(case)}.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Pass)
    except (OSError, msgspec.DecodeError):
        return None
    return msgspec.structs.replace(case.facts, torch=found.torch, allreduce=found.allreduce)


def remember(case: Case) -> None:
    """Keep the pass, if the probes did pass. A folder that cannot be written only costs the next run time."""
    facts = case.facts
    if facts.torch is None or facts.allreduce is None or not facts.allreduce.ok:
        return
    path = folder(os.environ) / f"{key(case)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.encode(Pass(facts.torch, facts.allreduce)).decode())
    except (OSError, DoctorError):
        return
