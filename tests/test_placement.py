"""The launch plan in words: rank → machine → device, what stands idle, why memory is uneven, and the strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import GIB, TRAIN, XFLUX_ACCELERATE, case, findings, gpus, job, machine, packages, record, verdict

from xflux_doctor import strategy
from xflux_doctor.check import examine
from xflux_doctor.checks import ALL, sharing, words
from xflux_doctor.cli import main
from xflux_doctor.commands.fix import new_accelerate
from xflux_doctor.facts import GpuProcess, Package
from xflux_doctor.job import Override
from xflux_doctor.matrix import Matrix
from xflux_doctor.placement import place
from xflux_doctor.report import placement

DDP = XFLUX_ACCELERATE.replace("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU")


def lines(matrix: Matrix, text: str, *, count: int = 2, **changes: object) -> list[str]:
    return list(placement.lines(case(matrix, machine(matrix, count=count, **changes), job(text))))  # type: ignore[arg-type]


def test_every_rank_has_its_line(matrix: Matrix) -> None:
    shown = lines(matrix, DDP.replace("num_processes: 8", "num_processes: 2"), count=3)
    assert shown == [
        "launch: 2 ranks, DDP, started by torchrun, meeting at 127.0.0.1:29500",
        "  rank 0   → GPU 0 NVIDIA H100 80GB HBM3, 78.6 of 79.0 GiB free",
        "  rank 1   → GPU 1 NVIDIA H100 80GB HBM3, 78.6 of 79.0 GiB free",
        "  without a rank: GPU 2 NVIDIA H100 80GB HBM3",
    ]


def test_the_second_of_two_machines(matrix: Matrix) -> None:
    text = DDP.replace("num_machines: 1", "num_machines: 2\nmain_process_ip: 10.0.0.1").replace(
        "machine_rank: 0", "machine_rank: 1")  # fmt: skip
    shown = lines(matrix, text, count=4)
    assert shown[0] == "launch: 8 ranks on 2 machines, DDP, started by torchrun, meeting at 10.0.0.1:29500"
    assert shown[1].startswith("  rank 4   machine 1 → GPU 0") and shown[4].startswith("  rank 7   machine 1 → GPU 3")
    assert shown[5] == "  4 more on 1 other machine"


def test_ranks_without_a_device_and_on_the_cpu(matrix: Matrix) -> None:
    assert lines(matrix, XFLUX_ACCELERATE)[3] == "  rank 2   → no device"
    assert lines(matrix, XFLUX_ACCELERATE.replace("use_cpu: false", "use_cpu: true"))[1] == "  rank 0   → CPU"
    unknown = case(matrix, machine(matrix, card=None), job(DDP))
    assert list(placement.lines(unknown))[1] == "  rank 0   → a GPU (unknown here)"


def test_many_ranks_are_not_all_listed(matrix: Matrix) -> None:
    shown = lines(matrix, DDP.replace("num_processes: 8", "num_processes: 64"))
    assert len(shown) == 18 and shown[-1] == "  and 48 more"


def test_a_slip_of_the_finger(matrix: Matrix) -> None:
    """The number is wrong, and found so; it must not fill the memory first."""
    found = placement.values(case(matrix, machine(matrix, count=2), job(DDP.replace("es: 8", "es: 800000000"))))
    assert found["world_size"] == 800_000_000 and len(found["ranks"]) == 4096


def test_what_wins_over_the_file_is_said(matrix: Matrix) -> None:
    work = msgspec.structs.replace(job(DDP), overrides={"num_processes": Override(2, "SLURM_NTASKS")})
    assert list(placement.lines(case(matrix, machine(matrix, count=2), work)))[-1] == (
        "  num_processes is 2 by SLURM_NTASKS")  # fmt: skip


def test_uneven_memory_is_explained(matrix: Matrix) -> None:
    first, second = gpus("H100", 2)
    busy = msgspec.structs.replace(
        first, memory_free=50 * GIB, processes=(GpuProcess(4711, 28 * GIB, "python", "me", 10.0),)
    )
    facts = machine(matrix, gpus=(busy, second))
    subject = case(matrix, facts, job(DDP.replace("num_processes: 8", "num_processes: 2")))
    (note,) = placement.uneven(place(subject.job, subject.facts))
    assert note == "GPU 0 shows 28.6 GiB more than the others, held by python 4711"
    small = msgspec.structs.replace(gpus("A100", 1)[0], index=0, memory_total=40 * GIB, memory_free=40 * GIB)
    mixed = machine(matrix, gpus=(second, small))
    notes = list(placement.uneven(place(subject.job, mixed)))
    assert notes == ["the cards differ: the smallest, GPU 0 NVIDIA A100-SXM4-80GB, decides what every rank may use"]
    even = machine(matrix, count=2)
    assert list(placement.uneven(place(subject.job, even))) == []


@pytest.mark.parametrize("version", ["main", "", "1.15.0-custom build"])
def test_a_version_that_is_none(matrix: Matrix, version: str) -> None:
    """Somebody's own build: the launch is told all the same, and no check falls over it."""
    facts = machine(matrix, count=2)
    odd = {**(facts.packages or {}), "accelerate": Package("accelerate", version), "deepspeed": Package("x", version)}
    subject = case(matrix, msgspec.structs.replace(facts, packages=odd), job(XFLUX_ACCELERATE))
    assert placement.values(subject)["world_size"] == 8
    assert [(v.check, v.reason) for v in examine(subject, ALL) if v.status == "crashed"] == []


