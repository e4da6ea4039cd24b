"""`xflux-doctor run`: validate, repair in memory, launch the trainer, and leave a run folder that tells all."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import yaml
from xflux_trainer import config as train_config

from xflux_doctor import cluster
from xflux_doctor import facts as facts_module
from xflux_doctor import matrix as matrices
from xflux_doctor.check import Case, examine
from xflux_doctor.checks import network
from xflux_doctor.checks.words import devices
from xflux_doctor.commands import gate, planned, runfolder, together
from xflux_doctor.commands.check import summarize
from xflux_doctor.commands.fix import confirm, edited, new_accelerate, plan_of
from xflux_doctor.commands.lead import How, Led, lead, note
from xflux_doctor.commands.rejoin import Fellows
from xflux_doctor.commands.shown import show
from xflux_doctor.commands.together import Self
from xflux_doctor.deepspeed_file import KEY, SECTION
from xflux_doctor.errors import DoctorError, UsageError
from xflux_doctor.facts import Meeting
from xflux_doctor.files import write_atomic
from xflux_doctor.finding import Change, Edit, Finding
from xflux_doctor.inputs import Inputs, build
from xflux_doctor.launch import Launch, build_rank
from xflux_doctor.launch import build as build_launch
from xflux_doctor.plan import Plan, lay
from xflux_doctor.preempt import goes_on
from xflux_doctor.report import jsonreport, text
from xflux_doctor.report.summary import Summary
from xflux_doctor.runstate import RunState
from xflux_doctor.supervise import End

GIB = 1 << 30
_DEEPSPEED = "deepspeed.json"


def run(
    inputs: Inputs, *, dry_run: bool, yes: bool, extra: tuple[str, ...], wait: float = 20.0, how: How | None = None
) -> int:
    """The gate, then the training, and after a death up to `how.retries` more from its last checkpoint. Exit 1 and
    nothing started when the gate refuses, here or on another machine."""
    if inputs.facts and not dry_run:
        raise UsageError("Recorded facts are of another machine or another time.", "Give --dry-run with --facts.")
    case = build(inputs, matrices.load_with(inputs.matrix))
    if case.job.train is None and not case.job.problems:
        raise DoctorError("No training file was given, and no train.yaml lies here.", "Give --config FILE.", code=2)
    case, accelerate_text = _with_accelerate(case)
    repaired = plan_of(case)
    plan, words = _planned(case, repaired)
    case = msgspec.structs.replace(case, job=plan.job)
    me = together.who(case)
    how = how or How()
    if how.retries:
        together.check_retries(case, me, wait)
    # Before the machines meet: what cannot be written here must not leave the others waiting for this one.
    copies = None if plan.blockers else _copies(case, plan, accelerate_text, me)
    meeting = None if plan.blockers or dry_run else together.gathering(case, me, wait, how.retries)
    with contextlib.closing(meeting) if meeting else contextlib.nullcontext():
        if meeting is not None:
            case = together.with_meeting(case, meeting.open(tolerant="NE104" in case.accepted))
        if not plan.blockers and (case.facts.meeting is None or case.facts.meeting.met):
            case = gate.probed(case, inputs, me, lambda line: None if me.quiet else click.echo(f"  {line}"))
        summary = summarize(case)
        if not me.quiet or summary.exit_code:
            show(repaired, plan, summary, words, gate.added(case))
        if not summary.exit_code and (repaired.edits or gate.added(case)) and not dry_run:
            confirm(yes, "Train with these changes? (Your files stay as they are.)")
        log = None if summary.exit_code or dry_run or copies is None else _make_folder(copies.folder)
        if meeting is not None and case.facts.meeting is not None and case.facts.meeting.met:
            ended = meeting.agree(not summary.exit_code, max(inputs.timeout, inputs.deep_timeout) + wait)
            if not summary.exit_code:
                case, summary = _met(case, ended, summary, me)
    if summary.exit_code or copies is None:
        if case.job.train is not None and not dry_run:
            _refused(me.folder(Path(case.job.train.output_dir)), summary)
        return summary.exit_code
    fellows = together.fellows(case, me, meeting, wait, how.retries)
    return _launch(case, plan, summary, copies, me, log, extra=extra, how=how, fellows=fellows)


@dataclass(frozen=True)
class _Copies:
    """The run folder's own files, as they will be written."""

    folder: Path
    accelerate: Path
    train: Path
    texts: dict[Path, str]
    own: list[Change]
    """Edits of accelerate's copy that are not the user's job's: where the other copies lie."""


