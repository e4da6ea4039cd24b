"""NVIDIA's own tools, where they are on PATH: DCGM's quick diagnosis and nccl-tests' all-reduce. Neither is required.

What a tool could not do is unknown with its words; only what it found of the machine is a result.
Sources: docs.nvidia.com/datacenter/dcgm (dcgmi diag; diagnostic errors; its JSON has no published schema, so that
whatever is there is read), nccl-tests' src/common.cu (the table), NVIDIA/DCGM issue 43 (no host engine).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from xflux_doctor.facts import DcgmFailure, DcgmResult, Facts, NcclTests
from xflux_doctor.job import Job
from xflux_doctor.probes.runner import Outcome, run_program

DCGM_SECONDS = 10.0
"""At the most: level 1 takes a few seconds."""
NCCL_SECONDS = 15.0
"""At the most: all of the communicator's start is in it."""
LEAST = 2.0
"""Seconds; with less left neither is started."""
SIZE = 1 << 28
"""Bytes: the largest size of our own sweep, so that the two rates can be compared."""
_DETAIL = 400


def ask_dcgm(facts: Facts, job: Job, environment: Mapping[str, str], seconds: float) -> Facts:
    """Facts with `dcgm`, or a reason under `unknown`; ends within `seconds`."""
    if job.use_cpu or not facts.gpus:
        return _unknown(facts, "dcgm", "the job runs on the CPU" if job.use_cpu else "no GPU is known here")
    program = shutil.which("dcgmi", path=environment.get("PATH", ""))
    if program is None:
        return _unknown(facts, "dcgm", "dcgmi is not on PATH")
    if min(seconds, DCGM_SECONDS) < LEAST:
        return _unknown(facts, "dcgm", "no time was left for DCGM's diagnosis")
    outcome, why = _run((program, "diag", "-r", "1", "-j"), environment, min(seconds, DCGM_SECONDS))
    if outcome is None:
        return _unknown(facts, "dcgm", why)
    found = read_diagnosis(outcome.output) if outcome.code is not None else None
    if isinstance(found, DcgmResult):  # after a failure dcgmi ends with 226: its exit code says no more than this
        found = msgspec.structs.replace(found, seconds=outcome.seconds)
        left = min(seconds, DCGM_SECONDS) - outcome.seconds
        if found.failures and left > 0:
            listed, _ = _run((program, "discovery", "-l"), environment, left)
            found = msgspec.structs.replace(found, cards=read_discovery(listed.output if listed else ""))
        return msgspec.structs.replace(facts, dcgm=found)
    return _unknown(facts, "dcgm", f"dcgmi diag gave no result: {found or _words(outcome)}")


def ask_nccl_tests(facts: Facts, job: Job, environment: Mapping[str, str], seconds: float) -> Facts:
    """Facts with `nccl_tests` and its rate in `speeds`, or a reason under `unknown`; ends within `seconds`.

    One process drives the cards that the job's local ranks would get, with the job's own variables.
    """
    ranks = job.local_processes
    program = shutil.which("all_reduce_perf", path=environment.get("PATH", ""))
    if job.use_cpu or ranks < 2 or facts.torch is None or ranks > len(facts.torch.devices):
        return _unknown(facts, "nccl_tests", "the job has no two ranks here with a GPU each")
    if program is None:
        return _unknown(facts, "nccl_tests", "nccl-tests' all_reduce_perf is not on PATH")
    if min(seconds, NCCL_SECONDS) < LEAST:
        return _unknown(facts, "nccl_tests", "no time was left for nccl-tests")
    argv = (program, "-b", str(SIZE), "-e", str(SIZE), "-g", str(ranks), "-w", "3", "-n", "10")
    outcome, why = _run(argv, environment, min(seconds, NCCL_SECONDS))
    if outcome is None:
        return _unknown(facts, "nccl_tests", why)
    found = read_all_reduce(outcome.output + "\n" + outcome.stderr, ranks)
    if outcome.code is None or (found.busbw is None and not found.failed):
        # A library that it lacks, a build for MPI, a start that takes long: nothing of it is the job's.
        return _unknown(facts, "nccl_tests", f"all_reduce_perf gave no result: {_words(outcome)}")
    found = msgspec.structs.replace(found, seconds=outcome.seconds)
    speeds = {"nccl_tests_busbw_gbs": found.busbw} if found.busbw and not found.wrong and not found.failed else {}
    return msgspec.structs.replace(facts, nccl_tests=found, speeds={**facts.speeds, **speeds})


