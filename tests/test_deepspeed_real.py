"""Each rule of LA301 to LA313 against the running accelerate and DeepSpeed: what is refused, and what is mended.

For every case the real stack shows the words that the check foretells, and takes what the plan makes of it; where the
check asks a person, the plan is blocked. Cases without words load, and the check says what they silently do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import case as make_case
from deepspeed_kit import inline, named, real, running, stack_machine, write
from packaging.version import Version

from xflux_doctor import deepspeed_keys as keys
from xflux_doctor import job as jobs
from xflux_doctor import jsontext, matrix, yamltext
from xflux_doctor.check import examine
from xflux_doctor.checks import ALL
from xflux_doctor.plan import make

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

VERSION = Version(running()["deepspeed"])
OLD = Version("0.15") > VERSION
Z: dict[str, Any] = {
    "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": "auto",
}  # fmt: skip


def zero(**values: Any) -> dict[str, Any]:
    """A whole DeepSpeed file with these keys in zero_optimization."""
    return {**Z, "zero_optimization": {"stage": 2, **values}}


@dataclass(frozen=True)
class Rule:
    """One wrong pair of files: the check, the stack's words, and what it takes afterwards (empty: nobody mends it)."""

    code: str
    accelerate: str
    zero: Any = None
    fails: str = ""
    values: dict[str, Any] = field(default_factory=dict)


IGNORED = "the following accelerate config variables will be ignored"
STAGE = "value is not a valid enumeration member; permitted: 0, 1, 2, 3" if OLD else "Input should be 0, 1, 2, 3"
DEVICE = "value is not a valid enumeration member; permitted: 'none'" if OLD else "Input should be 'none', 'cpu' or"
EXTRA = "extra fields not permitted" if OLD else "Extra inputs are not permitted"
ATTRIBUTE = "object has no attribute 'get'"
BUCKET = "zero_optimization.reduce_bucket_size"

