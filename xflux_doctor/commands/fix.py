"""`xflux-doctor fix`: show the repairs and write them."""

from __future__ import annotations

import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import yaml

from xflux_doctor import batch, joint, jsontext, repair, strategy, yamltext
from xflux_doctor import matrix as matrices
from xflux_doctor.check import Case, examine
from xflux_doctor.checks import ALL
from xflux_doctor.checks.words import devices
from xflux_doctor.commands import planned
from xflux_doctor.commands.check import summarize
from xflux_doctor.errors import DoctorError
from xflux_doctor.finding import Change, Finding, Verdict
from xflux_doctor.inputs import Inputs, build, files_of
from xflux_doctor.meaning import everywhere
from xflux_doctor.plan import Plan, make
from xflux_doctor.report import difference, jsonreport, text
from xflux_doctor.template import accelerate_yaml, deepspeed_yaml, fsdp_yaml
from xflux_doctor.yamlnodes import read as read_yaml

NO_WRITING = frozenset({"HW101", "LA103", "LA104", "LA105", "LA113", "LA114"}).union(
    f"LA{code}" for code in (*range(201, 213), *range(301, 314))
)
"""Blockers under which nothing is written: a GPU job is never turned into a CPU job, a service's file never touched,
and a file of accelerate's that no edit makes right stays as it is, whole."""
_ROUNDS = 3
"""Writes until the files must be right; each is looked at again as it lies on the disk."""


@dataclass(frozen=True)
class FileRepair:
    """One file as it is and as it would be. `old` is None for a file to be made."""

    path: Path
    old: str | None
    new: str
    edits: tuple[Change, ...] = ()

    @property
    def diff(self) -> str:
        return repair.diff(self.old or "", self.new, str(self.path))


@dataclass(frozen=True)
class Look:
    """The job as its files are now, and what would be written."""

    plan: Plan
    refusal: Finding | None
    """Why nothing may be written, if there is a reason."""
    files: list[FileRepair]
    faster: planned.Faster | None = None
    """What `run` would do beside the repairs."""


def plan_of(case: Case) -> Plan:
    return make(case, lambda mended: examine(mended, ALL))


def repairs(case: Case, edits: tuple[Change, ...]) -> list[FileRepair]:
    """The files with the edits spliced into their text; everything else in them is kept."""
    found = []
    for name, path in files_of(case.job).items():
        mine = _of(edits, name)
        if not mine:
            continue
        try:
            old = repair.read(path)
            made = _places(old, mine, bundled=case.job.xflux is None) if name == "train" else mine
        except repair.RepairError as error:
            raise DoctorError(f"{error.seen}.", error.hint) from error
        new = edited(path, old, made)
        if new != old:
            found.append(FileRepair(path, old, new, made))
    if case.job.accelerate_path is None and case.job.accelerate is not None:  # a launch was laid under the job
        path = Path("accelerate_config.yaml")
        found.append(FileRepair(path, None, edited(path, new_accelerate(case), _of(edits, "accelerate"))))
    return found


def _of(edits: tuple[Change, ...], file: str) -> tuple[Change, ...]:
    return tuple(edit for edit in edits if edit.file == file)


def edited(path: Path, text: str, edits: tuple[Change, ...]) -> str:
    """The text of a file with its edits. Raises DoctorError where one cannot be made."""
    try:
        return _apply(path, edits)(text, edits)
    except yamltext.CannotEdit as error:
        raise DoctorError(f"{path} cannot be edited safely: {error}", "Make the change by hand.") from error


def _apply(path: Path, edits: tuple[Change, ...]) -> difference.Apply:
    json = path.suffix == ".json" or any(edit.file == "deepspeed" for edit in edits)
    return jsontext.apply if json else yamltext.apply


def _places(old: str, edits: tuple[Change, ...], *, bundled: bool) -> tuple[Change, ...]:
    """The edits of the training file, each for every place that holds its key."""
    data = read_yaml(old)
    return tuple(place for edit in edits for place in everywhere(data, edit, bundled=bundled))


def new_accelerate(case: Case) -> str:
    """An accelerate file for this machine, for a job that has none."""
    if case.job.use_cpu:
        cores = case.facts.host.cpus if case.facts.host else 1
        return accelerate_yaml(min(2, cores), cpu=True)
    ranks = max(1, len(devices(case) or ()))
    choice = strategy.best(case, ranks)
    if choice.strategy.startswith("zero"):
        return deepspeed_yaml(ranks, batch.accumulation(case.job), choice.because, int(choice.strategy[-1]))
    if choice.strategy == "fsdp":
        return fsdp_yaml(ranks, choice.because)
    return accelerate_yaml(ranks, cpu=False, because=choice.because)