def test_values_are_the_same_for_programs(matrix: Matrix) -> None:
    found = placement.values(case(matrix, machine(matrix, count=2), job(XFLUX_ACCELERATE)))
    assert (found["world_size"], found["strategy"], found["launcher"]) == (8, "zero2", "torchrun")
    assert [rank["gpu"] for rank in found["ranks"]] == [0, 1, None, None, None, None, None, None]
    assert found["failure"] == "Process 2 of 8 finds only 2 GPU(s) here."


@pytest.mark.parametrize(("ranks", "wanted"), [(1, "single"), (2, "ddp"), (8, "ddp")])
def test_a_lora_is_trained_by_ddp(matrix: Matrix, ranks: int, wanted: str) -> None:
    chosen = strategy.best(case(matrix, machine(matrix, count=8), job()), ranks)
    assert chosen.strategy == wanted and chosen.because


def test_zero_where_only_that_fits(matrix: Matrix) -> None:
    """A LoRA so large that its optimizer's states are what does not fit."""
    work = job(rank=512, lora_targets="all-linear", img_size=512)
    subject = case(matrix, machine(matrix, count=8), work)
    ddp, zero = (strategy.bill(subject, name, 8) for name in ("ddp", "zero2"))
    assert ddp is not None and zero is not None
    between = (strategy.stepping(ddp) + strategy.stepping(zero)) // 2 + ddp.gpu_context
    small = machine(matrix, gpus=gpus("H100", 8, memory_total=between, memory_free=between))
    assert strategy.best(case(matrix, small, work), 8).strategy == "zero2"
    assert strategy.best(subject, 8).strategy == "ddp"
    named = case(matrix, machine(matrix, gpus=None), work)  # a plan's cards, which are not here
    assert strategy.best(named, 8, between).strategy == "zero2" and strategy.best(named, 8).strategy == "ddp"


def test_a_whole_fine_tune_is_cut_up_where_only_that_fits(matrix: Matrix) -> None:
    """By the bill: DDP and ZeRO-2 keep what four H100 have not each; FSDP2 where the packages have it, else ZeRO-3."""
    work = job(mode="finetune", weight_update="master")
    new = case(matrix, machine(matrix, count=8), work)
    assert strategy.best(new, 8).strategy == "zero2"  # an eighth of the optimizer is little enough
    chosen = strategy.best(new, 4)
    assert chosen.strategy == "fsdp" and "DDP needs" in chosen.because and "ZeRO-2 needs" in chosen.because
    old = case(matrix, machine(matrix, count=8, packages=packages(matrix, "xflux-2024")), work, "xflux-2024")
    assert strategy.best(old, 4).strategy == "zero3"
    for subject, name in ((new, "fsdp"), (old, "zero3")):
        found = strategy.bill(subject, name, 4)
        assert found is not None and strategy.stepping(found) < 79 * GIB - found.gpu_context
    assert "nothing fits" in strategy.best(new, 2).because


def test_what_the_trainer_refuses_is_not_suggested(matrix: Matrix) -> None:
    """Adafactor needs whole weights; with them it fits, and DDP does it. A quantised base is cut up by nobody."""
    adafactor = job(mode="finetune", optimizer="adafactor")
    assert strategy.best(case(matrix, machine(matrix, count=8), adafactor), 8).strategy == "ddp"
    small = machine(matrix, card="A10", count=2)
    assert strategy.best(case(matrix, small, job(img_size=1024)), 2).strategy == "fsdp"
    assert strategy.best(case(matrix, small, job(img_size=1024, quantization="int8")), 2).strategy == "ddp"


@pytest.mark.parametrize(("train", "stack", "expected"), [
    ({"mode": "finetune", "weight_update": "master"}, "cuda13", "fsdp"),
    ({"mode": "finetune", "weight_update": "master"}, "xflux-2024", "zero3"),
    ({}, "cuda13", "ddp"),
])  # fmt: skip
def test_the_file_that_is_written_launches_what_was_chosen(
    matrix: Matrix, train: dict[str, Any], stack: str, expected: str
) -> None:
    facts = machine(matrix, count=4, packages=packages(matrix, stack))
    text = new_accelerate(case(matrix, facts, job(None, **train), stack))
    written = job(text, **train)
    assert written.strategy == expected and written.num_processes == 4
    assert findings(case(matrix, facts, written, stack), sharing.strategy_done) == ()
    assert verdict(case(matrix, facts, written, stack), words.keys_known).status == "ok"


def test_plan_says_that_sharding_saves_next_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], matrix: Matrix
) -> None:
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "facts.json", machine(matrix, count=2))
    (tmp_path / "accelerate.yaml").write_text(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2"))
    (tmp_path / "train.yaml").write_text(TRAIN + "mode: lora\n")
    assert main(["plan", "--facts", "facts.json"]) == 0
    shown = capsys.readouterr().out
    assert "how 2 ranks share the work" in shown and "DDP: the fastest" in shown
    assert "DeepSpeed ZeRO-2, as your file says" in shown
    assert "every rank holds the frozen transformer whole" in shown
