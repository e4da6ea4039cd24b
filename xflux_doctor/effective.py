"""What the nodes of a job must run alike, as short words: the launch and the training, without what is a node's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from xflux_trainer import config as train_config

from xflux_doctor.job import Job
from xflux_doctor.nodes import SAME

_LOCAL = frozenset(
    {"img_dir", "output_dir", "cache_dir", "pretrained_model", "heldout_dir", "num_workers", "logging_dir"}
)
"""Keys of the training file that may differ from machine to machine: where things lie, not what they are."""
_SAME = (*(key for key in SAME if key not in ("main_process_ip", "rdzv_backend")), "downcast_bf16")
"""Machine 0 may be called by other names elsewhere, and the file's rdzv_backend is not read (LA409)."""
_LONG = 60


def values(job: Job) -> dict[str, str]:
    """{key: its value} of the launch and the training; a long value is known by its hash."""
    return _short_values({**_launch(job), **_training(job)})


def document(job: Job) -> dict[str, Any] | None:
    """The job as a report carries it, with hashes by which two reports are told apart; None where there is no file."""
    if job.accelerate is None and job.train is None and not job.overrides:
        return None
    launch, training = _short_values(_launch(job)), _short_values(_training(job))
    return {
        "hash": digest({**launch, **training}),
        "accelerate": digest(launch),
        "train": digest(training) if training else "",
        "values": {**launch, **training},
    }


def digest(agreed: Mapping[str, str]) -> str:
    """Twelve letters for a job's values, in whatever order they stand."""
    return hashlib.sha256(json.dumps(dict(sorted(agreed.items()))).encode()).hexdigest()[:12]


def _launch(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {key: job.get(key) for key in _SAME}
    found["num_processes"] = job.num_processes
    found["distributed_type"] = job.distributed_type
    found["use_cpu"] = job.use_cpu
    if job.zero_file is not None:
        found["deepspeed_config_file"] = job.zero_file
    return found


def _training(job: Job) -> dict[str, Any]:
    if job.train is None:
        return {}
    return {key: value for key, value in train_config.to_dict(job.train).items() if key not in _LOCAL}


def _short_values(found: Mapping[str, Any]) -> dict[str, str]:
    return {key: _short(value) for key, value in found.items() if value is not None}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= _LONG else f"…{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:12]}"
