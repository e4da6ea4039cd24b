"""How long `check --quick` and `plan` take beside `import torch`, in fresh processes, with warm and with cold files.

    python benchmarks/check_speed.py [--python EXE] [--runs 5] [--json FILE]

Cold: before each run the pages of the interpreter's library and of its packages are dropped from the page cache
(posix_fadvise, no rights needed). Prints medians, the ten slowest checks, and the time inside NVML's start apart.
`plan` is asked for LoRAs, a full fine-tune and a ControlNet at 1024 px, for cards of 24 and of 80 GiB, with everything
lossy allowed, so that it searches as widely as it can; and the check of a LoRA that does not fit eight cards of 16 GiB,
which finds the plan that does. Exit 1 when a check takes 0.5 s or more, warm or cold, or a plan 0.3 s, warm.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from xflux_doctor.checks import ALL

LIMIT, PLAN_LIMIT = 0.5, 0.3
JOBS = {
    "LoRA": {"mode": "lora"},
    "LoRA of batch 8": {"mode": "lora", "train_batch_size": 8},
    "fine-tune": {"mode": "finetune"},
    "ControlNet of batch 8": {"mode": "controlnet", "train_batch_size": 8},
}
SMALL = "check --quick --facts, eight cards too small"
LOSSY = ["quantization", "optimizer", "weight_update", "backward_clip", "img_size"]
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "demo"


def doctor(python: str) -> list[str]:
    """What the script does that pip writes for `xflux-doctor`; the one beside this interpreter may be another's."""
    return [python, "-c", "from xflux_doctor.program import entry; entry()"]


def timed(argv: list[str]) -> float:
    # With PYTHONDONTWRITEBYTECODE the first run would leave none for those that are measured.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, env=environ)
    return time.perf_counter() - started


def evict(python: str) -> int:
    """Drop the clean pages of every file that the interpreter could read; returns how many files."""
    ask = "import json, sysconfig; print(json.dumps([sysconfig.get_path(n) for n in ('stdlib', 'purelib', 'platlib')]))"
    folders = json.loads(subprocess.run([python, "-c", ask], capture_output=True, check=True).stdout)
    count = 0
    for folder in {*folders, str(EXAMPLE.parent.parent / "xflux_doctor"), str(EXAMPLE.parent.parent / "trainer")}:
        for path in Path(folder).rglob("*"):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                continue
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
            count += 1
    return count


def plans(python: str, folder: Path) -> dict[str, list[str]]:
    """Command lines of `plan` by their names; the jobs are written into the folder.

    Of a machine whose packages are not known all is taken for granted, Triton too: there this trainer's own blocks
    compute, of which any number may be recomputed, and every format of the base is tried.
    """
    found = {}
    facts = json.loads(subprocess.run([*doctor(python), "facts"], capture_output=True).stdout)
    bare = folder / "facts.json"
    bare.write_text(json.dumps({**facts, "packages": None}), encoding="utf-8")
    for name, own in JOBS.items():
        job = {"model_name": "flux-dev", "img_dir": str(EXAMPLE / "photos"), "img_size": 1024, "allow": LOSSY, **own}
        file = folder / f"{name.replace(' ', '-')}.yaml"
        file.write_text(json.dumps(job), encoding="utf-8")  # JSON is YAML
        accelerate = folder / "accelerate.yaml"
        accelerate.write_text(json.dumps({"distributed_type": "NO", "num_processes": 1}), encoding="utf-8")
        for gpu, more in (("H100:24", []), ("H100:80", []), ("H100:24", ["--facts", str(bare)])):
            argv = [*doctor(python), "plan", "--config", str(file)]
            argv += ["--accelerate-config", str(accelerate), "--gpu", gpu, "--offline", "--format", "json"]
            found[f"plan --gpu {gpu}{' --facts' if more else ''}, {name}"] = [*argv, *more]
    return found


