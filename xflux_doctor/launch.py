"""How the trainer is started: an argv list and an environment. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xflux_doctor.job import Job


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
    argv = (
        python,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(accelerate),
        "-m",
        "xflux_trainer",
        "train",
        "--config",
        str(train),
        *extra,
    )
    return Launch(argv, {**environ, **added}, added)
