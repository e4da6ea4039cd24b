"""XF: each check fires on the fault and stays silent on a job that X-Flux's own scripts run well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import xflux_kit as kit
from conftest import GIB, XFLUX_ACCELERATE, case, findings, gpus, job, machine, packages, verdict

from xflux_doctor.check import Case, Check
from xflux_doctor.checks import ALL, xflux, xflux_data, xflux_resume, xflux_run
from xflux_doctor.facts import Facts, Package
from xflux_doctor.finding import Finding
from xflux_doctor.job import Job
from xflux_doctor.matrix import Matrix
from xflux_doctor.xflux import SCRIPTS

OURS = [check for check in ALL if check.code.startswith("XF")]
ONE = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 1")
DDP = ONE.replace("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU")
BESIDE = ("opencv-python timm onnxruntime matplotlib einops omegaconf pandas datasets wandb").split()


def rented(matrix: Matrix, count: int = 1, without: tuple[str, ...] = (), **changes: Any) -> Facts:
    """H100s with room, and everything that X-Flux's scripts import."""
    found = packages(matrix, "xflux-2024")
    found |= {name: Package(name, "1.0", location="/venv/site-packages") for name in BESIDE}
    found = {name: package for name, package in found.items() if name not in without}
    return machine(matrix, count=count, packages=found, **changes)


def roomy(work: Job, free: int = 10**13) -> Job:
    """The job on a disk of that size, whatever the tests' own disk has."""
    assert work.xflux
    return msgspec.structs.replace(work, xflux=msgspec.structs.replace(work.xflux, free=free))


def on(matrix: Matrix, work: Job, facts: Facts | None = None) -> Case:
    return case(matrix, facts or rented(matrix), work, "xflux-2024")


def one(subject: Case, check: Check) -> Finding:
    (finding,) = findings(subject, check)
    assert finding.because and finding.hint
    return finding


@pytest.mark.parametrize("script", ["lora", "finetune", "controlnet"])
@pytest.mark.parametrize("check", OURS, ids=lambda check: check.code)
def test_a_job_that_runs_well(matrix: Matrix, tmp_path: Path, check: Check, script: str) -> None:
    result = verdict(on(matrix, roomy(kit.job(tmp_path, script=script))), check)
    assert result.status in ("ok", "skipped"), result


def test_without_a_checkout_nothing_is_judged(matrix: Matrix, tmp_path: Path) -> None:
    assert {verdict(case(matrix, machine(matrix), job()), check).status for check in OURS} == {"skipped"}


Change = dict[str, Any]
CONFIGS: list[tuple[Check, Change, str, str]] = [
    (xflux.keys_given, {"lr_scheduler": ...}, "The config has no lr_scheduler", "ConfigAttributeError"),
    (xflux.keys_given, {"data": {"size": 512}}, "data_config has size", "unexpected keyword argument 'size'"),
    (xflux.keys_read, {"gradient_checkpointing": True}, "never reads gradient_checkpointing", "cannot be turned on"),
    (xflux.keys_read, {"img_size": 512}, "never reads img_size", "nothing at the top level"),
    (xflux.accumulation, {"gradient_accumulation_steps": 4}, "is 2 in accelerate's file and 4", "0.5 times"),
    (xflux.batch_sizes, {"train_batch_size": 3}, "train_batch_size is 3 at the top level and 1", "computed with 3"),
    (xflux.model_trains, {"model_name": "flux-dev-fp8"}, "flux-dev-fp8", "Cannot copy out of meta tensor"),
    (xflux.model_trains, {"model_name": "flux-dve"}, "flux-dve", "KeyError"),
    (xflux.samples_tracked, {"report_to": "tensorboard"}, "report_to is 'tensorboard'", "wandb.init"),
    (xflux_run.warm_up, {"lr_warmup_steps": 500}, "lr_warmup_steps 500", "no warm-up"),
    (xflux_data.captions_found, {"data": {"img_dir": "./images"}}, "img_dir is './images'", "RecursionError"),
    (xflux_data.images_used, {"data": {"img_dir": "gone"}}, "There is no folder", "FileNotFoundError"),
    (xflux_data.one_size, {"data": {"train_batch_size": 2, "random_ratio": True}}, "train_batch_size is 2", "stack"),
]


