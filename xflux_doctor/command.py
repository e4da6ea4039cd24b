"""A launch command as a person types it, read for what it says about the job. Pure.

`accelerate launch`, `torchrun` and `deepspeed` are read, with variables and `nohup`, `sudo -E` and their like in front,
`python -m` forms, and a redirection or pipe behind. Flags win over accelerate's file, but for the keys of a section
before accelerate 1.5, where the file wins.

Source: accelerate 0.30.1 and 1.15.0, commands/launch.py (`launch_command_parser`, `_validate_launch_command`);
1.4.0 and 1.5.2 for the change of the sections' precedence; pytorch v2.13.0, torch/distributed/run.py; DeepSpeed
v0.14.4, launcher/runner.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from packaging.version import Version

from xflux_doctor import shellwords
from xflux_doctor.errors import UsageError

FLAGS_WIN = Version("1.5.0")
"""First accelerate in which a flag wins over the same key of a section of the file (read in 1.4.0 and 1.5.2)."""
_SWITCHES = frozenset(
    "quiet q cpu multi_gpu tpu ipex enable_cpu_affinity dynamo_use_fullgraph dynamo_use_dynamic use_deepspeed use_fsdp "
    "use_parallelism_config use_megatron_lm use_xpu use_mps_device same_network m module no_python tpu_cluster "
    "no_tpu_cluster tpu_use_sudo downcast_bf16 fp8_use_autocast_during_eval dynamo_use_regional_compilation debug "
    # torchrun
    "standalone run_path virtual_local_rank use_env "
    # deepspeed
    "no_local_rank force_multi elastic_training save_pid bind_cores_to_rank no_ssh no_ssh_check".split()
)
"""Flags without a value."""
_WHOLE = {"num_processes", "num_machines", "machine_rank", "main_process_port"}
_TEXT = {"gpu_ids", "main_process_ip", "mixed_precision", "rdzv_backend"}
_KINDS = {"multi_gpu": "MULTI_GPU", "use_deepspeed": "DEEPSPEED", "use_fsdp": "FSDP", "tpu": "XLA",
          "use_megatron_lm": "MEGATRON_LM"}  # fmt: skip
_SECTIONS = {"fsdp_": "fsdp_config", "megatron_lm_": "megatron_lm_config", "dynamo_": "dynamo_config",
             "fp8_": "fp8_config", "parallelism_config_": "parallelism_config"}  # fmt: skip
_DEEPSPEED = frozenset(
    "deepspeed_config_file zero_stage offload_optimizer_device offload_param_device offload_optimizer_nvme_path "
    "offload_param_nvme_path gradient_accumulation_steps gradient_clipping zero3_init_flag zero3_save_16bit_model "
    "deepspeed_hostfile deepspeed_exclusion_filter deepspeed_inclusion_filter deepspeed_multinode_launcher "
    "deepspeed_moe_layer_cls_names".split()
)
_ALONE = frozenset("config_file num_cpu_threads_per_process dynamo_backend dynamo_mode tee t role rdzv_conf "
                   "max_restarts monitor_interval vm env main_training_function mpirun_hostfile mpirun_ccl log_dir "
                   "aws_access_key_id aws_secret_access_key".split())  # fmt: skip
_MODULES = {"accelerate.commands.launch": "accelerate", "torch.distributed.run": "torchrun",
            "torch.distributed.launch": "torchrun", "deepspeed.launcher.runner": "deepspeed"}  # fmt: skip
_TORCHRUN = frozenset("nproc_per_node nnodes node_rank master_addr master_port rdzv_endpoint rdzv_backend rdzv_id "
                      "rdzv_conf max_restarts monitor_interval start_method role log_dir r redirects t tee "
                      "local_ranks_filter local_addr logs_specs event_log_handler duplicate_stdout_filters "
                      "duplicate_stderr_filters numa_binding signals_to_handle shutdown_timeout".split())  # fmt: skip
_RUNNER = frozenset("num_gpus num_nodes include i exclude e hostfile H master_port master_addr launcher launcher_args "
                    "node_rank autotuning enable_each_rank_log bind_core_list min_elastic_nodes max_elastic_nodes "
                    "venv_script ssh_port num_accelerators log_level".split())  # fmt: skip


_BEFORE: dict[str, tuple[str, ...]] = {
    "nohup": (), "time": (), "exec": (), "env": (), "sudo": ("-u", "-g", "-h", "-C"),
    "nice": ("-n",), "timeout": ("-k", "-s"),
}  # fmt: skip
"""Programs that start the command after them as it is, and their flags with a value."""


@dataclass(frozen=True)
class Command:
    """What the command says. `words` are its own, as written, to be written again with other values."""

    words: tuple[str, ...]
    launcher: str
    """accelerate, torchrun or deepspeed."""
    flags: dict[str, str | bool]
    """By name without dashes, `-` as `_`; a flag without a value is True."""
    environment: dict[str, str]
    """Variables set in front."""
    script: str = ""
    arguments: tuple[str, ...] = ()
    """The script's own."""
    span: tuple[int, int] = (0, 0)
    """Where the launcher's flags are among the words."""
    tail: str = ""
    """What follows the command in its line: a redirection, a pipe, `&`."""

    def __str__(self) -> str:
        """As it can be pasted into a shell."""
        return " ".join([*self.words, self.tail] if self.tail else self.words)

    @property
    def config_file(self) -> str | None:
        value = self.flags.get("config_file")
        return _at_home(value) if isinstance(value, str) and self.launcher == "accelerate" else None

    @property
    def training_file(self) -> str | None:
        """What follows the script's `--config`, as X-Flux's scripts and the bundled trainer take it."""
        for at, word in enumerate(self.arguments):
            if word == "--config" and at + 1 < len(self.arguments):
                return _at_home(self.arguments[at + 1])
            if word.startswith("--config="):
                return word.partition("=")[2]
        return None

    def rewritten(self, flag: str, value: object) -> Command:
        """The same command with another value of a flag that it has."""
        pattern = re.compile(rf"(--?{flag.replace('_', '[-_]')})(?:=.*)?$")
        words, (start, end) = list(self.words), self.span
        for at in range(start, end):
            match = pattern.match(shellwords.value(words[at]))
            if match and "=" in words[at]:
                words[at] = f"{match[1]}={shlex.quote(str(value))}"
            elif match and at + 1 < end:
                words[at + 1] = shlex.quote(str(value))
        return dataclasses.replace(self, words=tuple(words))

    def without(self, flag: str) -> Command:
        """The same command without a flag that has no value."""
        names, (start, end) = (f"--{flag}", f"--{flag.replace('_', '-')}"), self.span
        kept = [word for at, word in enumerate(self.words) if not start <= at < end or word not in names]
        span = (start, end - len(self.words) + len(kept))
        return dataclasses.replace(self, words=tuple(kept), span=span)

    @property
    def named(self) -> dict[str, str]:
        """{key of accelerate's file: the flag that sets it}, for the flags that hold one number or word."""
        same = {name: name for name in self.flags if name in _WHOLE | _TEXT}
        others = {"torchrun": {"nproc_per_node": "num_processes"}, "deepspeed": {"num_gpus": "num_processes"}}
        return same | {key: flag for flag, key in others.get(self.launcher, {}).items() if flag in self.flags}

    def overrides(self, file: dict[str, Any], version: Version | None) -> dict[str, tuple[Any, str]]:
        """{key of accelerate's file: (value, the flag)}: what is launched in place of what `file` says."""
        if self.launcher == "torchrun":
            return self._torchrun()
        if self.launcher == "deepspeed":
            return self._deepspeed()
        found: dict[str, tuple[Any, str]] = {}
        sections: dict[str, dict[str, Any]] = {}
        for name, value in self.flags.items():
            if name in _WHOLE:
                found[name] = (_number(name, value), f"--{name}")
            elif name in _TEXT:
                found[name] = (value, f"--{name}")
            elif name in _KINDS:
                found["distributed_type"] = (_KINDS[name], f"--{name}")
            elif name == "cpu":  # no launcher of ranks is taken then, whatever the file says
                found |= {"use_cpu": (True, "--cpu"), "distributed_type": ("NO", "--cpu")}
            elif (section := _section(name)) and isinstance(value, str):
                sections.setdefault(section, {})[name] = _scalar(value)
        for section, flags in sections.items():
            own = file.get(section)
            own = own if isinstance(own, dict) else {}
            wins = version is None or version >= FLAGS_WIN
            merged = {**own, **flags} if wins else {**flags, **own}
            if merged != own:
                found[section] = (merged, ", ".join(f"--{name}" for name in flags))
        return found

    def _torchrun(self) -> dict[str, tuple[Any, str]]:
        machines = _number("nnodes", str(self.flags.get("nnodes", "1")).split(":")[0])
        found: dict[str, tuple[Any, str]] = {"distributed_type": ("MULTI_GPU", "torchrun"),
                                             "num_machines": (machines, "--nnodes")}  # fmt: skip
        each = str(self.flags.get("nproc_per_node", "1"))
        if each not in ("auto", "gpu", "cpu", "xpu"):
            found["num_processes"] = (_number("nproc_per_node", each) * machines, "--nproc_per_node")
        if "node_rank" in self.flags:
            found["machine_rank"] = (_number("node_rank", self.flags["node_rank"]), "--node_rank")
        endpoint = re.fullmatch(r"(\[.*\]|[^:]*)(?::(.*))?", str(self.flags.get("rdzv_endpoint", "")))
        host, port = (endpoint[1].strip("[]"), endpoint[2]) if endpoint else ("", "")
        for key, value, flag in (
            ("main_process_ip", host or self.flags.get("master_addr"), "rdzv_endpoint" if host else "master_addr"),
            ("main_process_port", port or self.flags.get("master_port"), "rdzv_endpoint" if port else "master_port"),
        ):
            if value:
                found[key] = (_number(flag, value) if key.endswith("port") else value, f"--{flag}")
        if machines > 1 and "main_process_ip" not in found:
            found["main_process_ip"] = ("127.0.0.1", "torchrun, without --master_addr")
        if self.flags.get("standalone"):
            found["main_process_port"] = (0, "--standalone")
        return found

    def _deepspeed(self) -> dict[str, tuple[Any, str]]:
        found: dict[str, tuple[Any, str]] = {"distributed_type": ("MULTI_GPU", "deepspeed")}
        include = re.search(r"localhost:([\d,]+)", str(self.flags.get("include", self.flags.get("i", ""))))
        if include:
            found["gpu_ids"] = (include[1], "--include")
            found["num_processes"] = (len(include[1].split(",")), "--include")
        elif self.flags.get("num_gpus", "-1") != "-1":  # its own word for all of them
            found["num_processes"] = (_number("num_gpus", self.flags["num_gpus"]), "--num_gpus")
        if "master_port" in self.flags:
            found["main_process_port"] = (_number("master_port", self.flags["master_port"]), "--master_port")
        return found


