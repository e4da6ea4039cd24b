"""`xflux-doctor fleet`: many nodes' reports into one, from files and streams, or from every node of a launch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import msgspec

from xflux_doctor import matrix as matrices
from xflux_doctor.cluster import Task, hosts_of, task
from xflux_doctor.commands.check import probed, summarize
from xflux_doctor.errors import DoctorError, UsageError
from xflux_doctor.files import write_atomic
from xflux_doctor.fleet import collect, network
from xflux_doctor.fleet.merge import merge, of_launch
from xflux_doctor.fleet.reading import read
from xflux_doctor.fleet.values import Broken, Fleet, Report
from xflux_doctor.inputs import Inputs, build
from xflux_doctor.report import fleetjson, fleettext, jsonreport

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
             "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
Found = tuple[Iterable[Report | Broken], tuple[int, ...]]
"""Reports of a launch, and the numbers of the nodes that sent none."""


def run(sources: tuple[str, ...], *, expect: str | None, form: str, output: str | None) -> int:
    """Merge what the sources hold; returns the exit code."""
    expected, by = expected_nodes(expect)
    return show(merge(read(sources, sys.stdin.buffer), expected, by), form=form, output=output)


def launch(
    inputs: Inputs, *, shared: str | None, port: int | None, wait: float, form: str, output: str | None
) -> int:  # fmt: skip
    """On every node of a launch: make this node's report; node 0 merges them and returns the exit code."""
    mine = task(os.environ)
    if mine is None:
        raise UsageError(
            "No reports were named, and neither srun nor torchrun started this process.",
            "Name files, folders or -; or start it on every node: srun --ntasks-per-node=1 xflux-doctor fleet.",
        )
    if mine.local_rank != 0:
        return 0  # one process of a node speaks for it
    if mine.source == "torchrun" and mine.local_count == 1:
        for name in _TORCHRUN:  # the job is what its files say, and not one rank on each node
            os.environ.pop(name, None)
    seat = collect.Seat(mine.node, mine.nodes, wait)
    found = _by_folder(Path(shared), seat, inputs) if shared else _by_network(mine, port, seat, inputs)
    if found is None:
        return 0
    names = hosts_of(os.environ.get("SLURM_STEP_NODELIST", "")) if mine.source == "Slurm" else ()
    return show(of_launch(found[0], dict(enumerate(names)), found[1], mine.source), form=form, output=output)


def _by_folder(folder: Path, seat: collect.Seat, inputs: Inputs) -> Found | None:
    if seat.number != 0:
        collect.send(folder, seat, _own(inputs))
        return None
    place, missing = collect.host(folder, seat, lambda: _own(inputs), _say)
    return read([str(place)], sys.stdin.buffer), missing


def _by_network(mine: Task, port: int | None, seat: collect.Seat, inputs: Inputs) -> Found | None:
    """On the launch's own port; torchrun's agents listen there themselves, so then on the next one."""
    port = port or mine.port + (1 if mine.meets_by_itself else 0)
    if seat.number != 0:
        network.send(mine.host, port, seat, _own(inputs))
        return None
    if seat.count == 1:
        return [Report("node00000", msgspec.json.encode(_own(inputs)))], ()
    host = network.Host(mine.host, port)
    return host.gather(seat, _own(inputs), _say)


def _say(words: str) -> None:
    click.echo(words, err=True)


def _own(inputs: Inputs) -> dict[str, Any]:
    """This node's report. Whatever goes wrong here is told by node 0: an exit code of one would end all others."""
    try:
        case = probed(build(inputs, matrices.load_with(inputs.matrix)), inputs)
        return jsonreport.document(summarize(case))
    except DoctorError as error:
        return collect.failed(platform.node(), f"{error.seen} {error.hint}".strip())
    except Exception as error:  # noqa: BLE001 - a defect of ours on one node must not hide the others
        return collect.failed(platform.node(), f"xflux-doctor itself failed ({type(error).__name__}: {error})")


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
