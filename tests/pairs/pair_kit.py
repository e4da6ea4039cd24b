"""What a pair is: a broken job, what `check` says before its start, and what `explain` says after its real death.

A fault is put into a sound job of one or two CPU ranks. Nothing of ours is mocked: `check` looks at this machine,
the job is started as a user without the doctor would start it, and `explain` reads what it really printed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import ROOT

PHOTOS = ROOT / "examples/demo/photos"
SOUND_TRAIN: dict[str, Any] = {
    "model_name": "flux-dev", "max_train_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "rank": 4,
    "checkpointing_steps": 100, "max_text_tokens": 16, "disable_sampling": True, "heldout_samples": 0, "report_to":
    "none", "data_config": {"img_dir": str(PHOTOS), "img_size": 64, "train_batch_size": 1},
}  # fmt: skip
SOUND_ACCELERATE: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "mixed_precision": "no", "num_machines": 1,
    "machine_rank": 0, "num_processes": 1, "use_cpu": True,
}  # fmt: skip
DEEPSPEED: dict[str, Any] = {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16", "num_processes": 2}
"""What of the sound accelerate file is another for two ranks under DeepSpeed."""
TRAINER = (sys.executable, "-m", "xflux_trainer", "train", "--config", "train.yaml")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml", "-m",
              "xflux_trainer", "train", "--config", "train.yaml")  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
SCRIPT = (sys.executable, "script.py")


@dataclass
class Place:
    """A folder with a sound job in it, and how it is checked and started; a fault changes any of that."""

    folder: Path
    model: Path | None
    """A model of random weights, where one could be made; it is shared: `own_model` copies it."""
    train: dict[str, Any] = field(default_factory=dict)
    accelerate: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    start: tuple[str, ...] = TRAINER
    """The job's command line."""
    inside: tuple[str, ...] = ()
    """What the check and the job are both started by, such as a shell with a limit."""
    check: tuple[str, ...] = ("--quick",)
    """Options of `check`."""
    python: str = sys.executable
    """The job's interpreter."""
    files: tuple[str, ...] = ("--config", "train.yaml", "--accelerate-config", "accelerate.yaml")
    """The options by which `check` is told the job's files."""
    closing: list[Callable[[], None]] = field(default_factory=list)

    def data(self, **changes: Any) -> None:
        """Change data_config of the training file."""
        self.train["data_config"] = {**self.train["data_config"], **changes}

    def photos(self, count: int = 2) -> Path:
        """A folder of its own with so many of the demo's photographs and their captions."""
        folder = self.folder / "photos"
        folder.mkdir()
        for photo in sorted(PHOTOS.glob("*.jpg"))[:count]:
            shutil.copy(photo, folder)
            shutil.copy(photo.with_suffix(".json"), folder)
        self.data(img_dir=str(folder))
        return folder

    def own_model(self) -> Path:
        """A copy of the model that may be broken."""
        assert self.model is not None
        copy = self.folder / "model"
        shutil.copytree(self.model, copy)
        self.train["pretrained_model"] = str(copy)
        return copy

    def script(self, code: str) -> None:
        """The user's own program instead of the trainer."""
        (self.folder / "script.py").write_text(code)
        self.start = (self.python, "script.py")

    def deepspeed(self, file: Mapping[str, Any] | str | None = None, **section: Any) -> None:
        """Two ranks under DeepSpeed, by a JSON file or by the inline section."""
        self.accelerate.update(DEEPSPEED)
        if file is not None:
            (self.folder / "ds.json").write_text(file if isinstance(file, str) else json.dumps(file))
            section["deepspeed_config_file"] = "ds.json"
            del self.accelerate["mixed_precision"]
        self.accelerate["deepspeed_config"] = section or {"zero_stage": 2, "gradient_accumulation_steps": 2}
        self.start = ACCELERATE

    def write(self) -> None:
        self.train.setdefault("pretrained_model", str(self.model) if self.model else None)
        (self.folder / "train.yaml").write_text(yaml.safe_dump(self.train))
        if "train.yaml" not in self.files:  # else `check` would take the file that lies there
            (self.folder / "train.yaml").unlink()
        (self.folder / "accelerate.yaml").write_text(yaml.safe_dump(self.accelerate))

    def environ(self) -> dict[str, str]:
        """This process's, on CPU ranks, with caches in the folder."""
        quiet = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                 "HF_HOME": str(self.folder / "hf"), "XDG_CACHE_HOME": str(self.folder / "cache"),
                 "TORCH_EXTENSIONS_DIR": str(self.folder / "ops"), "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        return {name: value for name, value in {**os.environ, **quiet, **self.environment}.items() if value != "-"}

    def run(self, *argv: str, seconds: int = 240) -> subprocess.CompletedProcess[str]:
        """Start something as the job is started; both its streams come as stdout."""
        # A session of its own: a launcher's death must not take the test with it.
        return subprocess.run(
            [*self.inside, *argv], cwd=self.folder, env=self.environ(), stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=seconds, errors="replace", check=False,
            start_new_session=True,
        )  # fmt: skip


class Pair(NamedTuple):
    """One fault of a job."""

    name: str
    cause: str
    """What explain names."""
    code: str
    """What check finds, and explain says too."""
    break_it: Callable[[Place], None]
    """Puts the fault into the sound job; may skip where this machine cannot have it."""
    words: str = ""
    """What the true error says, where the cause alone does not tell one pair from another."""
    needs: tuple[str, ...] = ("torch", "accelerate", "diffusers")
    """Packages without which the job could not even fail."""
    quick: bool = False
    """Continuous integration provokes it too."""


def sound(folder: Path, model: Path | None) -> Place:
    """A job that nothing is wrong with."""
    train = {**SOUND_TRAIN, "output_dir": str(folder / "out"), "cache_dir": str(folder / "encoded")}
    with socket.socket() as free:  # 29500 may be another test's
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Place(folder, model, train, {**SOUND_ACCELERATE, "main_process_port": port})


def before(place: Place) -> dict[str, list[str]]:
    """What `check` finds: {code: what was seen, each}."""
    options = ("--format", "json", "--output", "check.json", *place.files, *place.check)
    argv = (sys.executable, "-m", "xflux_doctor.cli", "check", *options)
    done = place.run(*argv)
    assert done.returncode in (0, 1), done.stdout
    found: dict[str, list[str]] = {}
    for result in json.loads((place.folder / "check.json").read_text())["results"]:
        assert result["status"] != "crashed", result
        for finding in result["findings"]:
            found.setdefault(finding["code"], []).append(f"{finding['severity']}: {finding['seen']}")
    return found


def after(place: Place) -> tuple[dict[str, Any], str]:
    """What `explain` says of the job's real death, and its log."""
    done = place.run(*place.start)
    log = place.folder / "job.log"
    log.write_text(done.stdout)
    assert done.returncode, f"the job did not fail:\n{done.stdout[-3000:]}"
    argv = [sys.executable, "-m", "xflux_doctor.cli", "explain", str(log), "--format", "json"]
    explained = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert explained.returncode in (0, 1), explained.stderr
    return json.loads(explained.stdout), done.stdout


def skip(why: str) -> None:
    pytest.skip(why)
