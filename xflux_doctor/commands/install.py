"""`xflux-doctor fix --install`: the stack's packages, by pip, in the chosen interpreter."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import click

from xflux_doctor import choose, pins
from xflux_doctor import matrix as matrices
from xflux_doctor.check import Case
from xflux_doctor.commands.check import summarize
from xflux_doctor.commands.fix import confirm
from xflux_doctor.errors import DoctorError, UsageError
from xflux_doctor.inputs import Inputs, build


def run(inputs: Inputs, *, yes: bool) -> int:
    """Install the stack with pip in the chosen interpreter, after showing the exact commands; check again."""
    if inputs.facts:
        raise UsageError("Recorded facts are of another machine or another time.", "Install without --facts.")
    case = build(inputs, matrices.load_with(inputs.matrix))
    python = case.facts.python
    if case.stack is None or python is None:
        raise DoctorError(case.stack_because, "See `xflux-doctor matrix list`.")
    why = choose.why_not(case.stack, case.facts, cpu=case.job.use_cpu)
    if why:
        raise DoctorError(f"Stack {case.stack.name} {why}.", "See `xflux-doctor matrix list`.")
    if python.externally_managed:
        raise DoctorError(
            f"{python.executable} is managed by the operating system (EXTERNALLY-MANAGED).",
            "Make a venv (`python3 -m venv venv`) and name its Python by --python.",
        )
    if inputs.offline and not os.environ.get("PIP_FIND_LINKS"):
        raise DoctorError(
            "--offline was given, and pip fetches packages.", "Name a folder of wheels by PIP_FIND_LINKS.", code=2
        )
    if "pip" not in (case.facts.packages or {}):
        raise DoctorError(
            f"{python.executable} has no pip.", f"Run `{python.executable} -m ensurepip`, then try again."
        )
    if not python.venv and not python.conda:
        click.echo(f"! {python.executable} is no venv: other programs of {python.prefix} will use these packages too.")
    with tempfile.TemporaryDirectory(prefix="xflux-doctor-") as folder:
        commands = pip_commands(case.stack, python.executable, Path(folder), broken(case), offline=inputs.offline)
        click.echo(f"Stack {case.stack.name} ({case.stack_because}) into {python.prefix}:")
        for _, shown in commands:
            click.echo(f"  $ {shown}")
        confirm(yes, "Run these commands?")
        for argv, shown in commands:
            code = subprocess.call(argv, stdin=subprocess.DEVNULL)
            if code != 0:
                raise DoctorError(f"pip ended with {code}: {shown}", "Its last lines above say why.")
    after = summarize(build(inputs, matrices.load_with(inputs.matrix)))
    wrong = [v for v in after.verdicts if v.check.startswith("SW") and v.status in ("error", "crashed")]
    for verdict in wrong:
        for finding in verdict.findings:
            click.echo(click.style(f"✗ {finding.code} {finding.seen}", fg="red"))
    click.echo("The packages are the stack's." if not wrong else "Some packages are still not the stack's.")
    return 1 if wrong else 0


def broken(case: Case) -> dict[str, str]:
    """Packages that pip takes for installed and that are not right, each with the version that is to come.

    Another build, no files, torn files, two copies, files of another release: pip would say "already satisfied".
    """
    assert case.stack is not None
    found = {}
    for name, package in (case.facts.packages or {}).items():
        pin = case.stack.packages.get(name)
        mixed = bool(package.module_version) and package.module_version != package.version.partition("+")[0]
        if pin is not None and (mixed or pins.judge(pin, package) in ("broken", "wrong build", "shadowed")):
            found[name] = pin.version
        elif pin is None and package.damaged:
            found[name] = package.version
    return found


def pip_commands(
    stack: matrices.Stack,
    python: str,
    folder: Path,
    anew: Mapping[str, str] = MappingProxyType({}),
    *,
    offline: bool = False,
) -> list[tuple[list[str], str]]:
    """The pip calls: first, alone, packages whose build lives on another index and those to be installed `anew`,
    then the rest from the default index.

    Asking the second index only for the packages that need it keeps everything else off it.
    """
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", *(["--no-index"] if offline else [])]
    commands: list[tuple[list[str], str]] = []
    for name in dict.fromkeys((*stack.packages, *anew)):
        pin = stack.packages.get(name)
        page = pin.page(name) if pin and not offline else ""
        elsewhere = ["--find-links", page] if page else []
        forced = ["--force-reinstall"] if name in anew else []
        if elsewhere or forced:
            argv = [*pip, "--no-deps", *forced, *elsewhere, f"{name}=={pin.exact if pin else anew[name]}"]
            commands.append((argv, " ".join(argv)))
    file = folder / f"{stack.name}.txt"
    lines = [line for line in matrices.requirements(stack) if not line.startswith("--")]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    argv = [*pip, "--requirement", str(file)]
    commands.append((argv, " ".join([*pip, *lines])))
    return commands
