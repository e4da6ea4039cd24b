"""ME: free memory against the job's need, and what holds the rest."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from conftest import GIB, XFLUX_ACCELERATE, case, findings, gpus, job, machine, verdict

from xflux_doctor.bill import need
from xflux_doctor.checks import memory
from xflux_doctor.facts import GpuProcess
from xflux_doctor.finding import Edit
from xflux_doctor.matrix import Matrix

ONE = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 1").replace("DEEPSPEED", "NO")


def test_fits(matrix: Matrix) -> None:
    assert findings(case(matrix, machine(matrix), job(ONE, img_size=1024)), memory.gpu_memory) == ()


def test_card_too_small_says_the_terms(matrix: Matrix) -> None:
    (finding,) = findings(case(matrix, machine(matrix, card="T4"), job(ONE)), memory.gpu_memory)
    assert "Tesla T4" in finding.seen and "transformer 22.2" in finding.because and finding.edits == ()


def test_checkpointing_is_the_repair(matrix: Matrix) -> None:
    work = job(ONE, img_size=1024, train_batch_size=2, gradient_checkpointing=False)
    (finding,) = findings(case(matrix, machine(matrix, card="L40S"), work), memory.gpu_memory)
    assert [(e.key, e.value) for e in finding.edits if isinstance(e, Edit)] == [(("gradient_checkpointing",), True)]


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
    work = dataclasses.replace(job(ONE, img_size=1024), gpu_limit=20 * GIB)
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
    assert len(found) == 2 and all("Adam and fp32 weights" in finding.because for finding in found)
    text = text.replace("offload_optimizer_device: none", "offload_optimizer_device: cpu")
    subject = case(matrix, machine(matrix, count=2), job(text, mode="finetune"))
    assert subject.job.offloads == ("optimizer",) and findings(subject, memory.gpu_memory) == ()
    assert need(subject).host_per_rank > 60 * GIB and findings(subject, memory.host_memory) == ()
    assert subject.facts.host
    host = msgspec.structs.replace(subject.facts.host, memory_limit=100 * GIB)
    small = msgspec.structs.replace(subject.facts, host=host)
    (finding,) = findings(case(matrix, small, subject.job), memory.host_memory)
    assert finding.severity == "error" and "the container's limit is 100 GiB" in finding.seen