@pytest.mark.parametrize(("check", "change", "seen", "because"), CONFIGS, ids=lambda v: getattr(v, "code", ""))
def test_configs(matrix: Matrix, tmp_path: Path, check: Check, change: Change, seen: str, because: str) -> None:
    given = {key: value for key, value in change.items() if value is not ...}
    gone = tuple(key for key, value in change.items() if value is ...)
    finding = one(on(matrix, kit.job(tmp_path, without=gone, **given)), check)
    assert seen in finding.seen and because in finding.because


def test_a_checkout_with_holes(matrix: Matrix, tmp_path: Path) -> None:
    root = kit.checkout(tmp_path)
    (root / "src/flux/sampling.py").unlink()
    finding = one(on(matrix, kit.job(root)), xflux.checkout_whole)
    assert "src/flux/sampling.py" in finding.seen and "ModuleNotFoundError" in finding.because


def test_imports(matrix: Matrix, tmp_path: Path) -> None:
    facts = rented(matrix, without=("timm", "opencv-python"))
    finding = one(on(matrix, kit.job(tmp_path), facts), xflux.imports)
    assert "imports cv2, timm" in finding.seen and "No module named 'cv2'" in finding.because
    other = {**(facts.packages or {}), "opencv-python-headless": Package("opencv-python-headless", "4.10")}
    headless = msgspec.structs.replace(facts, packages=other)
    assert "cv2" not in one(on(matrix, kit.job(tmp_path), headless), xflux.imports).seen


def test_wandb_is_not_there(matrix: Matrix, tmp_path: Path) -> None:
    finding = one(on(matrix, kit.job(tmp_path), rented(matrix, without=("wandb",))), xflux.samples_tracked)
    assert "NameError: name 'wandb' is not defined" in finding.because


@pytest.mark.parametrize(("variables", "words"), [
    ({"FLUX_DEV": "gone.safetensors"}, "FLUX_DEV names gone.safetensors"),
    ({"AE": ""}, "AE is set and empty"),
])  # fmt: skip
def test_model_variables(matrix: Matrix, tmp_path: Path, variables: dict[str, str], words: str) -> None:
    assert words in one(on(matrix, kit.job(tmp_path, environment=variables)), xflux.weights_exist).seen
    schnell = kit.job(tmp_path, environment={"FLUX_SCHNELL": "gone"})  # the job does not load that one
    assert findings(on(matrix, schnell), xflux.weights_exist) == ()


def test_strategies(matrix: Matrix, tmp_path: Path) -> None:
    three = kit.job(tmp_path, accelerate=ONE.replace("zero_stage: 2", "zero_stage: 3"))
    finding = one(on(matrix, three), xflux_run.strategy)
    assert "ZeRO stage 3" in finding.seen and [edit.key[-1] for edit in finding.edits] == ["zero_stage"]


@pytest.mark.parametrize(("batch", "words"), [(2, "must match the size of tensor b (64)"), (64, "Nothing fails")])
def test_the_fine_tune_script_takes_one_image(matrix: Matrix, tmp_path: Path, batch: int, words: str) -> None:
    work = kit.job(tmp_path, script="finetune", data={"train_batch_size": batch})
    assert words in one(on(matrix, work), xflux_run.one_image).because
    lora = kit.job(tmp_path, data={"train_batch_size": batch})
    assert verdict(on(matrix, lora), xflux_run.one_image).status == "skipped"


def test_images(matrix: Matrix, tmp_path: Path) -> None:
    kit.png(tmp_path / "images/1.png")
    kit.png(tmp_path / "images/2.png", caption=None)
    kit.png(tmp_path / "images/3.PNG")
    kit.png(tmp_path / "images/more/4.png")
    found = findings(on(matrix, kit.job(tmp_path)), xflux_data.images_used)
    assert [finding.severity for finding in found] == ["warning"] * 3
    words = " ".join(finding.seen for finding in found)
    assert "1 of 2 items" in words and "3.PNG" in words and "folders with images: more" in words
    (tmp_path / "images/1.json").unlink()
    assert findings(on(matrix, kit.job(tmp_path)), xflux_data.images_used)[0].severity == "error"


