"""`xflux-doctor matrix`: list, show, check, export."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
import yaml

from xflux_doctor import matrix as matrices
from xflux_doctor.errors import DoctorError
from xflux_doctor.gather.machine import gather


def show_list(*, cpu: bool) -> int:
    """Every stack with what it wants, the one that fits, and why the others do not."""
    matrix = matrices.load()
    facts = gather()
    choice = matrices.choose(matrix, facts, cpu=cpu)
    for stack in matrix.stacks:
        chosen = stack.name == choice.stack
        mark = click.style("✓", fg="green") if chosen else "-"
        wants = f"Python {stack.python}" + (f", driver {stack.driver}" if stack.driver else "")
        click.echo(f"{mark} {stack.name:<12} {stack.summary} ({wants}; run on CPU {stack.tested.cpu}, GPU "
                   f"{stack.tested.gpu})")  # fmt: skip
        click.echo(f"    {'chosen: ' + choice.because if chosen else choice.refused[stack.name]}")
    if choice.stack is None:
        click.echo(choice.because)
    return 0 if choice.stack else 1


def show(name: str) -> int:
    """One stack or one rule as YAML."""
    matrix = matrices.load()
    found = [item for item in matrix.stacks if item.name == name] + [r for r in matrix.rules if r.id == name]
    if not found:
        raise DoctorError(f"There is no stack or rule {name!r}.", "See `xflux-doctor matrix list`.", code=2)
    value = {k: v for k, v in msgspec.to_builtins(found[0]).items() if v not in (None, "", {}, [])}
    click.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110), nl=False)
    return 0


def validate(file: str | None) -> int:
    """Load a matrix file; a fault is an error with its place."""
    if file is not None and not Path(file).is_file():
        raise DoctorError(f"There is no file {file}.", "Name a matrix file.", code=2)
    matrix = matrices.load(Path(file) if file else None)
    click.echo(f"{len(matrix.stacks)} stacks, {len(matrix.rules)} rules: no fault found.")
    return 0


def export(name: str) -> int:
    """The stack as a pip requirements file."""
    stack = matrices.load().stack(name)
    click.echo(f"# Stack {stack.name} of xflux-doctor's compatibility matrix: Python {stack.python}")
    for index in dict.fromkeys(p.index for p in stack.packages.values() if p.index and not p.index_required):
        click.echo(f"# torch's build is the public index's own; {index} has it too.")
    for line in matrices.requirements(stack):
        click.echo(line)
    return 0
