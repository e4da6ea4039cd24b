"""Plans and the host's memory: what is streamed lies there, once for each rank, and a container's limit kills."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from conftest import GIB, XFLUX_ACCELERATE, case, gpus, job, machine, packages

from xflux_doctor import bill, planner
from xflux_doctor.bill import need
from xflux_doctor.check import Case, examine
from xflux_doctor.checks import memory
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import make
from xflux_doctor.plansearch import Found

EIGHT = XFLUX_ACCELERATE.replace("DEEPSPEED", "MULTI_GPU")
ONE = EIGHT.replace("num_processes: 8", "num_processes: 1").replace("MULTI_GPU", "NO")


def subject(matrix: Matrix, limit: int, text: str = ONE, *, host: dict[str, Any] | None = None, **train: Any) -> Case:
    """The seed's job on H100s of which `limit` GiB each may be taken; 256 GiB of the host."""
    count = 8 if text is EIGHT else 1
    more = {"triton": "3.6.0", "torchao": "0.18.0"}
    facts = machine(matrix, gpus=gpus("H100", count), packages=packages(matrix, "cuda13", **more))
    assert facts.host
    facts = msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, **(host or {})))
    settings = {"img_size": 1024, "lora_targets": "diffusers", "disable_sampling": True, **train}
    return case(matrix, facts, msgspec.structs.replace(job(text, **settings), gpu_limit=limit * GIB))


def planned(case: Case) -> Found:
    found = planner.known(case)
    assert found is not None
    return found


def test_a_plan_says_what_it_holds_of_the_host(matrix: Matrix) -> None:
    """By the bill of the job as the plan has it."""
    work = subject(matrix, 16)
    row = planned(work).chosen
    assert row is not None and row.changes["stream_blocks"] and not row.lacks
    plan = make(work, lambda mended: examine(mended, [memory.gpu_memory]))
    assert plan.job.train is not None
    assert row.host == need(case(matrix, work.facts, plan.job)).host_per_rank > 12 * GIB


@pytest.mark.parametrize("limit", [12, 16, 24, 32])
def test_with_room_it_is_as_without_a_host(matrix: Matrix, limit: int) -> None:
    work = subject(matrix, limit)
    nothing = msgspec.structs.replace(work, facts=msgspec.structs.replace(work.facts, host=None))
    assert planned(work).rows == planned(nothing).rows


def test_a_container_gets_a_plan_that_it_has_room_for(matrix: Matrix) -> None:
    """At 24 GiB of the card 20 blocks are streamed, 8 GiB; with 7 GiB for all, fewer can be."""
    roomy = planned(subject(matrix, 24)).chosen
    assert roomy is not None and roomy.host and roomy.host > 8 * GIB
    found = planned(subject(matrix, 24, host={"memory_limit": 7 * GIB}))
    plan = found.chosen
    assert plan is not None and not plan.lacks and not plan.lossy and plan.host and plan.host < 7 * GIB
    assert plan.changes["stream_blocks"] < roomy.changes["stream_blocks"]
    assert plan.seconds and roomy.seconds and plan.seconds > roomy.seconds
    # The same where others hold what is missing.
    held = {"memory_limit": 16 * GIB, "memory_held": 9 * GIB}
    assert planned(subject(matrix, 24, host=held)).chosen == plan


def test_what_the_host_lacks_is_shown_and_not_taken(matrix: Matrix) -> None:
    work = subject(matrix, 16, host={"memory_limit": 7 * GIB})
    found = planned(work)
    rows = [row for row in found.rows if row.allowed and row.verdict(planner.of_case(work)) == "fits"]
    assert found.chosen is None and rows and all(row.lacks and not row.fits for row in rows)
    (result,) = examine(work, [memory.gpu_memory])
    assert "What fits the card lacks 6.1 GiB of the host's memory" in result.findings[0].hint
    assert not result.findings[0].edits
    # With a base in fewer bytes there is room.
    lossy = planned(subject(matrix, 16, host={"memory_limit": 7 * GIB}, allow=("quantization",))).chosen
    assert lossy is not None and not lossy.lacks and "quantization" in lossy.changes
    # Who says that ME102 is no concern gets the plan as if the limit was none.
    accepted = msgspec.structs.replace(work, accepted=frozenset({"ME102"}))
    assert planned(accepted).chosen == planned(subject(matrix, 16)).chosen


def test_a_machine_may_have_more_than_it_says(matrix: Matrix) -> None:
    """Virtual machines' memory grows as it is used: what lacks some of it is taken where nothing else is left."""
    found = planned(subject(matrix, 16, host={"memory_total": 7 * GIB}))
    assert found.chosen is not None and found.chosen.lacks > 5 * GIB and not found.chosen.fits
    some = planned(subject(matrix, 24, host={"memory_total": 7 * GIB}))
    assert some.chosen is not None and not some.chosen.lacks


