"""The frame of the checks: skips, crashes, accepted codes; and that the list of checks is sound."""

from __future__ import annotations

import re
from collections.abc import Iterator

from conftest import case, job, machine

from xflux_doctor.check import Case, check, examine
from xflux_doctor.checks import ALL
from xflux_doctor.facts import Facts, from_json, to_json
from xflux_doctor.finding import Edit, Finding, error
from xflux_doctor.matrix import Matrix
from xflux_doctor.report.summary import Summary


@check("XX101", "raises")
def raises(_case: Case) -> Iterator[Finding]:
    """Raises."""
    raise ZeroDivisionError("oops")
    yield error("")


@check("XX102", "finds")
def finds(_case: Case) -> Iterator[Finding]:
    """Finds."""
    yield error("seen", "because", edits=(Edit("accelerate", ("a",), 1),))


@check("XX103", "needs an all-reduce", needs=("allreduce",))
def needs(_case: Case) -> Iterator[Finding]:
    """Needs."""
    yield error("never")


def test_a_crash_is_isolated_and_counts(matrix: Matrix) -> None:
    verdicts = examine(case(matrix, machine(matrix), job()), [raises, finds])
    assert [v.status for v in verdicts] == ["crashed", "error"]
    assert verdicts[0].reason == "ZeroDivisionError: oops"
    assert Summary(verdicts[:1], machine(matrix), None).exit_code == 3
    assert Summary(verdicts, machine(matrix), None).exit_code == 1
    assert verdicts[1].findings[0].code == "XX102"


def test_missing_facts_are_skips_with_the_recorded_reason(matrix: Matrix) -> None:
    (quick,) = examine(case(matrix, machine(matrix), job()), [needs])
    assert (quick.status, quick.reason) == ("skipped", "no all-reduce was run (quick level)")
    facts = machine(matrix, unknown={"allreduce": "torch sees no GPU"})
    assert examine(case(matrix, facts, job()), [needs])[0].reason == "torch sees no GPU"


def test_accepted_codes_become_warnings_without_edits(matrix: Matrix) -> None:
    subject = case(matrix, machine(matrix), job(), accepted=frozenset({"XX102"}))
    (verdict,) = examine(subject, [finds])
    assert verdict.status == "warning" and verdict.findings[0].edits == ()
    assert Summary((verdict,), machine(matrix), None).exit_code == 0
    assert Summary((verdict,), machine(matrix), None, strict=True).exit_code == 1


def test_checks_are_well_formed() -> None:
    codes = [item.code for item in ALL]
    assert len(codes) == len(set(codes))
    for item in ALL:
        assert re.fullmatch(r"(SW|TC|HO|HW|EN|LA|ME|DA|ST|WE|XF|NE)\d{3}", item.code)
        assert item.help and item.help.endswith(".") and item.title == item.title.strip()
        known = (*Facts.__struct_fields__, "train", "accelerate", "stack", "xflux", "trainer")
        assert all(need in known for need in item.needs)


def test_facts_round_trip(matrix: Matrix) -> None:
    facts = machine(matrix, count=2, environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert from_json(to_json(facts).encode()) == facts
