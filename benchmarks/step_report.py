"""The tables and the picture of `step.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import bars
import children
from children import Outcome

HEAD = (
    "| row | px | batch | s/step | rounds | samples/s | useful TFLOP/s | of the bf16 limit | of the fp8 limit "
    "| allocated GiB | reserved GiB |"
)


def ceilings(found: dict[str, Any]) -> str:
    """What the card can do, as a table."""
    lines = ["| ceiling | TFLOP/s |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in found.items() if isinstance(value, float)]
    lines += [f"| {name} | {why} |" for name, why in found["not_there"].items()]
    return "\n".join(lines)


def line(row: Outcome) -> str:
    start = f"| {row['row']} | {row['pixels']} | {row['batch']} |"
    if row["outcome"] != "measured":
        return f"{start} {row['outcome']} | – | – | – | – | – | – | – |"
    shares = [f"{row[key]:.0%}" if key in row else "–" for key in ("of_limit_bf16", "of_limit_fp8")]
    rounds = " / ".join(f"{seconds:.3f}" for seconds in row["rounds"])
    cells = [
        f"{row['seconds_per_step']:.3f}", rounds, f"{row['samples_per_second']:.2f}", f"{row['tflops']:.4g}", *shares,
        f"{row['allocated_gib']:.1f}", f"{row['reserved_gib']:.1f}",
    ]  # fmt: skip
    return f"{start} {' | '.join(cells)} |"


def table(rows: list[Outcome]) -> str:
    return "\n".join([HEAD, "|" + "---|" * (HEAD.count("|") - 1), *map(line, rows)])


def pairs(rows: list[Outcome]) -> list[dict[str, Any]]:
    """Each of ours beside each peer at the same size and batch: how many times as fast, and the memory's ratio."""
    done = [row for row in rows if row["outcome"] == "measured"]
    return [
        {
            "ours": own["row"], "peer": other["row"], "pixels": own["pixels"], "batch": own["batch"],
            "times_as_fast": other["seconds_per_step"] / own["seconds_per_step"],
            "memory": own["allocated_gib"] / other["allocated_gib"] if other["allocated_gib"] else None,
        }
        for own in done if own["step"] == "ours"
        for other in done
        if other["step"] != "ours" and (own["pixels"], own["batch"]) == (other["pixels"], other["batch"])
    ]  # fmt: skip


def ratios(rows: list[Outcome]) -> str:
    lines = ["| ours | peer | px | batch | times as fast | memory, ours of theirs |", "|---|---|---|---|---|---|"]
    for one in pairs(rows):
        memory = "–" if one["memory"] is None else f"{one['memory']:.2f}"
        cells = (one["ours"], one["peer"], one["pixels"], one["batch"], f"{one['times_as_fast']:.2f}", memory)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def save(options: argparse.Namespace, found: dict[str, Any], rows: list[Outcome]) -> Path:
    """Write the numbers and draw them."""
    from xflux_trainer.meter import WARM_UP

    body = {
        "layers": options.layers, "heads": options.heads, "steps": options.steps, "warm_up": WARM_UP,
        "rounds": options.rounds, "shared_process": options.shared, "ceilings_tflops": found, "rows": rows,
        "ratios": pairs(rows),
    }  # fmt: skip
    file = children.save(options.results, "step", "step.py", body)
    bars.draw(file.with_suffix(".svg"), panels(rows))
    return file


def panels(rows: list[Outcome]) -> list[bars.Panel]:
    """A panel for each size and batch: seconds per step, with the limit in bf16 as a line."""
    done = [row for row in rows if row["outcome"] == "measured"]
    made = []
    for pixels, batch in dict.fromkeys((row["pixels"], row["batch"]) for row in done):
        here = [row for row in done if (row["pixels"], row["batch"]) == (pixels, batch)]
        drawn = [
            bars.Bar(
                row["row"], row["seconds_per_step"], bars.OURS if row["step"] == "ours" else bars.PEER,
                f"{row['seconds_per_step']:.3f} s, {row['allocated_gib']:.1f} GiB",
            )
            for row in here
        ]  # fmt: skip
        limit = here[0].get("limit_bf16")
        title = f"{pixels} px, batch {batch}: seconds per step" + (
            f" (line: bf16 limit, {limit:.3f} s)" if limit else ""
        )
        made.append(bars.Panel(title, drawn, limit))
    return made
