"""LA: each check fires on the fault and stays silent beside it."""

from __future__ import annotations

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, findings, gpus, job, machine, packages, values, verdict

from xflux_doctor.check import examine
from xflux_doctor.checks import ALL, launch, sections, words
from xflux_doctor.finding import Comment, Edit, Rename
from xflux_doctor.job import Problem
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import make


def changed(old: str, new: str) -> str:
    assert old in XFLUX_ACCELERATE
    return XFLUX_ACCELERATE.replace(old, new)


def test_unreadable_files_are_findings(matrix: Matrix) -> None:
    work = msgspec.structs.replace(
        job(), problems=(Problem("accelerate", "a is empty", "Write it."), Problem("train", "t is empty", "Write it."))
    )
    subject = case(matrix, machine(matrix), work)
    assert [f.seen for f in findings(subject, launch.accelerate_readable)] == ["a is empty."]
    assert [f.seen for f in findings(subject, launch.train_readable)] == ["t is empty."]
    assert findings(case(matrix, machine(matrix), job()), launch.accelerate_readable) == ()


@pytest.mark.parametrize(("count", "stack", "text"), [
    (1, "xflux-2024", "rank 1 dies with 'RuntimeError: CUDA error: invalid device ordinal'"),
    (2, "xflux-2024", "rank 2 dies with 'RuntimeError: CUDA error: invalid device ordinal'"),
    (1, "cuda13", "'Duplicate GPU detected : rank 0 and rank 1 both on CUDA device'"),
    (2, "cuda13", "'Duplicate GPU detected : rank 0 and rank 2 both on CUDA device'"),
])  # fmt: skip
def test_eight_processes_on_fewer_devices(matrix: Matrix, count: int, stack: str, text: str) -> None:
    facts = machine(matrix, count=count, packages=packages(matrix, stack))
    (finding,) = findings(case(matrix, facts, job(), stack), launch.ranks_have_devices)
    assert "num_processes is 8" in finding.seen and "NVIDIA H100 80GB HBM3" in finding.seen
    assert text in finding.because
    assert finding.edits[0] == Edit("accelerate", ("num_processes",), count, "one rank per visible device")
    steps = [(e.file, e.key[-1]) for e in finding.edits[1:]]
    assert steps == [(file, "gradient_accumulation_steps") for file in ("accelerate", "train")]
    assert values(finding)[1:] == [16 // count] * 2
    assert finding.offers == () and "a step still sees 16 samples" in finding.hint


def test_eight_processes_on_eight_devices(matrix: Matrix) -> None:
    assert findings(case(matrix, machine(matrix, count=8), job()), launch.ranks_have_devices) == ()


def test_visible_devices_count_not_all_devices(matrix: Matrix) -> None:
    facts = machine(matrix, count=8, environment={"CUDA_VISIBLE_DEVICES": "0,1,2"})
    (finding,) = findings(case(matrix, facts, job()), launch.ranks_have_devices)
    assert "3 devices are visible under CUDA_VISIBLE_DEVICES=0,1,2" in finding.seen
    assert finding.edits[0] == Edit("accelerate", ("num_processes",), 3, "one rank per visible device")


def test_gpu_ids_override_the_environment(matrix: Matrix) -> None:
    facts = machine(matrix, count=8, environment={"CUDA_VISIBLE_DEVICES": "0"})
    work = job(changed("num_processes: 8", "num_processes: 2\ngpu_ids: '2,3'"))
    assert findings(case(matrix, facts, work), launch.ranks_have_devices) == ()


def test_two_machines_share_the_ranks(matrix: Matrix) -> None:
    work = job(changed("num_machines: 1", "num_machines: 2"))
    assert findings(case(matrix, machine(matrix, count=4), work), launch.ranks_have_devices) == ()
    (finding,) = findings(case(matrix, machine(matrix, count=2), work), launch.ranks_have_devices)
    assert "(4 on this machine)" in finding.seen
    assert finding.edits[0] == Edit("accelerate", ("num_processes",), 4, "one rank per visible device")


def test_multi_gpu_on_one_device_becomes_no(matrix: Matrix) -> None:
    work = job(changed("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU"))
    (finding,) = findings(case(matrix, machine(matrix, count=1), work), launch.ranks_have_devices)
    assert Edit("accelerate", ("distributed_type",), "NO", "one process needs no process group") in finding.edits


@pytest.mark.parametrize("value", ["", "-1", "9", "0,0"])
def test_no_device_is_no_edit(matrix: Matrix, value: str) -> None:
    facts = machine(matrix, count=2, environment={"CUDA_VISIBLE_DEVICES": value})
    (finding,) = findings(case(matrix, facts, job()), launch.ranks_have_devices)
    assert finding.edits == () and repr(value) in finding.seen and "none of the 2 GPUs" in finding.seen


def test_mig_is_unknown_not_ok(matrix: Matrix) -> None:
    facts = machine(matrix, gpus=gpus("H100", 1, mig=True))
    assert verdict(case(matrix, facts, job()), launch.ranks_have_devices).status == "skipped"


def test_unknown_keys(matrix: Matrix) -> None:
    work = job(XFLUX_ACCELERATE + "parallelism_config: {}\nnum_process: 8\n".replace("num_process:", "num_procesess:"))
    work.accelerate.pop("num_processes")  # type: ignore[union-attr]
    old = case(matrix, machine(matrix, packages=packages(matrix, "xflux-2024")), work, "xflux-2024")
    assert [f.edits[0].key for f in findings(old, words.keys_known) if f.edits] == [("num_procesess",)]
    (newer,) = findings(old, sections.of_this_release)  # accelerate 0.30.1 has no parallelism_config
    assert [type(edit) for edit in newer.edits] == [Comment] and newer.edits[0].key == ("parallelism_config",)
    new = case(matrix, machine(matrix), work)  # accelerate 1.15 knows parallelism_config
    assert [f.edits[0].key for f in findings(new, words.keys_known)] == [("num_procesess",)]
    assert findings(case(matrix, machine(matrix), job()), words.keys_known) == ()


@pytest.mark.parametrize(("old", "new", "edit"), [
    ("distributed_type: DEEPSPEED", "distributed_type: DEEP_SPEED",
     Edit("accelerate", ("distributed_type",), "DEEPSPEED")),
    ("mixed_precision: bf16", "mixed_precision: bfloat16", Edit("accelerate", ("mixed_precision",), "bf16")),
    ("mixed_precision: bf16", "mixed_precision: no", Edit("accelerate", ("mixed_precision",), "no")),
    ("num_processes: 8", "num_processes: '8'", Edit("accelerate", ("num_processes",), 8)),
    ("num_processes: 8", "gpu_ids: 0\nnum_processes: 1", Edit("accelerate", ("gpu_ids",), "0")),
    ("num_processes: 8\n", "", Edit("accelerate", ("num_processes",), 1)),
    ("distributed_type: DEEPSPEED\n", "", Edit("accelerate", ("distributed_type",), "DEEPSPEED")),
    ("distributed_type: DEEPSPEED", "distributed_type: deepspeed",
     Edit("accelerate", ("distributed_type",), "DEEPSPEED")),
    ("distributed_type: DEEPSPEED", "distributed_type: GPU", Edit("accelerate", ("distributed_type",), "MULTI_GPU")),
    ("distributed_type: DEEPSPEED", "distributed_type: CPU", Edit("accelerate", ("distributed_type",), "NO")),
    ("num_processes: 8", "num_processes: 0", Edit("accelerate", ("num_processes",), 1)),
    ("num_processes: 8", "num_processes: true", Edit("accelerate", ("num_processes",), 1)),
])  # fmt: skip
def test_values(matrix: Matrix, old: str, new: str, edit: Edit) -> None:
    (finding,) = findings(case(matrix, machine(matrix), job(changed(old, new))), words.values_known)
    assert [(e.file, e.key, e.value) for e in finding.edits] == [(edit.file, edit.key, edit.value)]  # type: ignore[union-attr]


def test_values_noop(matrix: Matrix) -> None:
    assert findings(case(matrix, machine(matrix), job()), words.values_known) == ()
    loud = job(changed("mixed_precision: bf16", "mixed_precision: BF16"))  # accelerate lowers its case
    assert findings(case(matrix, machine(matrix), loud), words.values_known) == ()
    # 0.30.1 reads a bare no as the word no
    old = machine(matrix, packages=packages(matrix, "xflux-2024"))
    bare = job(changed("mixed_precision: bf16", "mixed_precision: no"))
    assert findings(case(matrix, old, bare, "xflux-2024"), words.values_known) == ()


@pytest.mark.parametrize(("value", "kept"), [("0,5", 1), ("0,0", None), ("0,1,-1", 2)])
def test_silent_truncation(matrix: Matrix, value: str, kept: int | None) -> None:
    facts = machine(matrix, count=2, environment={"CUDA_VISIBLE_DEVICES": value})
    found = findings(case(matrix, facts, job()), launch.chosen_devices_exist)
    if kept is None:
        assert found == ()  # nothing is left: LA105 says so as an error
    else:
        assert f"of which {kept} name a GPU" in found[0].seen and found[0].severity == "warning"


def test_devices_that_exist(matrix: Matrix) -> None:
    facts = machine(matrix, count=2, environment={"CUDA_VISIBLE_DEVICES": "1,0"})
    assert findings(case(matrix, facts, job()), launch.chosen_devices_exist) == ()


def test_cpu_ranks(matrix: Matrix) -> None:
    facts = machine(matrix, card=None, stack="cpu")
    (finding,) = findings(case(matrix, facts, job(cpu=True), "cpu"), launch.cpu_ranks)
    assert [(e.key, e.value) for e in finding.edits] == [(("use_cpu",), True)]  # type: ignore[union-attr]
    cpu_file = changed("use_cpu: false", "use_cpu: true")
    assert findings(case(matrix, facts, job(cpu_file), "cpu"), launch.cpu_ranks) == ()
    crowded = job(cpu_file.replace("num_processes: 8", "num_processes: 99"))
    (finding,) = findings(case(matrix, facts, crowded, "cpu"), launch.cpu_ranks)
    assert values(finding) == [16, 12, 12]
    assert "198 samples a step do not divide by 16: the nearest is 192" in finding.hint


@pytest.mark.parametrize(("before", "steps", "batch", "count", "after", "total"), [
    (8, 2, 1, 3, 5, 15), (8, 1, 4, 3, 3, 36), (16, 1, 1, 3, 5, 15), (3, 1, 1, 2, 2, 4), (8, 2, 1, 1, 16, 16),
])  # fmt: skip
def test_the_samples_of_a_step_stay_or_the_nearest_is_taken(
    matrix: Matrix, before: int, steps: int, batch: int, count: int, after: int, total: int
) -> None:
    text = changed("num_processes: 8", f"num_processes: {before}").replace("MULTI_GPU", "DEEPSPEED")
    text = text.replace("gradient_accumulation_steps: 2", f"gradient_accumulation_steps: {steps}")
    work = job(text, gradient_accumulation_steps=steps, train_batch_size=batch, learning_rate=2e-5)
    (finding,) = findings(case(matrix, machine(matrix, count=count), work), launch.ranks_have_devices)
    assert set(values(finding)[1:]) == {after}
    old = before * steps * batch
    if total == old:
        assert finding.offers == () and "still sees" in finding.hint
    else:
        (offer,) = finding.offers
        assert offer == Edit("train", ("learning_rate",), float(f"{2e-5 * total / old:.4g}"), offer.reason)
        assert f"{old} samples a step do not divide by {count}: the nearest is {total}" in finding.hint


def test_ddp_keeps_its_samples_by_the_training_file_alone(matrix: Matrix) -> None:
    text = changed("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU")
    (finding,) = findings(case(matrix, machine(matrix, count=2), job(text)), launch.ranks_have_devices)
    assert [e.file for e in finding.edits] == ["accelerate", "train"] and values(finding) == [2, 4]
    bare = msgspec.structs.replace(job(text), train=None, train_path=None)
    (finding,) = findings(case(matrix, machine(matrix, count=2), bare), launch.ranks_have_devices)
    assert [e.file for e in finding.edits] == ["accelerate"] and "set gradient_accumulation_steps to 4" in finding.hint


def test_one_id_under_multi_gpu(matrix: Matrix) -> None:
    text = changed("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU")
    text = text.replace("num_processes: 8", "num_processes: 1\ngpu_ids: '1'")
    (finding,) = findings(case(matrix, machine(matrix, count=2), job(text)), launch.gpu_ids_enough)
    assert "Less than two GPU ids were configured" in finding.because
    assert values(finding) == ["NO"]
    for right in ("gpu_ids: '0,1'", "gpu_ids: all", "num_machines: 2"):
        other = text.replace("gpu_ids: '1'", right)
        assert findings(case(matrix, machine(matrix, count=2), job(other)), launch.gpu_ids_enough) == ()


def test_idle_gpus(matrix: Matrix) -> None:
    work = job(changed("num_processes: 8", "num_processes: 1"))
    (finding,) = findings(case(matrix, machine(matrix, count=2), work), launch.idle_gpus)
    assert "1 of them will stand idle" in finding.because and finding.severity == "warning"
    assert findings(case(matrix, machine(matrix, count=1), work), launch.idle_gpus) == ()


def test_accumulation(matrix: Matrix) -> None:
    (finding,) = findings(case(matrix, machine(matrix), job()), launch.accumulation_agrees)
    assert finding.edits == (Edit("train", ("gradient_accumulation_steps",), 2, "accelerate's value wins"),)
    same = job(gradient_accumulation_steps=2)
    assert findings(case(matrix, machine(matrix), same), launch.accumulation_agrees) == ()


def test_trainer_installed(matrix: Matrix) -> None:
    bare = machine(matrix, packages=packages(matrix, "cuda13", xflux_doctor=""))
    (finding,) = findings(case(matrix, bare, job()), launch.trainer_installed)
    assert finding.commands == ("/venv/bin/python -m pip install xflux-doctor",)
    assert findings(case(matrix, machine(matrix), job()), launch.trainer_installed) == ()


@pytest.mark.parametrize(("old", "new", "key", "value"), [
    ("distributed_type:", "distributed_typ:", "distributed_type", "DEEPSPEED"),
    ("num_processes: 8", "num_proceses: 4", "num_processes", 4),
])  # fmt: skip
def test_a_misspelt_key_keeps_its_value(matrix: Matrix, old: str, new: str, key: str, value: object) -> None:
    subject = case(matrix, machine(matrix, count=8), job(changed(old, new), gradient_accumulation_steps=2))
    plan = make(subject, lambda mended: examine(mended, ALL))
    assert plan.job.get(key) == value and [type(edit) for edit in plan.edits] == [Rename]


@pytest.mark.parametrize("section", ["deepspeed_config: hello", "deepspeed_config: [1]"])
def test_a_section_that_is_none(matrix: Matrix, section: str) -> None:
    text = "distributed_type: DEEPSPEED\nmixed_precision: bf16\nnum_processes: 1\nuse_cpu: false\n" + section
    (finding,) = findings(case(matrix, machine(matrix), job(text)), words.values_known)
    assert "deepspeed_config" in finding.seen and not finding.edits


@pytest.mark.parametrize("environment", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}])
def test_no_device_is_found_without_an_accelerate_file(matrix: Matrix, environment: dict[str, str]) -> None:
    facts = machine(matrix, count=2, environment=environment)
    (finding,) = findings(case(matrix, facts, job(None)), launch.ranks_have_devices)
    assert finding.severity == "error" and not finding.edits
    assert findings(case(matrix, machine(matrix), job(None)), launch.ranks_have_devices) == ()


