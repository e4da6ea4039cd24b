"""HW208 and NE106 over recorded answers of DCGM and nccl-tests."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import XFLUX_ACCELERATE, case, findings, job, machine, verdict

from xflux_doctor.check import Case
from xflux_doctor.checks import outside
from xflux_doctor.facts import AllReduce, Bandwidth, DcgmFailure, DcgmResult, NcclTests
from xflux_doctor.finding import Edit
from xflux_doctor.matrix import Matrix

SIZE = 1 << 28
SICK = DcgmFailure("software", (1,), "Pending page retirements together with a DBE were detected on GPU 1.", 6)


def subject(matrix: Matrix, ranks: int = 2, cards: int = 4, **facts: Any) -> Case:
    work = job(XFLUX_ACCELERATE.replace("num_processes: 8", f"num_processes: {ranks}"))
    return case(matrix, machine(matrix, count=cards, **facts), work)


def asked(matrix: Matrix, *failures: DcgmFailure, cards: dict[str, str] | None = None, **work: Any) -> Case:
    return subject(matrix, dcgm=DcgmResult("4.2.3", 2, failures, cards or {}), **work)


class TestDiagnosis:
    def test_a_pass(self, matrix: Matrix) -> None:
        assert verdict(asked(matrix), outside.diagnosis).status == "ok"

    def test_not_there_is_no_pass(self, matrix: Matrix) -> None:
        for facts, why in (({}, "check --deep"), ({"unknown": {"dcgm": "dcgmi is not on PATH"}}, "not on PATH")):
            found = verdict(subject(matrix, **facts), outside.diagnosis)
            assert found.status == "skipped" and why in found.reason

    def test_a_card_of_the_job(self, matrix: Matrix) -> None:
        (finding,) = findings(asked(matrix, SICK), outside.diagnosis)
        assert finding.severity == "error" and "failed for GPU 1: Pending page" in finding.seen
        assert Edit("accelerate", ("gpu_ids",), "0,2", "DCGM's diagnosis fails for the card") in finding.edits

    def test_two_bad_cards_leave_the_same_others(self, matrix: Matrix) -> None:
        both = findings(asked(matrix, SICK, DcgmFailure("software", (2,), "", 2)), outside.diagnosis)
        assert [finding.severity for finding in both] == ["error", "warning"]  # the job runs on 0 and 1
        assert Edit("accelerate", ("gpu_ids",), "0,3", "DCGM's diagnosis fails for the card") in both[0].edits

    def test_another_card(self, matrix: Matrix) -> None:
        (finding,) = findings(asked(matrix, SICK, ranks=1), outside.diagnosis)
        assert finding.severity == "warning" and not finding.edits

    def test_dcgms_numbers_are_its_own(self, matrix: Matrix) -> None:
        """A container sees some of the cards that the host's engine counts."""
        names = [gpu.uuid for gpu in machine(matrix, count=4).gpus or ()]
        (finding,) = findings(asked(matrix, SICK, cards={"0": names[1], "1": names[0]}), outside.diagnosis)
        assert finding.severity == "error" and "for GPU 0:" in finding.seen
        (finding,) = findings(asked(matrix, SICK, cards={"1": "GPU-elsewhere", "5": names[1]}), outside.diagnosis)
        assert finding.severity == "warning" and "does not see (DCGM's GPU 1)" in finding.seen

    def test_no_card_named(self, matrix: Matrix) -> None:
        (finding,) = findings(asked(matrix, DcgmFailure("NVML Library", (), "", 4)), outside.diagnosis)
        assert finding.severity == "error" and finding.seen.endswith("failed for this machine.") and not finding.edits

    @pytest.mark.parametrize("failure", [
        DcgmFailure("software", (0,), "Persistence mode for GPU 0 is disabled.", 5),
        DcgmFailure("Persistence Mode", (0,), "Persistence mode for GPU 0 is disabled."),
    ])  # fmt: skip
    def test_a_setting_calls_no_card_sick(self, matrix: Matrix, failure: DcgmFailure) -> None:
        (finding,) = findings(asked(matrix, failure), outside.diagnosis)
        assert finding.severity == "warning" and not finding.edits

    def test_a_cpu_job(self, matrix: Matrix) -> None:
        facts = machine(matrix, dcgm=DcgmResult("4.2.3", 0, (SICK,)))
        assert verdict(case(matrix, facts, job(cpu=True)), outside.diagnosis).status == "skipped"


class TestNcclTests:
    def both(self, matrix: Matrix, ours: float | None, **other: Any) -> Case:
        sweep = (Bandwidth(SIZE, 1e-3, ours),) if ours else ()
        reduced = AllReduce("nccl", 2, True, "done", bandwidth=sweep)
        return subject(matrix, allreduce=reduced, nccl_tests=NcclTests(2, SIZE, **{"busbw": 200.0, **other}))

    def test_like_rates(self, matrix: Matrix) -> None:
        for ours in (161.0, 200.0, 300.0):
            assert verdict(self.both(matrix, ours), outside.nccl_tests).status == "ok"

    def test_a_lower_rate_of_ours(self, matrix: Matrix) -> None:
        (finding,) = findings(self.both(matrix, 150.0), outside.nccl_tests)
        assert finding.severity == "warning" and "150 GB/s" in finding.seen and "200 GB/s" in finding.seen

    def test_wrong_values(self, matrix: Matrix) -> None:
        (finding,) = findings(self.both(matrix, 200.0, wrong=12), outside.nccl_tests)
        assert finding.severity == "error" and "gave 12 values" in finding.seen

    def test_its_failure(self, matrix: Matrix) -> None:
        words = "Test NCCL failure common.cu:392 'unhandled cuda error'"
        (finding,) = findings(self.both(matrix, 200.0, busbw=None, failed=words), outside.nccl_tests)
        assert finding.severity == "warning" and words in finding.seen and "works here" in finding.because

    def test_nothing_to_compare_is_no_pass(self, matrix: Matrix) -> None:
        for found in (self.both(matrix, None), subject(matrix, nccl_tests=NcclTests(2, SIZE, 200.0)), subject(matrix)):
            assert verdict(found, outside.nccl_tests).status == "skipped"