def parse(text: str) -> Command:
    """Read a command. Raises UsageError where it is no launch, or has a flag that the launcher does not know."""
    try:
        raw, tail = shellwords.split(text)
        words = [shellwords.value(word) for word in raw]
    except ValueError as error:
        raise UsageError(f"--launch cannot be read: {error}.", "Quote the whole command once.") from error
    launcher, environment, rest = _launcher(words, text)
    start = len(words) - len(rest)
    flags: dict[str, str | bool] = {}
    while rest and rest[0].startswith("-") and rest[0] != "--":
        word = rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_") if word.startswith("--") else name
        _known(name, launcher, word)
        if name in _SWITCHES:
            flags[name] = True
        elif equals:
            flags[name] = value
        elif rest:
            flags[name] = rest.pop(0)
        else:
            raise UsageError(f"{word} has no value in the command of --launch.", "Complete the command.")
    span = (start, len(words) - len(rest))
    for word in raw[: span[1]]:
        if re.search(r"[$`]", re.sub(r"'[^']*'|\\.", "", word)):
            hint = "Write the value, or put the whole command in double quotes, so that your shell does."
            raise UsageError(f"{word} in the command of --launch is for a shell to fill in.", hint)
    rest = rest[1:] if rest[:1] == ["--"] else rest
    return Command(raw, launcher, flags, environment, rest[0] if rest else "", tuple(rest[1:]), span, tail)