def test_mixed_sizes(matrix: Matrix, tmp_path: Path) -> None:
    kit.png(tmp_path / "images/1.png", 640, 480)
    kit.png(tmp_path / "images/2.png", 480, 640)
    finding = one(on(matrix, kit.job(tmp_path, data={"train_batch_size": 2})), xflux_data.one_size)
    assert "2 sizes" in finding.seen
    assert verdict(on(matrix, kit.job(tmp_path)), xflux_data.one_size).status == "skipped"


def test_an_fp32_base(matrix: Matrix, tmp_path: Path) -> None:
    """Without DeepSpeed nothing casts the frozen model back: 98.8 GiB at 1024 px."""
    work = kit.job(tmp_path, accelerate=DDP, data={"img_size": 1024})
    finding = one(on(matrix, work), xflux_run.base_in_bf16)
    assert finding.severity == "error" and "the transformer stays fp32" in finding.seen
    assert {"DEEPSPEED", 2} <= {getattr(edit, "value", None) for edit in finding.edits}
    large = rented(matrix, gpus=gpus("B200", 1))
    assert one(on(matrix, work, large), xflux_run.base_in_bf16).severity == "warning"


def test_gpu_memory(matrix: Matrix, tmp_path: Path) -> None:
    small = rented(matrix, gpus=gpus("L40S", 1))
    finding = one(on(matrix, kit.job(tmp_path, data={"img_size": 1024}), small), xflux_run.gpu_memory)
    assert "at 1024 px" in finding.seen and "with any number of ranks" in finding.because
    held = rented(matrix, gpus=gpus("H100", 1, memory_free=10 * GIB))
    assert "held outside this container" in one(on(matrix, kit.job(tmp_path), held), xflux_run.gpu_memory).because


def test_host_memory(matrix: Matrix, tmp_path: Path) -> None:
    facts = rented(matrix, count=8)
    assert facts.host
    small = msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, memory_limit=100 * GIB))
    work = kit.job(tmp_path, accelerate=XFLUX_ACCELERATE)
    finding = one(on(matrix, work, small), xflux_run.host_memory)
    assert finding.severity == "error" and "the container's limit is 100 GiB" in finding.seen
    assert "exitcode: -9" in finding.because


def test_disk(matrix: Matrix, tmp_path: Path) -> None:
    finding = one(on(matrix, roomy(kit.job(tmp_path), 30 * 10**9)), xflux_run.disk)
    assert "2 checkpoints of 2" in finding.seen and "No space left on device" in finding.because
    assert [getattr(edit, "value", None) for edit in finding.edits] == [1]


@pytest.mark.parametrize(("ranks", "asked", "words"), [
    (2, "latest", "it was saved by 2 ranks, and the job starts 1"),
    (1, "out/checkpoint-500/", "the script looks for '' in"),
    (1, "checkpoint-700", "the script looks for 'checkpoint-700'"),
])  # fmt: skip
def test_resume(matrix: Matrix, tmp_path: Path, ranks: int, asked: str, words: str) -> None:
    root = kit.checkout(tmp_path)
    kit.zero_checkpoint(root / "out", 500, ranks=ranks)
    finding = one(on(matrix, kit.job(root, resume_from_checkpoint=asked)), xflux_resume.resumes)
    assert words in finding.seen and finding.severity == "error"


def test_what_can_be_resumed_is_left_alone(matrix: Matrix, tmp_path: Path) -> None:
    root = kit.checkout(tmp_path)
    kit.zero_checkpoint(root / "out", 500)
    assert findings(on(matrix, kit.job(root, resume_from_checkpoint="latest")), xflux_resume.resumes) == ()


def test_a_fine_tune_s_optimizer_is_one_part_of_it(matrix: Matrix, tmp_path: Path) -> None:
    root = kit.checkout(tmp_path)
    for name in ("dit.bin", "optimizer.bin"):
        kit.sparse(root / "out/checkpoint-500" / name, 1000)
    work = kit.job(root, script="finetune", resume_from_checkpoint="latest")
    finding = one(on(matrix, work), xflux_resume.resumes)
    assert "rank 0's part of a ZeRO optimizer" in finding.seen and SCRIPTS["finetune"] in finding.docs
    (root / "out/checkpoint-500/optimizer.bin").unlink()
    again = kit.job(root, script="finetune", resume_from_checkpoint="latest")
    assert "it has no optimizer.bin" in one(on(matrix, again), xflux_resume.resumes).seen
