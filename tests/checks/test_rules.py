"""SW105: every row of the matrix can break, and is silent on a healthy machine."""

from __future__ import annotations

import pytest
from conftest import case, findings, job, machine, packages

from xflux_doctor.checks import rules
from xflux_doctor.gather.packages import OF_INTEREST
from xflux_doctor.matrix import Matrix


@pytest.mark.parametrize("stack", ["xflux-2024", "cuda12", "cuda13", "cpu"])
def test_stacks_keep_all_rules(matrix: Matrix, stack: str) -> None:
    facts = machine(matrix, packages=packages(matrix, stack))
    assert findings(case(matrix, facts, job(), stack), rules.rules) == ()


def test_every_rule_can_break(matrix: Matrix) -> None:
    """For each row: a version outside `need` beside versions inside `when` breaks it, one inside keeps it."""
    candidates = [f"{a}.{b}.{c}" for a in range(14) for b in range(60) for c in (0, 2, 99)]
    candidates += ["525.60.13", "470.1", "580.65.06", "600.0"]
    for rule in matrix.rules:
        beside = {}
        for name, need in rule.when.items():
            inside = next((v for v in candidates if rules._within(v, need)), None)
            assert inside, (rule.id, name, need)
            beside[name] = inside
        outside = next((v for v in candidates if not rules._within(v, rule.need)), None)
        assert outside, rule.id
        assert rules.broken(rule, {**beside, rule.what: outside}), rule.id
        assert not rules.broken(rule, {rule.what: outside}) or not rule.when, rule.id
        kept = next((v for v in candidates if rules._within(v, rule.need)), None)
        if kept:
            assert not rules.broken(rule, {**beside, rule.what: kept}), rule.id


def test_resume_rule(matrix: Matrix) -> None:
    """deepspeed before 0.16 cannot resume under torch 2.6: the best known skew must be in the matrix."""
    found = packages(matrix, "xflux-2024", torch="2.6.0+cu124")
    subject = case(matrix, machine(matrix, packages=found), job(), "xflux-2024")
    assert any("deepspeed 0.14.4" in f.seen and "torch 2.6.0" in f.seen for f in findings(subject, rules.rules))


def test_rules_speak_only_of_what_is_looked_at(matrix: Matrix) -> None:
    """A rule about a name that nobody gathers would never fire."""
    looked_at = OF_INTEREST | {"python", "driver"}
    for rule in matrix.rules:
        assert {rule.what, *rule.when} <= looked_at, rule.id
