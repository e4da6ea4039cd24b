"""Whether a frozen base held and multiplied in fp8 trains adapters as bf16 does: 200 steps of the demo, three seeds.

    python benchmarks/fp8_curve.py [--steps 200] [--seeds 0,1,2] [--size 256] [--jobs 2] [--cpu]

Each run is the trainer's own (`python -m xflux_trainer train`) on examples/demo's photographs and its small FLUX. The
noise, the times and the order of the images follow from the seed, so that two runs of one seed differ by what computes
alone; between seeds all of it differs, and the adapters' first values too. That spread is the yardstick:

* Curves are running means over 20 steps. `noise` is the standard deviation between the bf16 seeds, its root mean square
  over all steps: one width for all of them, as three curves cross and a band between their extremes has no width there.
* An arm's `distance` is the largest over all steps of |mean of its seeds - mean of the bf16 seeds|.
* The training loss spreads mostly by which times were drawn. The held-out loss is taken at the same images, times and
  noise in every run, so that its spread over the seeds is that of the training alone. It is compared in the same way,
  after the last step.
* The seeds' draws are the same in every arm and cancel in a distance, which is why a small one can be seen at all;
  `from bf16, same seed` is the mean relative difference of the curves seed by seed.

An arm is within the noise where both distances are at most 1. A control that must not be has half the learning rate:
where the yardstick cannot tell it from bf16, it could not have told anything. Beside fp8 stands bf16 by diffusers'
own blocks, which is what another way of rounding does by itself. Prints a table, writes
benchmarks/results/fp8_curve-MACHINE-DATE.json. Exit 1 where fp8 is outside of the noise or the control is inside.
On a GPU fp8 needs compute capability 8.9.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import children
import yaml
from children import REPO, RESULTS, Outcome, numbers

DEMO = REPO / "examples" / "demo"
WINDOW = 20
"""Steps of a running mean."""
BASE = "bf16"
CONTROL = "bf16, half the learning rate"
ARMS: dict[str, dict[str, Any]] = {
    BASE: {},
    "bf16, diffusers' blocks": {"kernels": "diffusers"},
    "fp8": {"quantization": "fp8-dynamic"},
    "fp8, modulation too": {"quantization": "fp8-dynamic", "modulation": "quantize"},
    CONTROL: {"learning_rate": 1.5e-3},
}
"""What each run is told beside the demo's own file."""
FP8 = [name for name in ARMS if name.startswith("fp8")]

Curves = dict[str, list[list[float]]]
"""By arm, for each seed the losses of its steps."""


# Runs ----------------------------------------------------------------------------------------------------


