"""Train a LoRA on a full-size FLUX.1-dev with random weights through the doctor, and measure it.

    python benchmarks/full_size_lora.py [--model DIR] [--work DIR] [--steps 20] [--gpu-limit-gib N]

Rank 16, 1024x1024, batch 1, bf16, every block checkpointed, one GPU. Writes the weights (34 GB, kept for the next
time) and a dataset of the demo's photos when they are missing, runs `xflux-doctor run`, prints a table out of
metrics.json and writes benchmarks/results/. Exit 1 when the device's allocated peak is above 26 GiB or the
host's own memory while loading reaches 8 GiB; any other failure gives the doctor's exit code, or 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageOps

REPO = Path(__file__).resolve().parent.parent
PHOTOS = REPO / "examples" / "demo" / "photos"
RESULTS = REPO / "benchmarks" / "results"
GIB = 1 << 30
SIZE = 1024
DEVICE_LIMIT_GIB, HOST_LOAD_LIMIT_GIB = 26.0, 8.0


def write_dataset(folder: Path) -> None:
    """The demo's photos cut to squares and scaled up, so that every step has the full 4096 image tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(PHOTOS.glob("*.jpg")):
        with Image.open(source) as photo:
            square = ImageOps.fit(photo.convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS)
        square.save(folder / source.name, quality=92)
        (folder / source.name).with_suffix(".json").write_bytes(source.with_suffix(".json").read_bytes())


def train_config(work: Path, model: Path, steps: int) -> dict[str, Any]:
    """The training file, in X-Flux's keys and ours."""
    return {
        "model_name": "flux-dev",
        "pretrained_model": str(model),
        "data_config": {"train_batch_size": 1, "num_workers": 2, "img_size": SIZE, "img_dir": str(work / "images")},
        "output_dir": str(work / "output"),
        "report_to": "none",
        "max_train_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "mixed_precision": "bf16",
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "rank": 16,
        "lora_targets": "xflux",
        "checkpointing_steps": steps,
        "checkpoints_total_limit": 1,
        "heldout_samples": 1,
        "sample_every": 0,
        "sample_width": SIZE,
        "sample_height": SIZE,
        "sample_steps": 4,
        "seed": 0,
    }


