"""The bill against the trainer's own steps where there is no GPU: on torch's meta device, of sizes without values.

    python benchmarks/memory_meta.py [--rows 'lora-*,finetune-*'] [--beside FILE]

Model classes, adapters, blocks, checkpointing, loss, optimizer and loop are the trainer's; weights and images are made
up. What stands in for attention and for launches, and what is not seen, is said in meta_device.py. A step's peak is the
most bytes of all storages that were alive at one time, rounded as torch's allocator does. cuBLAS' workspaces are no
tensors of the step: the bill's term for them is added to what was seen. Two steps are taken: the second finds the
optimizer's states there. Steps that a card records are launched here, their gradients in one place as for a recording.

Beside them stands what memory.py measured on a card, where a result has the row: from the newest
results/memory-nvidia-*.json or from --beside FILE. (With other releases of torch and diffusers the latter's blocks keep
other things: the bill knows, that result does not.) Written to results/memory-meta-TORCH-DATE.json, with every
term of the bill. Exit 1 when the bill is more than 3 % off what was seen.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import children
import meta_device
import step_ours
import torch
from children import GIB, RESULTS, Outcome, numbers
from memory_rows import BACKWARD, KEPT, ROWS, Row, bill, size, spec_of
from meta_device import META
from xflux_trainer import graphs, memory_diffusers, memory_fused, train
from xflux_trainer.errors import UserError
from xflux_trainer.ranks import Launch, Ranks
from xflux_trainer.signals import Stop
from xflux_trainer.spec import FluxSpec

STEPS = 2
BOUND = 0.03
UNSEEN = ("cuBLAS",)
"""Terms of the bill that no tensor of the step is."""
CHOSEN = (
    "lora-4-xflux", "lora-kept", "lora-kept-1152x896", "lora-kept-1024-batch2", "lora-kept-512-batch4",
    "lora-tier28-768-batch2", "lora-checkpointed-1024-batch4", "lora-64-attn-tier28", "lora-128-diffusers-kept-512",
    "lora-launched-kept", "lora-accumulation2-kept-512", "lora-backward-128", "lora-fp32-512", "diffusers-checkpointed",
    "diffusers-kept-512", "diffusers-xflux-kept", "finetune-adafactor", "finetune-adafactor-tier28-512-batch4",
    "finetune-adafactor-tier50-1536-batch2", "finetune-adamw8bit", "finetune-adamw8bit-kept-512",
    "finetune-text-attention", "controlnet",
)  # fmt: skip
LARGER = [
    Row("finetune-adamw", {**BACKWARD, "optimizer": "adamw"}),
    Row("finetune-adamw-after-512-batch2", {"mode": "finetune", "optimizer": "adamw", **size(512, 2)}),
    Row("lora-kept-1536-batch4", {**KEPT, **size(1536, 4)}),
]
"""Some that do not fit one card of 141 GB, or were not measured."""
HEAD = (
    "| row | px | batch | forecast GiB | seen | difference | on a card | seen against it | s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def choose(patterns: str) -> list[Row]:
    """The rows that are asked for, of all that memory.py has; without a pattern those chosen here."""
    every = [*ROWS, *LARGER]
    if not patterns:
        return [row for row in every if row.name in CHOSEN or row in LARGER]
    return [row for row in every if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns.split(","))]


def take(row: Row, spec: FluxSpec) -> Outcome:
    """Forecast a row and take its steps. What cannot be had here has the outcome `not there`."""
    made = bill(row, spec, "cuda", triton=True, norms=_norms())
    terms = {term.name: 0 for term in made.gpu if term.phase == "train"}
    for term in made.gpu:
        if term.phase == "train":
            terms[term.name] += term.bytes
    config = row.config()
    found = {
        "row": row.name, "config": row.keys, "shape": row.shape or (config.img_size, config.img_size),
        "batch": config.train_batch_size, "forecast_bytes": sum(terms.values()), "terms": terms,
    }  # fmt: skip
    why = _why_not(row)
    if why:
        return {**found, "outcome": "not there", "why": why}
    started = time.perf_counter()
    try:
        seen = _steps(row, spec)
    except UserError as error:
        return {**found, "outcome": "not there", "why": str(error)}
    seen["seconds"] = round(time.perf_counter() - started, 1)
    unseen = sum(terms.get(name, 0) for name in UNSEEN)
    error = found["forecast_bytes"] / (seen["seen_bytes"] + unseen) - 1
    return {**found, "outcome": "seen", **seen, "unseen_bytes": unseen, "error": error}


def _norms() -> memory_diffusers.Norms:
    """As the doctor asks for it: by the releases that are installed here."""
    diffusers, torch_ = (tuple(map(int, version(name).split(".")[:2])) for name in ("diffusers", "torch"))
    return memory_diffusers.norms_of(diffusers, torch_)


def _why_not(row: Row) -> str:
    """What a device without values cannot have."""
    config = row.config()
    if config.quantization != "none":
        return "a base in fewer bits is made of values, by packages that look at them"
    if config.stream_blocks or config.modulation == "stream":
        return "streamed weights wait in pinned memory, and there is no card to pin it for"
    return ""


def _steps(row: Row, spec: FluxSpec) -> Outcome:
    with tempfile.TemporaryDirectory() as folder, meta_device.card() as ledger:
        run = _assemble(row, spec, Path(folder))
        before = ledger.live
        ledger.reset_peak()
        clock: Any = step_ours.Clock(STEPS, META)
        with contextlib.suppress(step_ours.Enough):
            train._loop(run, clock, Stop())
        run.meter.host.stop()
        return {"before_bytes": before, "seen_bytes": ledger.peak, "trained_parameters": run.trained}


def _assemble(row: Row, spec: FluxSpec, folder: Path) -> Any:
    """A run that can take its first step on the meta device, as on a card."""
    config = row.config()
    keys = {"mixed_precision": "bf16", "lora_targets": config.lora_targets, **row.keys}
    if memory_fused.computes(config, "single", "cuda"):
        keys["kernels"] = "fused"  # what `auto` takes on a card
    keys = {key: value for key, value in keys.items() if key not in ("img_size", "train_batch_size")}
    config = step_ours.config_of(keys, config.img_size, config.train_batch_size, folder)
    ranks = Ranks(Launch())
    ranks.device = META
    run = step_ours.assemble(config, spec, ranks, row.shape)
    module: Any = run.trainee.module
    fast = getattr(module, "velocity", module).fast
    if fast is not None:
        attention = meta_device.flash_attn_4()
        for block in (*fast.doubles, *fast.singles):
            block.attention = attention
    stepper: Any = run.stepper
    if memory_fused.records(config, "single", "cuda") and fast is not None:
        trained = run.trainee.trained.values()
        stepper.recorder = graphs.Recorder(fast, trained, config.gradient_accumulation_steps, META)
        stepper.recorder.broken = "there is nothing to record on meta"
    return run


# The table ---------------------------------------------------------------------------------------------------


def newest() -> Path | None:
    """The last result of memory.py on a card."""
    files = RESULTS.glob("memory-nvidia-*.json")
    return max(files, key=lambda file: file.stem[-len("2026-01-01") :], default=None)


def measured(file: Path | None) -> dict[str, int]:
    """By row what a card's allocator gave at the most."""
    rows = json.loads(file.read_text("utf-8"))["rows"] if file else []
    return {row["row"]: row["allocated_bytes"] for row in rows if "allocated_bytes" in row}


