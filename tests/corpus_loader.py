"""What the installed accelerate makes of files: run as a child, paths on stdin, one JSON object on stdout.

Two devices are faked, in torch only. Each file goes through accelerate's own loader, its launch command's own
checks, the environment that its launcher builds, and for FSDP the plugin that the ranks build from that.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any


def main() -> None:
    import torch

    torch.cuda.device_count = lambda: 2
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    warnings.simplefilter("ignore")
    print(json.dumps({path: look(path) for path in sys.stdin.read().splitlines()}))


def look(path: str) -> dict[str, Any]:
    """{error} or {args}: every launch flag as it would be."""
    before = dict(os.environ)
    try:
        args = launched(path)
        given = {key: value if isinstance(value, str | int | float) or value is None else str(value)
                 for key, value in vars(args).items()}  # fmt: skip
        ranks(args)
    except Exception as error:  # noqa: BLE001 - whatever accelerate raises is the answer
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {"args": given}


def launched(path: str) -> Namespace:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    load_config_from_file(path)
    args = launch_command_parser().parse_args(["--config_file", path, "train.py"])
    checked: Namespace = _validate_launch_command(args)[0]
    return checked


def ranks(args: Namespace) -> None:
    """What the launcher hands to the ranks; raises what it or they would raise. Needs no port and no mpirun."""
    from accelerate.utils import launch

    launch.is_port_in_use = lambda port: bool(port) and int(port) < 0  # ports of this machine are no part of a file
    launch._get_mpirun_args = lambda: ("mpirun", "--hostfile", "-n", "--npernode", "--bind-to")[: _mpirun_words(launch)]
    if args.use_deepspeed or args.tpu:
        return
    if args.use_fsdp or args.multi_gpu or args.use_megatron_lm:
        environment = launch.prepare_multi_gpu_env(args)
    else:
        environment = launch.prepare_simple_launcher_cmd_env(args)[1]
    for name, value in environment.items():
        if not isinstance(value, str) and not (args.use_fsdp or args.multi_gpu):
            raise TypeError(f"expected str, bytes or os.PathLike object, not {type(value).__name__} ({name})")
        os.environ[name] = str(value)
    if args.use_fsdp:
        from accelerate.utils import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
        if args.fsdp_auto_wrap_policy == "SIZE_BASED_WRAP":
            plugin.set_auto_wrap_policy(None)
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG"):
        from accelerate.parallelism_config import ParallelismConfig

        total = ParallelismConfig().total_size
        if total not in (1, int(args.num_processes)):
            raise ValueError(f"total_size ({total}) does not match num_processes ({args.num_processes})")


def _mpirun_words(launch: Any) -> int:
    return 5 if "bind_to" in Path(launch.__file__).read_text() else 4


if __name__ == "__main__":
    main()
