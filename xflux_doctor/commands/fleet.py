"""`xflux-doctor fleet`: many nodes' reports into one, from files and streams, or from every node of a launch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from xflux_doctor.cluster import hosts_of
from xflux_doctor.errors import UsageError
from xflux_doctor.files import write_atomic
from xflux_doctor.fleet.merge import merge
from xflux_doctor.fleet.reading import read
from xflux_doctor.fleet.values import Fleet
from xflux_doctor.report import fleetjson, fleettext, jsonreport


def run(sources: tuple[str, ...], *, expect: str | None, form: str, output: str | None) -> int:
    """Merge what the sources hold; returns the exit code."""
    expected, by = expected_nodes(expect)
    return show(merge(read(sources, sys.stdin.buffer), expected, by), form=form, output=output)


def expected_nodes(expect: str | None) -> tuple[tuple[str, ...], str]:
    """Who should send a report, and who says so: `--expect`, else the Slurm job that this runs in."""
    if expect is not None:
        names = hosts_of(expect)
        if not names:
            raise UsageError(f"{expect!r} names no hosts.", "Write them with commas, or as Slurm does: node[001-064].")
        return tuple(dict.fromkeys(names)), "--expect"
    names = hosts_of(os.environ.get("SLURM_JOB_NODELIST", ""))
    return tuple(dict.fromkeys(names)), "SLURM_JOB_NODELIST" if names else ""


def show(fleet: Fleet, *, form: str, output: str | None) -> int:
    """Print or write the merged report."""
    text = jsonreport.encode(fleetjson.document(fleet)) if form == "json" else fleettext.render(fleet)
    if output is None:
        click.echo(text, nl=False)
    elif not Path(output).absolute().parent.is_dir():
        raise UsageError(f"There is no folder {Path(output).parent}.", "Check the path given to --output.")
    else:
        write_atomic(Path(output), click.unstyle(text))
    return fleet.exit_code