def test_machines_below_one_make_no_ranks_below_one(matrix: Matrix) -> None:
    work = job(changed("num_machines: 1", "num_machines: -1"))
    plan = make(case(matrix, machine(matrix, count=2), work), lambda mended: examine(mended, ALL))
    assert plan.job.num_processes >= 1


@pytest.mark.parametrize("value", [0, -3, 1 << 20])
def test_an_accumulation_that_nobody_can_do(matrix: Matrix, value: int) -> None:
    work = job(changed("gradient_accumulation_steps: 2", f"gradient_accumulation_steps: {value}"))
    (finding,) = findings(case(matrix, machine(matrix, count=8), work), launch.accumulation_agrees)
    assert finding.severity == "error" and [edit.file for edit in finding.edits] == ["accelerate"]


def test_a_section_left_over_from_deepspeed_does_not_count(matrix: Matrix) -> None:
    work = job(changed("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU"))
    assert verdict(case(matrix, machine(matrix, count=8), work), launch.accumulation_agrees).status == "skipped"


def test_multi_cpu_starts_one_rank(matrix: Matrix) -> None:
    text = "distributed_type: MULTI_CPU\nmixed_precision: bf16\nnum_machines: 1\nnum_processes: 2\nuse_cpu: true\n"
    (finding,) = findings(case(matrix, machine(matrix, card=None), job(text), "cpu"), launch.cpu_ranks)
    assert [edit.value for edit in finding.edits] == ["MULTI_GPU"]  # type: ignore[union-attr]


