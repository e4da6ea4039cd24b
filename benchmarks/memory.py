"""The bill against the card: predicted and measured memory of the real trainer's steps, over many configurations.

    python benchmarks/memory.py [--rows 'lora-*,int4'] [--resume] [--limit-gib G]
    python benchmarks/memory.py --random 12 --seed 1
    python benchmarks/memory.py --again benchmarks/results/memory-….json

Weights and images are made up, everything else of a step is the trainer's own: see step_ours.py. Each row takes three
steps (the third is recorded where steps are) from a model that is built on the device; its peak is the largest
`torch.cuda.max_memory_allocated` from the first step on. Beside it: what the allocator reserved, and the whole card's
memory in use by NVML. Predicted is the bill's phase `train`, as the doctor asks for it. Running out of memory is a
result: with --limit-gib the allocator is held to what a smaller card would have.

Rows are written one by one to results/memory-GPU-DATE.json (--random: memory-random-…), with every term of the bill;
--resume skips those that today's file has. --again FILE measures nothing: it forecasts that file's rows by the bill as
it is now. Exit 1 when a row failed for another reason than memory or a missing part.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import children
import memory_report
from children import GIB, RESULTS, Outcome, numbers
from memory_rows import ROWS, Row, bill, drawn, spec_of

STEPS = 3
"""Two are launched kernel by kernel, then one is recorded."""
CALIBRATION = children.REPO / "trainer" / "calibration.json"
TIGHT = 0.97
"""Above that share of the limit a job is called tight."""


def predict(row: Row, spec: Any, device: str, limit: int, *, triton: bool, precision: str = "bf16") -> Outcome:
    """The forecast of a row's phase `train`, as the doctor asks for it, and its verdict on a card of `limit` bytes."""
    made = bill(row, spec, device, triton=triton, precision=precision)
    terms = [term for term in (made.gpu if device == "cuda" else made.host) if term.phase == "train"]
    terms = [term for term in terms if term.name != "Python and torch"]
    peak = sum(term.bytes for term in terms)
    config = row.config(precision)
    share = (peak + made.gpu_holes + made.gpu_context) / limit if limit else 0.0
    return {
        "row": row.name, "config": row.keys, "shape": row.shape or (config.img_size, config.img_size),
        "batch": config.train_batch_size, "predicted_bytes": peak, "predicted_context_bytes": made.gpu_context,
        "predicted_load_bytes": made.gpu_phases.get("load"), "limit_bytes": limit,
        "called": "fits" if share <= TIGHT else "tight" if share <= 1 else "does not fit",
        "terms": {term.name: term.bytes for term in terms},
    }  # fmt: skip


def again(file: Path, options: argparse.Namespace) -> None:
    """Forecast a file's rows anew; what was measured, and the file's machine and date, stay."""
    whole = json.loads(file.read_text("utf-8"))
    spec = spec_of(options.layers, options.heads)
    for number, row in enumerate(whole["rows"]):
        shape = tuple(row["shape"])
        square = shape[0] == shape[1] and "bucket_by" not in row["config"]
        keys = {key: tuple(value) if isinstance(value, list) else value for key, value in row["config"].items()}
        made = predict(Row(row["row"], keys, None if square else shape), spec, "cuda", row["limit_bytes"], triton=True)
        made["config"], made["shape"] = row["config"], row["shape"]
        error = {"error": made["predicted_bytes"] / row["allocated_bytes"] - 1} if "allocated_bytes" in row else {}
        whole["rows"][number] = {**row, **made, **error}
    whole["summary"] = memory_report.summary(whole["rows"])
    children.write(file, whole)
    memory_report.draw(file.with_suffix(".svg"), whole["rows"])
    print(
        "\n".join(
            [memory_report.HEAD, *map(memory_report.line, whole["rows"]), "", memory_report.said(whole["summary"])]
        )
    )


def calibrate(file: Path) -> None:
    """Write what only a card can tell into the trainer's data, with where it was measured: the most that NVML showed
    beside the allocator's memory."""
    whole = json.loads(file.read_text("utf-8"))
    most = max(row["context_bytes"] for row in whole["rows"] if "context_bytes" in row)
    source = {"result": file.name, **{key: whole[key] for key in ("date", "machine", "versions")}}
    children.write(CALIBRATION, {"context_bytes": most, "source": source})
    print(f"context_bytes: {most:,} ({most / GIB:.2f} GiB), written to {CALIBRATION.name}")


# Rows, in a process that takes them one after the other -----------------------------------------------------


