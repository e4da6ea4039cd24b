"""The default level's facts: what torch sees, and a right all-reduce over the job's ranks, in one deadline."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from xflux_doctor.facts import AllReduce, Facts, HubAccess, TorchFacts
from xflux_doctor.gather.environment import is_offline, without_login
from xflux_doctor.job import Job
from xflux_doctor.probes.runner import Child, Outcome, run

HUB_SECONDS = 5.0
"""The hub's own deadline: it answers in a fraction of a second, or something is wrong."""
STAGES = ("start", "import", "rendezvous", "init", "tiny", "values", "done")


def job_environment(job: Job, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment that a rank would get: the user's, whole, with the devices that the job chooses."""
    environment = dict(environ)
    if job.use_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif job.gpu_ids is not None and job.gpu_ids != "all":
        environment["CUDA_VISIBLE_DEVICES"] = job.gpu_ids
    return environment


def probe(facts: Facts, job: Job, environ: Mapping[str, str], seconds: float) -> Facts:
    """Facts with `hub`, `torch` and `allreduce` filled in, or a reason under `unknown`. Ends within `seconds`."""
    if facts.python is None:
        return facts
    deadline = time.monotonic() + seconds
    python = facts.python.executable
    facts = ask_hub(facts, job, environ, min(HUB_SECONDS, seconds / 2))
    environment = job_environment(job, environ)
    unknown = dict(facts.unknown)
    outcome = run(python, "torch_import", (), environment, deadline - time.monotonic())
    torch = _torch(outcome)
    if torch is None:
        unknown["torch"] = _import_failure(outcome)
        unknown["allreduce"] = "torch could not be imported"
        return msgspec.structs.replace(facts, unknown=unknown)
    facts = msgspec.structs.replace(facts, torch=torch)
    why_not = _cannot_reduce(job, torch, facts.host.cpus if facts.host else 1)
    if why_not:
        unknown["allreduce"] = why_not
        return msgspec.structs.replace(facts, unknown=unknown)
    ranks = job.local_processes
    backend = "gloo" if job.use_cpu else "nccl"
    reduced = all_reduce(python, backend, ranks, environment, max(1.0, deadline - time.monotonic()))
    return msgspec.structs.replace(facts, allreduce=reduced, unknown=unknown)


def ask_hub(facts: Facts, job: Job, environ: Mapping[str, str], seconds: float) -> Facts:
    """Facts with `hub`, if the weights must come from there and it may be asked; else a reason under `unknown`."""
    cache = facts.hub_cache
    if cache is None or facts.python is None:
        return facts
    if cache.complete or job.offline or is_offline(environ):
        why = "the model is in the hub cache" if cache.complete else "the hub was not asked: this is an offline run"
        return msgspec.structs.replace(facts, unknown={**facts.unknown, "hub": why})
    endpoint = without_login((environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"))
    # The child's own limit ends a little before ours, so that its words reach us; finding the address has no limit.
    arguments = (cache.repository, f"{seconds * 0.8:.1f}")
    outcome = run(facts.python.executable, "hub_access", arguments, environ, seconds)
    said = next((line for line in outcome.lines if "detail" in line), None)
    if said is None:
        kind = "timeout: no answer in time" if outcome.code is None else f"probe: {outcome.how}"
        said = {"status": None, "detail": kind}
    status = said["status"] if isinstance(said.get("status"), int) else None
    answer = HubAccess(cache.repository, endpoint, status, str(said["detail"]), outcome.seconds)
    return msgspec.structs.replace(facts, hub=answer)


def _torch(outcome: Outcome) -> TorchFacts | None:
    for line in reversed(outcome.lines):
        if "version" in line:
            return msgspec.convert({k: v for k, v in line.items() if k != "error"}, TorchFacts)
    return None


def _import_failure(outcome: Outcome) -> str:
    for line in outcome.lines:
        if "error" in line:
            return f"import torch raised {line['error']}"
    return f"import torch {outcome.how}"


def _cannot_reduce(job: Job, torch: TorchFacts, cores: int) -> str:
    if job.accelerate is None and not job.use_cpu and not torch.devices:
        return "no accelerate file says how many ranks there are, and torch sees no GPU"
    if job.use_cpu:
        few = job.num_processes <= max(2, cores)
        return "" if few else f"{job.num_processes} ranks on {cores} cores are not started (see LA107)"
    if not torch.devices:
        return "torch sees no GPU"
    if job.local_processes > len(torch.devices):
        return f"the job wants {job.local_processes} ranks and torch sees {len(torch.devices)} devices"
    return ""


def all_reduce(python: str, backend: str, ranks: int, environment: Mapping[str, str], seconds: float) -> AllReduce:
    """One all-reduce over `ranks` children; names the first rank that failed or fell silent and its stage."""
    started = time.monotonic()
    deadline = started + seconds
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="xflux-doctor-") as folder:
        try:
            for rank in range(ranks):
                # torch's own limit ends a little before ours, so that its sentence reaches us
                limit = f"{max(1.0, seconds * 0.9):.1f}"
                arguments = (backend, str(rank), str(ranks), str(Path(folder) / "store"), limit)
                children.append(Child(python, "allreduce", arguments, environment))
            _wait(children, deadline)
            outcomes = [child.finish(time.monotonic()) for child in children]
        finally:
            for child in children:
                child.kill()
    return _verdict(backend, outcomes, time.monotonic() - started)


def _wait(children: list[Child], deadline: float) -> None:
    """Until all have ended, one has failed (the others get two seconds to speak), or the deadline."""
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if all(code is not None for code in codes):
            return
        if any(code not in (None, 0) for code in codes):
            deadline = min(deadline, time.monotonic() + 2.0)
        time.sleep(0.02)


def _verdict(backend: str, outcomes: list[Outcome], seconds: float) -> AllReduce:
    failed: list[tuple[int, int, str]] = []
    for rank, outcome in enumerate(outcomes):
        stages = [str(line["stage"]) for line in outcome.lines if line.get("stage") in STAGES]
        last = STAGES.index(stages[-1]) if stages else 0
        if outcome.code == 0 and last == len(STAGES) - 1:
            continue
        said = next((str(line["detail"]) for line in outcome.lines if "detail" in line), "")
        failed.append((last, rank, said or outcome.how))
    if not failed:
        return AllReduce(backend, len(outcomes), True, "done", None, "", seconds)
    # The rank that got least far is the cause; the others wait for it.
    stage, rank, detail = min(failed)
    return AllReduce(backend, len(outcomes), False, STAGES[stage], rank, detail, seconds)