def _launcher(words: list[str], text: str) -> tuple[str, dict[str, str], list[str]]:
    """(The launcher, the variables set in front of it, its own words)."""
    rest, environment = list(words), dict[str, str]()
    while rest:
        name = PurePath(rest[0]).name
        assigned = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", rest[0], re.DOTALL)
        if assigned:
            environment[assigned[1]] = assigned[2]
            rest = rest[1:]
        elif name in _BEFORE:
            at = 1
            while at < len(rest) and rest[at].startswith("-"):
                at += 2 if rest[at] in _BEFORE[name] else 1
            kept = any("E" in flag or flag == "--preserve-env" for flag in rest[1:at])
            if (name == "env" and at > 1) or (name == "sudo" and not kept):
                break  # the ranks would not see this environment
            rest = rest[at + (name == "timeout") :]
        else:
            break
    found = _named(rest)
    if found is not None:
        return found[0], environment, found[1]
    hint = (
        "Give the line that starts the training: 'accelerate launch …', 'torchrun …' or 'deepspeed …'; leave out what "
        "stands before it, such as srun or cd."
    )
    raise UsageError(f"--launch is no launch command: {text[:60]!r}.", hint)


def _named(words: list[str]) -> tuple[str, list[str]] | None:
    """The launcher that the words begin with, and those after it."""
    name = PurePath(words[0]).name if words else ""
    if re.fullmatch(r"python[\d.]*", name):
        rest = words[1:]
        while rest and re.fullmatch(r"-[bBdEiIOqsSuvx]+", rest[0]):  # python's own switches without a value
            rest = rest[1:]
        return (_MODULES[rest[1]], rest[2:]) if len(rest) > 1 and rest[0] == "-m" and rest[1] in _MODULES else None
    if name == "accelerate" and words[1:2] == ["launch"]:
        return "accelerate", words[2:]
    return (name.partition("-")[0], words[1:]) if name in ("accelerate-launch", "torchrun", "deepspeed") else None