class Grid:
    """Takes rows; keeps the model from one to the next where they differ in the images' sizes alone."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        import torch
        from xflux_trainer.ranks import Launch, Ranks

        self.folder, self.spec = folder, spec_of(options.layers, options.heads)
        self.ranks = Ranks(Launch())
        self.ranks.join()
        self.cuda = self.ranks.device.type == "cuda"
        self.triton = find_spec("triton") is not None
        self._run: Any = None
        self._base = ""
        self._left = 0
        """Bytes that earlier rows left behind: none, but for a fault."""
        self.limit, self.steps = 0, STEPS
        if self.cuda:
            torch.zeros(1, device=self.ranks.device)
            free, total = torch.cuda.mem_get_info()
            self.context = _device_bytes() - torch.cuda.memory_reserved()
            self.limit = int(options.limit_gib * GIB) if options.limit_gib else free + self.context
            if options.limit_gib:
                torch.cuda.set_per_process_memory_fraction(min(1.0, (self.limit - self.context) / total))

    def take(self, row: Row) -> Outcome:
        """Predict and measure one. Raises what is neither a lack of memory nor a missing part."""
        import torch
        from xflux_trainer.errors import UserError

        found = self._predict(row)
        try:
            return {**found, **self._measure(row, found)}
        except (UserError, ImportError) as error:
            outcome, why = "not there", str(error)
        except RuntimeError as error:
            lacking = ("out of memory", "ALLOC_FAILED")
            if not isinstance(error, torch.cuda.OutOfMemoryError) and not any(each in str(error) for each in lacking):
                raise
            outcome, why = "out of memory", str(error).split(". ")[0]
            traceback.clear_frames(error.__traceback__)  # they hold what is to be freed
        self._drop()
        wrong = "it was called fits" if outcome == "out of memory" and found["called"] == "fits" else ""
        return {**found, "outcome": outcome, "why": why, **({"wrong": wrong} if wrong else {})}

    def _predict(self, row: Row) -> Outcome:
        kind = self.ranks.device.type
        return predict(row, self.spec, kind, self.limit, triton=self.triton, precision=self._precision)

    @property
    def _precision(self) -> str:
        return "bf16" if self.cuda else "no"

    def _measure(self, row: Row, predicted: Outcome) -> Outcome:
        import step_ours
        from xflux_trainer import optim, train
        from xflux_trainer.signals import Stop

        config = row.config(self._precision)
        keys = {"mixed_precision": self._precision, "lora_targets": config.lora_targets, **row.keys}
        keys = {key: value for key, value in keys.items() if key not in ("img_size", "train_batch_size")}
        config = step_ours.config_of(keys, config.img_size, config.train_batch_size, self.folder)
        found: Outcome = {}
        if self._run is None or self._base != row.base:
            self._drop()
            self._left = found["left_bytes"] = self._allocated()
            started = time.perf_counter()
            self._run = step_ours.assemble(config, self.spec, self.ranks, row.shape)
            self._base = row.base
            found["build_seconds"] = time.perf_counter() - started
            load = self._run.meter.peaks()["device"].get("load")
            found |= {"load_bytes": load["allocated"]} if load else {}
        else:
            self._run = step_ours.resized(self._run, config, row.shape)
            optim.release(self._run.stepper)  # what was recorded of another size
        run = self._run
        self._clean()
        found["before_bytes"] = self._allocated()
        run.meter.device_peaks.clear()
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        clock: Any = step_ours.Clock(self.steps, self.ranks.device)
        with contextlib.suppress(step_ours.Enough):
            train._loop(run, clock, Stop())
        recorder = getattr(run.stepper, "recorder", None)
        found |= {
            "outcome": "measured", "seconds_per_step": statistics.median(clock.seconds()), "seconds": clock.seconds(),
            "notes": run.notes,
            "recorded": bool(recorder and not recorder.broken), "trained_parameters": run.trained,
            "loss_last": clock.losses[-1],
        }  # fmt: skip
        return {**found, **self._peaks(run, predicted)} if self.cuda else found

    def _peaks(self, run: Any, predicted: Outcome) -> Outcome:
        import torch

        peak = run.meter.peaks()["device"]["overall"]
        device, reserved = _device_bytes(), torch.cuda.memory_reserved()
        # The card's peak: what is not the allocator's does not shrink again.
        most = device - reserved + peak["reserved"]
        spare = predicted["called"] == "does not fit" and most <= TIGHT * self.limit
        allocated = peak["allocated"] - self._left
        return {
            "allocated_bytes": allocated, "reserved_bytes": peak["reserved"] - self._left,
            "device_bytes": most - self._left, "context_bytes": device - reserved,
            "error": predicted["predicted_bytes"] / allocated - 1,
            **({"wrong": "it was called does not fit"} if spare else {}),
        }  # fmt: skip

    def _drop(self) -> None:
        if self._run is not None:
            self._run.meter.host.stop()
        self._run = None
        self._clean()

    def _clean(self) -> None:
        """Let go of everything that no model holds, so that a row finds the card as a run's first step does."""
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        import torch

        return torch.cuda.memory_allocated() if self.cuda else 0


def _device_bytes() -> int:
    """What processes use of the card, by NVML; by the CUDA runtime, with what the driver keeps for itself (0.6 GiB on
    an H200), where there is no pynvml."""
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)
    except Exception:  # noqa: BLE001 - a foreign pynvml, or a torch that does not tell the card's UUID
        free, total = torch.cuda.mem_get_info()
        return int(total - free)


