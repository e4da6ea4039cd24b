"""LA311 to LA317 by values: where several places name one number, the one that wins depends on who runs the job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from conftest import case, findings, job, machine
from deepspeed_kit import BUCKET, Z, inline, named, neither, one, ours, sets, theirs

from xflux_doctor.check import Case, examine
from xflux_doctor.checks import (
    ALL,
    deepspeed_file,
    deepspeed_memory,
    deepspeed_wins,
)
from xflux_doctor.finding import Edit, Remove
from xflux_doctor.job import Job
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import lay, make
from xflux_doctor.report.text import describe

# --- who runs it ------------------------------------------------------------------------------------------------


def test_the_bundled_trainers_stages(matrix: Matrix) -> None:
    for stage, meant in ((4, 2), (0, 2), (True, 1), (None, 2), (2.0, 2)):
        finding = one(matrix, ours({**Z, "zero_optimization": {"stage": stage}}), deepspeed_file.values_known)
        assert finding and sets(finding.edits) == {"deepspeed:zero_optimization.stage": meant}, stage
    for stage in (1, 2, 3, "2", "auto"):
        assert one(matrix, ours({**Z, "zero_optimization": {"stage": stage}}), deepspeed_file.values_known) is None
    auto = ours({**Z, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "sub_group_size": "auto"}})
    assert one(matrix, auto, deepspeed_file.values_known) is None  # it fills them, or DeepSpeed does


def test_zero3_of_a_file_is_mended_in_the_file(matrix: Matrix, tmp_path: Path) -> None:
    work = theirs(tmp_path, {**Z, "zero_optimization": {"stage": 3}})
    plan = make(case(matrix, machine(matrix, count=2), work), lambda mended: examine(mended, ALL))
    assert {key: value for key, value in sets(plan.edits).items() if "stage" in key} == {
        "deepspeed:zero_optimization.stage": 2
    }


@pytest.mark.parametrize(("zero", "severity", "edits", "offers"), [
    ({"bf16": {"enabled": True}}, None, {}, {}),
    ({"bf16": {"enabled": "auto"}}, None, {}, {}),
    ({}, None, {}, {}),
    ({"fp16": {"enabled": True}}, "error", {}, {"deepspeed:fp16.enabled": False, "deepspeed:bf16.enabled": True}),
    ({"bf16": {"enabled": False}}, "error", {}, {"deepspeed:bf16.enabled": True}),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "error", {"deepspeed:fp16.enabled": False}, {}),
])  # fmt: skip
def test_precision_of_xflux(
    matrix: Matrix, tmp_path: Path, zero: Any, severity: str | None, edits: Any, offers: Any
) -> None:
    finding = one(matrix, theirs(tmp_path, zero), deepspeed_wins.precision_agrees)
    assert (finding.severity if finding else None) == severity
    if finding:
        assert (sets(finding.edits), sets(finding.offers)) == (edits, offers)
        if severity == "error" and "fp16" in zero:
            assert "arg cannot be set to `bf16` when `fp16` is set" in finding.because


def test_precision_of_the_bundled_trainer(matrix: Matrix) -> None:
    finding = one(
        matrix, ours({**Z, "bf16": {"enabled": True}}, mixed_precision="fp16"), deepspeed_wins.precision_agrees
    )
    assert finding and finding.severity == "warning"
    assert sets(finding.edits) == {"deepspeed:bf16.enabled": False, "deepspeed:fp16.enabled": True}
    assert one(matrix, ours({**Z, "bf16": {"enabled": False}}), deepspeed_wins.precision_agrees) is None


def test_the_batch_follows_the_ranks(matrix: Matrix, tmp_path: Path) -> None:
    eight = named(ranks=8)
    work = theirs(tmp_path, {**Z, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 1}, eight)
    plan = make(case(matrix, machine(matrix, count=2), work), lambda mended: examine(mended, ALL))
    assert plan.job.num_processes == 2 and plan.job.zero_file is not None
    total, steps = plan.job.zero_file["train_batch_size"], plan.job.zero_file["gradient_accumulation_steps"]
    assert total == 2 * steps and not [f for f in plan.blockers if f.code == "LA312"]
    finding = one(matrix, theirs(tmp_path, {**Z, "train_batch_size": 7}), deepspeed_wins.batch_adds_up)
    assert finding and "7 != 1 * 2 * 2" in finding.because
    assert sets(finding.edits) == {"deepspeed:train_batch_size": 4}


def test_an_optimizer_in_the_file(matrix: Matrix, tmp_path: Path) -> None:
    for params, same in (({}, True), ({"lr": "auto", "betas": "auto"}, True), ({"lr": 1e-5}, True), ({"lr": 1}, False)):
        zero = {**Z, "optimizer": {"type": "AdamW", "params": params}}
        finding = one(matrix, theirs(tmp_path, zero), deepspeed_wins.no_optimizer)
        assert finding and finding.severity == "error" and "in the config file and in the code" in finding.because
        gone = (Remove("deepspeed", ("optimizer",), "the script has its own optimizer"),)
        assert (finding.edits, finding.offers) == ((gone, ()) if same else ((), gone))
    for work in (ours(zero), neither(zero)):
        finding = one(matrix, work, deepspeed_wins.no_optimizer)
        assert finding and finding.severity == "warning" and not finding.edits


def test_accumulation_in_the_file(matrix: Matrix, tmp_path: Path) -> None:
    check, steps = deepspeed_wins.accumulation_agrees, "gradient_accumulation_steps"
    finding = one(matrix, ours({**Z, steps: 4}), check)
    assert finding and finding.severity == "warning" and sets(finding.edits) == {f"train:{steps}": 4}
    for silent in ({**Z, steps: "auto"}, {key: value for key, value in Z.items() if key != steps}):
        assert one(matrix, ours(silent), check) is None  # the bundled trainer takes its own number
    four = theirs(tmp_path, {**Z, steps: 4})
    finding = one(matrix, four, check, "xflux-2024")
    assert finding and "DeepSpeed steps after 4 passes" in finding.because
    assert sets(finding.edits) == {f"train:{steps}": 4}
    finding = one(matrix, four, check)
    assert finding and "DeepSpeed divides each gradient by 4" in finding.because
    assert sets(finding.edits) == {f"deepspeed:{steps}": 2}
    finding = one(
        matrix, theirs(tmp_path, {key: value for key, value in Z.items() if key != steps}), check, "xflux-2024"
    )
    assert finding and finding.severity == "error" and "which means 1" in finding.seen
    assert sets(finding.edits) == {f"deepspeed:{steps}": 2}
    assert one(matrix, theirs(tmp_path, {**Z, steps: "auto"}), check) is None


@pytest.mark.parametrize(("stack", "zero", "line", "limit", "where"), [
    ("cuda13", {"gradient_clipping": 0.5}, "", 0.5, "by ds.json"),
    ("cuda13", {}, "", None, ""),  # 1.0 is DeepSpeed's own now
    ("xflux-2024", {}, "", 0.0, "not clipped, by DeepSpeed 0.14.4's own default"),
    ("xflux-2024", {"gradient_clipping": "auto"}, "", None, ""),
    ("xflux-2024", None, "gradient_clipping: '2'", 2.0, "by accelerate's file"),
    ("xflux-2024", None, "gradient_clipping: 0", 0.0, "not clipped"),
    ("cuda13", None, "gradient_clipping: auto", None, ""),
    ("cuda13", None, "zero_stage: 2", None, ""),
])  # fmt: skip
def test_clipping_of_xflux(
    matrix: Matrix, tmp_path: Path, stack: str, zero: Any, line: str, limit: float | None, where: str
) -> None:
    work = theirs(tmp_path, zero or {})
    if zero is None:
        work = msgspec.structs.replace(
            work, accelerate=yaml.safe_load(inline(line)), zero_file=None, deepspeed_path=None
        )
    finding = one(matrix, work, deepspeed_wins.clipping_agrees, stack)
    assert (finding is None) == (limit is None)
    if finding:
        assert where in finding.seen and sets(finding.edits) == {"train:max_grad_norm": limit}


def test_clipping_of_the_bundled_trainer(matrix: Matrix) -> None:
    check = deepspeed_wins.clipping_agrees
    finding = one(matrix, ours({**Z, "gradient_clipping": 0.25}), check)
    assert finding and sets(finding.edits) == {"train:max_grad_norm": 0.25}
    assert one(matrix, ours({**Z, "gradient_clipping": "auto"}, max_grad_norm=3.0), check) is None
    assert one(matrix, ours({}, max_grad_norm=3.0), check) is None  # it writes its own number
    off = msgspec.structs.replace(job(max_grad_norm=0.0), accelerate=yaml.safe_load(inline("gradient_clipping: 0")))
    assert one(matrix, off, check) is None


def test_a_large_bucket(matrix: Matrix, tmp_path: Path) -> None:
    big = {**Z, "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": True}}
    for work in (ours(big), theirs(tmp_path, big)):
        finding = one(matrix, work, deepspeed_memory.bucket_fits)
        assert finding and finding.severity == "warning" and not finding.edits and "about 1907 MiB" in finding.because
        (offer,) = finding.offers
        assert offer.key == BUCKET and isinstance(offer, Edit) and 10_000_000 < int(offer.value or 0) < 40_000_000
        assert one(matrix, lay(work, [offer]), deepspeed_memory.bucket_fits) is None
    small = {**Z, "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000}}
    assert one(matrix, theirs(tmp_path, small), deepspeed_memory.bucket_fits) is None


def test_zero_is_no_help_on_small_cards(matrix: Matrix, tmp_path: Path) -> None:
    check = deepspeed_memory.zero_saves_little
    assert one(matrix, theirs(tmp_path), check) is None
    finding = one(matrix, theirs(tmp_path), check, card="A10")
    assert finding and finding.severity == "warning" and not finding.edits
    assert "ZeRO on 2 ranks takes 75 MiB off each" in finding.seen and "954 MiB more" in finding.because
    finding = one(matrix, ours(), check, card="T4")
    assert finding and "gradient_checkpointing" in finding.hint and "954" not in finding.because
    assert findings(_single(matrix, ours(accelerate=named(ranks=1))), deepspeed_file.values_known) == ()


def _single(matrix: Matrix, work: Job) -> Case:
    return case(matrix, machine(matrix, count=1), work)


def test_an_edit_of_the_file_is_named_in_words() -> None:
    assert describe(Edit("deepspeed", ("bf16", "enabled"), True)) == "bf16.enabled: true in the DeepSpeed file"