def read_diagnosis(text: str) -> DcgmResult | str:
    """What `dcgmi diag -j` printed, of DCGM 2 and later; or why there is no result in it."""
    start, end = text.find("{"), text.rfind("}")
    try:
        document = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return "what it printed is no JSON"
    if not isinstance(document, dict):
        return ""
    root = next((v for k, v in document.items() if re.match("DCGM.*Diagnostic", k) and isinstance(v, dict)), document)
    if message := root.get("runtime_error") or root.get("error"):
        return _short(str(message))
    passed, failures = 0, []
    for test, result in _results(root):
        status = str(result.get("status", "")).lower()
        passed += status in ("pass", "warn")
        if status == "fail":
            failures += _failures(test, result)
    if not passed and not failures:
        return "no test of it ran"
    metadata = document.get("metadata")
    version = root.get("version") or (metadata.get("version") if isinstance(metadata, dict) else "")
    return DcgmResult(str(version or ""), passed, tuple(failures))


def read_discovery(text: str) -> dict[str, str]:
    """`dcgmi discovery -l`: UUIDs by DCGM's numbers."""
    found, number = {}, ""
    for line in text.splitlines():
        if row := re.match(r"\|\s*(\d+)\s*\|", line):
            number = row[1]
        if number and (uuid := re.search(r"\bUUID:\s*(GPU-[\w-]+)", line)):
            found[number] = uuid[1]
    return found


def read_all_reduce(text: str, ranks: int) -> NcclTests:
    """The table of nccl-tests. Releases before 2.12 have no `root` column and an error in the place of `#wrong`, so
    columns are counted from the right: time, algbw, busbw and #wrong, out of place and in place."""
    busbw, wrong = None, 0
    for line in text.splitlines():
        row = line.split()
        if len(row) >= 11 and row[0] == str(SIZE):
            try:
                busbw = float(row[-6])
            except ValueError:
                continue
            wrong = max((int(value) for value in (row[-5], row[-1]) if value.isdigit()), default=0)
    if count := re.search(r"Out of bounds values\s*:\s*(\d+)", text):
        wrong = max(wrong, int(count[1]))
    failed = re.search(r"Test (?:NCCL|CUDA) failure.*", text)
    return NcclTests(ranks, SIZE, busbw, wrong, _short(failed[0]) if failed else "")


def _results(root: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each result with its test's name; a test without results by its summary."""
    for category in _dicts(root.get("test_categories")):
        for test in _dicts(category.get("tests")):
            name = str(test.get("name", "a test without a name"))
            summary = test.get("test_summary")
            for result in _dicts(test.get("results")) or _dicts([summary if summary else test]):
                yield name, result


def _failures(test: str, result: Mapping[str, Any]) -> list[DcgmFailure]:
    """One for each thing that DCGM complains of in a failed result."""
    numbers = _gpus(result)
    found = []
    for one in _list(result.get("warnings")) or _list(result.get("info")) or [""]:
        said = one if isinstance(one, dict) else {"warning": one}
        severity = said.get("error_severity")
        detail = _short(str(said.get("warning") or said.get("error") or ""))
        # A result of DCGM 2 and 3 may be that of all cards; its words then name the one.
        named = {int(number) for number in re.findall(r"\bGPU\s*(\d+)", detail)}
        gpus = tuple(number for number in numbers if number in named) or numbers
        found.append(DcgmFailure(test, gpus, detail, severity if isinstance(severity, int) else None))
    return found


def _gpus(result: Mapping[str, Any]) -> tuple[int, ...]:
    if "entity_id" in result:
        return _numbers(result["entity_id"]) if result.get("entity_group", "GPU") == "GPU" else ()
    return _numbers(result.get("gpu_ids", result.get("gpu_id", "")))


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", str(value)))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _dicts(value: object) -> list[dict[str, Any]]:
    return [one for one in _list(value) if isinstance(one, dict)]


def _run(argv: Sequence[str], environment: Mapping[str, str], seconds: float) -> tuple[Outcome | None, str]:
    """How it ended, or why it could not be started."""
    try:
        return run_program(argv, environment, seconds), ""
    except OSError as error:
        return None, f"{argv[0]} could not be started: {error.strerror or error}"


def _words(outcome: Outcome) -> str:
    """How it ended, with its last complaint; dcgmi writes its own on stdout."""
    complaints = [line.strip() for line in outcome.output.splitlines() if re.search("error|fail", line, re.IGNORECASE)]
    return f"it {outcome.how}" + (f"; {_short(complaints[-1])}" if complaints else "")


def _short(text: str) -> str:
    return " ".join(text.split())[:_DETAIL]


def _unknown(facts: Facts, name: str, why: str) -> Facts:
    return msgspec.structs.replace(facts, unknown={**facts.unknown, name: why})