def accelerate_config() -> dict[str, Any]:
    """One process on one GPU."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "NO",
        "downcast_bf16": "no",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "bf16",
        "num_machines": 1,
        "num_processes": 1,
        "use_cpu": False,
    }


def run(argv: list[str], seconds: float) -> int:
    """Run a command in its own session, its output shown; the whole group ends with us or at the deadline."""
    print("$ " + " ".join(argv), flush=True)
    child = subprocess.Popen(argv, cwd=REPO, start_new_session=True)
    try:
        return child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"error: still running after {seconds:.0f} s: stopped. Give --deadline more seconds.", file=sys.stderr)
        return 124
    finally:
        if child.poll() is None:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM first, so that the doctor ends the trainer, which has a session of its own."""
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def gpu() -> dict[str, str]:
    """Name, driver and memory of the GPU that the run uses, as nvidia-smi has them."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"  # an index or a UUID
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", f"--id={first}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        name, driver, memory = (part.strip() for part in answer.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {"name": "unknown", "driver": "unknown", "memory": "unknown"}
    return {"name": name, "driver": driver, "memory": memory}


def measured(metrics: dict[str, Any]) -> dict[str, Any]:
    """The benchmark's numbers out of the trainer's metrics.json."""
    device, host = metrics["peak_device_bytes"], metrics["peak_host_bytes"]
    return {
        "steps": metrics["steps"],
        "seconds_per_step": metrics["seconds_per_step"],
        "seconds_total": metrics["seconds_total"],
        "trained_parameters": metrics["trained_parameters"],
        "device_allocated_gib": {phase: peak["allocated"] / GIB for phase, peak in device.items()},
        "device_reserved_gib": {phase: peak["reserved"] / GIB for phase, peak in device.items()},
        "host_own_gib": {phase: peak / GIB for phase, peak in host.items()},
    }


def table(numbers: dict[str, Any], machine: dict[str, str], torch: str) -> str:
    allocated, reserved, host = (
        numbers[key] for key in ("device_allocated_gib", "device_reserved_gib", "host_own_gib")
    )
    lines = [
        f"{machine['name']} ({machine['memory']}), driver {machine['driver']}, torch {torch}",
        f"FLUX.1-dev LoRA r16, {SIZE} px, batch 1, bf16, all blocks checkpointed, {numbers['steps']} steps",
        "",
        f"{'seconds per step (median)':<28}{numbers['seconds_per_step']:>10.3f}",
        f"{'seconds in all':<28}{numbers['seconds_total']:>10.1f}",
        "",
        f"{'peak, GiB':<12}{'allocated':>12}{'reserved':>12}{'host':>12}",
    ]
    for phase in dict.fromkeys([*host, *allocated]):
        cells = [f"{column[phase]:.2f}" if phase in column else "-" for column in (allocated, reserved, host)]
        lines.append(f"{phase:<12}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def judge(numbers: dict[str, Any]) -> list[str]:
    """What is over its limit."""
    device = numbers["device_allocated_gib"].get("overall")
    load = numbers["host_own_gib"].get("load")
    over = []
    if device is None:
        over.append("no device memory was measured: the run was not on a GPU")
    elif device > DEVICE_LIMIT_GIB:
        over.append(f"the device's allocated peak is {device:.2f} GiB; the limit is {DEVICE_LIMIT_GIB:g}")
    if load is None:
        over.append("the host's memory while loading was not measured")
    elif load >= HOST_LOAD_LIMIT_GIB:
        over.append(f"the host held {load:.2f} GiB while loading; it must stay below {HOST_LOAD_LIMIT_GIB:g}")
    return over


def write_inputs(options: argparse.Namespace) -> tuple[Path, Path]:
    """Dataset and configs in the work folder; returns the two configs' paths."""
    work: Path = options.work.absolute()
    write_dataset(work / "images")
    train, accelerate = work / "train.yaml", work / "accelerate_config.yaml"
    config = train_config(work, options.model.absolute(), options.steps)
    train.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    accelerate.write_text(yaml.safe_dump(accelerate_config(), sort_keys=False), "utf-8")
    return train, accelerate


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=REPO / "output" / "flux-dev-random")
    parser.add_argument("--work", type=Path, default=REPO / "output" / "full-size-lora")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gpu-limit-gib", type=float, help="hold the job to this much GPU memory")
    parser.add_argument("--stack", default="cuda13", help="the stack that the packages are held against")
    parser.add_argument("--deadline", type=float, default=3600, metavar="S", help="seconds for each of both commands")
    options = parser.parse_args()

    writer = [sys.executable, str(REPO / "benchmarks" / "write_flux_weights.py"), str(options.model.absolute())]
    if code := run(writer, options.deadline):
        return code
    train, accelerate = write_inputs(options)
    metrics_file = options.work.absolute() / "output" / "metrics.json"
    metrics_file.unlink(missing_ok=True)  # an earlier run's numbers must not be taken for this one's
    doctor = [sys.executable, "-m", "xflux_doctor.cli", "run", "--config", str(train)]
    doctor += ["--accelerate-config", str(accelerate), "--stack", options.stack, "--offline", "--yes"]
    if options.gpu_limit_gib is not None:
        doctor += ["--gpu-limit", f"{options.gpu_limit_gib:g}"]
    if code := run(doctor, options.deadline):
        return code if code != 1 else 2
    return report(options, metrics_file, train)


def report(options: argparse.Namespace, metrics_file: Path, train: Path) -> int:
    """Print the table, write the result, and say whether the limits were kept."""
    try:
        metrics = json.loads(metrics_file.read_text("utf-8"))
        numbers = measured(metrics)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {metrics_file} cannot be used: {error!r}. Look at the run's log beside it.", file=sys.stderr)
        return 2
    machine = gpu()
    print("\n" + table(numbers, machine, metrics["versions"]["torch"]))
    over = judge(numbers)
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
    result = {
        "benchmark": "full_size_lora",
        "date": date,
        "command": " ".join(["python", "benchmarks/full_size_lora.py", *_shown_options(options)]),
        "machine": machine,
        "versions": metrics["versions"],
        "config": _without_paths(yaml.safe_load(train.read_text("utf-8"))),
        "measured": numbers,
        "limits": {"device_allocated_gib": DEVICE_LIMIT_GIB, "host_load_gib": HOST_LOAD_LIMIT_GIB},
        "over": over,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"full_size_lora-{slug}-{date}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    partial.replace(file)
    print(f"\nwritten to {file.relative_to(REPO)}")
    for sentence in over:
        print(f"over the limit: {sentence}", file=sys.stderr)
    return 1 if over else 0


def _shown_options(options: argparse.Namespace) -> list[str]:
    """The options that change what is measured; folders are this machine's own business."""
    shown = ["--steps", str(options.steps)]
    return shown + (["--gpu-limit-gib", f"{options.gpu_limit_gib:g}"] if options.gpu_limit_gib is not None else [])


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key not in ("pretrained_model", "output_dir")}
    config["data_config"] = {key: value for key, value in config["data_config"].items() if key != "img_dir"}
    return config


if __name__ == "__main__":
    sys.exit(main())
