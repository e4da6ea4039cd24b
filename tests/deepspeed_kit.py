"""What the tests of DeepSpeed's config share: the real stack in a child, and machines with the running packages."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import xflux_kit
import yaml
from conftest import ROOT, case, findings, job, machine

from xflux_doctor.checks import (
    ALL,
)
from xflux_doctor.facts import Facts, Package
from xflux_doctor.finding import Change, Edit, Finding
from xflux_doctor.job import Job
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


# --- jobs by values, for three who may run them -------------------------------------------------------------------

MINE = [check for check in ALL if check.code.startswith("LA3")]
Z: dict[str, Any] = {
    "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
}  # fmt: skip
BUCKET = ("zero_optimization", "reduce_bucket_size")


def with_file(work: Job, zero: dict[str, Any] | None, accelerate: str | None = None) -> Job:
    """The job with a DeepSpeed file of these values."""
    text = accelerate or named()
    return msgspec.structs.replace(
        work, accelerate=yaml.safe_load(text), accelerate_text=text, deepspeed_path=Path("ds.json"), zero_file=zero,
        zero_text=json.dumps(zero),
    )  # fmt: skip


def ours(zero: dict[str, Any] | None = None, accelerate: str | None = None, **train: Any) -> Job:
    """A job of the bundled trainer."""
    return with_file(job(**{"gradient_accumulation_steps": 2, **train}), Z if zero is None else zero, accelerate)


def theirs(root: Path, zero: dict[str, Any] | None = None, accelerate: str | None = None, **changes: Any) -> Job:
    """A job of X-Flux's own script."""
    return with_file(xflux_kit.job(root, **changes), Z if zero is None else zero, accelerate)


def neither(zero: dict[str, Any] | None = None, accelerate: str | None = None) -> Job:
    """A job of which only accelerate's file is known."""
    return with_file(Job(accelerate_path=Path("accelerate.yaml")), Z if zero is None else zero, accelerate)


def one(matrix: Matrix, work: Job, check: Any, stack: str = "cuda13", count: int = 2, **facts: Any) -> Finding | None:
    found = findings(case(matrix, machine(matrix, count=count, stack=stack, **facts), work, stack), check)
    assert len(found) < 2, found
    return found[0] if found else None


def sets(changes: tuple[Change, ...]) -> dict[str, Any]:
    """{file:key: value}; None for what goes."""
    return {f"{c.file}:{'.'.join(c.key)}": c.value if isinstance(c, Edit) else None for c in changes}