def _copies(case: Case, plan: Plan, accelerate_text: str, me: Self) -> _Copies:
    """Raises DoctorError where a file cannot be edited, or would be the user's own."""
    assert case.job.train is not None
    folder = me.folder(Path(case.job.train.output_dir).absolute())
    source = case.job.accelerate_path or Path("accelerate_config.yaml")
    accelerate, train = folder / f"accelerate{'.json' if source.suffix == '.json' else '.yaml'}", folder / "train.yaml"
    own = _own_deepspeed(case, plan, folder)
    mine = [edit for edit in plan.edits if edit.file == "accelerate"] + own
    texts = {accelerate: edited(source, accelerate_text, tuple(mine)), train: train_config.to_yaml(case.job.train)}
    if own and case.job.deepspeed_path is not None:
        zero = tuple(edit for edit in plan.edits if edit.file == "deepspeed")
        texts[folder / _DEEPSPEED] = edited(case.job.deepspeed_path, case.job.zero_text, zero)
    _keep_own_files(case, *texts)
    return _Copies(folder, accelerate, train, texts, own)


def _planned(case: Case, plan: Plan) -> tuple[Plan, str]:
    """With the fastest settings that fit, and with the limit that the command line sets; and a sentence on the plan.
    Nobody need be asked."""
    train, limit = plan.job.train, plan.job.gpu_limit
    if train is not None and not plan.blockers and goes_on(os.environ, Path(train.output_dir)):
        edit = Edit("train", ("resume_from_checkpoint",), "latest", "a requeued job goes on from its last checkpoint")
        plan = planned.laid(case, plan, (edit,))
        train = plan.job.train
    if plan.blockers or train is None or not plan.job.bundled or plan.job.use_cpu:
        return plan, ""
    if limit is not None and train.gpu_limit_gib != limit / GIB:
        plan = planned.laid(case, plan, (Edit("train", ("gpu_limit_gib",), limit / GIB, "--gpu-limit"),))
    faster = planned.faster(case, plan)
    return (plan, "") if faster is None else (planned.laid(case, plan, faster.edits), faster.words)


def _met(case: Case, ended: Meeting, summary: Summary, me: Self) -> tuple[Case, Summary]:
    """All are ready, or the launch is off here too."""
    case = together.with_meeting(case, ended)
    if ended.together:
        if not me.quiet:
            click.echo(f"  {together.shown(ended)}")
        return case, summary
    verdicts = examine(case, network.MEETING)
    late = msgspec.structs.replace(summary, verdicts=verdicts, facts=case.facts, launch=())
    click.echo(text.render(late), nl=False)
    return case, late


def _with_accelerate(case: Case) -> tuple[Case, str]:
    """A job without an accelerate file gets one for this machine."""
    if case.job.accelerate is not None or case.job.problems or case.job.accelerate_path is not None:
        return case, case.job.accelerate_text
    new = new_accelerate(case)
    job = cluster.under(msgspec.structs.replace(case.job, accelerate=yaml.safe_load(new)), case.facts.environment)
    return msgspec.structs.replace(case, job=job), new


def _launch(
    case: Case, plan: Plan, summary: Summary, copies: _Copies, me: Self, log: Path | None, *, extra: tuple[str, ...],
    how: How, fellows: Fellows | None,
) -> int:  # fmt: skip
    """Write the run folder and start. Without a `log` nothing is written or started: the launch is shown."""
    assert case.job.train is not None and case.facts.python is not None
    folder, python, seen = copies.folder, case.facts.python.executable, devices(case)
    job = lay(case.job, copies.own)
    if me.rank_task is not None:
        number = None if seen is None else len(seen)
        launch = build_rank(python, job, me.rank_task, number, copies.train, os.environ, extra)
    else:
        launch = build_launch(python, job, copies.accelerate, copies.train, os.environ, extra)
    if case.facts.allreduce is not None:
        launch = launch.adding(network.proven(case.facts.allreduce))
    if log is None:
        click.echo(f"$ {launch.shell}")
        return 0
    for path, content in copies.texts.items():
        write_atomic(path, content)
    _record(folder, case, plan, summary, launch)
    if not me.quiet:
        click.echo(f"$ {launch.shell}\n  log: {log}\n")
    runfolder.started(folder, log, launch.shell)
    files = {"accelerate": copies.accelerate, "train": copies.train, "deepspeed": folder / _DEEPSPEED}
    cards = () if job.use_cpu or seen is None else tuple(gpu.uuid for gpu in seen if gpu.uuid)
    led = lead(
        launch, folder, files, log, how, cards=cards, next_log=lambda attempt: _make_folder(folder, attempt),
        fellows=fellows,
    )  # fmt: skip
    end, log = led.end, led.log
    try:
        _finish(folder, led, quiet=me.quiet)
        write_atomic(folder / "report.txt", _report(summary, plan, launch, folder, end))
    except (DoctorError, OSError) as error:  # the training's own end is what counts
        click.echo(f"The run folder could not be completed: {error}", err=True)
    note(folder, RunState.own(log, end.exit_code))  # last: who is attached reads the rest then
    return end.exit_code


