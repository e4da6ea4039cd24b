"""Stands in for the interpreter under test: runs the probe that it is given, with the fault of $FAULT in it.

    fault_rank.py -c START PROBE BACKEND RANK WORLD …      (as the runner calls an interpreter)

The probe itself knows nothing of faults: its file is imported by its path and patched here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from typing import Any


def here() -> None:
    """A rank hangs in Python, under this name."""
    time.sleep(600)


def strike(kind: str) -> None:
    """What befalls the rank at its stage."""
    if kind == "hang":
        here()
    elif kind in ("kill", "stop", "segv"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segv": signal.SIGSEGV}[kind])


def sicken(dist: Any, name: str, dtype: str, *, giver: bool) -> None:
    """The collective's result is off by one at this rank; or what it gives is, for everybody."""
    true = getattr(dist, name)

    def off(tensor: Any) -> None:
        if tensor.numel() > 1 and str(tensor.dtype).endswith(dtype):
            tensor.add_(1)

    def sick(first: Any, *rest: Any, **more: Any) -> Any:
        if giver:
            off(rest[0] if name == "all_gather" else first)
            return true(first, *rest, **more)
        result = true(first, *rest, **more)
        off(first[0] if name == "all_gather" else first)
        return result

    setattr(dist, name, sick)


def patch(probe: Any, fault: dict[str, Any]) -> None:
    true = probe.Report.say
    kind = fault["kind"]

    def say(self: Any, **values: Any) -> None:
        if kind == "garbage":
            os.write(1, b'\xff\xfe{"stage": [1, 2], "rank": {}} {"x":\n[3]\n"s"\nno newline at the end: {')
        true(self, **values)
        reached = values.get("stage", "start" if self.state["steps"] == 1 else "")
        if reached == "import" and kind == "version":
            import torch

            torch.__version__ = "9.9.9"
        if reached == "rendezvous" and kind in ("wrong", "gives"):
            import torch.distributed as dist

            for name in fault["names"]:
                sicken(dist, name, fault["dtype"], giver=kind == "gives")
        if reached == fault.get("stage"):
            if kind == "command":
                subprocess.run(fault["command"], check=True)
            strike(kind)

    probe.Report.say = say


def main() -> None:
    fault = json.loads(os.environ["FAULT"])
    path, *arguments = sys.argv[3:]
    if not path.endswith("allreduce.py"):
        sys.argv = [path, *arguments]
        runpy.run_path(path, run_name="__main__")
        return
    if int(arguments[1]) in fault.get("ranks", (1,)):
        if fault["kind"] in ("absent", "late"):
            time.sleep(fault["seconds"])
        if fault["kind"] == "interface":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "dead0")
        if fault.get("mute"):
            os.close(1)
            os.close(2)
    spec = importlib.util.spec_from_file_location("probe", path)
    assert spec and spec.loader
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    if int(arguments[1]) in fault.get("ranks", (1,)):
        patch(probe, fault)
    sys.exit(probe.main(arguments))


if __name__ == "__main__":
    main()
