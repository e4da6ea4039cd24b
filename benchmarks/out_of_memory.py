"""A run that runs out of the card's memory, and `run --retries 3` that finishes it.

    python benchmarks/out_of_memory.py --work DIR [--limit 34] [--results DIR]

A LoRA of rank 16 at 1024 px on a FLUX.1-dev-sized transformer with made-up weights (23.8 GB, kept in DIR) keeps every
activation, with the allocator held to 34 GiB. The check foretells that it does not fit; with --accept ME101 it starts
as it is, runs out of memory, and must be finished by a retry with lighter settings and the same batch.
Writes benchmarks/results/out-of-memory-GPU-DATE.json. Exit 1 where it was not foretold, did not run out of memory,
was not finished, or was finished with another batch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cards
import children
import start
from children import GIB, RESULTS

STEPS = 6


def job(work: Path) -> dict[str, Any]:
    own = {"lora_targets": "diffusers", "gradient_checkpointing": False, "train_batch_size": 1}
    return {**start.settings(work), **own, "max_train_steps": STEPS, "checkpointing_steps": 10**6}


def doctor(work: Path, words: list[str], options: argparse.Namespace) -> subprocess.CompletedProcess[str]:
    files = ["--config", str(work / "train.yaml"), "--accelerate-config", str(work / "accelerate.yaml")]
    argv = [sys.executable, "-m", "xflux_doctor.cli", *words, *files, "--offline", "--gpu-limit", str(options.limit)]
    return subprocess.run(argv, cwd=work, capture_output=True, text=True, timeout=options.deadline, check=False)


def finished(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The check, then the run to its end."""
    (work / "train.yaml").write_text(json.dumps(job(work)), encoding="utf-8")  # JSON is YAML
    (work / "accelerate.yaml").write_text('distributed_type: "NO"\nnum_processes: 1\n', encoding="utf-8")
    checked = json.loads(doctor(work, ["check", "--quick", "--format", "json"], options).stdout)
    foretold = [item["findings"] for item in checked["results"] if item["check"] == "ME101" and item["findings"]]
    begun = time.monotonic()
    with cards.Watched() as watched:
        done = doctor(work, ["run", "--yes", "--quick", "--accept", "ME101", "--retries", "3"], options)
    out, said = work / "out", [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8")) if done.returncode == 0 else {}
    lines = (out / "retries.jsonl").read_text(encoding="utf-8") if (out / "retries.jsonl").is_file() else ""
    shutil.rmtree(out, ignore_errors=True)
    retries = [json.loads(text) for text in lines.splitlines()]
    sizes = {key: metrics.get(key) for key in ("world_size", "train_batch_size", "gradient_accumulation_steps")}
    causes = [retry["cause"] for retry in retries]
    whole = metrics.get("steps") == STEPS and sizes == dict.fromkeys(sizes, 1)
    good = bool(foretold) and done.returncode == 0 and causes[:1] == ["cuda-oom"] and whole
    return {
        "limit_gib": options.limit, "foretold": foretold, "exit": done.returncode, "causes": causes,
        "retries": retries, "sizes": sizes, "steps": metrics.get("steps"), "seconds": time.monotonic() - begun,
        "seconds_per_step": metrics.get("seconds_per_step"),
        "nvml_gib": [most / GIB for most in watched.most], "said": said[-30:], "good": good,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a local disk with 25 GB free")
    parser.add_argument("--limit", type=float, default=34, metavar="GIB", help="what the allocator may take")
    parser.add_argument("--deadline", type=float, default=400, metavar="S", help="seconds for each command")
    start.model_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    start.make(work, options)
    body = finished(work, options)
    file = children.save(options.results, "out-of-memory", "out_of_memory.py", body)
    print("\n".join(body["said"]), f"{'finished' if body['good'] else 'NOT as promised'}: exit {body['exit']}, "
          f"retries after {', '.join(body['causes']) or 'nothing'}, {body['seconds']:.0f} s", sep="\n")  # fmt: skip
    print(f"written to {file.name}")
    return 0 if body["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
