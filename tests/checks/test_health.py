"""HW110 to HW117, HW119 and HW122: the cards' condition; each fires on the fault and stays silent beside it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, findings, gpus, job, machine, verdict

from xflux_doctor.check import Case, Check
from xflux_doctor.checks import health, xids
from xflux_doctor.facts import Facts, GpuHealth, LostGpu, Xid
from xflux_doctor.finding import Edit
from xflux_doctor.matrix import Matrix

FINE = GpuHealth(True, True, 0, False, False, False, "none", ("idle",), True, "completed", 16, 16, 40)
EIGHT = job(XFLUX_ACCELERATE)
HOUR = 3600.0


def eight(matrix: Matrix, *, card: str = "H100", which: int = 5, count: int = 8, **changes: Any) -> Facts:
    """Eight healthy cards, one of them with another health."""
    cards = list(gpus(card, count, health=FINE))
    cards[which] = msgspec.structs.replace(cards[which], health=msgspec.structs.replace(FINE, **changes))
    return machine(matrix, gpus=tuple(cards))


ALL = (
    health.ecc_errors, health.row_remapping, health.page_retirement, health.ecc_mode, health.recovery_action,
    health.clocks, health.fabric, health.pcie_width, health.persistence,
)  # fmt: skip


@pytest.mark.parametrize("check", ALL, ids=lambda check: check.code)
def test_healthy_cards_and_cards_that_tell_nothing(matrix: Matrix, check: Check) -> None:
    assert findings(case(matrix, eight(matrix), EIGHT), check) == ()
    silent = machine(matrix, count=8)
    assert verdict(case(matrix, silent, EIGHT), check).status == "skipped"
    assert verdict(case(matrix, eight(matrix), job(cpu=True)), check).status == "skipped"


@pytest.mark.parametrize(("check", "changes", "severity", "words"), [
    (health.ecc_errors, {"ecc_uncorrected": 3, "recovery_action": ""}, "error", "3 uncorrected memory errors"),
    (health.ecc_errors, {"ecc_uncorrected": 1}, "warning", "1 uncorrected memory error since"),
    (health.row_remapping, {"remap_failed": True}, "error", "remapping of a memory row has failed"),
    (health.row_remapping, {"remap_pending": True}, "warning", "is to be remapped at the next reset"),
    (health.page_retirement, {"retirement_pending": True}, "warning", "faulty memory pages wait"),
    (health.ecc_mode, {"ecc_pending": False}, "warning", "ECC is on and will be off"),
    (health.recovery_action, {"recovery_action": "gpu_reset"}, "error", "asks for a reset of the GPU (gpu_reset)"),
    (health.recovery_action, {"recovery_action": "drain_p2p"}, "error", "GPU-to-GPU traffic"),
    (health.recovery_action, {"recovery_action": "action 12"}, "error", "asks for action 12"),
    (health.clocks, {"throttle": ("hw_slowdown", "hw_thermal"), "temperature": 92}, "warning", "It has 92 °C"),
    (health.clocks, {"throttle": ("hw_power_brake",)}, "warning", "the power supply asks for less"),
    (health.fabric, {"fabric": "not_started"}, "error", "GPU 5: not started"),
    (health.fabric, {"fabric": "failed"}, "error", "GPU 5: failed"),
    (health.pcie_width, {"pcie_width": 8}, "warning", "has 8 of 16 PCIe lanes"),
])  # fmt: skip
def test_one_card_of_eight(matrix: Matrix, check: Check, changes: Any, severity: str, words: str) -> None:
    (finding,) = findings(case(matrix, eight(matrix, **changes), EIGHT), check)
    assert finding.severity == severity
    assert words in finding.seen and "GPU 5" in finding.seen


def test_a_bad_card_gets_the_plan_on_the_others(matrix: Matrix) -> None:
    facts = eight(matrix, recovery_action="gpu_reset")
    (finding,) = findings(case(matrix, facts, EIGHT), health.recovery_action)
    assert finding.edits == (
        Edit("accelerate", ("gpu_ids",), "0,1,2,3,4,6,7", "GPU 5 is not well"),
        Edit("accelerate", ("num_processes",), 7, "one rank per card that is left"),
    )
    assert finding.hint.endswith("Or train on the other cards (0, 1, 2, 3, 4, 6, 7).")
    two = job(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2").replace("DEEPSPEED", "MULTI_GPU"))
    first = eight(matrix, which=0, count=2, recovery_action="gpu_reset")
    (finding,) = findings(case(matrix, first, two), health.recovery_action)
    assert [(edit.key[0], getattr(edit, "value", None)) for edit in finding.edits] == [
        ("gpu_ids", "1"), ("num_processes", 1), ("distributed_type", "NO"),
    ]  # fmt: skip


def test_the_plan_needs_another_card_and_one_machine(matrix: Matrix) -> None:
    alone = eight(matrix, which=0, count=1, recovery_action="gpu_reset")
    (finding,) = findings(case(matrix, alone, job(None)), health.recovery_action)
    assert finding.edits == () and finding.commands == () and "Or train" not in finding.hint
    no_file = eight(matrix, which=0, count=2, recovery_action="gpu_reset")
    (finding,) = findings(case(matrix, no_file, job(None)), health.recovery_action)
    assert finding.edits == () and finding.commands == ("export CUDA_VISIBLE_DEVICES=1",)
    nodes = job(XFLUX_ACCELERATE.replace("num_machines: 1", "num_machines: 2"))
    (finding,) = findings(case(matrix, eight(matrix, which=0, recovery_action="gpu_reset"), nodes),
                          health.recovery_action)  # fmt: skip
    assert finding.edits == () and finding.commands == ("export CUDA_VISIBLE_DEVICES=1,2,3,4",)


def test_a_bad_card_that_the_job_does_not_use(matrix: Matrix) -> None:
    facts = eight(matrix, recovery_action="gpu_reset", ecc_uncorrected=4, remap_failed=True, throttle=("hw_thermal",))
    four = job(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 4"))
    hidden = msgspec.structs.replace(facts, environment={"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,6,7"})
    for subject in (case(matrix, facts, four), case(matrix, hidden, EIGHT)):
        for check in (health.recovery_action, health.ecc_errors, health.row_remapping, health.clocks):
            assert findings(subject, check) == ()


def test_work_and_the_power_limit_are_no_faults(matrix: Matrix) -> None:
    for throttle in (("none",), ("idle",), ("sw_power_cap",), ("application_clocks", "sync_boost")):
        assert findings(case(matrix, eight(matrix, throttle=throttle), EIGHT), health.clocks) == ()


def test_a_single_card_outside_a_fabric_is_only_warned_of(matrix: Matrix) -> None:
    alone = eight(matrix, which=0, count=1, fabric="not_started")
    (finding,) = findings(case(matrix, alone, job()), health.fabric)
    assert finding.severity == "warning" and "580.159.04" in finding.hint
    assert findings(case(matrix, eight(matrix, fabric="not_supported"), EIGHT), health.fabric) == ()


def test_traffic_between_cards_does_not_matter_to_one_rank(matrix: Matrix) -> None:
    alone = eight(matrix, which=0, count=1, recovery_action="drain_p2p")
    (finding,) = findings(case(matrix, alone, job(None)), health.recovery_action)
    assert finding.severity == "warning"


def test_desktop_boards_share_their_lanes(matrix: Matrix) -> None:
    """8 of 16 lanes are such a board's design; 4 are not."""
    assert findings(case(matrix, eight(matrix, card="5090", pcie_width=8), EIGHT), health.pcie_width) == ()
    assert len(findings(case(matrix, eight(matrix, card="5090", pcie_width=4), EIGHT), health.pcie_width)) == 1


