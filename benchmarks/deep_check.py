"""`check --deep` on this machine's GPU, beside an independent measurement, and two faults that it must name.

    python benchmarks/deep_check.py [--results FOLDER]

A 1024 px LoRA job is written into a temporary folder (its weights need not be here). Then, one after the other: the
deep check; products, copies and the link by a few lines of torch of our own; what `fix` makes of a job whose attention
is cudnn by what the check found; the deep check of two ranks on the one GPU, which must be called a duplicate GPU; and
the check of the first job beside a process that holds 60 GB, or half of the card, which must be named with its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import children
from children import REPO, RESULTS

sys.path.insert(0, str(REPO))
TRAIN = """\
model_name: flux-dev
mode: lora
rank: 16
mixed_precision: bf16
{more}data_config:
  img_dir: {images}
  img_size: 1024
"""
ONE = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
mixed_precision: bf16
num_machines: 1
num_processes: 1
gpu_ids: '0'
use_cpu: false
"""
TWO = ONE.replace("'NO'", "MULTI_GPU").replace("num_processes: 1", "num_processes: 2")
CODES = ("HW201", "HW202", "HW203", "HW204", "HW205", "HW206", "HW207", "NE101")
HOLD = 60 * 10**9
BAR, SECONDS = 0.05, 60.0
HOLDER = """
import sys, time, torch
size = min(int(sys.argv[1]), torch.cuda.mem_get_info()[1] // 2)
kept = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(1)
torch.cuda.synchronize()
print(size, flush=True)
time.sleep(600)
"""
OWN = """
import json, sys, time, torch
torch.cuda.init()
def rate(call, seconds=0.8):
    for _ in range(5):
        call()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    total, count = 0.0, 0
    while total < seconds:
        first.record()
        for _ in range(10):
            call()
        last.record()
        torch.cuda.synchronize()
        total += first.elapsed_time(last) / 1000
        count += 10
    return total / count
found = {}
for m, n, k in json.loads(sys.argv[1]):
    a = torch.randn(m, k, device="cuda").bfloat16()
    w = torch.randn(n, k, device="cuda").bfloat16()
    found[f"{m}x{n}x{k}"] = 2e-12 * m * n * k / rate(lambda: torch.nn.functional.linear(a, w))
a = torch.zeros(1 << 29, dtype=torch.float32, device="cuda")
b = torch.ones_like(a)
found["copy_gbs"] = 2 * a.nbytes / rate(lambda: a.copy_(b)) / 1e9
host = torch.empty(1 << 26, dtype=torch.float32, pin_memory=True)
there = torch.empty_like(host, device="cuda")
found["h2d_gbs"] = host.nbytes / rate(lambda: there.copy_(host, non_blocking=True)) / 1e9
found["d2h_gbs"] = host.nbytes / rate(lambda: host.copy_(there, non_blocking=True)) / 1e9
print(json.dumps(found))
"""


class Place:
    """A folder with a job, and the environment in which the doctor finds itself and the trainer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        images, modules = folder / "images", folder / "modules"
        images.mkdir()
        modules.mkdir()
        for name, source in (("xflux_doctor", "xflux_doctor"), ("xflux_trainer", "trainer")):
            (modules / name).symlink_to(REPO / source)
        path = os.pathsep.join((str(modules), *filter(None, [os.environ.get("PYTHONPATH")])))
        self.environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        self.images = images
        sys.path.insert(0, str(modules))  # for what of the trainer this process itself asks

    def job(self, name: str, accelerate: str, more: str = "") -> list[str]:
        train, launch = self.folder / f"{name}.yaml", self.folder / f"{name}-accelerate.yaml"
        train.write_text(TRAIN.format(images=self.images, more=more))
        launch.write_text(accelerate)
        return ["--config", str(train), "--accelerate-config", str(launch), "--offline"]

    def doctor(self, *words: str, seconds: float = 100.0) -> tuple[dict[str, Any], float]:
        started = time.perf_counter()
        argv = [sys.executable, "-m", "xflux_doctor.cli", *words, "--format", "json"]
        done = subprocess.run(
            argv, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=seconds, check=False
        )
        took = time.perf_counter() - started
        if not done.stdout.startswith("{"):
            raise SystemExit(f"{' '.join(words)} said no JSON:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(done.stdout), took

    def own(self, shapes: list[list[int]]) -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", OWN, json.dumps(shapes)], capture_output=True, text=True, timeout=60, check=False
        )
        return json.loads(done.stdout) if done.returncode == 0 else {"why": done.stderr[-500:]}


def said(report: dict[str, Any], *codes: str) -> dict[str, Any]:
    """What these checks found, in short."""
    return {
        item["check"]: {"status": item["status"], "seen": [one["seen"] for one in item["findings"]] or item["reason"],
                        "because": [one["because"] for one in item["findings"]],
                        "edits": [edit for one in item["findings"] for edit in one["edits"]]}
        for item in report["results"] if item["check"] in codes
    }  # fmt: skip


def beside(probe: dict[str, Any], own: dict[str, float]) -> dict[str, dict[str, float]]:
    """The doctor's number, ours, and the difference in percent."""
    mine = {name: probe.get(name) or 0.0 for name in ("copy_gbs", "h2d_gbs", "d2h_gbs")}
    mine |= next((one["rates"] for one in probe["products"] if one["kind"] == "bfloat16"), {})
    return {
        name: {"doctor": value, "own": own[name], "percent": 100 * (value / own[name] - 1)}
        for name, value in mine.items() if name in own
    }  # fmt: skip