def _known(name: str, launcher: str, word: str) -> None:
    own = {"accelerate": _WHOLE | _TEXT | set(_KINDS) | _DEEPSPEED | _ALONE, "torchrun": _TORCHRUN,
           "deepspeed": _RUNNER}[launcher]  # fmt: skip
    if name in own or name in _SWITCHES or (launcher == "accelerate" and _section(name)):
        return
    near = difflib.get_close_matches(name, sorted(own), n=1)
    hint = f"Did you mean --{near[0]}?" if near else "Remove it, or see the launcher's --help."
    raise UsageError(f"{launcher} has no flag {word.partition('=')[0]}.", hint)


def _at_home(path: str) -> str:
    """The shell has not expanded what was quoted as a whole for --launch."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises for a user without a home


def _section(name: str) -> str:
    if name in _DEEPSPEED:
        return "deepspeed_config"
    return next((section for prefix, section in _SECTIONS.items() if name.startswith(prefix)), "")


def _number(name: str, value: object) -> int:
    """Raises UsageError where the launcher would stop at it, or could start nothing with it."""
    least, most = (0, 65535) if name.endswith(("port", "endpoint")) else (0 if name.endswith("rank") else 1, 1 << 20)
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if not least <= number <= most:
        hint = (
            f"Give a whole number of {least} to {most}." if most < 1 << 20 else f"Give a whole number from {least} on."
        )
        raise UsageError(f"--{name} is {value!r} in the command of --launch.", hint)
    return number


def _scalar(value: str) -> str | int | float | bool:
    """As the file would say it."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