def test_persistence_only_where_it_costs(matrix: Matrix) -> None:
    off = eight(matrix, persistence=False)
    assert findings(case(matrix, off, EIGHT), health.persistence) == ()
    slow = msgspec.structs.replace(off, timings={"nvml_start": 2.4})
    (finding,) = findings(case(matrix, slow, EIGHT), health.persistence)
    assert "took 2.4 s to start" in finding.seen and finding.severity == "warning"
    on = msgspec.structs.replace(eight(matrix), timings={"nvml_start": 2.4})
    assert findings(case(matrix, on, EIGHT), health.persistence) == ()


def report(number: int, seconds: float, pci: str = "0000:05:00", text: str = "Xid") -> Xid:
    return Xid(number, pci, seconds, text)


def logged(matrix: Matrix, *reports: Xid, action: str = "", **changes: Any) -> Case:
    cards = tuple(
        msgspec.structs.replace(gpu, pci=f"00000000:0{gpu.index}:00.0", health=GpuHealth(recovery_action=action))
        for gpu in gpus("H100", 8)
    )
    return case(matrix, machine(matrix, gpus=cards, xids=reports, **changes), EIGHT)


@pytest.mark.parametrize(("number", "seconds", "action", "severity"), [
    (79, 600, "", "error"),
    (79, 600, "gpu_reset", "error"),
    (79, 600, "none", "warning"),
    (79, 5 * HOUR, "", "warning"),
    (79, 30 * HOUR, "", None),
    (48, 60, "", "error"),
    (119, 60, "", "error"),
    (63, 60, "", "warning"),
    (94, 60, "none", "warning"),
    (13, 600, "", "warning"),
    (31, 5 * HOUR, "", None),
    (43, 60, "", None),
    (45, 60, "", None),
    (154, 60, "", None),
])  # fmt: skip
def test_xids(matrix: Matrix, number: int, seconds: float, action: str, severity: str | None) -> None:
    found = findings(logged(matrix, report(number, seconds), action=action), xids.kernel_reports)
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    assert all(f"GPU 5 at 0000:05:00: Xid {number} once" in finding.seen for finding in found)
    assert bool(found and found[0].edits) == (severity == "error")


