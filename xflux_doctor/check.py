"""The frame of every check: what a case is, how a check is declared, how all are run.

A check is a generator under `@check`; its docstring is its help text. The frame decides skips (a needed fact is
missing), isolates a crash, and takes the time. Only `examine` may catch any exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from xflux_doctor.facts import Facts
from xflux_doctor.finding import Edit, Finding, Status, Verdict
from xflux_doctor.finding import error as finding_of_error
from xflux_doctor.job import Job
from xflux_doctor.matrix import Matrix, Stack


class Case(msgspec.Struct, frozen=True):
    """Everything that a check may look at."""

    facts: Facts
    job: Job
    matrix: Matrix
    stack: Stack | None = None
    """The stack that the packages are held against."""
    stack_because: str = ""
    accepted: frozenset[str] = frozenset()
    """Codes that the user accepts: their errors become warnings."""
    taken: frozenset[str] = frozenset()
    """Codes whose offers the user takes: they are edits then."""


Body = Callable[[Case], Iterator[Finding]]


class Check(msgspec.Struct, frozen=True):
    """One check: its code (for ever), title, needed facts and body."""

    code: str
    title: str
    needs: tuple[str, ...]
    body: Body

    @property
    def help(self) -> str:
        return (self.body.__doc__ or "").strip()


def check(code: str, title: str, *, needs: tuple[str, ...] = ()) -> Callable[[Body], Check]:
    """Declare a check. `needs` names facts (`gpus`, `torch` …) and parts of the job (`train`, `accelerate`,
    `trainer`: that the bundled trainer runs it)."""

    def declare(body: Body) -> Check:
        return Check(code, title, needs, body)

    return declare


_NOT_PROBED = {
    "folders": "these facts do not say what is under the job's folders",
    "hub": "the hub was not asked",
    "torch": "torch was not imported (quick level)",
    "allreduce": "no all-reduce was run (quick level)",
    "gpu_probes": "no GPU was tried (check --deep)",
    "dcgm": "DCGM was not asked (check --deep)",
    "nccl_tests": "nccl-tests was not run (check --deep, of two ranks and more)",
    "cluster": "the job is for one machine, or names no main_process_ip",
    "meeting": "no launch over several machines was begun",
    "train": "no readable training file was given (--config)",
    "accelerate": "no readable accelerate file was given (--accelerate-config)",
    "stack": "no stack of the matrix fits this machine",
}


def missing(case: Case, need: str) -> str:
    """Why a needed part of the case is not there; empty when it is."""
    if case.job.xflux and need in ("train", "trainer"):
        return "the job is judged as X-Flux's own script runs it (XF), without the bundled trainer"
    holders: dict[str, object | None] = {
        "trainer": True,
        "train": case.job.train,
        "accelerate": case.job.accelerate,
        "stack": case.stack,
    }
    value = holders[need] if need in holders else getattr(case.facts, need)
    if value is not None:
        return ""
    return case.facts.unknown.get(need) or _NOT_PROBED.get(need, f"{need} is unknown")


def examine(case: Case, checks: Iterable[Check]) -> tuple[Verdict, ...]:
    """Run the checks in order. A check that raises becomes a `crashed` verdict; the others still run."""
    return tuple(_run(case, item) for item in checks)


def _run(case: Case, item: Check) -> Verdict:
    reasons = [reason for need in item.needs if (reason := missing(case, need))]
    if reasons:
        return Verdict(item.code, item.title, "skipped", reason=reasons[0])
    started = time.perf_counter()
    try:
        findings = tuple(_accept(case, item.code, finding) for finding in item.body(case))
    except SkipCheck as skip:
        return Verdict(item.code, item.title, "skipped", reason=str(skip), seconds=time.perf_counter() - started)
    except OSError as error:  # a folder that may not be entered, a name too long: the job's files, not a defect of ours
        found = _accept(case, item.code, _unreadable(error))
        return Verdict(item.code, item.title, found.severity, (found,), seconds=time.perf_counter() - started)
    except Exception as error:  # noqa: BLE001 - one broken check must not silence the others
        reason = f"{type(error).__name__}: {error}"
        return Verdict(item.code, item.title, "crashed", reason=reason, seconds=time.perf_counter() - started)
    status: Status = "ok"
    if findings:
        status = "error" if any(f.severity == "error" for f in findings) else "warning"
    return Verdict(item.code, item.title, status, findings, seconds=time.perf_counter() - started)


def _unreadable(error: OSError) -> Finding:
    seen = f"{error.filename or 'A file of this job'}: {error.strerror or error}."
    hint = "Give yourself the right to read it, or correct the path."
    return finding_of_error(seen, "It could not be looked at, and the training will not read it either.", hint)


_NEVER_ACCEPTED = frozenset({"LA101", "LA102"})
"""Without its files there is no job that could go on."""


class SkipCheck(Exception):
    """Raised by a check's body when it does not apply; the message is the reason."""


def _accept(case: Case, code: str, finding: Finding) -> Finding:
    """Give the finding its check's code; an accepted error becomes a warning that the tool will not repair."""
    named = _where_it_is_said(case, _taken(case, msgspec.structs.replace(finding, code=code)))
    if code not in case.accepted or code in _NEVER_ACCEPTED or finding.severity == "warning":
        return named
    because = f"{finding.because} (accepted by --accept {code})".strip()
    return msgspec.structs.replace(named, severity="warning", because=because, edits=(), offers=())


def _taken(case: Case, finding: Finding) -> Finding:
    """What was offered is an edit like any other once the user has asked for it by --take."""
    if finding.code not in case.taken or not finding.offers:
        return finding
    return msgspec.structs.replace(finding, edits=(*finding.edits, *finding.offers), offers=())


def _where_it_is_said(case: Case, finding: Finding) -> Finding:
    """An edit of accelerate's file has no effect where a flag or a variable wins: that is what must change then.

    Edits that belong together are made together or not at all.
    """
    job = case.job
    won = [edit for edit in finding.edits if edit.file == "accelerate" and job.source(edit.key[0])]
    if not won:
        return finding
    sources = ", ".join(dict.fromkeys(f"{edit.key[0]} comes from {job.source(edit.key[0])}" for edit in won))
    command, flags = job.command, job.command.named if job.command else {}
    for edit in won:
        if command is not None and isinstance(edit, Edit) and edit.key[0] in flags:
            machines = job.num_machines if flags[edit.key[0]] in ("nproc_per_node", "num_gpus") else 1
            value = edit.value // max(1, machines) if isinstance(edit.value, int) else edit.value
            command = command.rewritten(flags[edit.key[0]], value)
        elif command is not None and isinstance(edit, Edit) and edit.key == ("distributed_type",):
            command = command.without(job.source("distributed_type").removeprefix("--"))  # refused with one process
    commands = (*finding.commands, str(command)) if command != job.command else finding.commands
    hint = f"{finding.hint} {sources}: no file is changed for it.".strip()
    return msgspec.structs.replace(finding, hint=hint, edits=(), offers=(), commands=commands)
