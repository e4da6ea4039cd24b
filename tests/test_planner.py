"""The planner: what it finds is the fastest that fits, it takes nothing lossy unasked, and its edits make that plan."""

from __future__ import annotations

import gc
import json
from typing import Any

import msgspec
import pytest
from conftest import GIB, ROOT, XFLUX_ACCELERATE, case, gpus, job, machine, packages

from xflux_doctor import planner, plansearch
from xflux_doctor.bill import need
from xflux_doctor.check import Case, examine
from xflux_doctor.checks import memory
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import make
from xflux_doctor.plans import Card, Row, capability_of, recomputing
from xflux_doctor.plansearch import Found
from xflux_doctor.refused import FP8
from xflux_doctor.verdict import TIGHT, held_by

ONE = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 1").replace("DEEPSPEED", "NO")
SEED = {"img_size": 1024, "lora_targets": "diffusers", "disable_sampling": True}


def subject(matrix: Matrix, limit: float, text: str = ONE, **train: Any) -> Case:
    """The seed's job on one H100 of which `limit` GiB may be taken, with flash-attn-4 and torchao."""
    more = {"triton": "3.6.0", "flash-attn-4": "4.0.0", "torchao": "0.18.0", "bitsandbytes": "0.50.2"}
    facts = machine(matrix, gpus=gpus("H100", 1, memory_free=79 * GIB), packages=packages(matrix, "cuda13", **more))
    work = msgspec.structs.replace(job(text, **{**SEED, **train}), gpu_limit=int(limit * GIB))
    return case(matrix, facts, work)


def planned(matrix: Matrix, limit: float, text: str = ONE, **train: Any) -> Found:
    found = planner.known(subject(matrix, limit, text, **train))
    assert found is not None
    return found


def chosen(found: Found) -> Row:
    assert found.chosen is not None and found.chosen.fits
    return found.chosen