def test_xids_are_counted_and_dated(matrix: Matrix) -> None:
    (finding,) = findings(logged(matrix, report(63, 4 * HOUR), report(63, 2 * HOUR)), xids.kernel_reports)
    assert "Xid 63 2 times, last 2.0 h ago" in finding.seen
    (finding,) = findings(logged(matrix, report(31, 600)), xids.kernel_reports)
    assert "touched memory that is not its own" in finding.seen and "not at fault by this alone" in finding.because


def test_xids_of_other_cards(matrix: Matrix) -> None:
    """In a privileged container the log tells of cards that are not this container's."""
    assert findings(logged(matrix, report(79, 60, "0000:3b:00")), xids.kernel_reports) == ()
    lost = LostGpu(8, "it has fallen off the bus (GPU is lost)", "0000:3b:00.0")
    (finding,) = findings(logged(matrix, report(79, 60, "0000:3b:00"), lost_gpus=(lost,)), xids.kernel_reports)
    assert finding.severity == "warning" and "The lost card at 0000:3b:00" in finding.seen


def test_xids_unknown_is_no_pass(matrix: Matrix) -> None:
    facts = machine(matrix, xids=None, unknown={"xids": "the kernel log cannot be read from here"})
    result = verdict(case(matrix, facts, job()), xids.kernel_reports)
    assert (result.status, result.reason) == ("skipped", "the kernel log cannot be read from here")
    assert findings(logged(matrix), xids.kernel_reports) == ()


def test_a_fatal_report_of_the_switch(matrix: Matrix) -> None:
    fatal = report(20034, 60, "0000:85:00.0", "SXid (PCI:0000:85:00.0): 20034, Fatal, Link 30")
    (finding,) = findings(logged(matrix, fatal), xids.kernel_reports)
    assert finding.severity == "error" and "SXid 20034" in finding.seen
    old = report(20034, 5 * HOUR, "0000:85:00.0", fatal.text)
    assert findings(logged(matrix, old), xids.kernel_reports) == ()