def line(row: Outcome) -> str:
    width, height = row["shape"]
    cells = [row["row"], f"{width}" if width == height else f"{width}x{height}", str(row["batch"])]
    cells.append(f"{row['forecast_bytes'] / GIB:.2f}")
    if row["outcome"] == "seen":
        cells += [f"{(row['seen_bytes'] + row['unseen_bytes']) / GIB:.2f}", f"{row['error']:+.2%}"]
    else:
        cells += ["–", row["why"]]
    on_card = row.get("measured_bytes")
    cells.append(f"{on_card / GIB:.2f}" if on_card else "–")
    cells.append(f"{row['seen_error']:+.2%}" if "seen_error" in row else "–")
    cells.append(str(row.get("seconds", "–")))
    return f"| {' | '.join(cells)} |"


def summary(rows: list[Outcome]) -> dict[str, Any]:
    """How far the forecast is off what was seen, and that off what a card gave: median and largest, and whose."""
    found: dict[str, Any] = {}
    for name in ("error", "seen_error"):
        errors = {row["row"]: row[name] for row in rows if name in row}
        if errors:
            worst = max(errors, key=lambda row: abs(errors[row]))
            median = statistics.median(map(abs, errors.values()))
            found[name] = {"rows": len(errors), "median": median, "worst": errors[worst], "worst_row": worst}
    return found


def said(found: dict[str, Any]) -> str:
    texts = {"error": "The forecast beside what was seen", "seen_error": "What was seen beside a card"}
    lines = []
    for name, own in found.items():
        worst = f"{own['worst']:+.2%} ({own['worst_row']})"
        lines.append(f"{texts[name]}, {own['rows']} rows: median {own['median']:.2%}, worst {worst}.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", default="", help="names or patterns, with commas between them")
    parser.add_argument("--beside", type=Path, default=newest(), metavar="FILE", help="a result of memory.py")
    parser.add_argument("--layers", type=numbers, default=(19, 38), metavar="D,S", help="double and single blocks")
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    rows = choose(options.rows)
    if not rows:
        print(f"error: no row is called {options.rows}.", file=sys.stderr)
        return 2
    whole = (options.layers, options.heads) == ((19, 38), 24)
    cards = measured(options.beside) if whole else {}
    done: list[Outcome] = []
    print(HEAD, flush=True)
    for row in rows:
        found = take(row, spec_of(options.layers, options.heads))
        if row.name in cards:
            found["measured_bytes"] = cards[row.name]
            if found["outcome"] == "seen":
                found["seen_error"] = (found["seen_bytes"] + found["unseen_bytes"]) / cards[row.name] - 1
        done.append(found)
        print(line(found), flush=True)
    sums = summary(done)
    release = torch.__version__.partition("+")[0]
    beside = options.beside.name if cards else None
    body = {"steps": STEPS, "layers": options.layers, "beside": beside, "summary": sums, "rows": done}
    file = children.save(options.results, "memory-meta", "memory_meta.py", body, of=release)
    print(f"\n{said(sums)}\n\nwritten to {file.name}")
    return 1 if any(abs(row.get("error", 0.0)) > BOUND for row in done) else 0


if __name__ == "__main__":
    sys.exit(main())