SAGEMAKER = "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: DATA_PARALLEL\nec2_instance_type: ml.p4d\n"


def test_a_service_s_file_is_left_alone(matrix: Matrix) -> None:
    subject = case(matrix, machine(matrix, count=2), job(SAGEMAKER))
    (finding,) = findings(subject, words.for_this_machine)
    assert "AMAZON_SAGEMAKER" in finding.seen and finding.edits == ()
    assert {verdict(subject, item).status for item in (words.keys_known, words.values_known)} == {"skipped"}
    for text in (XFLUX_ACCELERATE, "distributed_type: NO\n"):
        assert findings(case(matrix, machine(matrix), job(text)), words.for_this_machine) == ()


@pytest.mark.parametrize(
    ("word", "value"), [("local_machine", "LOCAL_MACHINE"), ("LOCAL", "LOCAL_MACHINE"), ("slurm", None)]
)
def test_a_compute_environment_that_accelerate_does_not_know(matrix: Matrix, word: str, value: str | None) -> None:
    """It is a slip of the pen and not a service's file: the rest of it is judged, and the word is mended."""
    subject = case(matrix, machine(matrix, count=8), job(changed("LOCAL_MACHINE", word)))
    (finding,) = findings(subject, words.values_known)
    assert f"compute_environment is {word!r}" in finding.seen and "takes the file for SageMaker's" in finding.because
    assert [getattr(edit, "value", None) for edit in finding.edits] == ([value] if value else [])
    assert findings(subject, words.for_this_machine) == ()