RULES: dict[str, Rule] = {
    "missing": Rule("LA301", named(), None, "Expected a string path to an existing deepspeed config"),
    "empty name": Rule("LA301", inline("deepspeed_config_file: ''", precision=None), None, "Expected a string path"),
    "comments": Rule("LA301", named(), '{"zero_optimization": {"stage": 2} // two\n}', "JSONDecodeError"),
    "comma": Rule("LA301", named(), '{"zero_optimization": {"stage": 2},}', "JSONDecodeError"),
    "mark": Rule("LA301", named(), '\ufeff{"zero_optimization": {"stage": 2}}', "Unexpected UTF-8 BOM"),
    "list": Rule("LA301", named(), "[1]", "'list' object has no attribute 'get'"),
    "twice": Rule("LA301", named(), '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, '
                                    '"train_micro_batch_size_per_gpu": 2}'),
    "inline equal": Rule("LA302", named("zero_stage: 2"), Z, IGNORED, {"stage": 2}),
    "inline null": Rule("LA302", named("gradient_clipping:"), Z, IGNORED, {"stage": 2}),
    "inline auto": Rule("LA302", named("zero_stage: 3"), zero(stage="auto"), IGNORED, {"stage": 3}),
    "inline alone": Rule("LA302", named("gradient_accumulation_steps: 8", "gradient_clipping: 0.5"), Z, IGNORED,
                         {"accumulation": 8, "clipping": 0.5}),
    "inline differs": Rule("LA302", named("zero_stage: 3"), Z, IGNORED),
    "offload alone": Rule("LA302", named("offload_optimizer_device: cpu"), Z, IGNORED,
                          {"offload_optimizer": ["cpu", "None"]}),
    "saved alone": Rule("LA302", named("zero3_save_16bit_model: true"), zero(stage=3), IGNORED,
                        {"save_16bit": True, "stage": 3}),
    "precision equal": Rule("LA302", named(precision="bf16"), Z, IGNORED, {"bf16": True, "fp16": False}),
    "precision auto": Rule("LA302", named(precision="bf16"), {**Z, "bf16": {"enabled": "auto"}}, IGNORED,
                           {"bf16": True}),
    "fp16 alone": Rule("LA302", named(precision="fp16"), {**zero(), "bf16": {"enabled": False}}, IGNORED,
                       {"fp16": True, "bf16": False}),
    "no precision": Rule("LA302", named(precision="'no'"), {**zero(), "bf16": {"enabled": "auto"}}, IGNORED,
                         {"fp16": False, "bf16": False}),
    "precision differs": Rule("LA302", named(precision="fp16"), Z, IGNORED),
    "misspelt": Rule("LA303", inline("gradient_acumulation_steps: 4"), values={"accumulation": 4}),
    "flag": Rule("LA303", inline("mixed_precision: fp16", "zero_stage: 2"), values={"fp16": True, "bf16": False}),
    "stage auto": Rule("LA304", inline("zero_stage: auto"), fails="invalid literal for int() with base 10: 'auto'",
                       values={"stage": 2}),
    "stage float": Rule("LA304", inline("zero_stage: 3.0"), fails="invalid literal for int() with base 10: '3.0'",
                        values={"stage": 3}),
    "stage word": Rule("LA304", inline("zero_stage: zero-1"), fails="invalid literal for int()", values={"stage": 1}),
    "stage true": Rule("LA304", inline("zero_stage: true"), fails="invalid literal for int() with base 10: 'True'"),
    "stage 4": Rule("LA304", inline("zero_stage: 4"), fails=STAGE),
    "steps auto": Rule("LA304", inline("gradient_accumulation_steps: auto"),
                       fails="invalid literal for int() with base 10: 'auto'", values={"accumulation": 1}),
    "steps float": Rule("LA304", inline("gradient_accumulation_steps: 2.0"),
                        fails="invalid literal for int() with base 10: '2.0'", values={"accumulation": 2}),
    "steps 0": Rule("LA304", inline("gradient_accumulation_steps: 0"), fails="has to be greater than 0"),
    "clip word": Rule("LA304", inline("gradient_clipping: some"), fails="could not convert string to float: 'some'"),
    "clip true": Rule("LA304", inline("gradient_clipping: true"), fails="could not convert string to float: 'true'"),
    "device no": Rule("LA304", inline("offload_optimizer_device: no"), fails=DEVICE,
                      values={"offload_optimizer": ["none", "None"]}),
    "device disk": Rule("LA304", inline("offload_param_device: disk", "zero_stage: 3"), fails=DEVICE),
    "init auto": Rule("LA304", inline("zero3_init_flag: auto"), fails="invalid truth value auto",
                      values={"init": False}),
    "init word": Rule("LA304", inline("zero3_init_flag: perhaps"), fails="invalid truth value perhaps"),
    "saved 1": Rule("LA304", inline("zero3_save_16bit_model: 1", "zero_stage: 3"), values={"save_16bit": True}),
    "param below 3": Rule("LA305", inline("offload_param_device: cpu"), values={"offload_param": ["none", "None"]}),
    "nvme inline": Rule("LA305", inline("offload_optimizer_device: nvme", "offload_optimizer_nvme_path: /nvme")),
    "nvme auto": Rule("LA305", named(), zero(stage=3, offload_param={"device": "nvme", "nvme_path": "auto"})),
    "optimizer at 0": Rule("LA305", inline("offload_optimizer_device: cpu", "zero_stage: 0")),
    "init below 3": Rule("LA306", inline("zero3_init_flag: true"), values={"init": False, "stage": 2}),
    "experts": Rule("LA306", inline("deepspeed_moe_layer_cls_names: Foo"), values={"stage": 2}),
    "no zero": Rule("LA307", named(), {"train_micro_batch_size_per_gpu": 1},
                    "Please specify the ZeRO optimization config in the DeepSpeed config.", {"stage": 0}),
    "zero null": Rule("LA307", named(), {**Z, "zero_optimization": None}, "must be a mapping, not NoneType",
                      {"stage": 0}),
    "zero true": Rule("LA307", named(), {**Z, "zero_optimization": True}, "'bool' " + ATTRIBUTE, {"stage": 1}),
    "zero list": Rule("LA307", named(), {**Z, "zero_optimization": []}, "'list' " + ATTRIBUTE),
    "top key": Rule("LA308", named(), {**Z, "gradient_clippin": 0.5}, values={"clipping": 0.5}),
    "zero key": Rule("LA308", named(), zero(reduce_bucketsize=5), EXTRA, {"bucket": 5}),
    "zero key unknown": Rule("LA308", named(), zero(quite_another_thing=5), EXTRA, {"stage": 2}),
    "offload key": Rule("LA308", named(), zero(offload_optimizer={"device": "cpu", "pinmemory": True}), EXTRA,
                        {"offload_optimizer": ["cpu", "None"]}),
    "both names": Rule("LA309", named(), zero(cpu_offload=True, offload_optimizer={"device": "cpu"}),
                       "Cannot provide deprecated parameter 'cpu_offload' and replacing parameter 'offload_optimizer' "
                       "together", {"offload_optimizer": ["cpu", "None"]}),
    "both names differ": Rule("LA309", named(), zero(cpu_offload=False, offload_optimizer={"device": "cpu"}),
                              "Cannot provide deprecated parameter 'cpu_offload'"),
    "cpu_offload": Rule("LA309", named(), zero(cpu_offload=True), values={"offload_optimizer": ["cpu", "None"]}),
    "cpu_offload off": Rule("LA309", named(), zero(cpu_offload=False), values={"offload_optimizer": ["none", "None"]}),
    "param offload": Rule("LA309", named(), zero(stage=3, cpu_offload_param=True),
                          values={"offload_param": ["cpu", "None"]}),
    "16bit weights": Rule("LA309", named(), zero(stage=3, stage3_gather_fp16_weights_on_model_save=True),
                          values={"save_16bit": True}),
    "16bit twice": Rule("LA309", named(), zero(stage=3, stage3_gather_fp16_weights_on_model_save=True,
                                               stage3_gather_16bit_weights_on_model_save=True),
                        "replacing parameter 'gather_16bit_weights_on_model_save' together", {"save_16bit": True}),
    "bfloat16": Rule("LA309", named(), {**{k: v for k, v in Z.items() if k != "bf16"}, "bfloat16": {"enabled": True}},
                     values={"bf16": True}),
    "stage text": Rule("LA310", named(), zero(stage="2"), STAGE if OLD else "", {"stage": 2}),
    "stage null": Rule("LA310", named(), zero(stage=None), "DeepSpeedZeroConfig"),
    "stage 7": Rule("LA310", named(), zero(stage=7), STAGE),
    "device": Rule("LA310", named(), zero(offload_optimizer={"device": "disk"}), DEVICE),
    "device upper": Rule("LA310", named(), zero(offload_optimizer={"device": "CPU"}), DEVICE,
                         {"offload_optimizer": ["cpu", "None"]}),
    "offload text": Rule("LA310", named(), zero(offload_optimizer="cpu"), "'str' " + ATTRIBUTE,
                         {"offload_optimizer": ["cpu", "None"]}),
    "null size": Rule("LA310", named(), zero(reduce_bucket_size=None), "DeepSpeedZeroConfig", {"bucket": 500_000_000}),
    "negative": Rule("LA310", named(), zero(reduce_bucket_size=-1), "DeepSpeedZeroConfig"),
    "no boolean": Rule("LA310", named(), zero(contiguous_gradients="maybe"), "DeepSpeedZeroConfig"),
    "bf16 true": Rule("LA310", named(), {**Z, "bf16": True}, "'bool' " + ATTRIBUTE, {"bf16": True}),
    "size auto": Rule("LA310", named(), zero(reduce_bucket_size="auto"), "Can't find `model.config` entry",
                      {"bucket": 9437184}),
    "other auto": Rule("LA310", named(), zero(sub_group_size="auto"), "`zero_optimization.sub_group_size` not found in "
                       "kwargs", {"stage": 2}),
    "top auto": Rule("LA310", named(), {**Z, "wall_clock_breakdown": "auto"},
                     "`wall_clock_breakdown` not found in kwargs", {"stage": 2}),
    "both precisions": Rule("LA311", named(), {**Z, "fp16": {"enabled": True}},
                            "bfloat16 and fp16 modes cannot be simultaneously enabled"),
    "precision nowhere": Rule("LA311", named(), {**Z, "bf16": {"enabled": "auto"}}, values={"bf16": False}),
    "batch": Rule("LA312", named(), {**Z, "train_micro_batch_size_per_gpu": 2, "train_batch_size": 7,
                                     "gradient_accumulation_steps": 3},
                  "is not equal to micro_batch_per_gpu * gradient_acc_step * world_size 7 != 2 * 3 * 2",
                  {"batch": 12, "micro": 2, "accumulation": 3}),
    "no micro": Rule("LA312", named(), {**zero(), "train_batch_size": 8, "train_micro_batch_size_per_gpu": None},
                     "'NoneType' and 'int'", {"batch": 8, "micro": 4}),
    "no micro odd": Rule("LA312", named(), {**zero(), "train_batch_size": 5, "train_micro_batch_size_per_gpu": None},
                         "'NoneType' and 'int'", {"batch": 2, "micro": 1}),
}  # fmt: skip
if OLD:
    RULES["clip none"] = Rule("LA304", inline("gradient_clipping: none"),
                              fails="could not convert string to float: 'none'", values={"clipping": 0.0})  # fmt: skip
