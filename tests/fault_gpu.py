"""Stands in for the interpreter under test: runs the probe of one GPU with the fault of $FAULT for its device in it.

    fault_gpu.py -c START PROBE ASK      (as the runner calls an interpreter)

The probe itself knows nothing of faults: its file is imported by its path and patched here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from typing import Any

SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}


def here() -> None:
    """A stage hangs in Python, under this name."""
    time.sleep(600)


def patch(probe: Any, fault: dict[str, Any]) -> None:
    true = probe.perform

    def perform(gpu: Any, name: str, call: Any) -> None:
        def faulty(gpu: Any, rest: str) -> Any:
            kind = fault["kind"]
            if kind == "raise":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if kind == "hang":
                here()
            if kind == "late":
                time.sleep(fault["seconds"])
            if kind == "garbage":
                os.write(1, b'\xff\xfe{"stage": [1], "done": {}} {"x":\n[3]\n{"stage": "memory", "failed": 3}\n{"stage')
            if kind in SIGNALS:
                os.kill(os.getpid(), SIGNALS[kind])
            if kind == "leave":  # as after a broken context
                gpu.settle = broken
                broken()
            return call(gpu, rest)

        true(gpu, name, faulty if name == fault["stage"] else call)

    def broken() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    probe.perform = perform
    if fault["kind"] == "wrong":
        sicken(probe)


def sicken(probe: Any) -> None:
    """One element of every product is off."""
    true = probe._stages

    def stages() -> Any:
        found = true()
        names = found["products"].__globals__
        right = names["_multiply"]

        def multiply(*given: Any) -> Any:
            made = right(*given)
            made[3, 5] *= 1.5
            return made

        names["_multiply"] = multiply
        return found

    probe._stages = stages


def main() -> None:
    faults = json.loads(os.environ["FAULT"])
    path, ask = sys.argv[3:]
    spec = importlib.util.spec_from_file_location("probe", path)
    assert spec and spec.loader
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    fault = faults.get(json.loads(ask)["device"])
    if fault:
        patch(probe, fault)
    sys.exit(probe.main([ask]))


if __name__ == "__main__":
    main()
