"""The planner under limits: does `xflux-doctor run` start and train by the plan it chose, and is that the fastest?

    python benchmarks/limits.py --work DIR [--limits 12,16,24,…] [--mode finetune] [--resume]
    python benchmarks/limits.py --work DIR --time

The job is a LoRA of rank 16 (or a fine-tune of all weights) at 1024 px on a FLUX.1-dev-sized transformer with made-up
weights (23.8 GB, kept in DIR). For each limit, once with nothing in `allow` and once with everything: what `plan`
chooses, then `run --gpu-limit` with it for five steps, the allocator held to the limit. --time takes every plan shown
for any limit, without a limit, in the trainer's own loop: seconds of a step, and what NVML shows of the card. The
table has for each limit the chosen plan's time beside that of the fastest plan that fits by its measured memory. Where
that is not within the bar, both are timed twice more with nothing beside them, and the medians count: steps that the
host launches kernel by kernel go at its pace, which drifts by more than the bar from minute to minute.

Appends to benchmarks/results/limits-GPU-DATE.json. Exit 1 where a plan did not train, where there was one and none was
chosen, or where the chosen one takes more than 1.05 times as long as the fastest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cards
import children
import start
from children import GIB, RESULTS, Outcome

LIMITS = {"lora": (12, 16, 24, 32, 40, 48, 78), "finetune": (32, 48, 78)}
LOSSY = ["quantization", "optimizer", "backward_clip"]
STEPS, SLOWEST, TIMINGS = 5, 1.05, 3
UNTIMED = 3
"""Steps that compile, warm up and record."""


# What is run ---------------------------------------------------------------------------------------------


def job(work: Path, out: Path, mode: str, allow: list[str]) -> dict[str, Any]:
    own: dict[str, Any] = {"lora_targets": "diffusers"}
    if mode == "finetune":
        own = {"mode": "finetune", "final_checkpoint": False}  # up to 143 GB, which nothing goes on from
    settings = {**start.settings(work), "max_train_steps": STEPS, "checkpointing_steps": 10**6, "allow": allow}
    return {**settings, "output_dir": str(out), **own}


def doctor(work: Path, command: list[str], limit: int, deadline: float) -> subprocess.CompletedProcess[str]:
    files = ["--config", str(work / "train.yaml"), "--accelerate-config", str(work / "accelerate.yaml")]
    argv = [sys.executable, "-m", "xflux_doctor.cli", *command, *files, "--gpu-limit", str(limit)]
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=deadline, cwd=work, check=False)
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace")
        return subprocess.CompletedProcess(argv, 124, said, f"not done after {deadline:g} s")


def _said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The end of it."""
    return (done.stdout + done.stderr).strip().splitlines()[-12:]


def under(work: Path, mode: str, limit: int, allow: list[str], options: argparse.Namespace) -> Outcome:
    """Plan, then run."""
    (work / "train.yaml").write_text(json.dumps(job(work, options.out, mode, allow)), encoding="utf-8")  # JSON is YAML
    (work / "accelerate.yaml").write_text('distributed_type: "NO"\nnum_processes: 1\n', encoding="utf-8")
    planned = doctor(work, ["plan", "--format", "json"], limit, 60)
    found: Outcome = {"mode": mode, "limit_gib": limit, "allow": allow, "plan": None, "rows": []}
    try:
        document = json.loads(planned.stdout)
    except ValueError:  # it failed, and says why
        return {**found, "outcome": "failed", "said": _said(planned)}
    plan = document["plan"]
    rows = [*([plan] if plan else []), *document["alternatives"]]
    found |= {
        "plan": plan, "rows": [{key: row[key] for key in ("label", "changes", "lossy")} for row in rows],
        "predicted_seconds": document["seconds_per_step"],
    }  # fmt: skip
    with cards.Watched() as watched:
        done = doctor(work, ["run", "--yes", "--quick"], limit, options.deadline)
    if plan is None:
        refused = done.returncode == 1 and "ME101" in done.stdout + done.stderr
        return {**found, "outcome": "refused" if refused else "failed", "said": _said(done)}
    if done.returncode:
        return {**found, "outcome": "failed", "said": _said(done)}
    metrics = json.loads((options.out / "metrics.json").read_text(encoding="utf-8"))
    shutil.rmtree(options.out)  # a fine-tune's is tens of GB
    peaks, most = metrics["peak_device_bytes"]["overall"], watched.most[0] if watched.most else 0
    return {
        **found, "outcome": "trained", "seconds_per_step": metrics["seconds_per_step"], "peak": peaks,
        "nvml_gib": most / GIB, "within": most <= limit * GIB, "notes": metrics.get("notes"),
        "host": children.host([plan], metrics["per_rank"]),
    }  # fmt: skip