else:
    RULES["clip none"] = Rule("LA304", inline("gradient_clipping: none"), fails="could not convert string to float")
    RULES["clip 0"] = Rule("LA304", inline("gradient_clipping: 0"))
    RULES["removed"] = Rule("LA308", named(), {**Z, "sparse_gradients": False}, "has been removed", {"stage": 2})
    RULES["removed, on"] = Rule("LA308", named(), {**Z, "elasticity": {"enabled": True}}, "has been removed")
    RULES["removed in zero"] = Rule("LA308", named(), zero(mics_shard_size=2), "is no longer supported", {"stage": 2})
    RULES["bf16 key"] = Rule("LA308", named(), {**Z, "bf16": {"enabled": True, "loss_scale": 0}}, EXTRA, {"bf16": True})
    RULES["compile key"] = Rule("LA308", named(), {**Z, "compile": {"backend": "inductor"}}, EXTRA, {"stage": 2})

RIGHT: dict[str, tuple[str, Any]] = {
    "whole": (named("zero3_init_flag: false"), zero(reduce_bucket_size=5e8, overlap_comm=True, offload_param=None)),
    "autos": (named(), {**zero(stage="auto"), "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
                        "train_batch_size": "auto"}),
    "texts": (named(), zero(reduce_bucket_size="500000000", overlap_comm="true")),
    "stage 3": (named(), zero(stage=3, stage3_prefetch_bucket_size=1000, stage3_param_persistence_threshold=10)),
    "inline texts": (inline("zero_stage: '1'", "gradient_clipping: '0.5'", "gradient_accumulation_steps: '4'"), None),
    "inline nulls": (inline("zero_stage:", "gradient_clipping:", "zero3_init_flag:"), None),
    "upper devices": (inline("offload_optimizer_device: CPU", "zero_stage: 1"), None),
    "init words": (inline("zero3_init_flag: 'yes'", "zero_stage: 3"), None),
    "no file": (inline("deepspeed_config_file: none", "zero_stage: 2"), None),
    "batch adds up": (named(), {**Z, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}),
}  # fmt: skip


