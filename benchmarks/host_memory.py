"""The host's memory of the trainer's process, phase by phase, beside its forecast.

    python benchmarks/host_memory.py [--work DIR] [--layers 1,1] [--pixels 256] [--ranks 2] [--strategy fsdp]

Writes a pipeline of FLUX.1's layout with random weights (kept for the next time: 2 GB with --layers 1,1, and 34 GB at
FLUX.1-dev's full size, --layers 19,38) and two images, and lets the trainer encode, load, take two steps and draw one
image of two, on the GPU where there is one; then once more with everything encoded. Measured is what the run itself
says in its metrics.json: RssAnon and RssShmem, ten times a second. With --ranks each rank is shown, under DDP, ZeRO-2
(--strategy zero2) or FSDP2 (fsdp, all weights trained). Exit 1 where a phase is further than 10 % from its forecast.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import children

MIB = 1 << 20
PHASES = ("cache", "load", "train", "sample")


def write_model(model: Path, layers: tuple[int, int], device: str) -> None:
    import write_flux_weights as writer

    model.mkdir(parents=True, exist_ok=True)
    for part in writer.full_size(layers):
        writer.write_part(model, part, device)
    writer.write_rest(model)


def write_images(folder: Path) -> None:
    """Two, new in each run: nothing of them is in a cache."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        image = folder / f"{number}.png"
        Image.frombytes("RGB", (1024, 1024), os.urandom(3 << 20)).save(image)
        image.with_suffix(".json").write_text(json.dumps({"caption": f"noise {time.time_ns()}"}), encoding="utf-8")


def settings(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "pretrained_model": str(work / "model"), "img_dir": str(work / "images"), "output_dir": str(work / "out"),
        "cache_dir": str(work / "cache"), "img_size": options.pixels, "rank": 16, "learning_rate": 1e-4,
        "max_train_steps": 2, "checkpointing_steps": 100, "heldout_samples": 0, "sample_every": 0, "sample_steps": 2,
        "sample_width": options.pixels, "sample_height": options.pixels, "mixed_precision": options.mixed_precision,
        "stream_blocks": options.stream_blocks, "report_to": "none",
        **({"mode": "finetune", "gradient_checkpointing": True} if options.strategy == "fsdp" else {}),
    }  # fmt: skip


def run(work: Path, config: dict[str, Any], options: argparse.Namespace, *, on_cpu: bool) -> dict[str, Any]:
    """The metrics of one run of the trainer, in processes of its own."""
    file = work / "train.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", **({"ACCELERATE_USE_CPU": "true"} if on_cpu else {})}
    argv = [sys.executable, "-m"]
    if options.ranks > 1:
        launch = {
            "compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": options.ranks,
            "mixed_precision": config["mixed_precision"], "use_cpu": on_cpu, **children.SHARED[options.strategy],
        }  # fmt: skip
        (work / "accelerate.yaml").write_text(json.dumps(launch), encoding="utf-8")
        argv += ["accelerate.commands.launch", "--config_file", str(work / "accelerate.yaml"), "-m"]
    argv += ["xflux_trainer", "train", "--config", str(file)]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the run ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return dict(json.loads((work / "out" / "metrics.json").read_text(encoding="utf-8")))


def measured(peaks: dict[str, int]) -> dict[str, int]:
    """Bytes by phase. Results are written between the phases, and the forecast has that with the training."""
    found = {phase: peaks[phase] for phase in PHASES if phase in peaks}
    found["train"] = max(found["train"], peaks["between"])
    return found


def forecast(work: Path, config: dict[str, Any], options: argparse.Namespace, *, on_cpu: bool, encoded: bool) -> Any:
    """The bill of the same run."""
    from xflux_trainer import bfl_spec, memory
    from xflux_trainer.config import TrainConfig

    return memory.forecast(
        TrainConfig(**config), bfl_spec.read_local(work / "model"), world_size=options.ranks,
        strategy=options.strategy, device="cpu" if on_cpu else "cuda", encoded=encoded,
    )  # fmt: skip