def too_small(python: str, folder: Path) -> list[str]:
    """The check of a job that does not fit, of eight ranks, on facts of such a machine."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    card = {"name": "NVIDIA H100 80GB HBM3", "memory_total": 16 << 30, "memory_free": 16 << 30, "capability": [9, 0]}
    gpus = [{"index": index, "uuid": f"GPU-{index:08d}-0000-0000-0000-000000000000", **card} for index in range(8)]
    file, launch = folder / "eight.json", folder / "eight.yaml"
    file.write_text(json.dumps({**facts, "gpus": gpus}), encoding="utf-8")
    launch.write_text(json.dumps({"distributed_type": "MULTI_GPU", "num_processes": 8}), encoding="utf-8")
    argv = [*doctor(python), "check", "--quick", "--facts", str(file), "--offline"]
    return [*argv, "--config", str(folder / "LoRA.yaml"), "--accelerate-config", str(launch)]


def answered(planned: dict[str, list[str]]) -> None:
    """A command that fails at once is not quick."""
    for name, argv in planned.items():
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if "alternatives" not in done.stdout:
            raise SystemExit(f"{name} gave no plan: {done.stderr or done.stdout}")


def slowest(check: list[str]) -> list[tuple[str, float]]:
    """The ten slowest checks of one run, in milliseconds."""
    report = json.loads(subprocess.run([*check, "--format", "json"], capture_output=True).stdout)
    timed_checks = [(f"{item['check']} {item['title']}", item["seconds"] * 1000) for item in report["results"]]
    return sorted(timed_checks, key=lambda pair: -pair[1])[:10]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has the doctor and torch")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cpu = [] if Path("/dev/nvidiactl").exists() else ["--cpu"]
    check = [*doctor(options.python), "check", "--quick", *cpu,
             "--config", str(EXAMPLE / "train.yaml"),
             "--accelerate-config", str(EXAMPLE / "accelerate_config.yaml")]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        planned = plans(options.python, Path(folder))
        subjects = {
            "python -c pass": [options.python, "-c", "pass"],
            "xflux-doctor check --quick": check,
            **planned,
            SMALL: too_small(options.python, Path(folder)),
            "import torch": [options.python, "-c", "import torch"],
        }
        for argv in subjects.values():
            timed(argv)  # warm the page cache and the byte code
        answered(planned)
        done = subprocess.run(subjects[SMALL], capture_output=True, text=True, check=False)
        if "Take the plan that fits" not in done.stdout:
            raise SystemExit(f"{SMALL} found no plan: {done.stderr or done.stdout}")
        # interleaved, so that a busy moment of the machine meets all of them
        rounds = [{name: timed(argv) for name, argv in subjects.items()} for _ in range(options.runs)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in subjects}
    cold = []
    for _ in range(options.runs):
        files = evict(options.python)
        cold.append(timed(check))
    cold_median = statistics.median(cold)
    top = slowest(check)
    facts = json.loads(subprocess.run([*doctor(options.python), "facts"], capture_output=True).stdout)
    for name, seconds in medians.items():
        print(f"{name:<50} {seconds:6.3f} s   (median of {options.runs}, fresh process, warm files)")
    print(f"{'  check with cold files':<50} {cold_median:6.3f} s   (median of {options.runs}; {files} files dropped)")
    print(f"{'  of which NVML start':<50} {facts['timings'].get('nvml_start', 0.0):6.3f} s")
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    print(f"machine: {machine}; {len(ALL)} checks, the ten slowest:")
    for name, milliseconds in top:
        print(f"  {milliseconds:7.2f} ms  {name}")
    if options.json:
        result = {"date": datetime.date.today().isoformat(), "machine": machine, "medians": medians, "rounds": rounds,
                  "checks": len(ALL), "cold": cold, "slowest_ms": dict(top),
                  "nvml_start": facts["timings"].get("nvml_start")}  # fmt: skip
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    checked = max(medians["xflux-doctor check --quick"], medians[SMALL], cold_median)
    if shutil.which(options.python) is None or checked >= LIMIT:
        print(f"too slow: the limit is {LIMIT} s", file=sys.stderr)
        return 1
    if slow := [name for name in planned if medians[name] >= PLAN_LIMIT]:
        print(f"too slow: {', '.join(slow)}; the limit is {PLAN_LIMIT} s", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
