"""Run in a stack's interpreter: really launch every case of a JSON file, and write what each rank saw.

`python launch_probe.py CASES.json OUT`: a case is {name, text, argv, environment}; `argv` begins with the launcher. One
process imports the launchers once and forks for each case, because their import takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

RANK = """\
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT",
         "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION")
seen = {name: os.environ.get(name) for name in names}
open(f"rank-{os.getpid()}.json", "w").write(json.dumps(seen))
"""
_SECONDS = 60


def launch(argv: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run

    if argv[0] == "torchrun":
        run.main(["--monitor-interval", "0.1", *argv[1:]])
    else:
        launch_command(launch_command_parser().parse_args(["--monitor_interval", "0.1", *argv[2:]]))


def forked(case: dict[str, Any], folder: Path) -> int:
    """The case in a child of its own, ended after a deadline with everything that it started."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.alarm(_SECONDS)
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", **case["environment"]}
    error = ""
    try:
        launch(case["argv"])
    except BaseException as caught:  # noqa: BLE001 - whatever it says is the answer
        error = f"{type(caught).__name__}: {caught}"
    Path("end.json").write_text(json.dumps(error))
    os._exit(0)


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    import accelerate.commands.launch
    import torch.distributed.run  # noqa: F401 - imported once, here

    for case in cases:
        nodes = []
        for node, argv in enumerate(case["nodes"]):
            folder = out / case["name"] / str(node)
            folder.mkdir(parents=True)
            (folder / "accelerate_config.yaml").write_text(case["text"])
            (folder / "train.py").write_text(RANK)
            nodes.append(forked({**case, "argv": argv}, folder))
        for child in nodes:
            os.waitpid(child, 0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
    print("accelerate", accelerate.__version__)


main()