# Times without a limit -----------------------------------------------------------------------------------


def key(mode: str, changes: dict[str, Any]) -> str:
    return json.dumps({"mode": mode, **{name: changes[name] for name in sorted(changes)}})


def plans(rows: list[Outcome]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every plan that was shown, by its key: the mode and what it changes. Other sizes of image do other work."""
    return {
        key(row["mode"], one["changes"]): (row["mode"], one["changes"])
        for row in rows for one in row["rows"] if "img_size" not in one["changes"]
    }  # fmt: skip


def time_plans(asked: list[tuple[str, dict[str, Any]]], options: argparse.Namespace) -> int:
    """Tell of each plan, in one process: seconds of a step, and what NVML would show of the card."""
    import memory
    from memory_rows import Row

    options.layers, options.heads, options.limit_gib = (19, 38), 24, 0.0
    with tempfile.TemporaryDirectory() as folder:
        grid = memory.Grid(options, Path(folder))
        grid.steps = UNTIMED + options.steps
        for mode, changes in asked:
            own = {} if mode == "lora" else {"mode": mode}
            found = grid.take(Row(key(mode, changes), {**own, **changes}))
            if found["outcome"] == "measured":
                found |= {
                    "seconds": statistics.median(found["seconds"][UNTIMED:]),
                    "nvml_gib": found["device_bytes"] / GIB,
                }
            kept = (
                "row",
                "outcome",
                "why",
                "seconds",
                "nvml_gib",
                "allocated_bytes",
                "predicted_bytes",
                "error",
                "notes",
            )
            children.tell({name: found[name] for name in kept if name in found})
    return 0


def time_all(rows: list[Outcome], times: dict[str, Outcome], options: argparse.Namespace) -> Iterator[None]:
    """Fill `times` with the plans of the rows that it lacks, those of one model side by side; then time again what is
    undecided."""
    ends = time.monotonic() + options.total
    while (asked := due(rows, times)) and time.monotonic() < ends:
        ordered = sorted(asked.values(), key=lambda one: one[0])
        argv = [sys.executable, str(Path(__file__).resolve()), "--steps", str(options.steps)]
        for found in children.told([*argv, "--child", json.dumps(ordered)], ends - time.monotonic()):
            name = found.pop("row")
            if name not in times or "seconds" in found:
                del asked[name]
            times[name] = joined(times.get(name), found)
            print(f"{found.get('seconds', found['outcome'])} {name}", flush=True)
            yield
        if asked:  # there was no more time, the child died, or a plan that was timed before did not train
            return


def due(rows: list[Outcome], times: dict[str, Outcome]) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is to be timed next: all plans that were not yet, else what is undecided."""
    shown = plans(rows)
    names = shown.keys() - times.keys() or undecided(rows, times)
    return {name: one for name, one in shown.items() if name in names}


def joined(known: Outcome | None, found: Outcome) -> Outcome:
    """A plan's timings as one: the median of its seconds, beside each."""
    if known is None or "seconds" not in known:
        return found
    if "seconds" not in found:
        return known
    each = [*known.get("each_seconds", [known["seconds"]]), found["seconds"]]
    return {**known, "seconds": statistics.median(each), "each_seconds": each}


def undecided(rows: list[Outcome], times: dict[str, Outcome]) -> set[str]:
    """The keys of the plans that decide a row that is not within the bar, and of those that are being timed again."""
    timings = {each: len(taken.get("each_seconds", [0])) for each, taken in times.items()}
    found = {each for row in rows if (ratio(row, times) or 0) > SLOWEST for each in (own(row), fastest(row, times))}
    found |= {each for each, count in timings.items() if count > 1}
    return {each for each in found if each and timings.get(each, 0) < TIMINGS}


# The table -----------------------------------------------------------------------------------------------


def own(row: Outcome) -> str | None:
    """The key of the plan that was chosen."""
    return key(row["mode"], row["plan"]["changes"]) if row["plan"] else None


def fastest(row: Outcome, times: dict[str, Outcome]) -> str | None:
    """The key of the fastest of the row's plans that fit by their measured memory and may be taken."""
    fits = [
        each for one in row["rows"] if not one["lossy"] or row["allow"]
        if (each := key(row["mode"], one["changes"])) in times
        and times[each].get("outcome") == "measured" and times[each]["nvml_gib"] <= row["limit_gib"]
    ]  # fmt: skip
    return min(fits, key=lambda each: times[each]["seconds"], default=None)


def seconds(row: Outcome, times: dict[str, Outcome]) -> float | None:
    """Of a step by the chosen plan: as it was timed alone, else in its run."""
    return times.get(own(row) or "", {}).get("seconds") or row.get("seconds_per_step")


def ratio(row: Outcome, times: dict[str, Outcome]) -> float | None:
    """How many times as long the chosen plan takes as the fastest."""
    took, best = seconds(row, times), fastest(row, times)
    return took / times[best]["seconds"] if took and best and row["plan"] else None


def judge(row: Outcome, times: dict[str, Outcome]) -> tuple[str, bool]:
    """A line, and whether it is as promised."""
    lossy = "all" if row["allow"] else "none"
    head = f"| {row['mode']} | {row['limit_gib']} | {lossy} | "
    if row["plan"] is None:
        good = row["outcome"] == "refused" and fastest(row, times) is None
        return f"{head}no plan: {row['outcome']} | – | – | – |", good
    slower = ratio(row, times)
    shown = [f"{one:.3f}" if one else "–" for one in (row.get("seconds_per_step"), seconds(row, times), slower)]
    good = row["outcome"] == "trained" and row.get("within", False) and (slower is None or slower <= SLOWEST)
    return f"{head}{row['plan']['label']}: {row['outcome']} | {' | '.join(shown)} |", good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, help="a folder on a local disk with 25 GB free")
    parser.add_argument("--out", type=Path, help="where the runs write; by default a folder in DIR. "
                        "A fine-tune writes 24 GB, here or into /dev/shm")  # fmt: skip
    parser.add_argument("--limits", type=children.numbers, help="GiB; by default those of the mode")
    parser.add_argument("--mode", choices=[*LIMITS], default="lora")
    parser.add_argument("--allow", choices=["none", "all", "both"], default="both")
    parser.add_argument("--time", action="store_true", help="time the plans that earlier calls were shown")
    parser.add_argument("--resume", action="store_true", help="go on with today's file, as --time does")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a timed plan, after those that are not")
    parser.add_argument("--deadline", type=float, default=150, metavar="S", help="seconds for each run")
    parser.add_argument("--total", type=float, default=540, metavar="S", help="seconds for all of this call")
    start.model_options(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return time_plans(json.loads(options.child), options)
    if options.work is None:
        parser.error("--work DIR is needed")
    options.work = options.work.absolute()
    options.out = (options.out or options.work / "out").absolute()
    ends = time.monotonic() + options.total
    file = children.place(options.results, "limits")[0]
    known = json.loads(file.read_text("utf-8")) if (options.resume or options.time) and file.exists() else {}
    rows: list[Outcome] = known.get("rows", [])
    if options.time and not rows:
        parser.error(f"{file} has no plan to time; the same without --time, today and on this machine, writes it")
    times: dict[str, Outcome] = known.get("times", {})
    if options.time:
        for _ in time_all(rows, times, options):
            children.save(options.results, "limits", "limits.py", {"rows": rows, "times": times})
    else:
        start.make(options.work, options)
        ways = {"none": [[]], "all": [LOSSY], "both": [[], LOSSY]}[options.allow]
        have = {(row["mode"], row["limit_gib"], bool(row["allow"])) for row in rows}
        for limit in options.limits or LIMITS[options.mode]:
            for allow in ways:
                if (options.mode, limit, bool(allow)) in have or time.monotonic() > ends:
                    continue
                rows.append(under(options.work, options.mode, limit, allow, options))
                print(judge(rows[-1], times)[0], *rows[-1].get("said", []), sep="\n  ", flush=True)
                children.save(options.results, "limits", "limits.py", {"rows": rows, "times": times})
    print("\n| mode | limit, GiB | lossy | plan | s/step in the run | timed alone | of the fastest that fits |")
    print("|---|---|---|---|---|---|---|")
    judged = [judge(row, times) for row in rows]
    print("\n".join(line for line, _ in judged), f"\nwritten to {file.name}")
    return 0 if all(good for _, good in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
