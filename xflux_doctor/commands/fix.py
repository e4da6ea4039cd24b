"""`xflux-doctor fix`: show the repairs, write them, install packages, or put the old files back."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import click
import yaml

from xflux_doctor import choose, pins, repair, yamltext
from xflux_doctor import matrix as matrices
from xflux_doctor.check import Case, examine
from xflux_doctor.checks import ALL
from xflux_doctor.checks.words import devices
from xflux_doctor.commands.check import summarize
from xflux_doctor.errors import DoctorError, UsageError
from xflux_doctor.files import write_atomic
from xflux_doctor.finding import Change, Finding
from xflux_doctor.inputs import Inputs, build
from xflux_doctor.plan import Plan, make
from xflux_doctor.report import jsonreport, text
from xflux_doctor.template import accelerate_yaml, xflux_yaml

NO_WRITING = frozenset({"HW101", "LA105", "LA114"})
"""Blockers under which nothing is written: a GPU job is never turned into a CPU job, a service's file never touched."""


@dataclass(frozen=True)
class FileRepair:
    """One file as it is and as it would be. `old` is None for a file to be made."""

    path: Path
    old: str | None
    new: str

    @property
    def diff(self) -> str:
        return repair.diff(self.old or "", self.new, str(self.path))


def plan_of(case: Case) -> Plan:
    return make(case, lambda mended: examine(mended, ALL))


def repairs(case: Case, edits: tuple[Change, ...]) -> list[FileRepair]:
    """The files with the edits spliced into their text; everything else in them is kept."""
    found = []
    for name, path in (("accelerate", case.job.accelerate_path), ("train", case.job.train_path)):
        mine = [edit for edit in edits if edit.file == name]
        if path is None or not mine:
            continue
        try:
            old = repair.read(path)
            new = yamltext.apply(old, mine)
        except repair.RepairError as error:
            raise DoctorError(f"{error.seen}.", error.hint) from error
        except yamltext.CannotEdit as error:
            raise DoctorError(f"{path} cannot be edited safely: {error}", "Make the change by hand.") from error
        if new != old:
            found.append(FileRepair(path, old, new))
    if case.job.accelerate_path is None and not case.job.problems:
        found.append(FileRepair(Path("accelerate_config.yaml"), None, new_accelerate(case)))
    return found


def new_accelerate(case: Case) -> str:
    """An accelerate file for this machine, for a job that has none."""
    if case.job.use_cpu:
        cores = case.facts.host.cpus if case.facts.host else 1
        return accelerate_yaml(min(2, cores), cpu=True)
    ranks = max(1, len(devices(case) or ()))
    if case.job.xflux:
        steps = case.job.xflux.get("gradient_accumulation_steps", 1)
        return xflux_yaml(ranks, steps if isinstance(steps, int) else 1)
    return accelerate_yaml(ranks, cpu=False)


def _with_launch(case: Case) -> Case:
    """With the accelerate file that will be made: X-Flux's script needs its DeepSpeed to fit."""
    if not case.job.xflux or case.job.accelerate_path or case.job.problems:
        return case
    made = yaml.safe_load(new_accelerate(case))
    return dataclasses.replace(case, job=dataclasses.replace(case.job, accelerate=made))


def run(inputs: Inputs, *, form: str, write: bool, yes: bool) -> int:
    """Plan the repairs and show them; write them with `write`. Exit 1 while anything stays wrong."""
    case = build(inputs, matrices.load_with(inputs.matrix))
    before = summarize(case)
    plan = plan_of(_with_launch(case))
    refusal = _refusal(plan, case)
    files = [] if refusal else repairs(case, plan.edits)
    written: list[str] = []
    if write and files:
        if form == "text":
            _show(files, plan)
        confirm(yes, "Write these files?")
        for item in files:
            written += _write(item, form)
    code = _exit_code(plan, refusal, files, written)
    if form == "json":
        diffs = {str(item.path): item.diff for item in files}
        report = jsonreport.document(before)
        click.echo(jsonreport.encode(jsonreport.with_fix(report, plan.edits, diffs, written, code)), nl=False)
        return code
    if not write and not refusal:
        _show(files, plan)
    _last_words(plan, refusal, files, written)
    return code


def _refusal(plan: Plan, case: Case) -> Finding | None:
    """The reason why nothing may be written, if there is one."""
    if any(problem.file == "accelerate" for problem in case.job.problems):
        return next((f for f in plan.blockers if f.code == "LA101"), None)
    return next((f for f in plan.blockers if f.code in NO_WRITING), None)


def _show(files: list[FileRepair], plan: Plan) -> None:
    for item in files:
        for line in item.diff.splitlines():
            color = "green" if line.startswith("+") else "red" if line.startswith("-") else None
            click.echo(click.style(line, fg=color))
    for edit in plan.edits:
        click.echo(f"  {text.describe(edit)}")


def _write(item: FileRepair, form: str) -> list[str]:
    kept = ""
    if item.old is None:
        write_atomic(item.path, item.new)
    else:
        try:
            backup = repair.write(item.path, item.new, item.old)
        except repair.RepairError as error:
            raise DoctorError(f"{error.seen}.", error.hint) from error
        kept = f" (the old one is {backup.copy})" if backup else ""
    if form == "text":
        click.echo(f"Wrote {item.path}{kept}.")
    return [str(item.path)]


def _exit_code(plan: Plan, refusal: Finding | None, files: list[FileRepair], written: list[str]) -> int:
    pending = len(files) > len(written)
    if refusal or plan.blockers or pending:
        return 1
    return 3 if any(verdict.status == "crashed" for verdict in plan.verdicts) else 0


def _last_words(plan: Plan, refusal: Finding | None, files: list[FileRepair], written: list[str]) -> None:
    for verdict in plan.verdicts:
        if verdict.status == "crashed":
            click.echo(click.style(f"✗ {verdict.check} crashed: {verdict.reason}", fg="magenta"))
    for finding in plan.blockers:
        click.echo(click.style(f"✗ {finding.code} {finding.seen}", fg="red"))
        if finding.hint:
            click.echo(f"    → {finding.hint}")
        for command in finding.commands:
            click.echo(f"    $ {command}")
    if refusal:
        click.echo("Nothing was written: the job cannot be repaired while this stands.")
    elif files and not written:
        click.echo("Nothing was written. `xflux-doctor fix --write-config` writes these files.")
    elif not files:
        click.echo("The files need no repair." if not plan.blockers else "No edit of the files can mend this.")


def confirm(yes: bool, question: str) -> None:
    """Ask a person; without a terminal nothing is asked."""
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise DoctorError(f"{question} There is no terminal to answer at.", "Give --yes to agree.", code=2)
    click.confirm(question, abort=True)


def undo(inputs: Inputs) -> int:
    """Put the latest backup of each of the job's files back."""
    case = build(inputs, matrices.load_with(inputs.matrix))
    paths = [path for path in (case.job.accelerate_path, case.job.train_path) if path is not None]
    restored = 0
    problems: list[repair.RepairError] = []
    for path in paths:
        try:
            backup = repair.undo(path)
        except repair.RepairError as error:
            problems.append(error)
            continue
        restored += 1
        click.echo(f"Restored {path} from {backup.copy}.")
    if not restored:
        if problems:
            raise DoctorError(f"{problems[0].seen}.", problems[0].hint)
        raise DoctorError(
            "No accelerate or training file was found.", "Name them with --accelerate-config or --config."
        )
    return 0


def install(inputs: Inputs, *, yes: bool) -> int:
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
