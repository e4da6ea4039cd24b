"""`xflux-doctor fix --install`: the stack's packages, by pip, in the chosen interpreter."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import click

from xflux_doctor import choose, install_room, pins
from xflux_doctor import matrix as matrices
from xflux_doctor.check import Case
from xflux_doctor.commands.check import summarize
from xflux_doctor.commands.fix import confirm
from xflux_doctor.errors import DoctorError, UsageError
from xflux_doctor.facts import PythonFacts
from xflux_doctor.inputs import Inputs, build

_NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded|Errno (?:28|122)\b")
_KEPT = 40
"""Last lines of pip's errors that are looked at."""
_CLEARING = 5.0
"""Seconds in which pip, told to end, removes its own folders."""


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
    anew = broken(case)
    room = _room(case, python, anew, offline=inputs.offline)
    with tempfile.TemporaryDirectory(prefix="xflux-doctor-", dir=room.temporary or None) as folder:
        commands = pip_commands(case.stack, python.executable, Path(folder), anew, room, offline=inputs.offline)
        click.echo(f"Stack {case.stack.name} ({case.stack_because}) into {python.prefix}:")
        for _, shown in commands:
            click.echo(f"  $ {shown}")
        confirm(yes, "Run these commands?")
        environment = {**os.environ, **({"TMPDIR": room.temporary} if room.temporary else {})}
        for argv, shown in commands:
            _pip(argv, shown, environment, (python.prefix, environment.get("TMPDIR") or tempfile.gettempdir()))
    after = summarize(build(inputs, matrices.load_with(inputs.matrix)))
    wrong = [v for v in after.verdicts if v.check.startswith("SW") and v.status in ("error", "crashed")]
    for verdict in wrong:
        for finding in verdict.findings:
            click.echo(click.style(f"✗ {finding.code} {finding.seen}", fg="red"))
    click.echo("The packages are the stack's." if not wrong else "Some packages are still not the stack's.")
    return 1 if wrong else 0


def _pip(argv: list[str], shown: str, environment: Mapping[str, str], places: tuple[str, ...]) -> None:
    """Run pip, its words passed on as they come. Raises DoctorError where it fails."""
    last: list[str] = []
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True, errors="replace"
    ) as pip:
        try:
            for line in pip.stderr or ():
                sys.stderr.write(line)
                sys.stderr.flush()
                last = [*last, line][-_KEPT:]
        except BaseException as ended:  # a signal ends pip too, as it would have without us
            if not isinstance(ended, KeyboardInterrupt):  # the terminal sends that one to both
                pip.send_signal(signal.SIGINT)  # of this one alone does pip remove the gigabytes that it has fetched
            try:
                pip.wait(_CLEARING)
            except subprocess.TimeoutExpired:
                pip.kill()
            raise
    if pip.returncode == 0:
        return
    if _NO_ROOM.search("".join(last)):
        raise DoctorError(
            f"A disk, or your share of it, is full: pip ended with {pip.returncode}: {shown}",
            f"Look at `df -h {shlex.join(places)}` and `quota`; free some room, or make a venv on a larger disk.",
        )
    raise DoctorError(f"pip ended with {pip.returncode}: {shown}", "Its last lines above say why.")


def _room(case: Case, python: PythonFacts, anew: Mapping[str, str], *, offline: bool) -> install_room.Arrangement:
    """How pip is called so that the stack fits on this machine's disks. Raises DoctorError where it does not fit.

    torch and its CUDA libraries are nine tenths of a stack: where torch is the stack's, nothing is asked; where another
    torch or some of those libraries are there (from a try that ran out of room), nobody is refused.
    """
    assert case.stack is not None
    packages = case.facts.packages or {}
    pin, torch = case.stack.packages.get("torch"), packages.get("torch")
    right = pin is not None and torch is not None and "torch" not in anew and pins.judge(pin, torch) == "exact"
    if case.stack.installed_gib is None or right:
        return install_room.AS_IT_IS
    disks = _disks(python)
    if disks is None:
        return install_room.AS_IT_IS
    download = 0 if offline else int((case.stack.download_gib or 0) * install_room.GIB)
    installed = int(case.stack.installed_gib * install_room.GIB)
    found = install_room.arrange(download, installed, disks)
    if found:
        return found
    missing = install_room.shortage(download, installed, disks)
    if any(name.startswith(("torch", "nvidia-cudnn", "nvidia-nccl")) for name in packages):
        click.echo(f"! {missing}, less what is there already.")
        return install_room.AS_IT_IS
    raise DoctorError(
        f"{missing}: pip would end in 'No space left on device'.",
        f"Free some room, or make a venv on a larger disk (`df -h` shows them) and name its Python by --python. "
        f"By hand it can still be tried: `xflux-doctor matrix export {case.stack.name}` writes what pip takes.",
    )


def _disks(python: PythonFacts) -> install_room.Disks | None:
    """The three places of pip. None where one of them is not known: pip will say what it finds."""
    elsewhere = [name for name in ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT") if os.environ.get(name)]
    if elsewhere or not os.access(python.prefix, os.W_OK):  # then pip takes the user's own folder
        return None
    argv = [python.executable, "-m", "pip", "cache", "dir"]
    try:
        asked = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        # pip refuses to say where its cache is switched off, and before 20.1 does not know the question.
        cache = asked.stdout.strip() if asked.returncode == 0 else ""
        return install_room.Disks(_disk(python.prefix), _disk(tempfile.gettempdir()), _disk(cache) if cache else None)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _disk(path: str) -> install_room.Disk:
    existing = next(place for place in (Path(path), *Path(path).parents) if place.exists())
    stat = os.statvfs(existing)
    # File systems over object storage, and a tmpfs without a limit, tell no size.
    free = stat.f_bavail * stat.f_frsize if stat.f_blocks else sys.maxsize
    return install_room.Disk(path, existing.stat().st_dev, free)


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
    room: install_room.Arrangement = install_room.AS_IT_IS,
    *,
    offline: bool = False,
) -> list[tuple[list[str], str]]:
    """The pip calls: first, alone, packages whose build lives on another index and those to be installed `anew`,
    then the rest from the default index.

    Asking the second index only for the packages that need it keeps everything else off it.
    """
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", *(["--no-index"] if offline else [])]
    pip += [] if room.cache else ["--no-cache-dir"]
    set_before = [f"TMPDIR={room.temporary}"] if room.temporary else []
    commands: list[tuple[list[str], str]] = []
    for name in dict.fromkeys((*stack.packages, *anew)):
        pin = stack.packages.get(name)
        page = pin.page(name) if pin and not offline else ""
        elsewhere = ["--find-links", page] if page else []
        forced = ["--force-reinstall"] if name in anew else []
        if elsewhere or forced:
            argv = [*pip, "--no-deps", *forced, *elsewhere, f"{name}=={pin.exact if pin else anew[name]}"]
            commands.append((argv, " ".join([*set_before, *argv])))
    file = folder / f"{stack.name}.txt"
    lines = [line for line in matrices.requirements(stack) if not line.startswith("--")]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    argv = [*pip, "--requirement", str(file)]
    commands.append((argv, " ".join([*set_before, *pip, *lines])))
    return commands
