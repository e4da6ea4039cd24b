"""`xflux-doctor check` and `facts`."""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

from xflux_doctor import effective
from xflux_doctor import facts as facts_module
from xflux_doctor import matrix as matrices
from xflux_doctor.check import Case, examine
from xflux_doctor.checks import ALL
from xflux_doctor.deep import ask_of
from xflux_doctor.errors import UsageError
from xflux_doctor.files import write_atomic
from xflux_doctor.gather.machine import gather
from xflux_doctor.inputs import Inputs, build
from xflux_doctor.pins import table
from xflux_doctor.probes.level import probe
from xflux_doctor.report import jsonreport, placement, text
from xflux_doctor.report.summary import Summary


def probed(case: Case, inputs: Inputs) -> Case:
    """The case with the facts of the default level or the deep one. Recorded facts are taken as they are."""
    if inputs.quick or inputs.facts:
        return case
    ask, seconds = (ask_of(case), inputs.deep_timeout) if inputs.deep else (None, inputs.timeout)
    return msgspec.structs.replace(case, facts=probe(case.facts, case.job, os.environ, seconds, ask))


def run(inputs: Inputs, *, form: str, output: str | None, strict: bool, verbose: bool) -> int:
    """Judge, report, and return the exit code."""
    case = probed(build(inputs, matrices.load_with(inputs.matrix)), inputs)
    summary = summarize(case, strict=strict)
    if form == "json":
        report = jsonreport.encode(jsonreport.document(summary))
    else:
        report = text.render(summary, verbose=verbose)
    if output is None:
        click.echo(report, nl=False)
        if form == "text" and case.job.xflux_nearby:
            click.echo(f"To judge this job as X-Flux's own script would run it: --xflux {case.job.xflux_nearby}")
    else:
        if not Path(output).absolute().parent.is_dir():
            raise UsageError(f"There is no folder {Path(output).parent}.", "Check the path given to --output.")
        write_atomic(Path(output), click.unstyle(report))
    return summary.exit_code


def summarize(case: Case, *, strict: bool = False) -> Summary:
    """Run every check on the case."""
    stack = case.stack.name if case.stack else None
    rows = table(case.stack, case.facts.packages)
    known = case.job.accelerate is not None or bool(case.job.overrides)
    return Summary(
        examine(case, ALL),
        case.facts,
        stack,
        case.stack_because,
        strict,
        packages=rows,
        launch=tuple(placement.lines(case)) if known else (),
        placement=placement.values(case) if known else None,
        job=effective.document(case.job),
    )


def show_facts(python: str | None) -> int:
    """Print the machine's quick facts as JSON."""
    names = tuple(sorted(matrices.load().names()))
    click.echo(facts_module.to_json(gather(python, names)))
    return 0
