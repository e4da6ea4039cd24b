"""HW106, HW118, HW120, HW121 and HW123: lost cards, MIG slices, who else is on a card."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from conftest import GIB, XFLUX_ACCELERATE, case, findings, gpus, job, machine, verdict

from xflux_doctor.check import Case, examine
from xflux_doctor.checks import ALL, cards, launch, memory
from xflux_doctor.facts import Driver, Facts, Gpu, GpuProcess, Host, LostGpu, MigSlice
from xflux_doctor.finding import Edit
from xflux_doctor.matrix import Matrix
from xflux_doctor.plan import make

DDP = XFLUX_ACCELERATE.replace("DEEPSPEED", "MULTI_GPU")
ONE = DDP.replace("num_processes: 8", "num_processes: 1").replace("MULTI_GPU", "'NO'")
BOX = Host("Linux", "x86_64", container="docker")
GONE = "it has fallen off the bus (GPU is lost)"


def one_lost(matrix: Matrix, which: int = 3, **changes: Any) -> Facts:
    left = tuple(gpu for gpu in gpus("H100", 8) if gpu.index != which)
    lost = LostGpu(which, GONE, f"0000:{which:02x}:00.0")
    return machine(matrix, **{"gpus": left, "lost_gpus": (lost,), **changes})


def test_a_lost_card_is_named_and_the_plan_is_on_the_seven(matrix: Matrix) -> None:
    subject = case(matrix, one_lost(matrix), job(DDP))
    (finding,) = findings(subject, cards.none_lost)
    assert finding.severity == "error"
    assert finding.seen == f"Of 8 GPUs 1 does not answer. GPU 3 at 0000:03:00.0: {GONE}."
    names = ",".join(gpu.uuid for gpu in subject.facts.gpus or ())
    assert finding.edits == (
        Edit("accelerate", ("gpu_ids",), names, "a card does not answer"),
        Edit("accelerate", ("num_processes",), 7, "one rank per card that is left"),
    )
    plan = make(subject, lambda mended: examine(mended, ALL))
    assert plan.job.num_processes == 7 and plan.job.gpu_ids == names
    assert "HW106" not in {found.code for found in plan.blockers}


def test_deepspeed_reads_only_numbers(matrix: Matrix) -> None:
    subject = case(matrix, one_lost(matrix), job())
    (finding,) = findings(subject, cards.none_lost)
    assert finding.edits == (Edit("accelerate", ("num_processes",), 7, "one rank per card that is left"),)
    plan = make(subject, lambda mended: examine(mended, ALL))
    assert not {"HW106", "LA105", "EN102"} & {found.code for found in plan.blockers}


@pytest.mark.parametrize(("choice", "severity"), [
    ("0,1,2", "warning"),
    ("2,1,0", "warning"),
    ("0,1,2,3", "error"),  # CUDA may count the lost card or leave it out
    ("4,5", "error"),
    ("GPU-00000000,GPU-00000004", "warning"),
])  # fmt: skip
def test_a_lost_card_beside_the_chosen_ones(matrix: Matrix, choice: str, severity: str) -> None:
    facts = one_lost(matrix, environment={"CUDA_VISIBLE_DEVICES": choice})
    (finding,) = findings(case(matrix, facts, job(DDP)), cards.none_lost)
    assert finding.severity == severity
    assert bool(finding.edits) == (severity == "error")


def test_a_card_of_somebody_else_is_not_lost(matrix: Matrix) -> None:
    """A batch system gives one card of eight; the driver may still count the others."""
    denied = tuple(LostGpu(index, "denied to this user or container") for index in range(1, 8))
    facts = machine(matrix, lost_gpus=denied)
    assert findings(case(matrix, facts, job()), cards.none_lost) == ()
    assert findings(case(matrix, machine(matrix, count=8), job()), cards.none_lost) == ()


def test_all_cards_lost(matrix: Matrix) -> None:
    facts = machine(matrix, gpus=(), lost_gpus=(LostGpu(0, GONE),))
    (finding,) = findings(case(matrix, facts, job()), cards.none_lost)
    assert finding.severity == "error" and finding.edits == () and "Or train" not in finding.hint


def sliced(gpu: Gpu, count: int = 3) -> Gpu:
    items = tuple(
        MigSlice(f"MIG-{gpu.index}{number}", f"{gpu.name} MIG {number + 1}g", (number + 1) * 10 * GIB, 10 * GIB)
        for number in range(count)
    )
    return msgspec.structs.replace(gpu, mig=True, slices=items)


def mig(matrix: Matrix, work: str | None, *, whole: int = 0, count: int = 3, value: str | None = None) -> Case:
    first, *others = gpus("A100", 1 + whole)
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    facts = machine(matrix, gpus=(sliced(first, count), *others), environment=environment)
    return case(matrix, facts, job(work))


def test_more_ranks_than_a_slice_takes(matrix: Matrix) -> None:
    (finding,) = findings(mig(matrix, DDP), cards.mig)
    assert (
        finding.severity == "error" and "GPU 0 (3 slices seen) is in MIG mode; the job starts 8 ranks" in finding.seen
    )
    assert [(edit.key[0], getattr(edit, "value", None)) for edit in finding.edits] == [
        ("num_processes", 1), ("distributed_type", "NO"),
    ]  # fmt: skip
    assert verdict(mig(matrix, DDP), launch.ranks_have_devices).status == "skipped"


def test_whole_cards_beside_a_slice(matrix: Matrix) -> None:
    subject = mig(matrix, DDP, whole=3)
    (finding,) = findings(subject, cards.mig)
    assert finding.severity == "error" and finding.hint.startswith("Train on the other cards (1, 2, 3)")
    plan = make(subject, lambda mended: examine(mended, ALL))
    assert (plan.job.gpu_ids, plan.job.num_processes) == ("1,2,3", 3)
    assert "HW118" not in {found.code for found in plan.blockers}
    (finding,) = findings(mig(matrix, ONE, whole=3), cards.mig)
    assert finding.severity == "warning" and "hides the whole cards" in finding.because
    assert findings(mig(matrix, DDP, whole=3, value="1,2,3"), cards.mig) == ()


def test_one_rank_and_the_slices(matrix: Matrix) -> None:
    (finding,) = findings(mig(matrix, ONE), cards.mig)
    assert finding.severity == "warning" and "CUDA takes the first slice" in finding.because
    assert finding.commands == ("export CUDA_VISIBLE_DEVICES=MIG-02",)
    assert findings(mig(matrix, ONE, count=1), cards.mig) == ()
    (finding,) = findings(mig(matrix, ONE, count=0), cards.mig)
    assert finding.severity == "warning" and "0 slices seen" in finding.seen


@pytest.mark.parametrize(("value", "work", "words"), [
    ("MIG-01", ONE, ""),
    ("MIG-01,MIG-02", ONE, "2 MIG slices are named"),
    ("MIG-01", DDP, "1 MIG slice is named; the job starts 8 ranks"),
    ("MIG-01,MIG-02", DDP, "2 MIG slices are named; the job starts 8 ranks"),
    ("MIG-77", ONE, "MIG-77 names none of the 3 MIG slices"),
    ("MIG-0", ONE, "MIG-0 names none of the 3 MIG slices"),
])  # fmt: skip
def test_named_slices(matrix: Matrix, value: str, work: str, words: str) -> None:
    found = findings(mig(matrix, work, value=value), cards.mig)
    assert [words in finding.seen for finding in found] == ([True] if words else [])
    assert verdict(mig(matrix, work, value=value), launch.chosen_devices_exist).status == "ok"


def test_slices_that_cannot_be_listed(matrix: Matrix) -> None:
    assert verdict(mig(matrix, ONE, count=0, value="MIG-77"), cards.mig).status == "skipped"
    no_mig = machine(matrix, environment={"CUDA_VISIBLE_DEVICES": "MIG-77"})
    (finding,) = findings(case(matrix, no_mig, job(ONE)), cards.mig)
    assert finding.severity == "error" and "No card is in MIG mode" in finding.hint
    assert findings(case(matrix, machine(matrix, count=8), job()), cards.mig) == ()


def test_memory_is_judged_by_the_slice(matrix: Matrix) -> None:
    (finding,) = findings(mig(matrix, ONE, value="MIG-00"), memory.gpu_memory)
    assert "has 10.0 GiB" in finding.seen


def rtx40(matrix: Matrix, driver: str = "535.129.03", count: int = 2, **environment: str) -> Case:
    named = tuple(msgspec.structs.replace(gpu, name="NVIDIA GeForce RTX 4090") for gpu in gpus("5090", count))
    facts = machine(matrix, gpus=named, environment=environment)
    return case(matrix, msgspec.structs.replace(facts, driver=Driver(driver)), job(DDP))


def test_rtx40(matrix: Matrix) -> None:
    (finding,) = findings(rtx40(matrix), cards.rtx40_p2p)
    assert finding.severity == "warning" and "2 × NVIDIA GeForce RTX 4090 under driver 535.129.03" in finding.seen
    (finding,) = findings(rtx40(matrix, NCCL_P2P_DISABLE="0", NCCL_IB_DISABLE="1"), cards.rtx40_p2p)
    assert finding.severity == "error" and "NCCL_P2P_DISABLE=0" in finding.because
    assert findings(rtx40(matrix, NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1"), cards.rtx40_p2p) == ()
    for fine in (rtx40(matrix, "550.40.07"), rtx40(matrix, "580.159.04"), rtx40(matrix, count=1)):
        assert findings(fine, cards.rtx40_p2p) == ()
    assert findings(case(matrix, machine(matrix, count=8), job()), cards.rtx40_p2p) == ()
    assert verdict(rtx40(matrix, "550.x"), cards.rtx40_p2p).status == "skipped"


def held(matrix: Matrix, used: float, *processes: GpuProcess, host: Host = BOX) -> Case:
    total = gpus("H200", 1)[0].memory_total
    card = gpus("H200", 1, memory_free=total - int(used * GIB), processes=processes)
    return case(matrix, machine(matrix, gpus=card, host=host), job(ONE, img_size=512))


def test_a_left_over_process_is_named_and_never_ended(matrix: Matrix) -> None:
    mine = GpuProcess(4711, 20 * GIB, "python", "ada", 3.4 * 3600)
    (finding,) = findings(held(matrix, 20.5, mine), cards.shared)
    assert finding.severity == "warning"
    assert "GPU 0: 20.5 of 140.0 GiB are in use: process 4711 python of ada holds 20.0 GiB, 3.4 h old." in finding.seen
    assert finding.commands == ("ps -fp 4711", "kill 4711") and "the doctor never does" in finding.hint
    desktop = msgspec.structs.replace(mine, name="blender")
    (finding,) = findings(held(matrix, 20.5, desktop), cards.shared)
    assert finding.commands == ("ps -fp 4711",)


def test_memory_that_no_process_here_holds(matrix: Matrix) -> None:
    (finding,) = findings(held(matrix, 21.0), cards.shared)
    assert "21.0 GiB are held outside this container" in finding.seen and " 0 processes" not in finding.seen
    assert finding.commands == ()
    (finding,) = findings(held(matrix, 21.0, host=Host("Linux", "x86_64")), cards.shared)
    assert "by what the driver does not name" in finding.seen
    (finding,) = findings(held(matrix, 21.0, GpuProcess(99, 20 * GIB)), cards.shared)
    assert "process 99, outside this container, holds 20.0 GiB" in finding.seen and finding.commands == ()


def test_what_is_nobodys(matrix: Matrix) -> None:
    """The driver's own share, a small helper, and Windows' screen under WSL2."""
    assert findings(held(matrix, 0.6), cards.shared) == ()
    assert findings(held(matrix, 0.9, GpuProcess(7, GIB // 4, "nvtop", "ada", 5.0)), cards.shared) == ()
    assert findings(held(matrix, 2.0, host=Host("Linux", "x86_64", wsl=True)), cards.shared) == ()


def test_short_memory_is_told_once(matrix: Matrix) -> None:
    subject = held(matrix, 130.0, GpuProcess(4711, 129 * GIB, "python", "ada", 60.0))
    assert findings(subject, memory.gpu_memory)
    assert findings(subject, cards.shared) == ()


def test_a_card_that_the_job_does_not_use_may_be_shared(matrix: Matrix) -> None:
    first, second = gpus("H200", 2)
    busy = msgspec.structs.replace(second, memory_free=100 * GIB)
    assert findings(case(matrix, machine(matrix, gpus=(first, busy)), job(ONE)), cards.shared) == ()


def test_wsl(matrix: Matrix) -> None:
    host = Host("Linux", "x86_64", wsl=True)
    (finding,) = findings(case(matrix, machine(matrix, count=2, host=host), job(DDP)), cards.wsl)
    assert finding.severity == "warning" and "WSL2 and the job starts 8 ranks on 2 GPUs" in finding.seen
    assert findings(case(matrix, machine(matrix, host=host), job(DDP)), cards.wsl) == ()
    assert verdict(case(matrix, machine(matrix, count=2), job(DDP)), cards.wsl).status == "skipped"