def _with_launch(case: Case) -> Case:
    """With the accelerate file that will be made for a job that has none: what is planned is planned for it."""
    if case.job.accelerate_path or case.job.problems or case.job.command is not None:
        return case
    made = yaml.safe_load(new_accelerate(case))
    return msgspec.structs.replace(case, job=msgspec.structs.replace(case.job, accelerate=made))


def run(inputs: Inputs, *, form: str, write: bool, yes: bool) -> int:
    """Plan the repairs and show them; write them with `write`. Exit 1 while anything stays wrong."""
    matrix = matrices.load_with(inputs.matrix)
    case = build(inputs, matrix)
    if write and _taken_back(case, form):
        case = build(inputs, matrix)
    before = summarize(case)
    looks = [_look(case)]
    written: list[str] = []
    mark = uuid.uuid4().hex
    while write and looks[-1].files and len(looks) <= _ROUNDS:
        if form == "text":
            _show(looks[-1].files)
            if not (yes or written):  # what is asked for with --take comes before the answer
                _offers(before.verdicts, looks[-1].plan, written=False)
        confirm(yes, "Write these files?" if not written else "This follows from what was written. Write it too?")
        _write(looks[-1].files, mark, form)
        written += [str(item.path) for item in looks[-1].files]
        looks.append(_look(build(inputs, matrix)))
    code = _exit_code(looks[-1])
    if form == "json":
        report = jsonreport.document(before)
        click.echo(jsonreport.encode(_with_fix(report, looks, written, code)), nl=False)
        return code
    if not write and not looks[-1].refusal:
        _show(looks[-1].files)
    _offers(before.verdicts, looks[-1].plan, written=bool(written))
    if looks[-1].faster:
        click.echo(click.style(f"? {planned.TAKE} {looks[-1].faster.words}", fg="yellow"))
        click.echo(f"    `run` does so by itself; `fix --take {planned.TAKE} --write-config` writes it down.")
    _last_words(looks, bool(written))
    return code


def _look(case: Case) -> Look:
    case, plan = _launched(case)
    found = planned.faster(case, plan)
    if found is not None and planned.TAKE in case.taken:
        plan, found = planned.laid(case, plan, found.edits), None
    refusal = _refusal(plan, case)
    return Look(plan, refusal, [] if refusal or plan.conflicts else repairs(case, plan.edits), found)


def _launched(case: Case) -> tuple[Case, Plan]:
    """The job in a launch file that is made for it, and its plan. It stays without one where that would stop a job that
    can start as it is: a card that others hold is no rank of one process."""
    made = _with_launch(case)
    plan = plan_of(made)
    if made is not case and plan.blockers and case.job.xflux is None:
        own = plan_of(case)
        if not own.blockers:
            return case, own
    return made, plan


def _refusal(plan: Plan, case: Case) -> Finding | None:
    """The reason why nothing may be written, if there is one."""
    if any(problem.file == "accelerate" for problem in case.job.problems):
        return next((f for f in plan.blockers if f.code == "LA101"), None)
    return next((f for f in plan.blockers if f.code in NO_WRITING), None)


def _show(files: list[FileRepair]) -> None:
    """The diff, the reason beside each change."""
    for item in files:
        if item.old is None:
            lines = [(line, "") for line in item.diff.splitlines()]
        else:
            lines = list(difference.reasoned(item.old, item.edits, str(item.path), _apply(item.path, item.edits)))
        for line, reason in lines:
            color = "green" if line.startswith("+") else "red" if line.startswith("-") else None
            why = click.style(f"  # why: {reason}", fg="bright_black") if reason else ""
            click.echo(click.style(line, fg=color) + why)


def _write(files: list[FileRepair], mark: str, form: str) -> None:
    """All of them or none."""
    try:
        backups = joint.write([joint.Change(item.path, item.old, item.new) for item in files], mark)
    except repair.RepairError as error:
        raise DoctorError(f"{error.seen}.", error.hint) from error
    for item, backup in zip(files, backups, strict=True):
        if form == "text" and backup is not None:
            kept = "" if backup.created else f" (the old one is {backup.copy})"
            linked = f" Its {backup.names - 1} other names (hard links) keep the old text." if backup.names > 1 else ""
            click.echo(f"Wrote {item.path}{kept}.{linked}")


def _taken_back(case: Case, form: str) -> bool:
    """Take back what a kill left half written, so that the repair starts from what the user wrote."""
    found = joint.broken_off(files_of(case.job).values())
    if found is None:
        return False
    try:
        joint.take_back(found)
    except repair.RepairError as error:
        raise DoctorError(f"{error.seen}.", error.hint) from error
    names = ", ".join(str(path) for path in found.written)
    said = f"The last repair was broken off between two files: {names} has its old text again."
    click.echo(said, err=form == "json")
    return True


