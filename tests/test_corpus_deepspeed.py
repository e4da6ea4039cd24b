"""DeepSpeed configs as people write them, through `fix --write-config`, and then through accelerate and DeepSpeed.

Each file of tests/corpus/accelerate/ds-* ends in one of three ways: it is right and is left alone; it is mended, in the
named keys only, and the running stack takes it with the named values; or it is refused in a sentence, and every
byte stays. The script is taken for one of another trainer: `--accept LA111`, the bundled trainer's own stages.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, record
from deepspeed_kit import real, running, stack_machine

from xflux_doctor import matrix as matrices
from xflux_doctor.cli import main

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

CORPUS = ROOT / "tests/corpus/accelerate"
OLD = running()["deepspeed"].startswith("0.14")
SECTION = "deepspeed_config."


@dataclass(frozen=True)
class Expected:
    """What becomes of one file."""

    outcome: str
    """right, mended or refused."""
    changed: frozenset[str] = frozenset()
    """Keys whose value differs afterwards; those of the JSON begin with a colon."""
    values: dict[str, Any] = field(default_factory=dict)
    """What the running stack makes of the result."""
    fails: str = ""
    """The running stack's own words for the file as it was; empty: it loads."""
    told: str = ""
    """Of the refusal."""


def right(**values: Any) -> Expected:
    return Expected("right", values=values)


def mended(changed: str, fails: str = "", **values: Any) -> Expected:
    return Expected("mended", frozenset(changed.split()), values, fails)


def refused(told: str, fails: str = "") -> Expected:
    return Expected("refused", fails=fails, told=told)


IGNORED = "the following accelerate config variables will be ignored"
TWO: dict[str, Any] = {"stage": 2, "accumulation": 1, "processes": 2}
INLINE = "gradient_accumulation_steps gradient_clipping offload_optimizer_device offload_param_device zero_stage"
CONFLICT = " ".join([*(SECTION + key for key in INLINE.split()), "mixed_precision"])
ZERO = ":zero_optimization."
SIZES = " ".join(
    ZERO + key for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
)
FILLED: dict[str, Any] = {"bucket": 3072 * 3072, "prefetch": 8493465, "persistence": 30720}