def held(place: Place) -> dict[str, Any]:
    """A process holds 60 GB, or half of the card."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(HOLD)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        size = int(process.stdout.readline() or 0)
        report, seconds = place.doctor("check", "--quick", *place.job("held", ONE))
        named = said(report, "HW121", "ME101")
        text = json.dumps(named)
        gib = f"{size / 2**30:.0f}"
        pids = [one["pid"] for gpu in report["facts"]["gpus"] or () for one in gpu["processes"]]
        return {"bytes": size, "pid": process.pid, "pids_seen": pids, "seconds": seconds, "gib": gib, "found": named,
                "named": "holds" in text or "are held" in text}  # fmt: skip
    finally:
        process.kill()
        process.wait()


def show(probe: dict[str, Any]) -> None:
    """What the GPU did, stage by stage."""
    print("done:", probe.get("done"))
    print("failed:", json.dumps(probe.get("failed"), indent=1))
    print("skipped:", probe.get("skipped"))
    memory = ("context_bytes", "wanted", "free", "whole", "pieces", "taken")
    print("memory:", {key: probe.get(key) for key in memory})
    for one in probe["products"]:
        print(f"product {one['kind']}: error {one['error']:.3f} of the bound, {one['rates']}")
    for one in probe.get("attention", ()):
        times = f"{1000 * one['forward']:.2f} + {1000 * one['backward']:.2f} ms" if one["ok"] else one["detail"][:300]
        word = "right" if one["ok"] else "absent" if one["absent"] else "WRONG"
        print(f"  {one['name']:24} {word} {max(one['errors'].values(), default=0):.4f} {times}")
    for one in probe.get("blocks", ()):
        errors = f"{one['output']:.4f} {one['gradient']:.4f} {1000 * one['seconds']:.1f} ms"
        print(f"  blocks {one['name']:12} ok {one['ok']} {errors} {one['attention']} {one['detail']}")
    print("readings:", probe.get("before"), probe.get("loaded"), probe.get("after"), sep="\n  ")


def deep(place: Place) -> dict[str, Any]:
    """The first job, beside our own numbers."""
    report, seconds = place.doctor("check", "--deep", *place.job("plain", ONE))
    facts = report["facts"]
    probe = (facts["gpu_probes"] or [{"products": [], "failed": facts["unknown"]}])[0]
    print(f"check --deep: {seconds:.1f} s (bar {SECONDS:.0f}), the GPU alone {probe.get('seconds', 0):.1f} s")
    show(probe)
    own = place.own([[4608, 12288, 3072], [8192, 8192, 8192]])
    compared = beside(probe, own) if "why" not in own else own
    for key, row in compared.items():
        far = isinstance(row, dict) and abs(row["percent"]) > 100 * BAR
        print(f"  {key}: {row}{' beyond the bar' if far else ''}")
    allreduce = facts["allreduce"]
    print("all-reduce:", allreduce and (allreduce["ok"], allreduce["stage"], f"{allreduce['seconds']:.1f} s"))
    found = said(report, *CODES)
    print(json.dumps(found, indent=1))
    crashed = [item["check"] for item in report["results"] if item["status"] == "crashed"]
    (place.folder / "facts.json").write_text(json.dumps(facts))
    return {"seconds": seconds, "probe": probe, "own": own, "compared": compared, "allreduce": allreduce,
            "checks": found, "crashed": crashed}  # fmt: skip


def cudnn(place: Place) -> dict[str, Any]:
    """What `fix` writes for a job that names cuDNN's attention, by what was found here."""
    words = place.job("cudnn", ONE, "attention: cudnn\n")
    words += ["--facts", str(place.folder / "facts.json"), "--write-config", "--yes"]
    report, seconds = place.doctor("fix", *words)
    lines = (place.folder / "cudnn.yaml").read_text().splitlines()
    written = next((line for line in lines if line.startswith("attention")), "")
    return {"seconds": seconds, "checks": said(report, "HW206"), "written": written}


def two(place: Place) -> dict[str, Any]:
    report, seconds = place.doctor("check", "--deep", "--timeout", "60", *place.job("two", TWO)[2:])
    found = said(report, "NE101")
    return {"seconds": seconds, "named": "uplicate GPU" in json.dumps(found), "checks": found,
            "allreduce": report["facts"]["allreduce"]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        body = deep(place)
        for key, part in (("cudnn", cudnn), ("two", two), ("held", held)):
            body[key] = part(place)
            print(f"{key}:", json.dumps(body[key], indent=1), flush=True)
        file = children.save(folder, "deep-check", "deep_check.py", body)
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
