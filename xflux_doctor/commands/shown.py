"""What `run` says before the training: stack, launch, what was changed, the bill. Ten lines where all is well."""

from __future__ import annotations

from collections.abc import Mapping

import click

from xflux_doctor.finding import Change
from xflux_doctor.plan import Plan
from xflux_doctor.report import text
from xflux_doctor.report.summary import Summary
from xflux_doctor.verdict import held_by

GIB = 1 << 30
_LINES = 4
"""Repairs that have a line each; more stand together, a line for each file."""


def show(repaired: Plan, plan: Plan, summary: Summary, words: str, added: Mapping[str, str]) -> None:
    """`words`: the faster plan; `added`: variables that the launch is given, with their price."""
    report = text.render(summary)
    if not summary.exit_code and not summary.counts["warning"]:
        report = "".join(line for line in report.splitlines(keepends=True) if line.strip())
    click.echo(report, nl=False)
    for line in _repairs(repaired.edits):
        click.echo(f"  repaired in memory: {line}")
    if words:
        click.echo(f"  planned: {words}")
    for name, price in added.items():
        click.echo(f"  added to the launch: {name}, without which the ranks' all-reduce failed; {price}")
    _bill(plan)


def _repairs(edits: tuple[Change, ...]) -> list[str]:
    if len(edits) <= _LINES:
        return [text.describe(edit) for edit in edits]
    by_file: dict[str, list[str]] = {}
    for edit in edits:
        name = "DeepSpeed" if edit.file == "deepspeed" else edit.file
        by_file.setdefault(name, []).append(text.describe(edit).replace(f" in the {name} file", "", 1))
    return [f"{'; '.join(words)}; in the {name} file" for name, words in by_file.items()]


def _bill(plan: Plan) -> None:
    if plan.bill is None:
        return
    on_gpu = held_by(plan.bill) if plan.bill.gpu else 0
    what = f"{on_gpu / GIB:.1f} GiB per GPU, " if on_gpu else ""
    whose = "the first rank" if plan.bill.world_size > 1 else "the rank"
    click.echo(
        f"  forecast (±{plan.bill.error_bar:.0%}): {what}{plan.bill.host_per_rank / GIB:.1f} GiB of host memory "
        f"for {whose}, {plan.bill.disk_total / GIB:.2f} GiB of disk"
    )