def job_of(folder: Path) -> jobs.Job:
    return jobs.read(None, str(folder / "accelerate.yaml"), folder=folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case's files as they were, and beside them as the plan would write them."""
    root = tmp_path_factory.mktemp("real")
    facts = stack_machine(matrix.load())
    for name, rule in RULES.items():
        _write_both(root / name, rule.accelerate, rule.zero, facts)
    for name, (accelerate, values) in RIGHT.items():
        _write_both(root / f"right {name}", accelerate, values, facts)
    return {path.name: path for path in root.iterdir()}


def _write_both(folder: Path, accelerate: str, values: Any, facts: Any) -> None:
    old = write(folder / "old", accelerate, values)
    plan = make(_case(old, facts), lambda case: examine(case, ALL))
    text = yamltext.apply((old / "accelerate.yaml").read_text(), [e for e in plan.edits if e.file == "accelerate"])
    edits = [edit for edit in plan.edits if edit.file == "deepspeed"]
    file = old / "ds.json"
    write(folder / "new", text, jsontext.apply(file.read_text(), edits) if file.exists() and edits else
          file.read_text() if file.exists() else None)  # fmt: skip


def _case(folder: Path, facts: Any) -> Any:
    # Another trainer's script: the bundled one's own limits (LA111) are accepted.
    return make_case(matrix.load(), facts, job_of(folder), None, accepted=frozenset({"LA111"}))


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    cases = [{"folder": str(path / kind)} for path in folders.values() for kind in ("old", "new")]
    got = real(cases)
    _FIELDS.update(got["fields"])
    return {name: (got["answers"][2 * at], got["answers"][2 * at + 1]) for at, name in enumerate(folders)}


_FIELDS: dict[str, Any] = {}


@pytest.mark.parametrize("name", RULES)
def test_a_rule(name: str, folders: dict[str, Path], answers: dict[str, Any], matrix: Any) -> None:
    rule, (old, new) = RULES[name], answers[name]
    facts = stack_machine(matrix)
    verdicts = examine(_case(folders[name] / "old", facts), ALL)
    mine = [verdict.check for verdict in verdicts if verdict.check.startswith("LA3") and verdict.findings]
    assert rule.code in mine, mine
    assert not [verdict for verdict in verdicts if verdict.status == "crashed"]
    if rule.fails:
        assert rule.fails in old.get("error", ""), old
    else:
        assert "values" in old, old
    after = examine(_case(folders[name] / "new", facts), ALL)
    left = [f.code for verdict in after for f in verdict.findings if f.severity == "error" and f.code[:3] == "LA3"]
    if not rule.values:
        assert rule.code in left or not rule.fails
        return
    assert left == []
    assert "values" in new, new
    assert {key: new["values"][key] for key in rule.values} == rule.values


@pytest.mark.parametrize("name", RIGHT)
def test_right_files_load_and_are_left_alone(
    name: str, folders: dict[str, Path], answers: dict[str, Any], matrix: Any
) -> None:
    old, new = answers[f"right {name}"]
    assert "values" in old and old == new, old
    verdicts = examine(_case(folders[f"right {name}"] / "old", stack_machine(matrix)), ALL)
    assert [f for verdict in verdicts if verdict.check.startswith("LA3") for f in verdict.findings] == []


def test_silent_things_are_as_they_are_told(answers: dict[str, Any]) -> None:
    """What loads, and does something else than the file says."""
    assert answers["twice"][0]["values"]["micro"] == 2  # json.load takes the last
    assert answers["misspelt"][0]["values"]["accumulation"] == 1
    assert answers["flag"][0]["values"]["fp16"] is True  # over bf16 at the top level
    assert answers["nvme inline"][0]["values"]["offload_optimizer"] == ["nvme", "none"]  # a folder named none
    assert answers["bfloat16"][0]["values"]["bf16"] is False
    assert answers["saved 1"][0]["values"]["save_16bit"] is False
    assert answers["top key"][0]["values"]["clipping"] == (0.0 if keys.CLIPS_BY_DEFAULT > VERSION else 1.0)
    assert "only applicable for ZeRO Stage 3" in answers["init below 3"][0]["warnings"][0]
    if not OLD:
        assert answers["clip 0"][0]["values"]["clipping"] == 1.0  # no 0 reaches DeepSpeed


def test_the_keys_are_those_of_the_running_release(answers: dict[str, Any]) -> None:
    assert keys.zero_keys(VERSION) == set(_FIELDS["zero_optimization"])
    for block in ("offload_optimizer", "offload_param"):
        assert keys.offload_keys(block, VERSION) == set(_FIELDS[block])
    if _FIELDS["compile"] is None:
        assert keys.STRICT_COMPILE > VERSION
    else:
        assert set(_FIELDS["compile"]) <= keys.COMPILE
    if _FIELDS["precision"] is None:
        assert keys.STRICT_PRECISION > VERSION
    else:
        assert {name: set(found) for name, found in _FIELDS["precision"].items()} == keys.PRECISION


def test_the_accelerator_reads_its_steps_as_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    with pytest.raises(ValueError, match=r"invalid literal for int\(\) with base 10: 'auto'"):
        Accelerator(cpu=True)
