"""Faults that only a machine with GPUs can have: what `check` finds before the start, and what `explain` says after.

    python benchmarks/pairs_gpu.py

Each fault is put into a small program of one or two processes. The variables stand in the program's environment alone;
nothing about the machine is changed. Prints a table; exit 1 where the two codes differ or nothing failed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

_INIT = "import os, torch, torch.distributed as d\nd.init_process_group('nccl')\n"
_SAYS = "import os\nprint('using', os.environ['CUDA_VISIBLE_DEVICES'])\n"  # as job scripts do; torch names no card
_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
_OOM = "import torch\nkept = [torch.empty(1 << 32, dtype=torch.uint8, device='cuda') for _ in range(1000)]\n"


class Fault(NamedTuple):
    name: str
    cause: str
    code: str
    program: str
    ranks: int = 1
    environment: Mapping[str, str] = MappingProxyType({})
    train: Mapping[str, Any] = MappingProxyType({})


def faults(cards: int) -> tuple[Fault, ...]:
    """Those of a machine with so many cards."""
    many = cards + 1
    return (
        Fault("a rank without a card", "invalid-device-ordinal", "LA105",
              _INIT + "torch.cuda.set_device(int(os.environ['LOCAL_RANK']))\nd.barrier()\n", many),
        Fault("two ranks on card 0", "nccl-duplicate-gpu", "LA105",
              _INIT + "torch.cuda.set_device(0)\nd.all_reduce(torch.ones(1, device='cuda'))\n", many),
        Fault("no card visible", "no-visible-gpu", "LA105", "import torch\ntorch.zeros(1).cuda()\n",
              environment={"CUDA_VISIBLE_DEVICES": ""}),
        Fault("a card that is not there", "no-visible-gpu", "LA105", "import torch\ntorch.zeros(1).cuda()\n",
              environment={"CUDA_VISIBLE_DEVICES": "GPU-00000000-0000-0000-0000-000000000000"}),
        Fault("a slice that is not there", "mig-device", "HW118", _SAYS + "import torch\ntorch.zeros(1).cuda()\n",
              environment={"CUDA_VISIBLE_DEVICES": "MIG-00000000-0000-0000-0000-000000000000"}),
        Fault("the allocator's word", "alloc-conf-unknown-key", "EN301", "import torch\ntorch.zeros(1).cuda()\n",
              environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segment:True",
                           "PYTORCH_ALLOC_CONF": "expandable_segment:True"}),
        Fault("the interface's name", "nccl-socket-ifname", "EN204",
              _INIT + "torch.cuda.set_device(0)\nd.all_reduce(torch.ones(1, device='cuda'))\n", many,
              {"NCCL_SOCKET_IFNAME": "=eth99", "GLOO_SOCKET_IFNAME": "-"}),
        Fault("out of memory", "cuda-oom", "ME101", _OOM, train={"train_batch_size": 4096, "img_size": 1024}),
    )  # fmt: skip


def before(fault: Fault, folder: Path, environ: dict[str, str]) -> dict[str, list[str]]:
    accelerate = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": fault.ranks,
                  "distributed_type": "MULTI_GPU" if fault.ranks > 1 else "NO", "mixed_precision": "bf16"}  # fmt: skip
    train = {"model_name": "flux-dev", "img_dir": str(Path(__file__).parent.parent / "examples/demo/photos"),
             "gradient_checkpointing": False, "output_dir": "out", **fault.train}  # fmt: skip
    (folder / "accelerate.yaml").write_text(json.dumps(accelerate))
    (folder / "train.yaml").write_text(json.dumps(train))
    argv = [sys.executable, "-m", "xflux_doctor.cli", "check", "--quick", "--format", "json", "--config", "train.yaml",
            "--accelerate-config", "accelerate.yaml"]  # fmt: skip
    done = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False)
    found: dict[str, list[str]] = {}
    for result in json.loads(done.stdout)["results"]:
        for finding in result["findings"]:
            found.setdefault(finding["code"], []).append(finding["seen"])
    return found


def after(fault: Fault, folder: Path, environ: dict[str, str]) -> tuple[int, dict[str, Any]]:
    (folder / "program.py").write_text(fault.program)
    ranked = fault.ranks > 1 or "init_process_group" in fault.program
    argv = [*_RANKS, str(fault.ranks), "program.py"] if ranked else [sys.executable, "program.py"]
    with (folder / "job.log").open("wb") as log:
        rc = subprocess.run(argv, cwd=folder, env=environ, stdout=log, stderr=log, timeout=120, check=False).returncode
    told = [sys.executable, "-m", "xflux_doctor.cli", "explain", "job.log", "--format", "json"]
    done = subprocess.run(told, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False)
    return rc, json.loads(done.stdout)


def main() -> int:
    smi = shutil.which("nvidia-smi")
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False).stdout if smi else ""
    cards = sum(line.startswith("GPU ") for line in listed.splitlines())
    if not cards:
        print("There is no GPU here.")
        return 1
    bad = 0
    print("| fault | check finds | explain says | its line | |\n|---|---|---|---|---|")
    for fault in faults(cards):
        with tempfile.TemporaryDirectory() as name:
            environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **fault.environment}
            environ = {key: value for key, value in environ.items() if value != "-"}
            found = before(fault, Path(name), environ)
            rc, told = after(fault, Path(name), environ)
            good = rc != 0 and fault.code in found and (told["cause"], told["code"]) == (fault.cause, fault.code)
            bad += not good
            line = told["evidence"][-1]["text"][:90] if told["evidence"] else ""
            seen = fault.code if fault.code in found else f"not {fault.code}: {' '.join(found)}"
            print(f"| {fault.name} | {seen} | {told['cause']}, {told['code']} | {line} | {'' if good else 'BAD'} |")
            if not good:
                print("\n".join((Path(name) / "job.log").read_text(errors="replace").splitlines()[-8:]))
    print(f"\n{len(faults(cards)) - bad} of {len(faults(cards))} pairs have one code, on {cards} cards")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