def test_each_rank_has_its_own(matrix: Matrix) -> None:
    one, eight = (planned(subject(matrix, 24, text, host={"memory_limit": 70 * GIB})).chosen for text in (ONE, EIGHT))
    assert one is not None and eight is not None
    assert 0 < eight.changes["stream_blocks"] < one.changes["stream_blocks"] and not eight.lacks
    # Where they cannot all stream, they share what they hold.
    shared = planned(subject(matrix, 24, EIGHT, host={"memory_limit": 40 * GIB})).chosen
    assert shared is not None and shared.changes == {"distributed_type": "FSDP"}


def test_where_the_ranks_alone_are_nearly_too_much_nothing_is_streamed(matrix: Matrix) -> None:
    """Eight ranks take 16.2 GiB of 16, which is tight; twenty streamed blocks of each would be 60 more."""
    work = subject(matrix, 24, EIGHT, host={"memory_limit": 16 * GIB})
    found = planned(work).chosen
    assert found is not None and found.changes == {"distributed_type": "FSDP"} and not found.lacks
    plan = make(work, lambda mended: examine(mended, [memory.host_memory, memory.gpu_memory]))
    assert plan.blockers == ()
    # Where there is no such way none is taken: what has no room at all, and what others hold all of.
    for host in ({"memory_limit": GIB}, {"memory_limit": 8 * GIB, "memory_held": 9 * GIB}):
        small = subject(matrix, 24, host=host)
        assert planned(small).chosen is None
        (result,) = examine(small, [memory.host_memory])
        assert result.status == "error" and result.findings[0].hint == "Give the container more memory."


def test_the_ranks_share_the_work_where_the_machine_seems_too_small_to_stream(matrix: Matrix) -> None:
    found = planned(subject(matrix, 24, EIGHT, host={"memory_total": 40 * GIB})).chosen
    assert found is not None and found.changes == {"distributed_type": "FSDP"} and not found.lacks


def test_a_modulation_that_is_streamed_need_not_be(matrix: Matrix) -> None:
    for limit in (40, 78):
        found = planned(subject(matrix, limit, host={"memory_limit": 7 * GIB}, modulation="stream"))
        assert found.own.lacks and found.chosen is not None and not found.chosen.lacks
        assert found.chosen.changes["modulation"] == "keep" and not found.chosen.lossy


OFFLOADED = EIGHT.replace("MULTI_GPU", "FSDP") + "fsdp_config: {fsdp_version: 2, fsdp_offload_params: true}\n"


@pytest.mark.parametrize(
    ("text", "limit", "train"),
    [
        (OFFLOADED.replace("num_processes: 8", "num_processes: 2"), 80, {"mode": "finetune"}),
        (ONE, 40, {"mode": "controlnet", "train_batch_size": 8}),
        (ONE, 24, {"train_batch_size": 8}),
    ],
)
def test_every_row_has_the_host_s_bill_of_the_job_that_it_makes(
    matrix: Matrix, text: str, limit: int, train: dict[str, Any]
) -> None:
    work = subject(matrix, limit, text, **train)
    rows = [row for row in planned(work).rows if not row.sharing]
    assert len(rows) > 3 and work.job.train is not None
    for row in rows:
        changes = {key: value for key, value in row.changes.items() if key != "gradient_accumulation_steps"}
        job = msgspec.structs.replace(work.job, train=dataclasses.replace(work.job.train, **changes))
        assert row.host == need(case(matrix, work.facts, job)).host_per_rank


def test_a_machine_s_own_memory_offers_a_plan_and_does_not_impose_it(matrix: Matrix) -> None:
    work = subject(matrix, 78, host={"memory_total": 12 * GIB}, stream_blocks=40, allow=("quantization",))
    (result,) = examine(work, [memory.host_memory])
    (finding,) = result.findings
    assert finding.severity == "warning" and finding.offers and not finding.edits
    assert finding.hint.startswith("Take the plan that holds less there") and "give the machine more" in finding.hint


def test_a_plan_after_a_death_reads_no_images(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may lie on a mount that is dead."""
    monkeypatch.setattr(bill, "_LATEST", [])
    monkeypatch.setattr(bill, "dataset", lambda case: pytest.fail("images were looked at"))
    found = planned(subject(matrix, 16, host={"memory_limit": 24 * GIB}))
    assert found.chosen is not None and found.chosen.host


def test_a_job_that_streams_too_much_is_repaired(matrix: Matrix) -> None:
    work = subject(matrix, 40, host={"memory_limit": 16 * GIB}, stream_blocks=57)
    assert planned(work).own.lacks
    (result,) = examine(work, [memory.host_memory])
    assert result.status == "error" and "Take the plan that holds less there" in result.findings[0].hint
    plan = make(work, lambda mended: examine(mended, [memory.host_memory]))
    assert plan.blockers == () and plan.job.train is not None and plan.job.train.stream_blocks < 57