TABLE: dict[str, Expected] = {
    # Hugging Face's documents
    "hf-docs-zero2": mended(SECTION + "zero3_init_flag", fp16=True, init=False, **TWO),
    "hf-docs-zero3-offload": right(stage=3, init=True, save_16bit=True, offload_param=["cpu", "None"]),
    "hf-docs-file": right(stage=3, fp16=True, overlap_comm=True, clipping=1.0),
    "hf-trainer-zero3": mended(SIZES, "Can't find `model.config` entry", stage=3, save_16bit=True, bf16=True, **FILLED),
    "trainer-optimizer": mended(
        ":optimizer.params.betas :optimizer.params.eps " + ZERO + "reduce_bucket_size",
        "Can't find `model.config` entry", optimizer="adamw", bucket=3072 * 3072, bf16=True, **TWO),
    # what stands beside a file
    "docs-conflict-equal": mended(CONFLICT, IGNORED, clipping=1.0, bf16=True, **TWO),
    "docs-conflict-auto": mended(
        f"{CONFLICT} :bf16.enabled {ZERO}offload_optimizer.device :gradient_accumulation_steps :gradient_clipping",
        IGNORED, stage=2, accumulation=4, clipping=0.5, offload_optimizer=["cpu", "None"], bf16=True),
    "docs-conflict-differs": refused(
        "gradient_accumulation_steps is 4 in accelerate's file and 1 in ds-docs-conflict-differs.json; "
        "zero_stage is 3 in accelerate's file and 2 in", IGNORED),
    "bf16-beside-fp16": refused("mixed_precision is bf16 in accelerate's file and fp16.enabled true in", IGNORED),
    "precision-beside": mended("mixed_precision :bf16 :bf16.enabled", IGNORED, bf16=True, stage=2, accumulation=2),
    # axolotl, kohya, X-Flux
    "axolotl-zero2": right(stage=2, bf16=True) if OLD else mended(
        ":compile.disable :compile.backend", "CompileConfig", stage=2, bf16=True, offload_optimizer=["cpu", "None"]),
    "axolotl-zero3": mended(SIZES, "Can't find `model.config` entry", stage=3, bf16=True, **FILLED),
    "kohya-zero2": right(stage=2, accumulation=4, offload_optimizer=["cpu", "None"]),
    "xflux-readme": right(stage=2, accumulation=2, bf16=True, clipping=1.0),
    # the section's own values
    "quoted-numbers": right(stage=2, accumulation=2, clipping=1.0, init=False),
    "inline-autos": mended(
        " ".join(SECTION + key for key in ("gradient_accumulation_steps", "zero_stage", "zero3_init_flag",
                                           "offload_optimizer_device", "offload_param_device")),
        "invalid literal for int() with base 10: 'auto'", clipping=1.0, offload_optimizer=["none", "None"], **TWO),
    "inline-words": mended(
        " ".join(SECTION + key for key in ("gradient_accumulation_steps", "gradient_clipping", "zero_stage")),
        "could not convert string to float: 'none'", stage=2, accumulation=2, clipping=0.0, save_16bit=True)
    if OLD else refused("gradient_clipping is 'none' in deepspeed_config", "could not convert string to float: 'none'"),
    "misspelt": mended(
        f"{SECTION}gradient_acumulation_steps {SECTION}gradient_accumulation_steps {SECTION}zero_optimization_stage "
        f"{SECTION}zero_stage", stage=1, accumulation=4, init=False),
    "flags-inside": mended(f"{SECTION}num_processes {SECTION}mixed_precision mixed_precision", fp16=True, **TWO),
    "nvme-inline": refused("offload_optimizer_device is nvme, with offload_optimizer_nvme_path '/local_nvme'"),
    "param-offload-zero2": mended(f"{SECTION}offload_param_device {SECTION}zero3_init_flag", init=False, **TWO),
    "moe-names": mended(SECTION + "deepspeed_moe_layer_cls_names", **TWO),
    "stage-four": refused("zero_stage is 4", "DeepSpeedZeroConfig"),
    # JSON that cannot be read
    "json-comments": refused("is not JSON: Expecting property name enclosed in double quotes", "JSONDecodeError"),
    "json-trailing-comma": refused("Remove the comma before the closing bracket", "JSONDecodeError"),
    "json-twice": refused("says 'gradient_accumulation_steps' twice"),
    "json-missing": refused("there is no file", "Expected a string path to an existing deepspeed config"),
    "base64": right(bf16=True, **TWO),
    # JSON that can be read
    "old-names": mended(
        f":bfloat16 :bfloat16.enabled :bf16 :bf16.enabled {ZERO}cpu_offload "
        f"{ZERO}stage3_gather_fp16_weights_on_model_save {ZERO}stage3_gather_16bit_weights_on_model_save",
        bf16=True, save_16bit=True, **TWO),
    "batch-of-eight": mended(":train_batch_size", "32 != 2 * 2 * 2", batch=8, micro=2, accumulation=2),
    "eight-of-two": mended("num_processes :gradient_accumulation_steps", batch=16, micro=1, accumulation=8),
    "no-micro": mended(":train_micro_batch_size_per_gpu", "'NoneType' and 'int'", batch=8, micro=4, stage=1),
    "no-zero": mended(":zero_optimization :zero_optimization.stage", "Please specify the ZeRO optimization", stage=0),
    "json-misspelt": mended(
        ":gradient_acumulation_steps :gradient_accumulation_steps "
        f"{ZERO}reduce_bucketsize {ZERO}reduce_bucket_size {ZERO}overlap_com {ZERO}overlap_comm "
        f"{ZERO}offload_optimizer.pinmemory {ZERO}offload_optimizer.pin_memory", "DeepSpeedZeroConfig",
        stage=2, accumulation=4, bucket=200_000_000, overlap_comm=True, offload_optimizer=["cpu", "None"]),
    "both-precisions": refused("bf16 and fp16 are both enabled", "bfloat16 and fp16 modes cannot be simultaneously"),
    "zero-true": mended(
        ":bf16 :bf16.enabled :zero_optimization :zero_optimization.stage", "'bool' object has no attribute 'get'",
        stage=1, bf16=True),
    "stage-text": mended(
        f"{ZERO}stage {ZERO}offload_optimizer {ZERO}offload_optimizer.device {ZERO}reduce_bucket_size",
        "'str' object has no attribute 'get'", stage=2, offload_optimizer=["cpu", "None"], bucket=500_000_000),
    "removed-blocks": right(bf16=True, **TWO) if OLD else mended(
        ":elasticity :elasticity.enabled :elasticity.max_train_batch_size :sparse_gradients", "has been removed",
        bf16=True, **TWO),
    "right-one-line": right(stage=1, bf16=True, accumulation=2, clipping=1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str
    folder: Path
    before: dict[str, bytes]
    after: dict[str, bytes]
    again: dict[str, bytes]
    """After a second fix."""


def _texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.suffix in (".yaml", ".json")
            and ".bak-" not in path.name}  # fmt: skip


def _fix(folder: Path, facts: Path) -> tuple[int, str]:
    said = io.StringIO()
    arguments = ["fix", "--write-config", "--yes", "--quick", "--accept", "LA111", "--facts", str(facts),
                 "--accelerate-config", "accelerate.yaml"]  # fmt: skip
    with _inside(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(arguments)
    return int(code or 0), said.getvalue()


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    try:
        yield
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("corpus")
    record(root / "machine.json", stack_machine(matrices.load()))
    found = {}
    for name in TABLE:
        for folder in (root / name / "old", root / name / "new"):
            folder.mkdir(parents=True)
            shutil.copy(CORPUS / f"ds-{name}.yaml", folder / "accelerate.yaml")
            if (CORPUS / f"ds-{name}.json").exists():
                shutil.copy(CORPUS / f"ds-{name}.json", folder)
        folder = root / name / "new"
        before = _texts(folder)
        code, output = _fix(folder, root / "machine.json")
        after = _texts(folder)
        _fix(folder, root / "machine.json")
        found[name] = Outcome(code, output, folder, before, after, _texts(folder))
    return found


@pytest.fixture(scope="module")
def loaded(outcomes: dict[str, Outcome]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Each file before and after, as the running stack takes it."""
    cases = [{"folder": str(item.folder.parent / kind)} for item in outcomes.values() for kind in ("old", "new")]
    answers = real(cases)["answers"]
    return {name: (answers[2 * at], answers[2 * at + 1]) for at, name in enumerate(outcomes)}


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items() if isinstance(data, dict) else ():
        found[f"{prefix}{key}"] = "{}" if isinstance(value, dict) else repr(value)
        found.update(_flat(value, f"{prefix}{key}."))
    return found


def _changed(item: Outcome) -> set[str]:
    changed = set()
    for name, old in item.before.items():
        read = json.loads if name.endswith(".json") else yaml.safe_load
        one, other = (_flat(read(text), ":" if name.endswith(".json") else "") for text in (old, item.after[name]))
        changed |= {key for key in {**one, **other} if one.get(key) != other.get(key)}
    return changed


def test_every_file_is_in_the_table() -> None:
    assert {path.stem.removeprefix("ds-") for path in CORPUS.glob("ds-*.yaml")} == set(TABLE)
    assert len(TABLE) >= 20


@pytest.mark.parametrize("name", TABLE)
def test_a_file(name: str, outcomes: dict[str, Outcome], loaded: dict[str, Any]) -> None:
    expected, item, (old, new) = TABLE[name], outcomes[name], loaded[name]
    assert item.again == item.after, "a second fix changes something"
    if expected.fails:
        assert expected.fails in old.get("error", ""), old
    else:
        assert "values" in old, old
    if expected.outcome == "refused":
        assert item.code == 1 and item.after == item.before
        assert expected.told in item.output, item.output
        return
    assert item.code == 0, item.output
    assert "values" in new, new
    assert {key: new["values"][key] for key in expected.values} == expected.values
    if expected.outcome == "right":
        assert item.after == item.before and new == old
    else:
        assert _changed(item) == expected.changed


def test_keys_that_no_edit_names_keep_their_values(outcomes: dict[str, Outcome], loaded: dict[str, Any]) -> None:
    """Where the file loaded before, the stack's values differ only where the table names a change."""
    reached = {"init", "fp16", "bf16", "stage", "accumulation", "batch", "accelerator_steps", "offload_param"}
    for name, expected in TABLE.items():
        old, new = loaded[name]
        if expected.outcome == "mended" and "values" in old:
            different = {key for key, value in old["values"].items() if new["values"][key] != value}
            assert different <= reached | {"processes"}, (name, different)


def test_the_other_bytes_stay(outcomes: dict[str, Outcome]) -> None:
    """JSON keeps its indentation, tabs or blanks, and its last line end."""
    old = outcomes["old-names"].after["ds-old-names.json"].decode()
    assert old.count("\n\t") == 10 and "  " not in old and old.endswith("}\n")
    line = outcomes["right-one-line"].after["ds-right-one-line.json"].decode()
    assert "\n" not in line
    comments = outcomes["inline-words"].after["accelerate.yaml"].decode()
    assert "zero3_save_16bit_model: yes # for the hub" in comments
