"""Run in a stack's interpreter: what the installed accelerate makes of each file, by its own functions, as JSON.

`python accelerate_env.py FILE…` prints {FILE: {cmd, env, each, where, backend, same_network}} or {FILE: {error}}, and
what DeepSpeed's runner makes of the host file `None`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import launch
from deepspeed.launcher.runner import fetch_hostfile


def asked(file: str) -> dict[str, Any]:
    args = launch_command_parser().parse_args(["--config_file", file, "script.py"])
    args, _, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""
    cmd = None
    try:
        if args.use_deepspeed:
            cmd, env = launch.prepare_deepspeed_cmd_env(args)
        elif args.multi_gpu or args.use_fsdp:  # as launch_command chooses
            env = launch.prepare_multi_gpu_env(args)
        else:
            cmd, env = launch.prepare_simple_launcher_cmd_env(args)
    except Exception as error:  # noqa: BLE001 - whatever it says is the answer
        return {"error": f"{type(error).__name__}: {error}"}
    return {"cmd": cmd, "env": env, "each": getattr(args, "nproc_per_node", None),
            "where": getattr(args, "rdzv_endpoint", None), "backend": args.rdzv_backend,
            "same_network": args.same_network}  # fmt: skip


print(json.dumps({**{file: asked(file) for file in sys.argv[1:]}, "hostfile": fetch_hostfile("None")}))
