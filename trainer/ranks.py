"""The processes of one run: who am I, which device is mine, and what the ranks tell each other.

`accelerate launch` and torchrun start the processes and describe the run in environment variables. They are
read here, once, and the process group is made here: accelerate's own `Accelerator` takes two CPU processes
for two single ones, and wraps the forward pass in an autocast that this trainer does not want.

On several machines the ranks share nothing but output_dir and cache_dir: the config, the images and the model lie on
each, in one place or in several. `share` looks whether they do.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Unsupported, UserError, WriteError, tell
from xflux_trainer.files import TEMPORARY
from xflux_trainer.memory import CUDA_CONTEXT, GIB
from xflux_trainer.pulse import PULSE

PATIENCE = timedelta(hours=1)
"""How long a rank waits for another before it takes it for dead: samples and caches come in uneven shares."""
SIGHT = 60.0
"""Seconds after which a file that another machine wrote to a common disk is seen: NFS keeps a folder's list so long."""
_NO_STEP = 0xFFFF_FFF0
"""Slurm's steps from here on are its own (slurm.h): a batch script is no task, whatever SLURM_NTASKS says."""


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    use_cpu: bool = False
    deepspeed: bool = False
    fsdp: bool = False
    """FSDP's second version; the first is not done."""
    accumulation: int | None = None
    """The accelerate config's gradient_accumulation_steps, where it has one."""
    mixed_precision: str = ""
    """The accelerate config's, which DeepSpeed and this trainer take from the train config instead."""
    unsupported: tuple[str, str] | None = None
    """What was asked for and is not done here, and what to do instead."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Launch:
        def true(name: str) -> bool:
            return environ.get(name, "").strip().lower() in ("true", "1", "yes")

        world_size = int(environ.get("WORLD_SIZE", "1"))
        accumulation = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
        # Where a DeepSpeed file is named, accelerate takes neither accumulation nor precision from its own file.
        file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        precision = environ.get("ACCELERATE_MIXED_PRECISION", "").lower() if file in ("", "none") else ""
        accumulation = _from_deepspeed_file(file) or accumulation
        return cls(
            rank=int(environ.get("RANK", "0")),
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            world_size=world_size,
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", str(world_size))),
            use_cpu=true("ACCELERATE_USE_CPU"),
            deepspeed=true("ACCELERATE_USE_DEEPSPEED"),
            fsdp=true("ACCELERATE_USE_FSDP"),
            accumulation=int(accumulation) if accumulation.isdigit() and int(accumulation) > 0 else None,
            mixed_precision=precision,
            unsupported=_unsupported(environ, true),
        )


class Ranks:
    """This process among the others. All methods that talk must be called by every rank."""

    def __init__(self, launch: Launch) -> None:
        if launch.unsupported:
            raise Unsupported(*launch.unsupported)
        self.launch = launch
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.device = _device(launch)
        self._joined = False

    def join(self) -> None:
        """Meet the other processes."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.cuda.init()  # the memory's peaks cannot be reset before
        # DeepSpeed and FSDP want a process group even of one.
        if (self.world_size > 1 or self.launch.deepspeed or self.launch.fsdp) and not dist.is_initialized():
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "29500")
            os.environ.setdefault("LOCAL_RANK", str(self.launch.local_rank))  # DeepSpeed reads it again
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            with PULSE.during("join"), PULSE.waiting():
                dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=PATIENCE)
            self._joined = True

    def keep_within(self, gib: float | None) -> None:
        """Hold this process's allocator to what a card of so many GiB would leave it beside the CUDA context."""
        if gib is None or self.device.type != "cuda":
            return
        total = torch.cuda.get_device_properties(self.device).total_memory
        room = gib * GIB - CUDA_CONTEXT
        if room < total:
            torch.cuda.set_per_process_memory_fraction(max(0.0, room) / total, self.device)

    def leave(self) -> None:
        """Part from the others; every rank must come here."""
        if self._joined and dist.is_initialized():
            if self.device.type == "cpu":
                # torch 2.4 takes gloo down with the interpreter locked, and waits for a thread that may need the
                # interpreter to let go of the last tensor that was sent (seen once in ten runs): let it do so before.
                time.sleep(0.2)
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.main:
            print(text, flush=True)

    def say_own(self, text: str) -> None:
        """Print what concerns this rank alone, whichever it is."""
        print(text if self.main else f"rank {self.rank}: {text}", flush=True)

    def barrier(self) -> None:
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with PULSE.waiting():
            dist.all_gather_object(values, value)
        return values

    def share(self, folder: Path) -> None:
        """Raise on every rank where one on another machine does not see what rank 0 writes to the folder."""
        if self.world_size == self.launch.local_world_size:
            return
        (name, *_) = self.gather(f"{TEMPORARY}seen-{uuid.uuid4().hex}")
        self.together(lambda: _touch(folder / name) if self.main else None)
        seen = self.main or _appears(folder / name)
        where = f"Rank {self.rank} on {socket.gethostname()} does not see what rank 0 wrote to {folder.absolute()}."
        hint = "Put output_dir and cache_dir on a disk that all machines share, such as NFS or Lustre."
        try:
            self.agree(None if seen else UserError(where, hint))
        finally:
            if self.main:
                (folder / name).unlink(missing_ok=True)

    def total(self, values: list[float]) -> list[float]:
        """The sums over the ranks."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with PULSE.waiting():
            dist.all_reduce(tensor)
            return [float(value) for value in tensor.tolist()]

    def agree(self, error: UserError | None = None) -> None:
        """Raise on every rank when any has an error, so that no rank waits for one that has left.

        It is said before anybody leaves: the launcher ends the others as soon as one has, and taking the process group
        down can hang (gloo, torch 2.4).
        """
        for rank, other in enumerate(self.gather(error)):
            if other is not None:
                found = error if rank == self.rank and error is not None else other
                found.everywhere = True
                if self.launch.local_rank == 0:
                    tell(found)
                self.barrier()
                found.said = True
                raise found

    def together(self, work: Callable[[], None]) -> None:
        """Do what not every rank may be able to do; where one has an error, all raise it."""
        problem: UserError | None = None
        try:
            work()
        except UserError as error:
            problem = error
        self.agree(problem)

    def accumulation(self, config: TrainConfig) -> tuple[int, list[str]]:
        """Forward passes per optimizer step, and a note for every key that two files name and disagree about."""
        notes = []
        own, other = config.mixed_precision, self.launch.mixed_precision
        if other not in ("", own):
            notes.append(
                f"mixed_precision is {own}, as the train config says; the accelerate config's {other} is ignored."
            )
        steps, launched = config.gradient_accumulation_steps, self.launch.accumulation
        if launched not in (None, steps):
            name = "gradient_accumulation_steps"
            notes.append(f"{name} is {launched}, as the accelerate config says; the train config's {steps} is ignored.")
        return launched or steps, notes


def _unsupported(environ: Mapping[str, str], true: Callable[[str], bool]) -> tuple[str, str] | None:
    """What the launcher asks for that is not done here: one sentence of what, one of what instead."""
    asks = "The accelerate config asks for {}, which this trainer does not do."
    other = "Set distributed_type to MULTI_GPU, DEEPSPEED or FSDP."
    if true("ACCELERATE_USE_FSDP") and environ.get("FSDP_VERSION", "1") != "2":
        hint = "Set fsdp_version: 2 in fsdp_config (accelerate 1.6 or newer), or distributed_type to MULTI_GPU."
        return asks.format("the first version of FSDP"), hint
    if true("ACCELERATE_USE_MEGATRON_LM"):
        return asks.format("Megatron-LM"), other
    sizes = {
        name: environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")
        for name in ("dp_replicate_size", "tp_size", "cp_size", "sp_size")
    }
    odd = [f"{name} {size}" for name, size in sizes.items() if size not in ("1", "0", "", "None")]
    if true("ACCELERATE_USE_PARALLELISM_CONFIG") and odd:
        return asks.format(f"a parallelism_config with {', '.join(odd)}"), f"Take parallelism_config out. {other}"
    step, tasks = environ.get("SLURM_STEP_ID", ""), environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in environ and step.isdigit() and int(step) < _NO_STEP and tasks.isdigit() and int(tasks) > 1:
        # Each would train alone, all into one folder.
        seen = f"srun started {tasks} tasks of this step, and none of them has a RANK."
        return seen, "Start it by `srun xflux-doctor run …`, which names each, or by `srun torchrun …`."
    return None


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise WriteError(f"Cannot write {path}: {error.strerror}.", "Let it be written to.") from error


def _appears(path: Path) -> bool:
    until = time.monotonic() + SIGHT
    while time.monotonic() < until:
        # A list of the folder is what makes a network disk look again.
        if path.parent.is_dir() and path.name in os.listdir(path.parent):  # noqa: PTH208
            return True
        time.sleep(0.2)
    return False


def _from_deepspeed_file(name: str) -> str:
    """The file's gradient_accumulation_steps; a file that cannot be read is reported where it is used."""
    try:
        return str(json.loads(Path(name).read_text(encoding="utf-8"))["gradient_accumulation_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _device(launch: Launch) -> torch.device:
    if launch.use_cpu or not torch.cuda.is_available():
        if os.environ.get("CUDA_VISIBLE_DEVICES", "").strip() not in ("", "-1") and not launch.use_cpu:
            print("note: no CUDA device can be used, so the CPU computes", file=sys.stderr, flush=True)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if launch.local_rank >= count:
        raise Unsupported(
            f"Process {launch.local_rank} of {launch.local_world_size} finds only {count} GPU(s) here.",
            f"Set num_processes to {count} in the accelerate config.",
        )
    return torch.device("cuda", launch.local_rank)
