"""How long `xflux-doctor check --quick` takes beside `import torch`, in fresh processes, with warm and with cold files.

    python benchmarks/check_speed.py [--python EXE] [--runs 5] [--json FILE]

Cold: before each run the pages of the interpreter's library and of its packages are dropped from the page cache
(posix_fadvise, no rights needed). Prints medians, the ten slowest checks, and the time inside NVML's start apart.
Exit 1 when the check takes 0.5 s or more, warm or cold.
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
import time
from pathlib import Path

from xflux_doctor.checks import ALL

LIMIT = 0.5
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "demo"


def timed(argv: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
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
    check = [options.python, "-m", "xflux_doctor.cli", "check", "--quick", *cpu,
             "--config", str(EXAMPLE / "train.yaml"),
             "--accelerate-config", str(EXAMPLE / "accelerate_config.yaml")]  # fmt: skip
    subjects = {
        "python -c pass": [options.python, "-c", "pass"],
        "xflux-doctor check --quick": check,
        "import torch": [options.python, "-c", "import torch"],
    }
    for argv in subjects.values():
        timed(argv)  # warm the page cache and the byte code
    # interleaved, so that a busy moment of the machine meets all of them
    rounds = [{name: timed(argv) for name, argv in subjects.items()} for _ in range(options.runs)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in subjects}
    cold = []
    for _ in range(options.runs):
        files = evict(options.python)
        cold.append(timed(check))
    cold_median = statistics.median(cold)
    top = slowest(check)
    facts = json.loads(subprocess.run([options.python, "-m", "xflux_doctor.cli", "facts"], capture_output=True).stdout)
    for name, seconds in medians.items():
        print(f"{name:<28} {seconds:6.3f} s   (median of {options.runs}, fresh process, warm files)")
    print(f"{'  with cold files':<28} {cold_median:6.3f} s   (median of {options.runs}; {files} files dropped)")
    print(f"{'  of which NVML start':<28} {facts['timings'].get('nvml_start', 0.0):6.3f} s")
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    print(f"machine: {machine}; {len(ALL)} checks, the ten slowest:")
    for name, milliseconds in top:
        print(f"  {milliseconds:7.2f} ms  {name}")
    if options.json:
        result = {"date": datetime.date.today().isoformat(), "machine": machine, "medians": medians, "rounds": rounds,
                  "checks": len(ALL), "cold": cold, "slowest_ms": dict(top),
                  "nvml_start": facts["timings"].get("nvml_start")}  # fmt: skip
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if shutil.which(options.python) is None or max(medians["xflux-doctor check --quick"], cold_median) >= LIMIT:
        print(f"too slow: the limit is {LIMIT} s", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
