"""`xflux-doctor matrix`: list, show, check, export."""

from __future__ import annotations

import json
from pathlib import Path

import click
import msgspec
import yaml

from xflux_doctor import choose
from xflux_doctor import matrix as matrices
from xflux_doctor.errors import DoctorError
from xflux_doctor.gather.machine import gather


def list_stacks(*, cpu: bool, form: str, site: str | None) -> int:
    """Every stack with what it wants, the one that fits, and why the others do not."""
    matrix = matrices.load_with(site)
    choice = choose.choose(matrix, gather(), cpu=cpu)
    if form == "json":
        stacks = [{"name": s.name, "summary": s.summary, "refused": choice.refused.get(s.name)} for s in matrix.stacks]
        _print_json({"chosen": choice.stack, "because": choice.because, "stacks": stacks})
        return 0 if choice.stack else 1
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


def list_rules(*, form: str, site: str | None) -> int:
    """Every rule in one line; as JSON whole."""
    matrix = matrices.load_with(site)
    if form == "json":
        _print_json([msgspec.to_builtins(rule) for rule in matrix.rules])
        return 0
    for rule in matrix.rules:
        when = ", ".join([*(f"{name} {need}" for name, need in rule.when.items()), *(f"job {w}" for w in rule.job)])
        asks = f"{rule.what} {rule.need}" + (f" when {when}" if when else "")
        click.echo(f"{rule.id:<20} {rule.severity:<8} {asks}")
    return 0


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show(name: str, site: str | None) -> int:
    """One stack or one rule as YAML."""
    matrix = matrices.load_with(site)
    found = [item for item in matrix.stacks if item.name == name] + [r for r in matrix.rules if r.id == name]
    if not found:
        hint = "See `xflux-doctor matrix list` and `matrix list --rules`."
        raise DoctorError(f"There is no stack or rule {name!r}.", hint, code=2)
    value = {k: v for k, v in msgspec.to_builtins(found[0]).items() if v not in (None, "", {}, [])}
    click.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110), nl=False)
    return 0


def validate(file: str | None) -> int:
    """Load a matrix file, and lay it over ours; every fault is told with its line."""
    if file is not None and not Path(file).is_file():
        raise DoctorError(f"There is no file {file}.", "Name a matrix file.", code=2)
    matrix = matrices.load(Path(file) if file else matrices.default_path())
    click.echo(f"{len(matrix.stacks)} stacks, {len(matrix.rules)} rules: no fault found.")
    if file is not None and not Path(file).samefile(matrices.default_path()):
        whole = matrices.load_with(file)
        click.echo(f"Laid over ours it makes {len(whole.stacks)} stacks, {len(whole.rules)} rules.")
    return 0


def export(name: str, site: str | None) -> int:
    """The stack as a pip requirements file that can be installed as it stands."""
    stack = matrices.load_with(site).stack(name)
    click.echo(f"# Stack {stack.name} of xflux-doctor's compatibility matrix: Python {stack.python}, Linux x86_64.")
    if stack.glibc:
        click.echo(f"# Its wheels want glibc {stack.glibc} or newer.")
    for index in dict.fromkeys(p.index for p in stack.packages.values() if p.index and not p.index_required):
        click.echo(f"# torch's build is the public index's own; {index} has it too.")
    if any(pin.index_required for pin in stack.packages.values()):
        click.echo("# Only what this page lists comes from there; everything else from the index that pip is set to.")
    for line in matrices.requirements(stack):
        click.echo(line)
    return 0