def _exit_code(look: Look) -> int:
    plan = look.plan
    if look.refusal or look.files or plan.blockers or plan.conflicts:
        return 1
    return 3 if any(verdict.status == "crashed" for verdict in plan.verdicts) else 0


def _with_fix(report: dict[str, Any], looks: list[Look], written: list[str], code: int) -> dict[str, Any]:
    """The report as JSON has it: the files' diffs from what they said first to what they say, or would say, last."""
    first: dict[Path, str] = {}
    last: dict[Path, str] = {}
    for item in [item for look in looks for item in look.files]:
        first.setdefault(item.path, item.old or "")
        last[item.path] = item.new
    diffs = {str(path): repair.diff(first[path], last[path], str(path)) for path in first}
    edits = tuple(dict.fromkeys(edit for look in looks for edit in look.plan.edits))
    left = tuple(finding for verdict in looks[-1].plan.verdicts for finding in verdict.findings)
    return jsonreport.with_fix(report, edits, diffs, list(dict.fromkeys(written)), left, code)


def _last_words(looks: list[Look], written: bool) -> None:
    """What is left: of the files as they were written, or as they would be."""
    plan, refusal, files = looks[-1].plan, looks[-1].refusal, looks[-1].files
    for verdict in plan.verdicts:
        if verdict.status == "crashed":
            click.echo(click.style(f"✗ {verdict.check} crashed: {verdict.reason}", fg="magenta"))
    for finding in plan.blockers:
        _blocker(finding)
    _conflicts(looks)
    if refusal:
        click.echo("Nothing was written: the job cannot be repaired while this stands.")
    elif plan.conflicts or (files and written):
        click.echo(
            "These repairs take each other back. Decide by hand, or accept one of the findings by --accept CODE."
        )
    elif files:
        click.echo("Nothing was written. `xflux-doctor fix --write-config` writes these files.")
    elif written:
        _warnings(plan)
    else:
        click.echo("The files need no repair." if not plan.blockers else "No edit of the files can mend this.")


def _offers(verdicts: tuple[Verdict, ...], plan: Plan, *, written: bool) -> None:
    """What the repairs leave to the user, such as a learning rate for another number of samples a step."""
    blocking = {finding.code for finding in plan.blockers}
    standing = {finding.code for verdict in plan.verdicts for finding in verdict.findings}
    for finding in (f for verdict in verdicts for f in verdict.findings):
        if finding.offers and finding.code not in blocking:
            click.echo(click.style(f"? {finding.code} {finding.hint}", fg="yellow"))
            for edit in finding.offers:
                gone = written and finding.code not in standing  # there is nothing left to --take
                click.echo(text.offer("" if gone else finding.code, edit))


def _blocker(finding: Finding) -> None:
    click.echo(click.style(f"✗ {finding.code} {finding.seen}", fg="red"))
    if finding.hint:
        click.echo(f"    → {finding.hint}")
    for edit in finding.offers:
        click.echo(text.offer(finding.code, edit))
    for command in finding.commands:
        click.echo(f"    $ {command}")


def _conflicts(looks: list[Look]) -> None:
    """Which edits keep changing which key: those that the plan takes back itself, or those of later writes."""
    plan = looks[-1].plan
    for edit in plan.conflicts:
        click.echo(click.style(f"✗ {'.'.join(edit.key)} does not come to rest:", fg="red"))
        for change in [*(other for other in plan.edits if (other.file, other.key) == (edit.file, edit.key)), edit]:
            click.echo(f"    {text.describe(change)}")
    if looks[-1].files and len(looks) > _ROUNDS:
        rounds = [edit for look in looks for item in look.files for edit in item.edits]
        for place in dict.fromkeys((edit.file, edit.key) for edit in looks[-1].files[0].edits):
            click.echo(click.style(f"✗ {'.'.join(place[1])} does not come to rest:", fg="red"))
            for change in dict.fromkeys(edit for edit in rounds if (edit.file, edit.key) == place):
                click.echo(f"    {text.describe(change)}")


def _warnings(plan: Plan) -> None:
    """The files were looked at again as they were written."""
    warnings = [f for verdict in plan.verdicts for f in verdict.findings if f.severity == "warning"]
    for finding in warnings:
        click.echo(click.style(f"! {finding.code} {finding.seen}", fg="yellow"))
    if not plan.blockers:
        click.echo("Looked again: nothing of this stops the job." if warnings else "Looked again: nothing is left.")


def confirm(yes: bool, question: str) -> None:
    """Ask a person; without a terminal nothing is asked."""
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise DoctorError(f"{question} There is no terminal to answer at.", "Give --yes to agree.", code=2)
    click.confirm(question, abort=True)
