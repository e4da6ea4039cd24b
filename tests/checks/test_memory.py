"""ME: free memory against the job's need, and what holds the rest."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from conftest import GIB, XFLUX_ACCELERATE, case, findings, gpus, job, machine, packages, verdict

from xflux_doctor.bill import need
from xflux_doctor.check import examine
from xflux_doctor.checks import memory
from xflux_doctor.facts import GpuProcess
from xflux_doctor.finding import Edit
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import make

ONE = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 1").replace("DEEPSPEED", "NO")


def test_fits(matrix: Matrix) -> None:
    assert findings(case(matrix, machine(matrix), job(ONE, img_size=1024)), memory.gpu_memory) == ()


def test_card_too_small_says_the_terms(matrix: Matrix) -> None:
    small = msgspec.structs.replace(job(ONE), gpu_limit=5 * GIB)
    (finding,) = findings(case(matrix, machine(matrix, card="T4"), small), memory.gpu_memory)
    assert "Tesla T4" in finding.seen and "has 5.0 GiB by --gpu-limit" in finding.seen and finding.edits == ()
    # Of the moment of most, each term once.
    assert "transformer 22.2, " in finding.because and finding.because.count("transformer") == 1


KEPT = {"img_size": 1024, "gradient_checkpointing": False}


@pytest.mark.parametrize(("train", "limit", "edits"), [
    ({"kernels": "diffusers"}, 28, {"gradient_checkpointing": True}),
    ({"train_batch_size": 3}, 44, {"train_batch_size": 1, "gradient_accumulation_steps": 3}),
    ({"gradient_checkpointing": True, "checkpointed_blocks": 2, "train_batch_size": 3}, 44,
     {"gradient_checkpointing": False, "checkpointed_blocks": None, "train_batch_size": 1,
      "gradient_accumulation_steps": 3}),
    ({}, 5, {}),
])  # fmt: skip
def test_the_plan_is_the_repair(matrix: Matrix, train: dict[str, Any], limit: int, edits: dict[str, Any]) -> None:
    work = msgspec.structs.replace(job(ONE, **{**KEPT, **train}), gpu_limit=limit * GIB)
    (finding,) = findings(case(matrix, machine(matrix), work), memory.gpu_memory)
    assert {e.key[0]: e.value for e in finding.edits if isinstance(e, Edit)} == edits
    for key in edits:
        assert f"{key} to " in finding.hint


@pytest.mark.parametrize("limit", [12, 20, 32])
def test_the_repair_is_enough(matrix: Matrix, limit: int) -> None:
    work = msgspec.structs.replace(job(ONE, **KEPT), gpu_limit=limit * GIB)
    subject = case(matrix, machine(matrix), work)
    plan = make(subject, lambda mended: examine(mended, [memory.gpu_memory]))
    assert plan.blockers == () and plan.verdicts[0].status == "ok" and plan.job.train is not None
    assert plan.job.train.quantization == "none" and plan.job.train.img_size == 1024


def test_where_it_is_tight_the_plan_is_offered(matrix: Matrix) -> None:
    work = msgspec.structs.replace(job(ONE, **KEPT), gpu_limit=int(41.3 * GIB))
    subject = case(matrix, machine(matrix), work)
    (finding,) = findings(subject, memory.gpu_memory)
    assert finding.severity == "warning" and finding.edits == () and "It is tight" in finding.because
    taken = msgspec.structs.replace(subject, taken=frozenset({"ME101"}))
    plan = make(taken, lambda mended: examine(mended, [memory.gpu_memory]))
    assert plan.verdicts[0].status == "ok" and plan.job.train is not None
    assert plan.job.train.gradient_checkpointing and 0 < (plan.job.train.checkpointed_blocks or 0) < 10


@pytest.mark.parametrize(("changes", "words"), [
    ({}, "Set quantization to fp8-dynamic, int8 or nf4"),
    ({"mixed_precision": "fp16"}, "Set quantization to int8 or nf4"),
    ({"kernels": "diffusers"}, "Set quantization to int8 or nf4"),
])  # fmt: skip
def test_fp8_products_are_advised_where_they_can_be_had(matrix: Matrix, changes: dict[str, Any], words: str) -> None:
    """Where no plan that loses nothing fits."""
    limited = msgspec.structs.replace(job(ONE, **changes), gpu_limit=5 * GIB)
    (finding,) = findings(case(matrix, machine(matrix), limited), memory.gpu_memory)
    assert finding.hint.startswith(words)
    (finding,) = findings(case(matrix, machine(matrix, card="A100"), limited), memory.gpu_memory)
    assert finding.hint.startswith("Set quantization to int8 or nf4")


@pytest.mark.parametrize(("installed", "requires", "fused"), [
    ({"triton": "3.6.0"}, ("triton==3.6.0",), True),
    ({}, ("triton==3.6.0",), False),
    ({}, (), True),  # metadata that names nothing
    ({"torch": ""}, (), True),  # still to come, and its wheel brings Triton
])  # fmt: skip
def test_the_bill_without_triton(
    matrix: Matrix, installed: dict[str, str], requires: tuple[str, ...], fused: bool
) -> None:
    found = packages(matrix, "cuda13", **installed)
    if "torch" in found:
        found["torch"] = msgspec.structs.replace(found["torch"], requires=requires)
    bill = need(case(matrix, machine(matrix, packages=found), job(ONE, **KEPT)))
    assert ("one block's backward pass" in {term.name for term in bill.gpu}) == fused


@pytest.mark.parametrize(("installed", "units"), [
    ({"diffusers": "0.37.0", "torch": "2.9.0+cu128"}, 0),
    ({"diffusers": "0.35.1", "torch": "2.8.0+cu128"}, 2 * 57),
    ({"diffusers": "0.34.0", "torch": "2.9.0+cu128"}, 5 * 19 + 4 * 38),
    ({"diffusers": "0.34.0", "torch": ""}, 0),  # as the newest where it is still to come
])  # fmt: skip
def test_the_bill_of_older_norms(matrix: Matrix, installed: dict[str, str], units: int) -> None:
    """diffusers' blocks keep fp32 copies of queries and keys where no kernel of CUDA's norms them: U each block."""

    def kept(**found: str) -> int:
        there = machine(matrix, packages=packages(matrix, "cuda13", **found))
        bill = need(case(matrix, there, job(ONE, **KEPT, kernels="diffusers")))
        return sum(term.bytes for term in bill.gpu if term.name == "activations" and term.phase == "train")

    assert kept(**installed) - kept(diffusers="0.37.0", torch="2.9.0+cu128") == units * 4608 * 3072 * 2


def test_held_memory_names_the_holder(matrix: Matrix) -> None:
    process = GpuProcess(4711, 70 * GIB, "python", "alice", 7200.0)
    busy = gpus("H100", 1, memory_free=8 * GIB, processes=(process,))
    (finding,) = findings(case(matrix, machine(matrix, gpus=busy), job(ONE)), memory.gpu_memory)
    assert "process 4711 python of alice holds 70.0 GiB, 2.0 h old" in finding.seen


def test_held_outside_the_container(matrix: Matrix) -> None:
    busy = gpus("H100", 1, memory_free=8 * GIB)
    (finding,) = findings(case(matrix, machine(matrix, gpus=busy), job(ONE)), memory.gpu_memory)
    assert "held outside this container" in finding.seen


def test_tight_is_a_warning(matrix: Matrix) -> None:
    need = findings(case(matrix, machine(matrix, card="T4"), job(ONE)), memory.gpu_memory)[0]
    gib = float(need.seen.split("about ")[1].split(" GiB")[0])
    tight = gpus("H100", 1, memory_free=int(gib * 1.02 * GIB))
    (finding,) = findings(case(matrix, machine(matrix, gpus=tight), job(ONE)), memory.gpu_memory)
    assert finding.severity == "warning" and "tight" in finding.because


def test_gpu_limit(matrix: Matrix) -> None:
    work = msgspec.structs.replace(job(ONE, img_size=1024), gpu_limit=20 * GIB)
    (finding,) = findings(case(matrix, machine(matrix), work), memory.gpu_memory)
    assert "20.0 GiB by --gpu-limit" in finding.seen


def test_only_the_job_s_gpus_count(matrix: Matrix) -> None:
    cards = (*gpus("H100", 1), *gpus("H100", 1, index=1, uuid="GPU-1", memory_free=GIB))
    assert findings(case(matrix, machine(matrix, gpus=cards), job(ONE)), memory.gpu_memory) == ()


def test_accept_makes_a_warning(matrix: Matrix) -> None:
    subject = case(matrix, machine(matrix, card="T4"), job(ONE), accepted=frozenset({"ME101"}))
    (finding,) = findings(subject, memory.gpu_memory)
    assert finding.severity == "warning" and "--accept ME101" in finding.because


def test_container_limit(matrix: Matrix) -> None:
    facts = machine(matrix)
    assert facts.host
    small = msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, memory_limit=1 * GIB))
    (finding,) = findings(case(matrix, small, job(ONE)), memory.host_memory)
    assert finding.severity == "error" and "the container's limit is 1 GiB" in finding.seen
    assert findings(case(matrix, facts, job(ONE)), memory.host_memory) == ()


@pytest.mark.parametrize("limit", [None, 500 * GIB])  # a container's limit above it does not change that
def test_mem_total_alone_never_blocks(matrix: Matrix, limit: int | None) -> None:
    facts = machine(matrix)
    assert facts.host
    host = msgspec.structs.replace(facts.host, memory_total=1 * GIB, memory_limit=limit)
    small = msgspec.structs.replace(facts, host=host)
    (finding,) = findings(case(matrix, small, job(ONE)), memory.host_memory)
    assert finding.severity == "warning"


def test_unknown_strategy_is_a_skip(matrix: Matrix) -> None:
    work = job(XFLUX_ACCELERATE.replace("zero_stage: 2", "zero_stage: 0"))
    result = verdict(case(matrix, machine(matrix, count=8), work), memory.gpu_memory)
    assert result.status == "skipped" and "zero0" in result.reason


def test_what_is_offloaded_is_not_asked_of_the_gpu(matrix: Matrix) -> None:
    """A whole fine-tune under ZeRO-3 on two cards fits only with its optimizer on the host, which then is asked."""
    text = XFLUX_ACCELERATE.replace("zero_stage: 2", "zero_stage: 3").replace("num_processes: 8", "num_processes: 2")
    subject = case(matrix, machine(matrix, count=2), job(text, mode="finetune"))
    found = findings(subject, memory.gpu_memory)
    assert len(found) == 1 and "GPUs 0, 1 (" in found[0].seen and "optimizer" in found[0].because
    text = text.replace("offload_optimizer_device: none", "offload_optimizer_device: cpu")
    subject = case(matrix, machine(matrix, count=2), job(text, mode="finetune"))
    assert subject.job.offloads == ("optimizer",) and findings(subject, memory.gpu_memory) == ()
    assert need(subject).host_per_rank > 60 * GIB and findings(subject, memory.host_memory) == ()
    assert subject.facts.host
    host = msgspec.structs.replace(subject.facts.host, memory_limit=100 * GIB)
    small = msgspec.structs.replace(subject.facts, host=host)
    (finding,) = findings(case(matrix, small, subject.job), memory.host_memory)
    assert finding.severity == "error" and "the container's limit is 100 GiB" in finding.seen
