"""A LoRA step of FLUX.1 side by side, in one run on one card: this trainer's, diffusers' example's and X-Flux's.

    python benchmarks/step.py [--rows 'ours-*,diffusers*'] [--sizes 512,1024] [--batches 1,4] [--xflux CHECKOUT]

Weights are made up, of full size and in bf16; 512 text tokens, rank 16. Ours is the trainer's own loop with its reader,
optimizer and bookkeeping; the peers' are their own model code, text and latents encoded before. What the card can do is
measured first: matrix products, and attention with each kernel. Every row runs in a process of its own with a deadline,
and all rows take turns, `--rounds` times, so that neither order nor heat decides. Prints tables, and writes
benchmarks/results/step-GPU-DATE.json and .svg. Exit 1 when a row failed for another reason than memory or a missing
part.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import children
from children import GIB, RESULTS, Outcome, numbers


@dataclass(frozen=True)
class Row:
    """One line: a name, what it shows, the train config's keys beside `OURS`, and whose step it is."""

    name: str
    about: str
    keys: dict[str, Any] = field(default_factory=dict)
    step: str = "ours"


OURS = {"rank": 16, "lora_targets": "diffusers"}
KEPT = {"gradient_checkpointing": False}
ROWS = [
    Row("ours-kept", "this trainer, nothing recomputed", KEPT),
    Row("ours-checkpointed", "this trainer, every block recomputed"),
    Row("ours-checkpointed-stream", "the same, 4 of 57 blocks streamed", {"stream_blocks": 4}),
    Row(
        "ours-fp8-kept",
        "this trainer, base held and multiplied in fp8, nothing recomputed",
        {"quantization": "fp8-dynamic", "modulation": "quantize", **KEPT},
    ),
    Row(
        "ours-int4",
        "this trainer, base in int4, every block recomputed",
        {"quantization": "int4", "modulation": "quantize"},
    ),
    Row("diffusers-kept", "diffusers' example, nothing recomputed", KEPT, "diffusers"),
    Row("diffusers-checkpointed", "diffusers' example, every block recomputed", {}, "diffusers"),
    Row("xflux", "X-Flux, base in bf16, nothing recomputed", KEPT, "xflux"),
]


# One row, in a process of its own ------------------------------------------------------------------------


def measure(row: Row, options: argparse.Namespace) -> None:
    """Build the model once, take the steps at every size and batch, and write each as soon as it is there."""
    import torch
    from xflux_trainer.errors import UserError

    done: dict[str, Outcome] = {}
    model: Any = None
    with tempfile.TemporaryDirectory() as folder:
        for pixels, size in places(options):
            try:
                if row.step == "ours":
                    model, found = ours(row, model, pixels, size, options, Path(folder))
                else:
                    model, found = peer(row, model, pixels, size, options)
                outcome = {"outcome": "measured", **found}
            except torch.cuda.OutOfMemoryError as error:
                outcome = {"outcome": "out of memory", "why": str(error).split(". ")[0]}
            except (UserError, ImportError) as error:
                outcome = {"outcome": "not there", "why": str(error)}
            if outcome["outcome"] != "measured" and torch.cuda.is_available():
                torch.cuda.empty_cache()
            done[place(pixels, size)] = outcome
            children.write(options.result, done)


def ours(row: Row, run: Any, pixels: int, size: int, options: argparse.Namespace, folder: Path) -> tuple[Any, Outcome]:
    """The trainer's loop; `run` is the one of an earlier size, or None."""
    import step_ours
    from random_flux import spec_of
    from xflux_trainer.ranks import Launch, Ranks

    config = step_ours.config_of({**OURS, **row.keys}, pixels, size, folder)
    if run is None:
        ranks = Ranks(Launch())
        ranks.join()
        run = step_ours.assemble(config, spec_of(options.layers, options.heads), ranks)
    else:
        run = step_ours.resized(run, config)
    return run, {"trained_parameters": run.trained, **step_ours.take_steps(run, options.steps)}


