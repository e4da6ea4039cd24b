"""The facts of the default level and the deep one: what torch sees, and whether the job's ranks reduce aright.

Both end within one deadline. The deep level also tries each GPU, times the reduction, seeks a way round one that
fails, and asks NVIDIA's own tools where they are installed.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping

import msgspec

from xflux_doctor.facts import AllReduce, Facts, GpuProbe, HubAccess, TorchFacts
from xflux_doctor.gather.clocks import reading
from xflux_doctor.gather.environment import is_offline, without_login
from xflux_doctor.job import Job
from xflux_doctor.probes.each_gpu import Ask, each_gpu
from xflux_doctor.probes.outside import ask_dcgm, ask_nccl_tests
from xflux_doctor.probes.reduction import all_reduce
from xflux_doctor.probes.retry import retry, trials
from xflux_doctor.probes.runner import Outcome, run

HUB_SECONDS = 5.0
"""The hub's own deadline: it answers in a fraction of a second, or something is wrong."""
GPU_SHARE, GPU_SECONDS = 0.6, 45.0
"""Of the deadline, and at the most: what the stages of all GPUs together may take."""
PATIENCE = 45.0
"""Seconds more, of that share, for a card whose context has not come: late is not the same as never."""
OUTSIDE_SHARE = 0.25
"""Of the deadline: what DCGM's diagnosis may take, where it is installed."""
MOST_RANKS = 16
"""Of more ranks than there are cards so many are started to hear what NCCL says."""
SQUARE = "8192x8192x8192"
LEAST_SECONDS = 4.0
"""Less than this is no try."""