def told(terms: Sequence[Any]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Bytes of the host by phase, and the terms that they are made of."""
    phases = {phase: sum(term.bytes for term in terms if term.phase == phase) for phase in PHASES}
    return {phase: size for phase, size in phases.items() if size}, [term._asdict() for term in terms]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'MiB':<16}{'':<10}" + "".join(f"{phase:>9}" for phase in PHASES)]
    for row in rows:
        for kind in ("measured", "forecast"):
            cells = [f"{row[kind][phase] / MIB:,.0f}" if phase in row[kind] else "-" for phase in PHASES]
            lines.append(f"{row['start']:<16}{kind:<10}" + "".join(f"{cell:>9}" for cell in cells))
        both = [(row["forecast"].get(phase), row["measured"].get(phase)) for phase in PHASES]
        off = [f"{want / size - 1:+.1%}" if want and size else "-" for want, size in both]
        lines.append(f"{'':<26}" + "".join(f"{cell:>9}" for cell in off))
    return "\n".join(lines)


def missed(rows: list[dict[str, Any]], bar: float) -> list[str]:
    return [
        f"{row['start']}, {phase}: {row['forecast'][phase] / MIB:,.0f} MiB forecast, {size / MIB:,.0f} measured"
        for row in rows
        for phase, size in row["measured"].items()
        if phase in row["forecast"]
        if abs(row["forecast"][phase] / size - 1) > bar
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=children.REPO / "output" / "host-memory", help="on a local disk")
    parser.add_argument("--layers", default="1,1", metavar="D,S", help="double and single blocks; full size is 19,38")
    parser.add_argument("--pixels", type=int, default=256, help="of the images, and of those that are drawn")
    parser.add_argument("--mixed-precision", default="bf16", choices=("bf16", "no"))
    parser.add_argument("--stream-blocks", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument(
        "--strategy", default="ddp", choices=tuple(children.SHARED), help="how several ranks share the work"
    )
    parser.add_argument("--use-cpu", action="store_true", help="although there is a GPU")
    parser.add_argument("--results", type=Path, default=children.RESULTS)
    options = parser.parse_args()
    if options.ranks == 1:
        options.strategy = "single"
    import torch
    from xflux_trainer import memory_host

    on_cpu = options.use_cpu or not torch.cuda.is_available()
    work: Path = options.work.absolute()
    double, single = children.numbers(options.layers)
    write_model(work / "model", (double, single), "cpu" if on_cpu else "cuda")
    write_images(work / "images")
    config = settings(work, options)
    rows = []
    for start, encoded in (("first", False), ("encoded", True)):
        metrics = run(work, config, options, on_cpu=on_cpu)
        bill = forecast(work, config, options, on_cpu=on_cpu, encoded=encoded)
        for number, rank in enumerate(metrics["per_rank"]):
            peaks = rank["host"]
            foretold, terms = told(bill.host_of_others if number else bill.host)
            name = start if options.ranks == 1 else f"{start}, rank {number}"
            rows.append(
                {"start": name, "measured": measured(peaks), "peaks": peaks, "forecast": foretold, "terms": terms}
            )
    print(f"{metrics['device']}, torch {metrics['versions']['torch']}, {double} + {single} blocks, {options.pixels} px")
    print(table(rows))
    shown = {key: value for key, value in config.items() if not key.endswith("_dir") and key != "pretrained_model"}
    body = {
        "layers": [double, single],
        "ranks": options.ranks,
        "strategy": options.strategy,
        "device": metrics["device"],
        "config": shown,
        "rows": rows,
    }
    of = "" if options.ranks == 1 else f"{options.ranks}-ranks-{options.strategy}"
    print(children.save(options.results, "host_memory", "host_memory.py", body, of))
    problems = missed(rows, memory_host.ERROR_BAR)
    for line in problems:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