def train_config(work: Path, name: str, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The demo's train file with what is measured changed."""
    keys: dict[str, Any] = yaml.safe_load((DEMO / "train.yaml").read_text("utf-8"))
    data = {**keys["data_config"], "img_dir": str(DEMO / "photos"), "img_size": options.size}
    return keys | {
        "data_config": data, "heldout_dir": str(DEMO / "heldout"), "pretrained_model": str(work / "flux"),
        "output_dir": str(work / name), "cache_dir": str(work / "cache"), "max_train_steps": options.steps,
        "checkpointing_steps": options.steps, "checkpoints_total_limit": 1, "disable_sampling": True,
        "report_to": "none", "kernels": "fused", "seed": seed, **ARMS[arm],
    }  # fmt: skip


def train(work: Path, arm: str, seed: int, options: argparse.Namespace) -> Outcome:
    """One run: the losses of its steps, the held-out loss before and after, seconds per step."""
    name = f"{list(ARMS).index(arm)}-{seed}"
    config = work / f"{name}.yaml"
    config.write_text(yaml.safe_dump(train_config(work, name, arm, seed, options)), encoding="utf-8")
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
    environment = {**os.environ, **threads} | ({"ACCELERATE_USE_CPU": "true"} if options.cpu else {})
    done = subprocess.run(
        [sys.executable, "-m", "xflux_trainer", "train", "--config", str(config)],
        cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"error: {arm}, seed {seed}: exit code {done.returncode}\n{done.stdout[-2000:]}")
    lines = (work / name / "metrics.jsonl").read_text("utf-8").splitlines()
    metrics = json.loads((work / name / "metrics.json").read_text("utf-8"))
    found = {
        "losses": [json.loads(line)["loss"] for line in lines], "device": metrics["device"],
        "seconds_per_step": metrics["seconds_per_step"],
        "heldout_before": metrics["heldout_loss"]["before"], "heldout_after": metrics["heldout_loss"]["after"],
    }  # fmt: skip
    print(f"{arm}, seed {seed}: held-out loss {found['heldout_before']:.4f} before, {found['heldout_after']:.4f} after,"
          f" {found['seconds_per_step']:.3f} s a step", flush=True)  # fmt: skip
    return found


def train_all(work: Path, options: argparse.Namespace) -> dict[str, list[Outcome]]:
    """By arm, for each seed. The first run encodes the images, for all of them."""
    flux = [sys.executable, str(DEMO / "make_tiny_flux.py"), str(work / "flux")]
    subprocess.run(flux, check=True, stdout=subprocess.DEVNULL)
    wanted = [(arm, seed) for arm in ARMS for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        first = train(work, *wanted[0], options)
        rest = pool.map(lambda each: train(work, *each, options), wanted[1:])
        found = dict(zip(wanted, [first, *rest], strict=True))
    return {arm: [found[arm, seed] for seed in options.seeds] for arm in ARMS}


# Comparison ----------------------------------------------------------------------------------------------


def smooth(curve: list[float], window: int) -> list[float]:
    """Means of every `window` steps that follow one another."""
    return [statistics.fmean(curve[k : k + window]) for k in range(len(curve) - window + 1)]


def spread(curves: list[list[float]]) -> float:
    """The standard deviation between curves, its root mean square over all places."""
    return statistics.fmean(statistics.variance(values) for values in zip(*curves, strict=True)) ** 0.5


def distance(curves: list[list[float]], others: list[list[float]]) -> float:
    """The largest difference of two means of curves at any place."""
    means = [[statistics.fmean(values) for values in zip(*each, strict=True)] for each in (curves, others)]
    return max(abs(a - b) for a, b in zip(*means, strict=True))


def compare(curves: Curves, heldout: dict[str, list[float]], window: int = WINDOW) -> dict[str, Any]:
    """Of each arm but `BASE` its distances in units of the noise, and how far each seed is from its own bf16 run.

    `heldout` has the held-out losses after the last step, one a seed.
    """
    smoothed = {arm: [smooth(curve, window) for curve in each] for arm, each in curves.items()}
    ends = {arm: [[value] for value in values] for arm, values in heldout.items()}
    noise = {"training": spread(smoothed[BASE]), "heldout": spread(ends[BASE])}
    arms = {}
    for arm in (name for name in curves if name != BASE):
        off = {
            "training": distance(smoothed[arm], smoothed[BASE]) / noise["training"],
            "heldout": distance(ends[arm], ends[BASE]) / noise["heldout"],
        }
        pairs = list(zip(smoothed[arm], smoothed[BASE], strict=True))
        arms[arm] = {
            "distance_in_noise": off,
            "within": max(off.values()) <= 1,
            "relative_difference_by_seed": [
                statistics.fmean(abs(a - b) / b for a, b in zip(*pair, strict=True)) for pair in pairs
            ],
            "relative_bias_by_seed": [
                statistics.fmean((a - b) / b for a, b in zip(*pair, strict=True)) for pair in pairs
            ],
        }
    return {"noise": noise, "arms": arms}


def table(found: dict[str, Any], heldout: dict[str, list[float]]) -> str:
    """One line an arm."""
    names = (
        "arm",
        "held-out loss, mean",
        "from bf16, same seed",
        "training curve, noises",
        "held-out, noises",
        "verdict",
    )
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---|" * (len(names) - 1)]
    lines.append(f"| {BASE} | {statistics.fmean(heldout[BASE]):.4f} | – | 1 | 1 | the yardstick |")
    for arm, row in found["arms"].items():
        off = row["distance_in_noise"]
        lines.append(
            f"| {arm} | {statistics.fmean(heldout[arm]):.4f} | "
            f"{statistics.fmean(row['relative_difference_by_seed']):.3%} | {off['training']:.3f} | "
            f"{off['heldout']:.3f} | {'within' if row['within'] else 'outside'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=numbers, default=(0, 1, 2))
    parser.add_argument("--size", type=int, default=256, help="pixels of the images' long side")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU though there is a GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    if len(options.seeds) < 2 or options.steps < 2 * WINDOW:
        print(f"error: a spread needs two seeds, and curves {2 * WINDOW} steps.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        runs = train_all(Path(folder), options)
    heldout = {arm: [run["heldout_after"] for run in each] for arm, each in runs.items()}
    found = compare({arm: [run["losses"] for run in each] for arm, each in runs.items()}, heldout)
    print(f"\n{table(found, heldout)}", flush=True)
    body = {
        "device": runs[BASE][0]["device"], "steps": options.steps, "seeds": options.seeds, "pixels": options.size,
        **found, "runs": {arm: [_short(run) for run in each] for arm, each in runs.items()},
    }  # fmt: skip
    print(f"\nwritten to {children.save(options.results, 'fp8_curve', 'fp8_curve.py', body)}")
    right = all(found["arms"][arm]["within"] for arm in FP8) and not found["arms"][CONTROL]["within"]
    return 0 if right else 1


def _short(run: Outcome) -> Outcome:
    """Without every step's loss: the means of 20 steps each."""
    losses = run["losses"]
    means = [statistics.fmean(losses[k : k + WINDOW]) for k in range(0, len(losses), WINDOW)]
    kept = {key: value for key, value in run.items() if key not in ("losses", "device")}
    return {**kept, f"loss_by_{WINDOW}_steps": [round(mean, 5) for mean in means]}


if __name__ == "__main__":
    sys.exit(main())