def job_environment(job: Job, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment that a rank would get: the user's, whole, with the devices that the job chooses."""
    environment = dict(environ)
    if job.use_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif job.gpu_ids is not None and job.gpu_ids != "all":
        environment["CUDA_VISIBLE_DEVICES"] = job.gpu_ids
    return environment


def probe(facts: Facts, job: Job, environ: Mapping[str, str], seconds: float, deep: Ask | None = None) -> Facts:
    """Facts with `hub`, `torch` and `allreduce` filled in, or a reason under `unknown`. Ends within `seconds`.

    `deep` is what each GPU is asked for in the deep level, which fills in `gpu_probes` and `speeds` as well.
    """
    if facts.python is None:
        return facts
    deadline = time.monotonic() + seconds
    python = facts.python.executable
    facts = ask_hub(facts, job, environ, min(HUB_SECONDS, seconds / 2))
    environment = job_environment(job, environ)
    if deep is not None:  # before torch, without which it can be had
        facts = ask_dcgm(facts, job, environment, (deadline - time.monotonic()) * OUTSIDE_SHARE)
    unknown = dict(facts.unknown)
    outcome = run(python, "torch_import", (), environment, deadline - time.monotonic())
    torch = _torch(outcome)
    if torch is None:
        unknown["torch"] = _import_failure(outcome)
        unknown["allreduce"] = "torch could not be imported"
        return msgspec.structs.replace(facts, unknown=unknown)
    facts = msgspec.structs.replace(facts, torch=torch)
    if deep is not None:
        facts = _gpus(facts, job, environment, deep, (deadline - time.monotonic()) * GPU_SHARE)
        unknown = dict(facts.unknown)
    why_not = _cannot_reduce(job, torch, facts.host.cpus if facts.host else 1, deep=deep is not None)
    if why_not:
        unknown["allreduce"] = why_not
        return msgspec.structs.replace(facts, unknown=unknown)
    reduced = (_deep if deep else _plain)(facts, job, environment, max(1.0, deadline - time.monotonic()))
    if deep is not None:
        facts = ask_nccl_tests(facts, job, environment, deadline - time.monotonic())
        unknown = dict(facts.unknown)
    speeds = dict(facts.speeds)
    if reduced.bandwidth and reduced.backend == "nccl" and reduced.ranks > 1:
        speeds["allreduce_busbw_gbs"] = max(reduced.bandwidth, key=lambda one: one.bytes).busbw
    return msgspec.structs.replace(facts, allreduce=reduced, unknown=unknown, speeds=speeds)


def _gpus(facts: Facts, job: Job, environment: Mapping[str, str], ask: Ask, seconds: float) -> Facts:
    """Facts with `gpu_probes` and the rates of the slowest card, or a reason under `unknown`."""
    assert facts.python and facts.torch
    why = "the job runs on the CPU" if job.use_cpu else "" if facts.torch.devices else "torch sees no GPU"
    if why:
        return msgspec.structs.replace(facts, unknown={**facts.unknown, "gpu_probes": why})
    devices = tuple(f"cuda:{number}" for number in range(len(facts.torch.devices)))[: max(1, job.local_processes)]
    ask = dataclasses.replace(ask, expand=not (facts.host and facts.host.wsl))
    before = {gpu.uuid.partition("-")[2]: gpu.memory_free for gpu in facts.gpus or ()}
    python = facts.python.executable
    patience = min(PATIENCE, max(0.0, seconds - GPU_SECONDS))
    found = each_gpu(python, devices, ask, environment, min(seconds, GPU_SECONDS), reading, before, patience)
    return msgspec.structs.replace(facts, gpu_probes=found, speeds={**facts.speeds, **_speeds(found)})


def _speeds(probes: tuple[GpuProbe, ...]) -> dict[str, float]:
    """Of the slowest card; products by the size that cards are compared by."""
    rates: dict[str, list[float]] = {}
    for one in probes:
        for name in ("copy_gbs", "h2d_gbs", "d2h_gbs"):
            rates.setdefault(name, []).append(getattr(one, name) or 0.0)
        tflops = [product.rates.get(SQUARE, 0.0) for product in one.products if product.kind == "bfloat16"]
        rates.setdefault("matmul_bf16_tflops", []).extend(tflops or [0.0])
    return {name: min(values) for name, values in rates.items() if min(values) > 0}


def _plain(facts: Facts, job: Job, environment: Mapping[str, str], seconds: float) -> AllReduce:
    assert facts.python
    backend = "gloo" if job.use_cpu else "nccl"
    return all_reduce(facts.python.executable, backend, job.local_processes, environment, seconds)


def _deep(facts: Facts, job: Job, environment: Mapping[str, str], seconds: float) -> AllReduce:
    """With the timed sweep; and after a failure once more for each variable that might be the way round it."""
    assert facts.python and facts.torch
    backend = "gloo" if job.use_cpu else "nccl"
    deadline = time.monotonic() + seconds
    if backend == "nccl":
        environment = {"NCCL_DEBUG": "WARN", **environment}  # what NCCL says of a failure is said there only
    host = facts.host
    todo = trials(
        backend,
        environment,
        host.interfaces if host else {},
        infiniband=bool(host and host.infiniband),
        machines=job.num_machines,
    )
    attempt = functools.partial(all_reduce, facts.python.executable, backend, job.local_processes)
    # A hang takes all the time that it is given: what follows it needs some too.
    first = attempt(environment, seconds / 2 if todo else seconds, deep=True)
    least = max(LEAST_SECONDS, 4 * facts.torch.seconds)
    return retry(first, todo, attempt, environment, deadline, least)


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


def _cannot_reduce(job: Job, torch: TorchFacts, cores: int, *, deep: bool) -> str:
    if job.accelerate is None and not job.use_cpu and not torch.devices:
        return "no accelerate file says how many ranks there are, and torch sees no GPU"
    if job.use_cpu:
        few = job.num_processes <= max(2, cores)
        return "" if few else f"{job.num_processes} ranks on {cores} cores are not started (see LA107)"
    if not torch.devices:
        return "torch sees no GPU"
    # The deep level tries what accelerate would: it gives such ranks a card that another one has, and NCCL says so.
    if job.local_processes > len(torch.devices) and not (deep and job.local_processes <= MOST_RANKS):
        return f"the job wants {job.local_processes} ranks and torch sees {len(torch.devices)} devices"
    return ""