def _own_deepspeed(case: Case, plan: Plan, folder: Path) -> list[Change]:
    """With repairs of the DeepSpeed file the run has a copy of its own, which its accelerate file names."""
    if case.job.deepspeed_path is None or not any(edit.file == "deepspeed" for edit in plan.edits):
        return []
    reason = "the run's own copy, with the repairs"
    return [Edit("accelerate", (SECTION, KEY), str(folder / _DEEPSPEED), reason)]


def _keep_own_files(case: Case, *written: Path) -> None:
    """The run folder's copies must not replace the files that they are copies of."""
    for own in (case.job.accelerate_path, case.job.train_path, case.job.deepspeed_path):
        if own is not None and any(path.exists() and path.samefile(own) for path in written):
            raise DoctorError(
                f"output_dir is the folder of your own {own.name}, which the run would replace.",
                "Set output_dir to a folder of its own.",
            )


def _report(summary: Summary, plan: Plan, launch: Launch, folder: Path, end: End) -> str:
    """What a person wants to read of a run afterwards, on one page."""
    lines = [click.unstyle(text.render(summary, verbose=True)), "Repairs:"]
    lines += [f"  {text.describe(edit)}" for edit in plan.edits] or ["  none"]
    lines += ["", f"$ {launch.shell}", f"ended with {end.exit_code} after {end.seconds:.0f} s"]
    metrics = folder / "metrics.json"
    if metrics.is_file():
        lines += ["", metrics.read_text(encoding="utf-8")]
    return "\n".join(lines) + "\n"


def _make_folder(folder: Path, retry: int = 0) -> Path:
    """The run folder and the name of this run's log."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    log = folder / "logs" / f"run-{stamp}{f'-retry-{retry}' if retry else ''}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    except OSError as error:
        hint = "Choose another output_dir, or make room."
        raise DoctorError(f"{log} cannot be made: {error.strerror}.", hint) from error
    return log


def _record(folder: Path, case: Case, plan: Plan, summary: Summary, launch: Launch) -> None:
    """What ran and why, beside what it makes."""
    write_atomic(folder / "facts.json", facts_module.to_json(case.facts) + "\n")
    write_atomic(folder / "findings.json", jsonreport.encode(jsonreport.document(summary)))
    record: dict[str, Any] = {
        "command": launch.shell,
        "argv": launch.argv,
        "hash": runfolder.identity(case),
        "stack": summary.stack,
        "added_environment": launch.added,
        "added_because": gate.added(case),
        "edits": [msgspec.to_builtins(edit) for edit in plan.edits],
        "accepted": sorted(case.accepted),
        "forecast": _bill(plan),
    }
    write_atomic(folder / "launch.json", jsonreport.encode(record))
    runfolder.plan(folder, case)


def _bill(plan: Plan) -> dict[str, Any] | None:
    return plan.bill._asdict() if plan.bill else None


def _refused(folder: Path, summary: Summary) -> None:
    """Leave the reason where the next person looks, if the folder is there already."""
    if folder.is_dir() and os.access(folder, os.W_OK):
        errors = [f for v in summary.verdicts for f in v.findings if f.severity == "error"]
        _result(folder, "gate", summary.exit_code, None, None, _of_finding(errors[0]) if errors else None)


def _of_finding(finding: Finding) -> dict[str, Any]:
    """What the gate stopped at, in the form of a diagnosis."""
    return {
        "cause": finding.code,
        "title": finding.seen,
        "because": finding.because,
        "evidence": [],
        "rank": None,
        "remedy": {"hint": finding.hint, "commands": list(finding.commands), "docs": finding.docs},
        "others": [],
    }


def _finish(folder: Path, led: Led, *, quiet: bool = False) -> None:
    """Write result.json and say how it ended: the file first, since a terminal may be gone."""
    end, log = led.end, led.log
    cause, words = None, f"\nDone in {end.seconds:.0f} s: {folder}"
    if end.exit_code != 0 and not end.interrupted:
        explain: Any = importlib.import_module("xflux_doctor.commands.explain")  # not for every start of the doctor
        cause = explain.as_dict(led.diagnosis, led.lighter)
        words = f"\nThe training ended with {end.exit_code} after {end.seconds:.0f} s.\n"
        words += f"{explain.words(led.diagnosis, led.lighter)}\n"
        words += f"{explain.suggestion(led.diagnosis, folder)}    log: {log}"
    elif end.interrupted:
        words = "\nInterrupted. Run the same command again with resume_from_checkpoint: latest to go on."
    _result(folder, "train", end.exit_code, end.trainer_exit_code, end.signal, cause)
    runfolder.ended(folder, log, end.exit_code, end.seconds, cause or {"cause": "none"})
    if cause is not None or not quiet:
        click.echo(words)


def _result(folder: Path, phase: str, code: int, trainer: int | None, number: int | None, cause: object) -> None:
    result = {"phase": phase, "exit_code": code, "trainer_exit_code": trainer, "signal": number, "cause": cause}
    write_atomic(folder / "result.json", jsonreport.encode(result))
