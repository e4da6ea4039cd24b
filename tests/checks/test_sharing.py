"""LA111 and LA116: how the ranks share the work, by values. tests/trainer holds LA116 to the trainer's own refusals."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import XFLUX_ACCELERATE, case, findings, job, machine, packages, verdict
from deepspeed_kit import Z, one, ours, sets

from xflux_doctor.check import examine
from xflux_doctor.checks import ALL, deepspeed_stages, sharing, software, toolchain
from xflux_doctor.checks.packages import formats_installed
from xflux_doctor.facts import Toolchain
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import make

FSDP = "distributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 2\nfsdp_config:\n"


def changed(old: str, new: str) -> str:
    assert old in XFLUX_ACCELERATE
    return XFLUX_ACCELERATE.replace(old, new)


@pytest.mark.parametrize(("old", "new", "mended"), [
    ("zero_stage: 2", "zero_stage: 5", 2),
    ("zero_stage: 2", "zero_stage: 0", 2),
    ("distributed_type: DEEPSPEED", "distributed_type: FSDP", None),
    ("distributed_type: DEEPSPEED", "distributed_type: XLA", None),
])  # fmt: skip
def test_a_strategy_that_the_trainer_does_not_do(matrix: Matrix, old: str, new: str, mended: int | None) -> None:
    subject = case(matrix, machine(matrix, count=8), job(changed(old, new)))
    (finding,) = findings(subject, sharing.strategy_done)
    assert [edit.value for edit in finding.edits] == ([mended] if mended else [])  # type: ignore[union-attr]
    plan = make(subject, lambda mended: examine(mended, ALL))
    blockers = [] if mended else ["LA208", "LA111"] if "XLA" in new else ["LA111"]
    assert [blocker.code for blocker in plan.blockers] == blockers


@pytest.mark.parametrize("text", [
    *(changed("zero_stage: 2", f"zero_stage: {stage}") for stage in (1, 2, 3)),
    FSDP + "  fsdp_version: 2\n",
    FSDP + "  version: '2'\n",
    FSDP + "  fsdp_version: 2\nparallelism_config:\n  parallelism_config_dp_shard_size: 2\n",
    "distributed_type: MULTI_GPU\nnum_processes: 2\n",
])  # fmt: skip
def test_strategies_that_it_does(matrix: Matrix, text: str) -> None:
    assert findings(case(matrix, machine(matrix, count=8), job(text)), sharing.strategy_done) == ()


@pytest.mark.parametrize(("text", "stack", "seen", "offer"), [
    (FSDP + "  fsdp_offload_params: false\n", "cuda13", "fsdp_config has no fsdp_version.",
     {"accelerate:fsdp_config.fsdp_version": 2}),
    (FSDP + "  fsdp_version: 1\n", "cuda13", "fsdp_config.fsdp_version is 1.",
     {"accelerate:fsdp_config.fsdp_version": 2}),
    (FSDP + "  fsdp_version: 2\n", "xflux-2024", "distributed_type is FSDP, and torch is 2.4.0",
     {"accelerate:distributed_type": "MULTI_GPU"}),
    (FSDP + "  fsdp_version: 2\nparallelism_config:\n  parallelism_config_tp_size: 2\n", "cuda13",
     "parallelism_config has tp_size 2.", {}),
])  # fmt: skip
def test_fsdp_that_it_does_not(matrix: Matrix, text: str, stack: str, seen: str, offer: dict[str, Any]) -> None:
    facts = machine(matrix, count=2, packages=packages(matrix, stack))
    (finding,) = findings(case(matrix, facts, job(text), stack), sharing.strategy_done)
    assert finding.seen.startswith(seen) and finding.severity == "error"
    assert sets(finding.offers) == offer and finding.edits == ()


def test_an_accelerate_without_fsdp2_is_told_apart_from_a_missing_key(matrix: Matrix) -> None:
    facts = machine(matrix, count=2, packages=packages(matrix, "cuda13", accelerate="1.5.2"))
    (finding,) = findings(case(matrix, facts, job(FSDP + "  fsdp_version: 2\n")), sharing.strategy_done)
    assert "accelerate 1.5.2 knows only the first" in finding.seen
    assert sets(finding.offers) == {"accelerate:distributed_type": "MULTI_GPU"}


def test_what_a_launcher_hands_over_counts_in_the_backward_pass(matrix: Matrix) -> None:
    one_process = "distributed_type: NO\n"
    train = {"mode": "finetune", "step_in_backward": True}
    assert findings(case(matrix, machine(matrix), job(one_process, **train)), sharing.goes_together) == ()
    told = machine(matrix, environment={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    (finding,) = findings(case(matrix, told, job(one_process, **train)), sharing.goes_together)
    assert "gradient_accumulation_steps is 4" in finding.seen
    assert sets(finding.offers) == {"train:step_in_backward": False} and finding.edits == ()


def test_settings_that_go_with_every_strategy(matrix: Matrix) -> None:
    for text in (XFLUX_ACCELERATE, FSDP + "  fsdp_version: 2\n", "distributed_type: MULTI_GPU\nnum_processes: 2\n"):
        for train in ({}, {"mode": "finetune"}, {"mode": "controlnet"}):
            subject = case(matrix, machine(matrix, count=8), job(text, **train))
            assert findings(subject, sharing.goes_together) == ()


def test_the_word_for_masters_is_mended(matrix: Matrix) -> None:
    work = job(XFLUX_ACCELERATE, mode="finetune", weight_update="kahan")
    (finding,) = findings(case(matrix, machine(matrix, count=8), work), sharing.goes_together)
    assert sets(finding.edits) == {"train:weight_update": "auto"}


# --- what the bundled trainer offloads --------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new", "stage", "severity", "edits", "offers"), [
    ("offload_optimizer_device: none", "offload_optimizer_device: cpu", 2, None, {}, {}),
    ("offload_param_device: none", "offload_param_device: cpu", 3, None, {}, {}),
    ("offload_param_device: none", "offload_param_device: cpu", 2, "warning",
     {"accelerate:deepspeed_config.offload_param_device": "none"}, {}),
    ("offload_param_device: none", "offload_param_device: nvme", 1, "error",
     {"accelerate:deepspeed_config.offload_param_device": "none"}, {}),
    ("offload_param_device: none", "offload_param_device: nvme", 3, "error", {},
     {"accelerate:deepspeed_config.offload_param_device": "cpu"}),
    ("offload_optimizer_device: none", "offload_optimizer_device: nvme", 2, "error", {},
     {"accelerate:deepspeed_config.offload_optimizer_device": "cpu"}),
])  # fmt: skip
def test_the_bundled_trainer_offloads_to_the_cpu(
    matrix: Matrix, old: str, new: str, stage: int, severity: str | None, edits: dict[str, Any], offers: dict[str, Any]
) -> None:
    work = job(changed(old, new).replace("zero_stage: 2", f"zero_stage: {stage}"))
    found = findings(case(matrix, machine(matrix, count=8), work), deepspeed_stages.offloads)
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    for finding in found:
        assert sets(finding.edits) == edits and sets(finding.offers) == offers


def test_a_file_s_offload_is_the_bundled_trainer_s(matrix: Matrix) -> None:
    """As trainer/zero_settings.py reads it: the block, else the older name, else what accelerate was told."""
    for block, offloads in (
        ({"stage": 3, "offload_param": {"device": "cpu"}}, ("param",)),
        ({"stage": 2, "cpu_offload": True}, ("optimizer",)),
        ({"stage": 2, "offload_optimizer": {"device": "auto"}}, ()),
        ({"stage": 2}, ()),
        ({}, ()),
    ):
        work = ours({**Z, "zero_optimization": block})
        assert work.offloads == offloads, block
        assert work.zero_stage == block.get("stage", 2)
        assert one(matrix, work, deepspeed_stages.offloads) is None


def test_an_offload_compiles_nothing(matrix: Matrix) -> None:
    text = changed("offload_optimizer_device: none", "offload_optimizer_device: cpu")
    facts = machine(matrix, count=8, toolchain=Toolchain())
    found = verdict(case(matrix, facts, job(text)), toolchain.compiler)
    assert found.status == "skipped" and "torch's AdamW" in found.reason


def test_fsdp_s_offload(matrix: Matrix) -> None:
    assert job(FSDP + "  fsdp_version: 2\n  fsdp_offload_params: true\n").offloads == ("optimizer", "param")
    assert job(FSDP + "  fsdp_version: 2\n").offloads == ()


@pytest.mark.parametrize(("train", "stack", "command"), [
    ({"quantization": "nf4"}, "cuda13", "pip install 'bitsandbytes'"),
    ({"quantization": "torchao-fp8"}, "xflux-2024", "pip install 'torchao==0.9.0'"),
    ({"optimizer": "adamw8bit"}, "xflux-2024", "pip install 'torchao==0.7.0'"),
    ({"quantization": "int8"}, "cuda13", None),
    ({}, "cuda13", None),
])  # fmt: skip
def test_a_format_whose_package_is_missing(
    matrix: Matrix, train: dict[str, Any], stack: str, command: str | None
) -> None:
    facts = machine(matrix, packages=packages(matrix, stack))
    found = findings(case(matrix, facts, job("distributed_type: NO\n", **train), stack), formats_installed)
    assert [finding.commands for finding in found] == ([(command,)] if command else [])
    bare = machine(matrix, packages=packages(matrix, stack, optimum_quanto=""))
    needs = case(matrix, bare, job("distributed_type: NO\n", quantization="int8"), stack)
    assert len(findings(needs, formats_installed)) == 1 and "optimum-quanto" in findings(needs, software.pins)[0].seen