def peer(row: Row, made: Any, pixels: int, size: int, options: argparse.Namespace) -> tuple[Any, Outcome]:
    """Another trainer's step; `made` is what an earlier size built, or None."""
    import step_peers
    import torch
    from random_flux import batch, spec_of
    from xflux_trainer import model
    from xflux_trainer.cache import Batch
    from xflux_trainer.meter import WARM_UP

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = spec_of(options.layers, options.heads)
    if made is None:
        model.quiet_libraries()
        model.steady_attention(device)  # with cuDNN's, which torch chooses by itself, their backward passes died
        if row.step == "xflux":
            made = step_peers.XFlux(spec, device, options.xflux)
        else:
            made = step_peers.DiffusersExample(
                spec, device, checkpointing=row.keys.get("gradient_checkpointing", True)
            )  # fmt: skip
    batches = [batch(spec, pixels, size, number) for number in range(2)]
    batches = [Batch(*(each.to(device) for each in (one.latents, one.text, one.pooled))) for one in batches]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = step_peers.take_steps(made, batches, WARM_UP + options.steps)
    cuda = device.type == "cuda"
    return made, {
        **made.found,
        "seconds": seconds[WARM_UP:],
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB if cuda else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else 0.0,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def child(options: argparse.Namespace) -> int:
    """What the parent asked for: some ceilings, or a row."""
    if options.ceilings:
        import step_ceilings

        children.write(options.result, step_ceilings.measure(options.ceilings.split(","), options.heads))
    else:
        measure(next(row for row in ROWS if row.name == options.child), options)
    return 0


# All rows ------------------------------------------------------------------------------------------------


def place(pixels: int, size: int) -> str:
    return f"{pixels}px-batch{size}"


def places(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Pixels and batch sizes, the smallest first."""
    return [(pixels, size) for pixels in sorted(options.sizes) for size in sorted(options.batches)]


def base_argv(options: argparse.Namespace) -> list[str]:
    argv = [sys.executable, str(Path(__file__).resolve()), "--heads", str(options.heads)]
    return [*argv, "--layers", ",".join(map(str, options.layers)), "--steps", str(options.steps)]


def measure_ceilings(options: argparse.Namespace) -> dict[str, Any]:
    """TFLOP/s by name; what is not there says why."""
    import step_ceilings

    found: dict[str, Any] = {"not_there": {}}
    for names in step_ceilings.GROUPS:
        one = children.run([*base_argv(options), "--ceilings", ",".join(names)], options.deadline)
        found["not_there"] |= one.pop("not_there", {})
        if "outcome" in one:
            found["not_there"] |= {name: f"{one['outcome']}: {one['why']}" for name in names if name not in one}
        found |= {name: value for name, value in one.items() if isinstance(value, float)}
    return found


def measure_round(row: Row, wanted: list[tuple[int, int]], options: argparse.Namespace) -> dict[str, Outcome]:
    """One row at these sizes and batches, once: in one process, or in one for each."""
    groups = [wanted] if options.shared else [[one] for one in wanted]
    done: dict[str, Outcome] = {}
    for group in groups:
        argv = [*base_argv(options), "--child", row.name]
        argv += ["--sizes", ",".join(str(pixels) for pixels in sorted({pixels for pixels, _ in group}))]
        argv += ["--batches", ",".join(str(size) for size in sorted({size for _, size in group}))]
        argv += ["--xflux", str(options.xflux)] if options.xflux else []
        found = children.run(argv, options.deadline)
        trouble = {key: found.pop(key) for key in ("outcome", "why") if key in found}
        for one in group:
            done[place(*one)] = found.get(place(*one)) or trouble
    return done


def combine(row: Row, pixels: int, size: int, rounds: list[Outcome]) -> Outcome:
    """The rounds of one row at one size: a median each, and the median of them."""
    head = {"row": row.name, "about": row.about, "step": row.step, "config": row.keys, "pixels": pixels, "batch": size}
    measured = [one for one in rounds if one["outcome"] == "measured"]
    if not measured:
        return {**head, **rounds[-1]}
    medians = [statistics.median(one["seconds"]) for one in measured]
    spread = [second for one in measured for second in one["seconds"]]
    same = {key: value for key, value in measured[-1].items() if key != "seconds"}
    peaks = {key: max(one[key] for one in measured) for key in ("allocated_gib", "reserved_gib")}
    return {
        **head, **same, **peaks, "rounds": medians, "seconds_per_step": statistics.median(medians),
        "seconds_min": min(spread), "seconds_max": max(spread), "samples_per_second": size / statistics.median(medians),
    }  # fmt: skip


def judge(found: Outcome, options: argparse.Namespace, ceilings: dict[str, Any]) -> Outcome:
    """Add the useful TFLOP/s, and what of the limits is reached."""
    import step_ceilings
    from random_flux import spec_of

    if found["outcome"] != "measured":
        return found
    spec = spec_of(options.layers, options.heads)
    finetune = found["config"].get("mode") == "finetune"
    useful = step_ceilings.work(spec, found["pixels"], found["batch"], finetune=finetune)
    more: dict[str, Any] = {"tflops": useful.total / found["seconds_per_step"] / 1e12}
    best = max((ceilings[name] for name in step_ceilings.ATTENTION if name in ceilings), default=None)
    for kind in ("bf16", "fp8"):
        if best and kind in ceilings:
            more[f"limit_{kind}"] = useful.limit(ceilings[kind], best)
            more[f"of_limit_{kind}"] = more[f"limit_{kind}"] / found["seconds_per_step"]
    if "bf16" in ceilings:
        more["of_matmul_bf16"] = more["tflops"] / ceilings["bf16"]
    return {**found, **more}


def main() -> int:
    import step_report

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", default="*", help="names or patterns, with commas between them (--list shows them)")
    parser.add_argument("--list", action="store_true", help="show the rows and leave")
    parser.add_argument("--sizes", type=numbers, default=(512, 1024), help="pixels of the image's sides")
    parser.add_argument("--batches", type=numbers, default=(1, 4), help="images per step")
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after three that are not")
    parser.add_argument("--rounds", type=int, default=2, help="turns that every row takes")
    parser.add_argument("--shared", action="store_true", help="one process for all sizes and batches of a row")
    parser.add_argument("--layers", type=numbers, default=(19, 38), metavar="D,S", help="double and single blocks")
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 each")
    parser.add_argument("--deadline", type=float, default=300, metavar="S", help="seconds for each process")
    parser.add_argument("--xflux", type=Path, help="folder of an X-Flux checkout; without it X-Flux is left out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child or options.ceilings:
        return child(options)
    if options.list:
        print("\n".join(f"{row.name:28} {row.about}" for row in ROWS))
        return 0
    patterns = options.rows.split(",")
    chosen = [row for row in ROWS if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]
    chosen = [row for row in chosen if row.step != "xflux" or options.xflux]
    if not chosen:
        print(f"error: no row is called {options.rows}, or it is xflux without --xflux.", file=sys.stderr)
        return 2
    options.xflux = options.xflux and options.xflux.absolute()
    ceilings = measure_ceilings(options)
    print(step_report.ceilings(ceilings), flush=True)
    rounds: dict[tuple[str, str], list[Outcome]] = {}
    results: list[Outcome] = []
    for _ in range(options.rounds):
        for row in chosen:
            # What could not run in one round is not asked again.
            lost = {one for one in places(options) if not _ran(rounds.get((row.name, place(*one)), []))}
            wanted = [one for one in places(options) if one not in lost]
            for where, outcome in measure_round(row, wanted, options).items() if wanted else ():
                rounds.setdefault((row.name, where), []).append(outcome)
            results = [
                judge(combine(row, *one, rounds[row.name, place(*one)]), options, ceilings)
                for one in places(options) for row in chosen if (row.name, place(*one)) in rounds
            ]  # fmt: skip
            for one in results:
                if one["row"] == row.name:
                    print(step_report.line(one), one.get("why", ""), flush=True)
            # After each: a row that ends the machine loses no others.
            file = step_report.save(options, ceilings, results)
    print(f"\n{step_report.table(results)}\n\n{step_report.ratios(results)}\n\nwritten to {file}")
    return 1 if any(one["outcome"] in ("failed", "too slow") for one in results) else 0


def _ran(rounds: list[Outcome]) -> bool:
    return all(one["outcome"] == "measured" for one in rounds)


if __name__ == "__main__":
    sys.exit(main())