def test_eight_cards_are_planned_for_once(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was searched for anew, which took 0.9 s on 2 cores, and eight times the same was said."""
    searched, search = [], planner.search
    monkeypatch.setattr(planner, "search", lambda *given: searched.append(given) or search(*given))
    text = XFLUX_ACCELERATE.replace("DEEPSPEED", "MULTI_GPU")
    facts = machine(matrix, gpus=gpus("H100", 8, memory_free=11 * GIB, memory_total=12 * GIB))
    (verdict,) = examine(case(matrix, facts, job(text, **SEED)), [memory.gpu_memory])
    assert len(verdict.findings) == len(searched) == 1
    assert "GPUs 0, 1, 2, 3, 4, 5, 6, 7 (NVIDIA H100 80GB HBM3) have 11.0 GiB." in verdict.findings[0].seen


def test_with_room_nothing_is_recomputed(matrix: Matrix) -> None:
    found = planned(matrix, 78)
    plan = chosen(found)
    assert plan.changes == {"gradient_checkpointing": False} and not plan.lossy and plan.seconds is not None
    assert found.own.seconds is not None and plan.seconds < 0.8 * found.own.seconds and found.own.fits
    # What is fastest already stays.
    kept = planned(matrix, 78, gradient_checkpointing=False)
    assert kept.chosen is kept.own and kept.own.changes == {}


@pytest.mark.parametrize(
    ("limit", "train"),
    [
        *((limit, {}) for limit in (12, 16, 24, 32, 40, 48)),
        *((limit, {"train_batch_size": 4}) for limit in (16, 24, 48)),
        (24, {"train_batch_size": 8, "lora_targets": "xflux"}),
        *((limit, {"mode": "controlnet", "train_batch_size": 2}) for limit in (24, 40)),
        *((limit, {"quantization": "fp8-dynamic", "train_batch_size": 8}) for limit in (16, 32)),
        *((limit, {"kernels": "diffusers", "train_batch_size": 4}) for limit in (16, 32)),
    ],
)
def test_it_is_the_fastest_of_all_that_can_be_said(matrix: Matrix, limit: int, train: dict[str, Any]) -> None:
    """Against every number of recomputed blocks beside every number of streamed ones that is tried, one by one."""
    found = planned(matrix, limit, **train)
    plan = chosen(found)
    assert not plan.lossy and plan.seconds is not None
    work = subject(matrix, limit, **train)
    assert plan.seconds <= 1.0001 * fastest(plansearch.Search(work, planner.of_case(work), ()))


def fastest(seek: plansearch.Search) -> float:
    """Seconds of the quickest way that fits with room, all of them tried."""
    ways = [way for line in seek._lines(seek.config, plansearch.STREAMED) for way in line]
    tried = [recomputing(way, count) for way in ways for count in (*range(58), None)]
    return min(seek._order(config) for config in tried if seek._fits(config, TIGHT))


def test_with_more_streamed_blocks_one_more_may_have_to_be_recomputed(matrix: Matrix) -> None:
    """Of fp8-dynamic with 32 instead of 28: the block where a step holds most is resident then."""
    keys = {"quantization": "fp8-dynamic", "lora_targets": "xflux", "img_size": 4096}
    work = subject(matrix, 56_717_259_777 / GIB, **keys)
    seek = plansearch.Search(work, planner.of_case(work), ())
    seek.timed["flash4"] = False
    found = seek._quickest(list(seek._lines(seek.config, plansearch.STREAMED)), TIGHT)
    assert found is not None and seek._order(found) <= 1.0001 * fastest(seek)


@pytest.mark.parametrize(
    ("limit", "allow", "batch"),
    [(24, (), 1), (12, (), 1), (24, ("quantization",), 1), (30, (), 1), (24, (), 8), (30, ("quantization",), 4)],
)
def test_its_edits_make_the_plan_and_it_fits_then(
    matrix: Matrix, limit: int, allow: tuple[str, ...], batch: int
) -> None:
    """The job as the files say after them has the plan's own bill, and ME101 has nothing to say. A batch in several
    passes has its gradients' places all along, which the bill of its plan once left out."""
    work = subject(matrix, limit, gradient_checkpointing=False, allow=allow, train_batch_size=batch)
    plan = make(work, lambda mended: examine(mended, [memory.gpu_memory]))
    assert plan.blockers == () and plan.verdicts[0].status == "ok" and plan.job.train is not None
    row = chosen(planner.known(work) or pytest.fail())
    bill = need(case(matrix, work.facts, plan.job))
    assert held_by(bill) == row.device
    assert (plan.job.train.quantization != "none") == bool(allow)


def test_one_block_less_would_not_fit(matrix: Matrix) -> None:
    plan = chosen(planned(matrix, 32))
    work = subject(matrix, 32, **{**plan.changes, "checkpointed_blocks": plan.changes["checkpointed_blocks"] - 1})
    bill = need(work)
    assert plan.changes["checkpointed_blocks"] > 1
    assert 100 * held_by(bill) > TIGHT * 32 * GIB


def test_what_loses_something_is_shown_and_taken_only_when_it_is_allowed(matrix: Matrix) -> None:
    found = planned(matrix, 24)
    lossy = [row for row in found.rows if row.lossy and row.fits]
    assert any(row.changes.get("quantization") == "fp8-dynamic" for row in lossy)
    assert not any(row.allowed for row in lossy) and not chosen(found).lossy
    allowed = chosen(planned(matrix, 24, allow=("quantization",)))
    assert allowed.lossy and allowed.changes["quantization"] == "fp8-dynamic"
    assert (allowed.seconds or 9) < (chosen(found).seconds or 0)
    # Size is what is trained on: with consent, and only where nothing else fits.
    assert "img_size" not in chosen(planned(matrix, 24, allow=("img_size",))).changes


def test_the_size_changes_last(matrix: Matrix) -> None:
    """At 2560 px the blocks' inputs alone are 8.5 GiB."""
    large = {"img_size": 2560}
    assert planned(matrix, 14, **large).chosen is None
    assert chosen(planned(matrix, 14, **large, allow=("img_size",))).changes["img_size"] == 1024
    assert "img_size" not in chosen(planned(matrix, 30, **large, allow=("img_size",))).changes


@pytest.mark.parametrize(("limit", "offered"), [(24, set()), (9, {768, 512})])
def test_smaller_images_are_offered_where_nothing_fits_that_may_be_taken(
    matrix: Matrix, limit: int, offered: set[int]
) -> None:
    rows = planned(matrix, limit).rows
    assert {row.changes["img_size"] for row in rows if "img_size" in row.changes} <= offered
    assert bool(offered) == (not any(row.fits and row.allowed and "img_size" not in row.changes for row in rows))


def test_a_batch_is_split_and_a_step_sees_as_many_samples(matrix: Matrix) -> None:
    plan = chosen(planned(matrix, 16, train_batch_size=8))
    assert plan.changes["train_batch_size"] * plan.changes["gradient_accumulation_steps"] == 8
    edits = {edit.key[-1]: edit.value for edit in planner.plan_edits(subject(matrix, 16, train_batch_size=8), plan)}
    assert edits["gradient_accumulation_steps"] == plan.changes["gradient_accumulation_steps"]


FINETUNE = {"mode": "finetune"}


@pytest.mark.parametrize(("limit", "allow", "fits"), [
    (78, (), False),  # AdamW's moments alone are 89 GiB
    (78, ("optimizer", "backward_clip"), True), (48, ("optimizer", "backward_clip"), True),
    (32, ("optimizer", "backward_clip"), True), (20, ("optimizer", "backward_clip"), False),
])  # fmt: skip
def test_a_full_fine_tune(matrix: Matrix, limit: int, allow: tuple[str, ...], fits: bool) -> None:
    found = planned(matrix, limit, **FINETUNE, allow=allow)
    assert (found.chosen is not None) == fits
    if found.chosen:
        assert found.chosen.changes["optimizer"] in ("adamw8bit", "adafactor") and found.chosen.fits


def test_what_the_file_says_is_not_changed_for_speed(matrix: Matrix) -> None:
    work = subject(matrix, 78)
    found = planner.known(work)
    assert found is not None
    taken = planner.quicker(found, ())
    assert taken is not None and taken.changes == {"gradient_checkpointing": False}
    assert planner.quicker(found, ("gradient_checkpointing",)) is None


def test_a_card_that_was_never_timed_is_planned_by_another_s_times(matrix: Matrix) -> None:
    found = planner.search(subject(matrix, 78), (Card("RTX 5090", 32 * GIB, 32 * GIB),))
    plan = chosen(found)
    assert plan.seconds is None
    assert plan.changes["checkpointed_blocks"] == chosen(planned(matrix, 32)).changes["checkpointed_blocks"]


def test_a_package_that_is_not_there_is_not_planned_with(matrix: Matrix) -> None:
    work = subject(matrix, 24, allow=("quantization",))
    less = {name: kept for name, kept in (work.facts.packages or {}).items() if name != "bitsandbytes"}
    import msgspec

    bare = case(matrix, msgspec.structs.replace(work.facts, packages=less), work.job)
    for one, there in ((work, True), (bare, False)):
        found = planner.known(one)
        assert found is not None
        assert any(row.changes.get("quantization") == "nf4" for row in found.rows) == there


# Several ranks -------------------------------------------------------------------------------------------

SHARDED = """\
distributed_type: FSDP
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
"""
WHOLE = "distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n"
ZERO = """\
distributed_type: DEEPSPEED
num_machines: 1
num_processes: 2
deepspeed_config:
  zero_stage: 2
  gradient_accumulation_steps: 3
  gradient_clipping: 0.5
"""
ALL = {"mode": "finetune", "img_size": 1024, "disable_sampling": True}


def pair(matrix: Matrix, limit: float, text: str, **train: Any) -> Case:
    """A fine-tune of all weights on two H200s of which `limit` GiB each may be taken."""
    more = {"triton": "3.6.0", "torchao": "0.18.0"}
    facts = machine(matrix, gpus=gpus("H200", 2, memory_free=139 * GIB), packages=packages(matrix, "cuda13", **more))
    return case(matrix, facts, msgspec.structs.replace(job(text, **{**ALL, **train}), gpu_limit=int(limit * GIB)))


@pytest.mark.parametrize(("text", "limit", "allow", "kind"), [
    (SHARDED, 56, ("optimizer",), "MULTI_GPU"), (WHOLE, 110, (), "FSDP"), (ZERO, 110, (), "FSDP"),
])  # fmt: skip
def test_the_ranks_share_the_work_in_another_way_where_nothing_else_fits(
    matrix: Matrix, text: str, limit: float, allow: tuple[str, ...], kind: str
) -> None:
    """Two cards of 56 GiB hold a fine-tune with Adafactor whole, and one with AdamW cut up on larger ones."""
    work = pair(matrix, limit, text, allow=allow)
    found = planner.known(work)
    assert found is not None and found.own.verdict(planner.of_case(work)) == "does not fit"
    assert chosen(found).changes["distributed_type"] == kind
    plan = make(work, lambda mended: examine(mended, [memory.gpu_memory]))
    assert not plan.blockers and plan.job.distributed_type == kind
    assert held_by(need(msgspec.structs.replace(work, job=plan.job))) <= limit * GIB
    # A step still sees as many samples, and clips as before.
    before = work.job.section("deepspeed_config")
    assert plan.job.training("gradient_accumulation_steps") == before.get("gradient_accumulation_steps", 1)
    assert plan.job.training("max_grad_norm") == before.get("gradient_clipping", 1.0)


@pytest.mark.parametrize(("limit", "allow", "changes"), [
    (80, ("optimizer",), {"optimizer": "adamw8bit"}), (80, ("weight_update",), {"weight_update": "stochastic"}),
    (45, ("optimizer", "weight_update"), {"optimizer": "adamw8bit", "weight_update": "stochastic"}),
])  # fmt: skip
def test_what_is_cut_up_is_held_in_fewer_bytes(
    matrix: Matrix, limit: float, allow: tuple[str, ...], changes: dict[str, Any]
) -> None:
    """Moments in 8 bits, weights in 16, or both; each where it is allowed alone."""
    work = pair(matrix, limit, SHARDED, allow=allow)
    taken = chosen(planner.known(work) or pytest.fail())
    assert {key: taken.changes.get(key) for key in changes} == changes and taken.lossy
    assert "distributed_type" not in taken.changes
    less = planner.known(pair(matrix, limit, SHARDED))
    assert less is not None and less.chosen is None
    assert any(changes.items() <= row.changes.items() and row.fits and not row.allowed for row in less.rows)


def test_another_way_to_share_is_shown_where_it_may_not_be_taken(matrix: Matrix) -> None:
    found = planner.known(pair(matrix, 80, SHARDED))
    assert found is not None and found.chosen is None
    shown = [row for row in found.rows if row.changes.get("distributed_type") == "MULTI_GPU"]
    assert any(row.fits and not row.allowed for row in shown)


def test_the_ranks_share_the_work_as_the_file_says_where_that_fits(matrix: Matrix) -> None:
    found = planner.known(pair(matrix, 110, SHARDED))
    assert chosen(found or pytest.fail()).changes.get("distributed_type") is None
    assert not any(row.sharing for row in found.rows)


def test_one_rank_under_deepspeed_is_one_process_where_that_fits(matrix: Matrix) -> None:
    """It was told that nothing fits, and to share among several."""
    text = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 1")
    plan = chosen(planned(matrix, 24, text))
    assert plan.changes["distributed_type"] == "NO" and plan.label.startswith("one process: ")
    work = subject(matrix, 24, text)
    mended = make(work, lambda job: examine(job, [memory.gpu_memory]))
    assert mended.blockers == () and mended.job.strategy == "single"
    # Not where what DeepSpeed's section says does not go with the training file.
    again = subject(matrix, 24, text, mode="finetune", optimizer="adafactor", step_in_backward=True)
    assert not any(row.sharing for row in (planner.known(again) or pytest.fail()).rows)


def test_a_card_that_was_never_timed_is_trained_on_by_the_plan_that_is_shown(matrix: Matrix) -> None:
    facts = machine(matrix, gpus=gpus("L40S", 1), packages=packages(matrix, "cuda13", triton="3.6.0"))
    found = planner.known(case(matrix, facts, job(ONE, **SEED)))
    assert found is not None and found.own.seconds is None and found.own.fits
    assert planner.quicker(found, ()) is found.chosen is not found.own
    assert planner.quicker(found, ("gradient_checkpointing",)) is None


def test_several_sizes_are_told_and_kept(matrix: Matrix) -> None:
    found = planned(matrix, 24, resolutions=(512, 1536), allow=("img_size",))
    assert chosen(found).label.startswith("512 to 1536 px, ")
    assert not any("img_size" in row.changes for row in found.rows)


@pytest.mark.parametrize(("name", "there"), [
    ("NVIDIA H100 80GB HBM3", True), ("RTX 4090", True), ("L40S", True), ("NVIDIA B200", True), ("RTX 5090", True),
    ("NVIDIA RTX 6000 Ada Generation", True), ("A100", False), ("RTX 3090", False), ("V100", False), ("A40", False),
    ("something", False),
])  # fmt: skip
def test_a_card_s_name_says_whether_it_multiplies_fp8(name: str, there: bool) -> None:
    """`plan --gpu A100:80` chose fp8 products."""
    assert (capability_of(name) >= FP8) == there


def test_what_a_driver_holds_of_an_idle_card_is_nobody_s(matrix: Matrix) -> None:
    """0.4 GiB were somebody else's, whom to end, and the repair was withheld."""
    facts = machine(matrix, gpus=gpus("H100", 1, memory_total=24 * GIB, memory_free=23 * GIB + 600 * 2**20))
    work = case(matrix, facts, job(ONE, **SEED, stream_blocks=11))
    assert 23.5 * GIB < held_by(need(work)) < 24 * GIB
    (verdict,) = examine(work, [memory.gpu_memory])
    assert "End it" not in verdict.findings[0].hint and verdict.findings[0].edits
    assert (memory._word("FSDP"), memory._word(True), memory._word(None)) == ("FSDP", "true", "null")


@pytest.mark.parametrize("enabled", [True, False])
def test_a_search_leaves_the_collector_as_it_was(
    matrix: Matrix, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    """Also one that fails: `run` lives on for days."""
    seen = []

    def fail(*_: object) -> None:
        seen.append(gc.isenabled())
        raise OSError

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        assert planner.known(subject(matrix, 24)) is not None and gc.isenabled() == enabled
        monkeypatch.setattr(plansearch.Search, "_label", fail)
        assert planner.known(subject(matrix, 24)) is None and gc.isenabled() == enabled and seen == [False]
    finally:
        (gc.enable if before else gc.disable)()


MEASURED = ROOT / "benchmarks" / "results" / "limits-nvidia-h200-2026-11-30.json"


@pytest.mark.parametrize("row", json.loads(MEASURED.read_text("utf-8"))["rows"],
                         ids=lambda row: f"{row['mode']} {row['limit_gib']} {bool(row['allow'])}")  # fmt: skip
def test_what_is_chosen_is_what_was_measured(matrix: Matrix, row: dict[str, Any]) -> None:
    """benchmarks/limits.py on an H200: each was trained with, and timed beside the others. README has them; where one
    is to change, it is to be measured again."""
    own = {"mode": "finetune", "final_checkpoint": False} if row["mode"] == "finetune" else {}
    settings = {"rank": 16, "max_train_steps": 5, "checkpointing_steps": 10**6, "heldout_samples": 0, **own}
    work = job(ONE, **{**SEED, "mixed_precision": "bf16", "allow": tuple(row["allow"]), **settings})
    facts = machine(matrix, gpus=gpus("H200", 1), packages=packages(matrix, "cuda13", triton="3.6.0", torchao="0.18.0"))
    found = planner.known(case(matrix, facts, msgspec.structs.replace(work, gpu_limit=row["limit_gib"] * GIB)))
    assert found is not None
    assert (found.chosen and found.chosen.changes) == (row["plan"] and row["plan"]["changes"])
