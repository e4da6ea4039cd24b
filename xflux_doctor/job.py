"""The job as its files describe it: the training file and accelerate's file, read and not judged.

A file that cannot be read is a problem in the job, which a check turns into a finding; only a path that was
named and does not exist is a usage error.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec
import yaml
from xflux_trainer.config import ConfigError, TrainConfig, load_with_notes

from xflux_doctor import deepspeed_file
from xflux_doctor.errors import UsageError
from xflux_doctor.xflux_scripts import nearby

if TYPE_CHECKING:  # for jobs that have one: most starts do without
    from xflux_doctor.command import Command
    from xflux_doctor.xflux import XFlux

TRAIN_NAMES = ("train.yaml", "train_config.yaml")
ACCELERATE_NAMES = ("accelerate_config.yaml", "accelerate.yaml")
_LARGEST = 1 << 20
"""A configuration file over 1 MiB is some other file."""


class Problem(msgspec.Struct, frozen=True):
    """One reason why a file of the job cannot be used."""

    file: str
    seen: str
    hint: str


class Override(msgspec.Struct, frozen=True):
    """A value that wins over accelerate's file, and what it comes from: `--num_processes`, `SLURM_NNODES` …"""

    value: Any
    source: str


class Job(msgspec.Struct, frozen=True, dict=True):
    """What would be trained, and how it would be launched."""

    train_path: Path | None = None
    train: TrainConfig | None = None
    notes: tuple[str, ...] = ()
    accelerate_path: Path | None = None
    accelerate: dict[str, Any] | None = None
    accelerate_text: str = ""
    problems: tuple[Problem, ...] = ()
    deepspeed_path: Path | None = None
    """The file that deepspeed_config.deepspeed_config_file names."""
    zero_file: dict[str, Any] | None = None
    """Its values."""
    zero_text: str = ""
    overrides: Mapping[str, Override] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Keys of accelerate's file that a flag of the launch command, Slurm or torchrun sets instead."""
    command: Command | None = None
    """The launch command that `--launch` gave."""
    launcher: str = ""
    """Who starts the ranks where that is not accelerate's file's choice: `torchrun` or `deepspeed`, by --launch."""
    cpu: bool = False
    """`--cpu` was given."""
    gpu_limit: int | None = None
    """Bytes per GPU that this job may use, by `--gpu-limit`, else by the training file's gpu_limit_gib."""
    offline: bool = False
    """`--offline` was given: nothing may be fetched."""
    xflux: XFlux | None = None
    """The X-Flux checkout whose own script runs this job, by `--xflux`; `train` is then None."""
    xflux_nearby: str = ""
    """The X-Flux checkout that the training file lies in, when `--xflux` was not given."""

    def get(self, key: str, default: Any = None) -> Any:
        """A top-level key of the accelerate file, or what is launched in its place."""
        if key in self.overrides:
            return self.overrides[key].value
        return (self.accelerate or {}).get(key, default)

    def source(self, key: str) -> str:
        """Who says so: the flag or variable that overrides the key, else empty."""
        return self.overrides[key].source if key in self.overrides else ""

    @property
    def bundled(self) -> bool:
        """Whether the bundled trainer runs this job."""
        return self.train is not None and self.xflux is None

    @property
    def quanto(self) -> bool:
        """Whether the bundled trainer quantises the base by optimum-quanto (trainer/quantize.py, PACKAGES)."""
        return self.train is not None and self.bundled and self.train.quantization in ("int8", "int4", "fp8")

    def training(self, key: str) -> Any:
        """A value of the training file, ours or X-Flux's; None where it is not known."""
        if self.xflux is not None:
            return self.xflux.data.get(key) if key == "train_batch_size" else self.xflux.get(key)
        return getattr(self.train, key, None)

    def section(self, name: str) -> dict[str, Any]:
        value = self.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def use_cpu(self) -> bool:
        return self.cpu or self.get("use_cpu") is True

    @functools.cached_property
    def distributed_type(self) -> str:
        """Upper case, as accelerate spells it; a bare YAML `NO` was read as False."""
        value = self.get("distributed_type", "NO")
        if isinstance(value, list | dict):  # no word; written out, aliases in it could be millions
            return type(value).__name__.upper()
        return "NO" if value is False else str(value).upper()

    @property
    def num_machines(self) -> int:
        return _whole(self.get("num_machines"), 1)

    @property
    def machine_rank(self) -> int:
        return _whole(self.get("machine_rank"), 0)

    @property
    def num_processes(self) -> int:
        """Ranks over all machines. accelerate starts one process for NO whatever the file says."""
        if self.distributed_type == "NO":
            return 1
        return _whole(self.get("num_processes"), 1)

    @property
    def local_processes(self) -> int:
        """Ranks on this machine."""
        return max(1, self.num_processes // max(1, self.num_machines))

    @property
    def gpu_ids(self) -> str | None:
        value = self.get("gpu_ids")
        return None if value is None else str(value).strip()

    @property
    def main_process_port(self) -> int:
        """Where the ranks meet; 0 lets the launcher choose. Source: accelerate's `--main_process_port`."""
        return _whole(self.get("main_process_port"), 29500)

    @property
    def compiled_ops(self) -> tuple[str, ...]:
        """Operators that DeepSpeed compiles on first use for this job.

        accelerate takes DeepSpeedCPUAdam where the optimizer is offloaded (0.30.1 and 1.15.0, accelerator.py,
        `_prepare_deepspeed`); NVMe offload needs async_io as well.
        """
        if not self.deepspeed or self.bundled:  # which steps on the host with torch's AdamW (trainer/sharded.py)
            return ()
        optimizer, param = self.offload_device("optimizer"), self.offload_device("param")
        devices = {optimizer, param}
        adam = ("cpu_adam",) if optimizer in ("cpu", "nvme") else ()
        return (*adam, "async_io") if "nvme" in devices else adam

    def offload_device(self, what: str) -> str:
        """Where the optimizer's states (`optimizer`) or the weights (`param`) are kept: none, cpu or nvme."""
        inline = self.section("deepspeed_config").get(f"offload_{what}_device", "none")
        if self.zero_file is None:
            return "none" if inline is None else str(inline).lower()
        block = self.zero_block.get(f"offload_{what}")
        if self.bundled and not block:  # trainer/zero_settings.py: the older name, then what accelerate was told
            older = self.zero_block.get("cpu_offload" if what == "optimizer" else "cpu_offload_param")
            return "cpu" if older else "none" if inline is None else str(inline).lower()
        named = block.get("device", "none") if isinstance(block, dict) else "none"
        return "none" if named in (None, "auto") and self.bundled else str(named).lower()

    @property
    def offloads(self) -> tuple[str, ...]:
        """What the bundled trainer keeps in the host's memory: `optimizer`, `param` (weights that are cut up)."""
        if self.distributed_type == "FSDP":
            offload = self.fsdp.get("fsdp_offload_params", ("", False))[1]
            return ("optimizer", "param") if str(offload).lower() == "true" else ()
        if not self.deepspeed:
            return ()
        found = [what for what in ("optimizer", "param") if self.offload_device(what) == "cpu"]
        return tuple(what for what in found if what == "optimizer" or self.zero_stage == 3)

    @property
    def fsdp(self) -> dict[str, tuple[str, Any]]:
        """{flag of accelerate launch: (key as the file writes it, value)} of fsdp_config, as releases with FSDP2 read
        it (accelerate_sections.flag_of)."""
        return {
            key if key.startswith("fsdp") else f"fsdp_{key}": (key, value)
            for key, value in ((str(key), value) for key, value in self.section("fsdp_config").items())
        }

    @property
    def fsdp_version(self) -> int:
        """1 where the file names none, as accelerate takes it."""
        return _whole(self.fsdp.get("fsdp_version", ("", 1))[1], 1)

    @property
    def zero_block(self) -> dict[str, Any]:
        """zero_optimization of DeepSpeed's file, which is all that counts where there is one."""
        block = (self.zero_file or {}).get("zero_optimization")
        return block if isinstance(block, dict) else {}

    @property
    def deepspeed(self) -> bool:
        return self.distributed_type == "DEEPSPEED"

    @property
    def zero_stage(self) -> int:
        if self.zero_file is not None:  # accelerate fills "auto" by 2; DeepSpeed's own default is 0
            inline = self.section("deepspeed_config").get("zero_stage", 2)
            stage = self.zero_block.get("stage", inline if self.bundled else 0)  # trainer/zero_settings.py
            return _whole(stage, 2 if stage == "auto" else 0)
        return _whole(self.section("deepspeed_config").get("zero_stage"), 2)

    @functools.cached_property
    def strategy(self) -> str:
        """`single`, `ddp`, `zero0` … `zero3` or `fsdp`: how the ranks share the work."""
        if self.deepspeed:
            return f"zero{self.zero_stage}"
        if self.distributed_type == "FSDP":
            return "fsdp"
        return "ddp" if self.num_processes > 1 else "single"


def _whole(value: Any, default: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return default
    try:
        return int(value)
    except ValueError:
        return default


def read(
    train: str | None,
    accelerate: str | None,
    *,
    folder: Path,
    default_accelerate: str = "",
    cpu: bool = False,
    gpu_limit: int | None = None,
    offline: bool = False,
    xflux: str | None = None,
    environment: Mapping[str, str] | None = None,
    command: Command | None = None,
) -> Job:
    """Read the job's files, found where people keep them when they are not named.

    With `xflux` the training file is X-Flux's own script's, not the bundled trainer's, and only that is read of it;
    `environment` are the variables which that script would see. Under a launch `command` no file is looked for here:
    accelerate takes the one that it names, else its default. Raises UsageError when a named path does not exist.
    """
    train_path = _find(train, TRAIN_NAMES, folder, "training file", "--config")
    usual = ACCELERATE_NAMES if command is None else ()
    accelerate_path = _find(accelerate, usual, folder, "accelerate file", "--accelerate-config")
    if accelerate_path is None and default_accelerate:
        accelerate_path = Path(default_accelerate)
    problems: list[Problem] = []
    checkout = _checkout(xflux, train_path, environment) if xflux is not None else None
    around = nearby(train_path) if checkout is None else None
    config, notes = _read_train(None if checkout else train_path, problems)
    text, mapping = _read_accelerate(accelerate_path, problems)
    zero = deepspeed_file.read(mapping, checkout.root if checkout else folder, accelerate_path)
    if zero is not None and zero.seen:
        problems.append(Problem("deepspeed", zero.seen, zero.hint))
    return Job(
        train_path=train_path,
        train=config,
        notes=notes,
        accelerate_path=accelerate_path,
        accelerate=mapping,
        accelerate_text=text,
        problems=tuple(problems),
        deepspeed_path=zero.path if zero else None,
        zero_file=zero.values if zero else None,
        zero_text=zero.text if zero else "",
        command=command,
        cpu=cpu,
        gpu_limit=gpu_limit or _own_limit(config),
        offline=offline,
        xflux=checkout,
        xflux_nearby=str(around or ""),
    )


def _checkout(named: str, train: Path | None, environment: Mapping[str, str] | None) -> XFlux:
    found: XFlux = importlib.import_module("xflux_doctor.xflux").read(named, train, environment)
    return found


def _find(named: str | None, usual: tuple[str, ...], folder: Path, what: str, flag: str) -> Path | None:
    if named is not None:
        path = Path(named)
        if not path.exists():
            raise UsageError(f"There is no {what} at {named}.", f"Check the path given to {flag}.")
        if path.is_dir():
            raise UsageError(f"{named} is a folder.", f"Give {flag} a file.")
        if not path.is_file():
            raise UsageError(f"{named} is a device or a pipe.", f"Give {flag} a file, which can be read twice.")
        return path
    return next((folder / name for name in usual if (folder / name).is_file()), None)


def _own_limit(config: TrainConfig | None) -> int | None:
    return int(config.gpu_limit_gib * (1 << 30)) if config is not None and config.gpu_limit_gib else None


def _read_train(path: Path | None, problems: list[Problem]) -> tuple[TrainConfig | None, tuple[str, ...]]:
    if path is None:
        return None, ()
    try:
        config, notes = load_with_notes(path)
    except ConfigError as error:
        problems += [
            Problem("train", f"{path}: {p.key} {p.seen}" if p.key else f"{path} {p.seen}", p.hint)
            for p in error.problems
        ]
        return None, ()
    return config, tuple(notes)


def _read_accelerate(path: Path | None, problems: list[Problem]) -> tuple[str, dict[str, Any] | None]:
    if path is None:
        return "", None
    try:
        text, mapping = _parse(path)
    except _Unreadable as error:
        problems.append(Problem("accelerate", error.seen, error.hint))
        return "", None
    return text, mapping


class _Unreadable(Exception):
    def __init__(self, seen: str, hint: str) -> None:
        self.seen, self.hint = seen, hint
        super().__init__(seen)


def _parse(path: Path) -> tuple[str, dict[str, Any]]:
    new = "Write it anew with `accelerate config`, or copy the example in the README."
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise _Unreadable(f"{path} holds {size} bytes; that is no configuration file", "Name another file.")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        hint = "Give yourself read permission, or name another file."
        raise _Unreadable(f"{path} cannot be read: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        if b"\0" in error.object:
            raise _Unreadable(f"{path} is binary, not text", "Name accelerate's YAML file.") from error
        line = error.object.count(b"\n", 0, error.start) + 1
        raise _Unreadable(f"{path} is not UTF-8 text (line {line})", "Save it as UTF-8.") from error
    if "\0" in text:
        raise _Unreadable(f"{path} is binary, not text", "Name accelerate's YAML file.")
    try:
        mapping = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise _Unreadable(f"{path} is not YAML: {_place(error, text)}", "Repair that line.") from error
    if mapping is None:
        raise _Unreadable(f"{path} is empty", new)
    if not isinstance(mapping, dict):
        raise _Unreadable(f"{path} holds {type(mapping).__name__}, not keys and values", new)
    return text, mapping


def _place(error: Exception, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).replace("\n", " ")
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return f"line {mark.line + 1} is indented with a tab; YAML takes only spaces"
    return f"line {mark.line + 1}: {getattr(error, 'problem', None) or 'cannot be parsed'}"
