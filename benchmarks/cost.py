"""What a step costs as work grows: seconds and memory over resolution and batch, and what ranks cost one another.

    python benchmarks/cost.py [--sizes 256,512,…] [--batches 1,2,4,8] [--row ours-checkpointed] [--ranks 1,2,4]

The grid is measured on the GPU (on the CPU without one) with a row of `step.py`, in one process, smallest first; what
does not fit says so. The ranks take the steps of a small model in the trainer's own loop under DDP, in turn with as
many ranks that take them each alone at the same time: what is left of the difference is the exchange. They are on GPUs
where there are enough, else on the CPU. Prints two tables and writes benchmarks/results/cost-GPU-DATE.json. Exit 1 when
something failed for another reason than memory or the deadline.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import children
import step
from children import RESULTS, Outcome, numbers

SIZES, BATCHES, RANKS = (256, 512, 768, 1024, 1280, 1536), (1, 2, 4, 8), (1, 2, 4)


# Resolution and batch ------------------------------------------------------------------------------------


def grid(options: argparse.Namespace) -> list[Outcome]:
    """The chosen row at every size and batch."""
    row = next(row for row in step.ROWS if row.name == options.row)
    wanted = step.places(options)
    found = step.measure_round(row, wanted, options)
    return [step.combine(row, *one, [found[step.place(*one)]]) for one in wanted]


def grid_table(rows: list[Outcome]) -> str:
    """Pixels down, batch across: seconds per step and GiB allocated."""
    batches = sorted({row["batch"] for row in rows})
    lines = ["| px | " + " | ".join(f"batch {size}" for size in batches) + " |", "|---|" + "---|" * len(batches)]
    for pixels in sorted({row["pixels"] for row in rows}):
        cells = [_cell(row) for row in rows if row["pixels"] == pixels]
        lines.append(f"| {pixels} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Outcome) -> str:
    if row["outcome"] != "measured":
        return str(row["outcome"])
    return f"{row['seconds_per_step']:.3f} s, {row['allocated_gib']:.1f} GiB"


# Ranks ---------------------------------------------------------------------------------------------------


def ranks_together(count: int, options: argparse.Namespace) -> Outcome:
    """So many ranks: a step of theirs with the exchange, and one without."""
    import torch

    gpus = max(options.ranks) <= torch.cuda.device_count()  # all on one kind of device, to be compared
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    argv += [str(Path(__file__).resolve()), "--child", "--steps", str(options.rank_steps)]
    argv += ["--rounds", str(options.rounds), "--sizes", str(options.rank_pixels)]
    argv += ["--layers", ",".join(map(str, options.rank_layers)), "--heads", str(options.rank_heads)]
    # One thread each, so that one rank is not given the cores that four share.
    more = {"OMP_NUM_THREADS": "1"} | ({} if gpus else {"ACCELERATE_USE_CPU": "true"})
    found = children.run(argv, options.deadline, **more)
    head = {"ranks": count, "device": "gpu" if gpus else "cpu"}
    if "outcome" in found:
        return {**head, **found}
    # The fastest round of each: what else the machine does only ever adds.
    together, apart = min(found["together"]), min(found["apart"])
    rounds = {"together": found.pop("together"), "apart": found.pop("apart")}
    return {
        **head, **found, "outcome": "measured", "seconds_per_step": together, "seconds_apart": apart,
        "exchange_share": 1 - apart / together, "rounds": rounds,
    }  # fmt: skip


def child(options: argparse.Namespace) -> int:
    """One rank: steps apart and together in turn, so that both see the same machine."""
    import step_ours
    from random_flux import spec_of
    from xflux_trainer.encoders import free
    from xflux_trainer.ranks import Launch, Ranks

    launch = Launch.read(os.environ)
    ranks = Ranks(launch)
    ranks.join()
    spec = spec_of(options.layers, options.heads)
    keys = step.OURS | ({"mixed_precision": "no"} if launch.use_cpu else {})
    times: dict[str, list[float]] = {"apart": [], "together": []}
    with tempfile.TemporaryDirectory() as folder:
        config = step_ours.config_of(keys, options.sizes[0], 1, Path(folder))
        alone = Ranks(Launch(local_rank=launch.local_rank, use_cpu=launch.use_cpu))
        runs: dict[str, Any] = {
            "apart": step_ours.assemble(config, spec, alone), "together": step_ours.assemble(config, spec, ranks),
        }  # fmt: skip
        trained = runs["together"].trained
        exchange = exchange_seconds(ranks, trained)
        for _ in range(options.rounds):
            for name in runs:
                ranks.barrier()
                own = statistics.median(step_ours.take_steps(runs[name], options.steps)["seconds"])
                times[name].append(max(ranks.gather(own)))
    if ranks.main:
        sizes = {"trained_parameters": trained, "exchanged_mib": trained * 4 / 2**20}
        children.write(options.result, {**times, **sizes, "exchange_seconds": exchange})
    # DDP goes before the process group that it talks through, see the trainer's own end of a run.
    runs.clear()
    free()
    ranks.leave()
    return 0


def exchange_seconds(ranks: Any, numbers: int) -> float:
    """Of the gradients' sum and of the loop's own exchange by themselves, with nothing computed meanwhile."""
    import torch
    import torch.distributed as dist

    if ranks.world_size == 1:
        return 0.0
    gradients = torch.zeros(numbers, device=ranks.device)
    seconds = []
    for _ in range(10):
        ranks.barrier()
        started = time.perf_counter()
        dist.all_reduce(gradients)
        ranks.total([0.0] * 4)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def rank_table(rows: list[Outcome]) -> str:
    names = (
        "ranks",
        "on",
        "s/step",
        "the same apart",
        "share of being several",
        "the exchange alone, s",
        "MiB exchanged",
    )
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---|" * (len(names) - 1)]
    for row in rows:
        start = f"| {row['ranks']} | {row['device']} |"
        if row["outcome"] != "measured":
            lines.append(f"{start} {row['outcome']} | – | – | – | – |")
            continue
        seconds = f"{row['seconds_per_step']:.3f} | {row['seconds_apart']:.3f} | {row['exchange_share']:.1%}"
        seconds += f" | {row['exchange_seconds']:.4f}"
        lines.append(f"{start} {seconds} | {row['exchanged_mib']:.1f} |")
    return "\n".join(lines)


def save(options: argparse.Namespace, cells: list[Outcome], ranks: list[Outcome]) -> Path:
    body = {
        "layers": options.layers, "heads": options.heads, "steps": options.steps, "grid": cells,
        "rank_layers": options.rank_layers, "rank_heads": options.rank_heads, "rank_pixels": options.rank_pixels,
        "rank_steps": options.rank_steps, "cores": os.cpu_count(), "ranks": ranks,
    }  # fmt: skip
    return children.save(options.results, "cost", "cost.py", body)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--row", default="ours-checkpointed", choices=[row.name for row in step.ROWS])
    parser.add_argument("--sizes", type=numbers, default=SIZES, help="pixels of the image's sides")
    parser.add_argument("--batches", type=numbers, default=BATCHES, help="images per step")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each size, after three that are not")
    parser.add_argument("--layers", type=numbers, default=(19, 38), metavar="D,S", help="double and single blocks")
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 each")
    parser.add_argument("--ranks", type=numbers, default=RANKS, help="numbers of ranks; 0: leave this part out")
    parser.add_argument("--rank-layers", type=numbers, default=(1, 2), metavar="D,S", help="blocks of the ranks' model")
    parser.add_argument("--rank-heads", type=int, default=2, help="its attention heads")
    parser.add_argument("--rank-pixels", type=int, default=256, help="sides of its images")
    parser.add_argument("--rank-steps", type=int, default=5, help="measured steps of the ranks in each round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the ranks with the exchange and without")
    parser.add_argument("--no-grid", action="store_true", help="measure the ranks alone")
    parser.add_argument("--deadline", type=float, default=540, metavar="S", help="seconds for each process")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    options.shared, options.xflux = True, None
    cells = [] if options.no_grid else grid(options)
    if cells:
        print(grid_table(cells), flush=True)
        file = save(options, cells, [])
    ranks: list[Outcome] = []
    for count in filter(None, options.ranks):
        ranks.append(ranks_together(count, options))
        print(rank_table(ranks[-1:]).splitlines()[-1], ranks[-1].get("why", ""), flush=True)
        file = save(options, cells, ranks)
    if not cells and not ranks:
        print("error: --no-grid and --ranks 0 leave nothing to measure.", file=sys.stderr)
        return 2
    print(f"\n{rank_table(ranks)}\n\nwritten to {file}")
    return 1 if any(row["outcome"] == "failed" for row in [*cells, *ranks]) else 0


if __name__ == "__main__":
    sys.exit(main())
