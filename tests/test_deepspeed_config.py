"""LA301 to LA317 by values: who runs the job decides what is wrong, what is mended and what is only offered."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xflux_kit
import yaml
from conftest import XFLUX_ACCELERATE, case, findings, job, machine
from deepspeed_kit import MINE, Z, inline, named, neither, one, ours, sets, theirs, write

from xflux_doctor import deepspeed_file as reader
from xflux_doctor import job as jobs
from xflux_doctor.check import examine
from xflux_doctor.checks import (
    ALL,
    deepspeed,
    deepspeed_section,
    deepspeed_stages,
)
from xflux_doctor.finding import Comment
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import lay, make

# --- right files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["cuda13", "xflux-2024"])
def test_xfluxs_own_file_on_eight_h100_is_well(matrix: Matrix, tmp_path: Path, stack: str) -> None:
    facts = machine(matrix, count=8, stack=stack)
    for work in (job(gradient_accumulation_steps=2), xflux_kit.job(tmp_path, accelerate=XFLUX_ACCELERATE),
                 msgspec.structs.replace(job(), train=None)):  # fmt: skip
        verdicts = examine(case(matrix, facts, work, stack), MINE)
        assert [f.seen for verdict in verdicts for f in verdict.findings] == []
        assert not [verdict for verdict in verdicts if verdict.status == "crashed"]


@pytest.mark.parametrize("stack", ["cuda13", "xflux-2024"])
def test_a_right_file_is_well_for_every_script(matrix: Matrix, tmp_path: Path, stack: str) -> None:
    for work in (ours(), theirs(tmp_path), neither()):
        verdicts = examine(case(matrix, machine(matrix, count=2, stack=stack), work, stack), MINE)
        assert [f.seen for verdict in verdicts for f in verdict.findings] == []


def test_other_jobs_are_not_looked_at(matrix: Matrix) -> None:
    plain = msgspec.structs.replace(ours(), accelerate={"distributed_type": "MULTI_GPU", "num_processes": 2})
    problem = msgspec.structs.replace(plain, problems=(jobs.Problem("deepspeed", "it is odd", ""),), zero_file=None)
    for work in (plain, problem):
        verdicts = examine(case(matrix, machine(matrix, count=2), work), MINE)
        assert [f for verdict in verdicts for f in verdict.findings] == []


ODD: list[Any] = [None, True, 0, -1, 2.5, float("nan"), float("inf"), "", "auto", "x", [], [1], {}, {"a": {}}, 10**400]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
def test_no_check_falls_over_odd_values(matrix: Matrix, tmp_path: Path, odd: Any) -> None:
    zero_keys = ["stage", "reduce_bucket_size", "offload_optimizer", "offload_param", "overlap_comm", "cpu_offload",
                 "contiguous_gradients", "stage3_gather_fp16_weights_on_model_save", "odd"]  # fmt: skip
    others = ("zero3_init_flag", "deepspeed_moe_layer_cls_names", "odd", "num_processes", "mixed_precision")
    section = dict.fromkeys((*deepspeed.PLACES, *others), odd)
    zero = dict.fromkeys([*Z, "optimizer", "scheduler", "fp16", "bfloat16", "elasticity", "odd"], odd)
    inside = {**Z, "zero_optimization": dict.fromkeys(zero_keys, odd), "bf16": {"enabled": odd}, "compile": odd}
    head = yaml.safe_load(named())
    for values in (zero, inside, {}, {"zero_optimization": odd}):
        for base in (ours(values), theirs(tmp_path, values), neither(values)):
            for keys in ({}, section):
                both = {
                    **head,
                    "mixed_precision": odd,
                    "deepspeed_config": {"deepspeed_config_file": "ds.json", **keys},
                }
                alone = {**head, "mixed_precision": "bf16", "deepspeed_config": keys or odd}
                none = msgspec.structs.replace(base, accelerate=alone, zero_file=None, deepspeed_path=None)
                for work in (msgspec.structs.replace(base, accelerate=both), none):
                    subject = case(matrix, machine(matrix, count=2), work)
                    crashed = [v for v in examine(subject, MINE) if v.status == "crashed"]
                    assert not crashed, crashed[0].reason
                    lay(work, [edit for v in examine(subject, MINE) for f in v.findings for edit in f.edits])


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "seen", "hint"), [
    (b"\xff\xfe{\0", "is not UTF-8 text", "UTF-8"),
    (b'{"a": "\0"}', "is binary", ""),
    (b" " * ((1 << 20) + 1), "holds 1048577 bytes", ""),
    (b"", "is empty (accelerate: Expecting value", ""),
    (b"[1]", "holds list", "Begin it with {"),
    (b"\xef\xbb\xbf{}", "byte order mark", "without a byte order mark"),
    (b'{"a": 1, /* b */ "c": 2}', "is not JSON", ""),
    (b'{\n# a\n"c": 2}', "is not JSON", "Remove the comments"),
    (b'{"a": [1,]}', "is not JSON", "Remove the comma"),
    (b'{"a": {"b": 1, "b": 1}}', "says 'b' twice", "Keep one"),
    (b"{'a': 1}", "is not JSON", "json.load"),
    (b"[" * 100_000, "is not JSON", ""),
])  # fmt: skip
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes, seen: str, hint: str) -> None:
    write(tmp_path, named())
    (tmp_path / "ds.json").write_bytes(content)
    work = jobs.read(None, str(tmp_path / "accelerate.yaml"), folder=tmp_path)
    (problem,) = work.problems
    assert problem.file == "deepspeed" and seen in problem.seen and hint in problem.hint
    assert work.zero_file is None and work.deepspeed_path == tmp_path / "ds.json"


def test_a_file_that_is_not_there(tmp_path: Path, matrix: Matrix) -> None:
    write(tmp_path / "configs", named(), {})
    work = jobs.read(None, str(tmp_path / "configs/accelerate.yaml"), folder=tmp_path)
    finding = one(matrix, work, deepspeed.file_readable)
    assert finding and f"there is no file {tmp_path / 'ds.json'}" in finding.seen
    assert str(tmp_path / "configs/ds.json") in finding.hint  # it lies beside accelerate's file
    for name, hint in (("~/ds.json", "expands no ~"), ("x" * 5000, "Correct the path"), (".", "Name DeepSpeed's")):
        found = reader.read({"deepspeed_config": {"deepspeed_config_file": name}}, tmp_path)
        assert found and found.seen and hint in found.hint
    for odd in (3, True, [], {"a": 1}):
        found = reader.read({"deepspeed_config": {"deepspeed_config_file": odd}}, tmp_path)
        assert found and "not the name of a file" in found.seen
    for nothing in (None, "none"):
        assert reader.read({"deepspeed_config": {"deepspeed_config_file": nothing}}, tmp_path) is None
    assert reader.read({"deepspeed_config": "ds.json"}, tmp_path) is None


def test_values_as_base64_are_read_and_never_edited(tmp_path: Path, matrix: Matrix) -> None:
    wrong = {**Z, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "odd": 1}, "train_batch_size": 5,
             "train_micro_batch_size_per_gpu": 1}  # fmt: skip
    text = base64.urlsafe_b64encode(json.dumps(wrong).encode()).decode()
    write(tmp_path, inline(f"deepspeed_config_file: {text}", "gradient_clipping: 0.5", precision=None))
    work = jobs.read(None, str(tmp_path / "accelerate.yaml"), folder=tmp_path)
    assert work.zero_file == wrong and work.deepspeed_path is None and not work.problems
    verdicts = examine(case(matrix, machine(matrix, count=2), work), MINE)
    found = [f for verdict in verdicts for f in verdict.findings]
    assert {"LA302", "LA308", "LA310", "LA312"} <= {f.code for f in found}
    assert not [edit for f in found for edit in (*f.edits, *f.offers) if edit.file == "deepspeed"]


def test_the_file_is_found_where_the_training_is_launched(tmp_path: Path) -> None:
    write(tmp_path, named(), Z)
    assert jobs.read(None, str(tmp_path / "accelerate.yaml"), folder=tmp_path).zero_file == Z
    root = xflux_kit.checkout(tmp_path / "x-flux")
    (root / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    config = xflux_kit.config(root / "own.yaml", **xflux_kit.LORA)
    work = jobs.read(str(config), str(tmp_path / "accelerate.yaml"), folder=tmp_path, xflux=str(root))
    assert work.deepspeed_path == root / "ds.json" and work.zero_stage == 1


def test_the_file_decides_stage_and_offload() -> None:
    work = neither({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}})
    assert (work.zero_stage, work.strategy, work.compiled_ops) == (3, "zero3", ("cpu_adam", "async_io"))
    assert neither({"zero_optimization": {"stage": "auto"}}).zero_stage == 2
    assert neither({"zero_optimization": {}}).zero_stage == 0


# --- LA302 ------------------------------------------------------------------------------------------------------


def test_the_bundled_trainer_is_warned_of_what_would_stop_others(matrix: Matrix) -> None:
    finding = one(matrix, ours(accelerate=named("zero_stage: 2", precision="bf16")), deepspeed.alone)
    assert (
        finding and finding.severity == "warning" and "The bundled trainer takes what ds.json says" in finding.because
    )
    assert [type(edit) for edit in finding.edits] == [Comment, Comment]
    finding = one(matrix, ours(accelerate=named("zero_stage: 1")), deepspeed.alone)
    assert finding and finding.severity == "error" and not finding.edits
    assert "zero_stage is 1 in accelerate's file and 2 in ds.json" in finding.seen
    assert sets(finding.offers) == {"accelerate:deepspeed_config.zero_stage": None}


def test_other_scripts_stop(matrix: Matrix) -> None:
    finding = one(matrix, neither(accelerate=named("gradient_clipping: '1.0'")), deepspeed.alone)
    assert finding and finding.severity == "error"
    assert sets(finding.edits) == {"accelerate:deepspeed_config.gradient_clipping": None}
    assert "ValueError: When using `deepspeed_config_file`" in finding.because


@pytest.mark.parametrize(("line", "zero", "edits"), [
    ("zero_stage: 0", {"zero_optimization": {}}, {}),
    ("zero_stage: 2", {"zero_optimization": {}}, {"deepspeed:zero_optimization.stage": 2}),
    ("zero_stage: 2", {"zero_optimization": {"stage": "auto"}}, {}),
    ("zero_stage: 1", {"zero_optimization": {"stage": "auto"}}, {"deepspeed:zero_optimization.stage": 1}),
    ("zero_stage: auto", {}, {}),
    ("gradient_accumulation_steps: 1", {"zero_optimization": {}}, {}),
    ("gradient_accumulation_steps: 1", {"gradient_accumulation_steps": "auto"},
     {"deepspeed:gradient_accumulation_steps": 1}),
    ("gradient_clipping: 1.0", {"gradient_clipping": "auto"}, {}),
    ("gradient_clipping: 1.0", {}, {"deepspeed:gradient_clipping": 1.0}),
    ("offload_param_device: no", {}, {}),
    ("offload_param_device: none", {"zero_optimization": {"offload_param": None}}, {}),
    ("offload_param_nvme_path: /nvme", {}, {}),
    ("zero3_save_16bit_model: false", {}, {}),
    ("zero3_save_16bit_model: true", {"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}}, {}),
])  # fmt: skip
def test_what_becomes_of_an_inline_key(matrix: Matrix, line: str, zero: Any, edits: dict[str, Any]) -> None:
    finding = one(matrix, neither(zero, named(line)), deepspeed.alone)
    assert finding, line
    commented = {f"accelerate:deepspeed_config.{line.split(':')[0]}": None}
    assert sets(finding.edits) == {**edits, **commented}


def test_mixed_precision_of_the_launch_command_may_stand_beside_a_file(matrix: Matrix) -> None:
    work = msgspec.structs.replace(neither(), overrides={"mixed_precision": jobs.Override("bf16", "--mixed_precision")})
    assert one(matrix, work, deepspeed.alone) is None


def test_xflux_has_its_precision_from_its_own_config(matrix: Matrix, tmp_path: Path) -> None:
    silent = {key: value for key, value in Z.items() if key != "bf16"}
    finding = one(matrix, theirs(tmp_path, silent, named(precision="fp16")), deepspeed.alone)
    assert finding and sets(finding.edits) == {"accelerate:mixed_precision": None}  # its YAML says bf16
    finding = one(matrix, theirs(tmp_path, silent, named(precision="bf16"), mixed_precision=None), deepspeed.alone)
    assert finding and sets(finding.edits)["deepspeed:bf16.enabled"] is True


# --- the section ------------------------------------------------------------------------------------------------


def test_unknown_keys_and_flags(matrix: Matrix) -> None:
    text = inline("overlap_comm: true", "num_processes: 4", "module: true", "zero_stage: 2")
    work = msgspec.structs.replace(neither(accelerate=text), zero_file=None, deepspeed_path=None)
    found = findings(case(matrix, machine(matrix, count=2), work), deepspeed_section.keys_read)
    assert [(f.severity, sets(f.edits)) for f in found] == [
        ("warning", {}),
        ("error", {"accelerate:num_processes": 4, "accelerate:deepspeed_config.num_processes": None}),
        ("error", {}),
    ]
    plan = make(case(matrix, machine(matrix, count=2), work), lambda mended: examine(mended, ALL))
    assert plan.job.num_processes == 2  # four start, and then there are two devices


def test_a_zero_of_clipping(matrix: Matrix) -> None:
    work = msgspec.structs.replace(
        neither(accelerate=inline("gradient_clipping: 0")), zero_file=None, deepspeed_path=None
    )
    assert one(matrix, work, deepspeed_section.values_taken, "xflux-2024") is None
    finding = one(matrix, work, deepspeed_section.values_taken)
    assert finding and "clips at its own 1.0" in finding.because and not finding.edits
    assert sets(finding.offers) == {"accelerate:deepspeed_config.gradient_clipping": 1e9}
    mine = msgspec.structs.replace(job(), accelerate=work.accelerate)
    assert one(matrix, mine, deepspeed_section.values_taken) is None  # the bundled trainer hands it on


def test_transformers_for_zero3_init(matrix: Matrix) -> None:
    work = msgspec.structs.replace(neither(accelerate=inline("zero_stage: 3")), zero_file=None, deepspeed_path=None)
    assert one(matrix, work, deepspeed_stages.stage_three_flags) is None
    facts = machine(matrix, count=2)
    assert facts.packages is not None
    facts.packages.pop("transformers")
    (finding,) = findings(case(matrix, facts, work), deepspeed_stages.stage_three_flags)
    assert "requires Transformers" in finding.because and not finding.edits
