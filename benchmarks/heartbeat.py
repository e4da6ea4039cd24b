"""What it costs a step that the trainer tells a supervisor what it does.

    python benchmarks/heartbeat.py --work DIR [--tiny] [--steps 24] [--rounds 2] [--results DIR]

The job of `start.py` (FLUX.1-dev's transformer with random weights, a LoRA of rank 16 at 1024 px; the demo's with
--tiny) is trained in turn without heartbeats and with them, as `xflux-doctor run` asks for them. Counted are the
records of a step; timed, in the same kind of folder, is how long one takes to write. Their product is the cost, since
the difference of two runs is less than that of one run with itself.
Writes benchmarks/results/heartbeat-DEVICE-DATE.json. Exit 1 where the cost is 0.5 % of a step or more;
with --tiny, whose steps take a hundredth of FLUX.1's, no bar is held.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import children
import start
from children import RESULTS

BAR = 0.005
RECORDS = 20_000


def run(work: Path, options: argparse.Namespace, steps: int, folder: Path | None) -> dict[str, Any]:
    """One run of so many steps: seconds of a step, and how many records its rank wrote in all."""
    config = work / "heartbeat.yaml"
    body = {**start.settings(work), "max_train_steps": steps, "gradient_checkpointing": False}
    config.write_text(json.dumps(body), encoding="utf-8")  # JSON is YAML
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environ.pop("XFLUX_WATCH", None)
    if folder:
        environ["XFLUX_WATCH"] = str(folder)
    argv = [sys.executable, "-m", "xflux_trainer", "train", "--config", str(config)]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=options.deadline, check=False)
    if done.returncode:
        raise SystemExit(f"error: the run failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    seconds = json.loads((work / "out" / "metrics.json").read_text(encoding="utf-8"))["seconds_per_step"]
    records = json.loads((folder / "rank0.json").read_text(encoding="ascii"))["beat"] if folder else 0
    shutil.rmtree(work / "out")
    return {"steps": steps, "heartbeats": bool(folder), "seconds_per_step": seconds, "records": records}


def one_record(folder: Path) -> float:
    """Seconds to write one."""
    code = f"""
import os, time
from xflux_trainer.pulse import Pulse
pulse = Pulse()
pulse.begin(os.environ)
started = time.perf_counter()
for step in range({RECORDS}):
    pulse.stepped(step, {RECORDS}, 0.3)
print((time.perf_counter() - started) / {RECORDS}, file=open({str(folder / "took")!r}, "w"))
"""
    environ = {**os.environ, "XFLUX_WATCH": str(folder)}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=60)
    return float((folder / "took").read_text())


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="xflux-watch-") as name:
        folder = Path(name)
        for _ in range(options.rounds):
            rows += [run(work, options, options.steps, None), run(work, options, options.steps, folder)]
        short = run(work, options, options.steps // 2, folder)
        each = one_record(folder)
    told = [row for row in rows if row["heartbeats"]]
    # What comes before the first step and after the last one is the same in both.
    records = (told[-1]["records"] - short["records"]) / (told[-1]["steps"] - short["steps"])
    seconds = min(row["seconds_per_step"] for row in told)
    return {"rows": rows, "records_per_step": records, "seconds_per_record": each, "seconds_per_step": seconds,
            "share": records * each / seconds}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a local disk")
    start.model_options(parser)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=150, metavar="S", help="seconds for each run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    start.make(work, options)
    started = time.perf_counter()
    body = measure(work, options)
    for row in body["rows"]:
        print(f"{'with' if row['heartbeats'] else 'without'} heartbeats: {row['seconds_per_step']:.4f} s per step")
    print(f"{body['records_per_step']:.1f} records a step, {1e6 * body['seconds_per_record']:.1f} µs each: "
          f"{100 * body['share']:.4f} % of a step ({time.perf_counter() - started:.0f} s)")  # fmt: skip
    print("written to", children.save(options.results, "heartbeat", "heartbeat.py", body).name)
    return 1 if body["share"] >= BAR and not options.tiny else 0


if __name__ == "__main__":
    sys.exit(main())