def child(rows: list[Row], options: argparse.Namespace) -> int:
    """Tell of each row what came of it; the process ends with the first whose failure leaves its state in doubt."""
    with tempfile.TemporaryDirectory() as folder:
        grid = Grid(options, Path(folder))
        for row in rows:
            try:
                children.tell(grid.take(row))
            except Exception as error:  # noqa: BLE001 - whatever it was, the other rows are to be measured
                traceback.print_exc()
                found = grid._predict(row)
                children.tell({**found, "outcome": "failed", "why": f"{type(error).__name__}: {str(error)[:300]}"})
                return 1
    return 0


# All rows --------------------------------------------------------------------------------------------------


def choose(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for, those of one model side by side."""
    rows = drawn(options.random, options.seed, spec_of(options.layers, options.heads)) if options.random else ROWS
    patterns = options.rows.split(",")
    chosen = [row for row in rows if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]
    bases = list(dict.fromkeys(row.base for row in chosen))
    return sorted(chosen, key=lambda row: bases.index(row.base))


def measure(rows: list[Row], options: argparse.Namespace, done: list[Outcome], save: Any) -> None:
    """Take the rows in a process, and in a fresh one after each that ended it; `save` is called after each row."""
    ends = time.monotonic() + options.deadline
    waiting = list(rows)
    while waiting and time.monotonic() < ends:
        argv = [sys.executable, str(Path(__file__).resolve()), "--child", "--rows", ",".join(r.name for r in waiting)]
        argv += ["--layers", ",".join(map(str, options.layers)), "--heads", str(options.heads)]
        argv += ["--random", str(options.random), "--seed", str(options.seed), "--limit-gib", str(options.limit_gib)]
        told = 0
        for found in children.told(argv, ends - time.monotonic()):
            waiting = [row for row in waiting if row.name != found["row"]]
            done.append(found)
            told += 1
            print(memory_report.line(found), found.get("why", ""), flush=True)
            save()
        if waiting and not told and time.monotonic() < ends:
            lost = waiting.pop(0)
            config = lost.config()
            shape = lost.shape or (config.img_size, config.img_size)
            done.append({
                "row": lost.name, "config": lost.keys, "shape": shape, "batch": config.train_batch_size,
                "outcome": "failed", "why": "its process died", "called": "",
            })  # fmt: skip
            print(memory_report.line(done[-1]), done[-1]["why"], flush=True)
            save()
    if waiting:
        print(f"\nnot done within {options.deadline:g} s: {', '.join(row.name for row in waiting)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", default="*", help="names or patterns, with commas between them (--list shows them)")
    parser.add_argument("--list", action="store_true", help="show the rows and their forecasts, and leave")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N drawn configurations in the list's place")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--again", type=Path, metavar="FILE", help="forecast a file's rows anew and measure nothing")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="write what a file measured into trainer/")
    parser.add_argument("--resume", action="store_true", help="leave out what today's result has already")
    parser.add_argument("--limit-gib", type=float, default=0.0, metavar="G", help="hold the process to a card of G GiB")
    parser.add_argument("--deadline", type=float, default=560, metavar="S", help="seconds for all rows together")
    parser.add_argument("--layers", type=numbers, default=(19, 38), metavar="D,S", help="double and single blocks")
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.calibrate:
        calibrate(options.calibrate)
        return 0
    if options.again:
        again(options.again, options)
        return 0
    rows = choose(options)
    if options.child:
        return child(rows, options)
    if not rows:
        print(f"error: no row is called {options.rows}; --list shows them.", file=sys.stderr)
        return 2
    if options.list:
        show(rows, options)
        return 0
    kind = "memory-random" if options.random else "memory"
    file = children.place(options.results, kind)[0]
    done: list[Outcome] = json.loads(file.read_text("utf-8"))["rows"] if options.resume and file.exists() else []
    have = {row["row"] for row in done if row["outcome"] in ("measured", "out of memory")}
    done = [row for row in done if row["row"] in have]

    def save() -> None:
        body = {"steps": STEPS, "summary": memory_report.summary(done), "rows": done}
        children.save(options.results, kind, "memory.py", body)

    print(memory_report.HEAD, flush=True)
    measure([row for row in rows if row.name not in have], options, done, save)
    if not done:
        print("error: nothing was measured before the deadline.", file=sys.stderr)
        return 1
    memory_report.draw(file.with_suffix(".svg"), done)
    print(f"\n{memory_report.said(memory_report.summary(done))}\n\nwritten to {file.name} and {file.stem}.svg")
    return 1 if any(row["outcome"] == "failed" for row in done) else 0


def show(rows: list[Row], options: argparse.Namespace) -> None:
    """Names, forecasts on a GPU and configs."""
    spec = spec_of(options.layers, options.heads)
    for row in rows:
        peak = bill(row, spec, "cuda", triton=True).gpu_phases["train"]
        shape = f"{row.shape[0]}x{row.shape[1]} " if row.shape else ""
        print(f"{row.name:40} {peak / GIB:7.2f} GiB  {shape}{row.keys}")


if __name__ == "__main__":
    sys.exit(main())
