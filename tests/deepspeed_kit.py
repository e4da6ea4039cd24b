"""What the tests of DeepSpeed's config share: the real stack in a child, and machines with the running packages."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT, machine

from xflux_doctor.facts import Facts, Package
from xflux_doctor.matrix import Matrix

CHILD = ROOT / "tests/deepspeed_child.py"
HEAD = "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nmachine_rank: 0\n"


def real(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Every case through the installed accelerate and DeepSpeed, and the keys that DeepSpeed's classes have."""
    done = subprocess.run(
        [sys.executable, str(CHILD)], input=json.dumps(cases), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout[done.stdout.index('{"answers"') :]))


@functools.cache
def running() -> dict[str, str]:
    """The stack of this interpreter: name and version of its packages."""
    names = ("torch", "accelerate", "deepspeed", "transformers", "torchvision", "diffusers", "peft")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def stack_machine(matrix: Matrix, count: int = 2, stack: str | None = None) -> Facts:
    """Two H100 with the packages that run this test, or those of a named stack."""
    if stack is None:
        stack = "xflux-2024" if running().get("deepspeed", "").startswith("0.14") else "cuda13"
    facts = machine(matrix, count=count, stack=stack)
    assert facts.packages is not None
    for name in ("accelerate", "deepspeed"):
        if name in running() and stack is None:
            facts.packages[name] = Package(name, running()[name], "", "/venv/site-packages")
    return facts


def write(folder: Path, accelerate: str, zero: object = None, name: str = "ds.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accelerate.yaml").write_text(accelerate, newline="")
    if zero is not None:
        (folder / name).write_text(zero if isinstance(zero, str) else json.dumps(zero, indent=4), newline="")
    return folder


def inline(*lines: str, precision: str | None = "bf16", top: str = "", ranks: int = 2) -> str:
    """accelerate's file with these lines in its deepspeed_config."""
    said = f"mixed_precision: {precision}\n" if precision is not None else ""
    section = "".join(f"  {line}\n" for line in lines)
    return f"{HEAD}num_processes: {ranks}\n{said}{top}deepspeed_config:\n{section}"


def named(*lines: str, precision: str | None = None, top: str = "", ranks: int = 2) -> str:
    return inline("deepspeed_config_file: ds.json", *lines, precision=precision, top=top, ranks=ranks)
