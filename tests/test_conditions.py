"""Conditions of the matrix's rows: what they hold of a thing, and texts that are none."""

from __future__ import annotations

import json

import jsonschema
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from xflux_doctor.conditions import ABSENT, Thing, fault, holds, together

SCHEMA = json.loads((ROOT / "xflux_doctor/compat_matrix.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("need", "thing", "answer"), [
    (">=2.4,<2.5", Thing(True, "2.4.1+cu121"), True), (">=2.4,<2.5", Thing(True, "2.5.0"), False),
    (">=2.4,<2.5", Thing(True, "2.4.0a0+f70bd71a48.nv24.06"), False), (">=2.4", ABSENT, False),
    (">=2.4", Thing(True), None), (">=2.4", Thing(True, "what"), None),
    ("present", Thing(True), True), ("present", ABSENT, False),
    ("absent", ABSENT, True), ("absent", Thing(True), False),
    ("build cu12*", Thing(True, "2.4.0", "cu121"), True), ("build cu12* cpu", Thing(True, "2.4.0", "cpu"), True),
    ("build cu12*", Thing(True, "2.4.0", "cu118"), False), ("build cu12*", Thing(True, "2.4.0"), None),
    ("build cu12*", ABSENT, False),
])  # fmt: skip
def test_conditions(need: str, thing: Thing, answer: bool | None) -> None:
    assert fault(need) == "" and holds(need, thing) is answer


@pytest.mark.parametrize("need", ["", "  ", "presnt", "=2.4", ">=2.4 or so", "build", "build ", "build cu12.1", "2.4"])
def test_conditions_that_are_none(need: str) -> None:
    assert fault(need)
    assert not jsonschema.Draft202012Validator(SCHEMA["$defs"]["condition"] | {"$defs": SCHEMA["$defs"]}).is_valid(need)


@given(st.sampled_from(("2.4", "2.4.0", "2.10", "1.0.post1")), st.sampled_from((">=", "<=", "==", "!=", "<", ">")))
def test_one_condition_agrees_with_itself(version: str, operator: str) -> None:
    assert together(f"{operator}{version}", f"{operator}{version}")


@pytest.mark.parametrize(("one", "other", "answer"), [
    (">=2.4", "<2.4", False), (">=2.4", "<=2.4", True), (">2.4", "<2.5", True), ("==1.0", ">=0.9", True),
    ("==1.0", "==1.1", False), ("present", "absent", False), ("absent", ">=1", False), ("present", ">=1", True),
])  # fmt: skip
def test_contradictions(one: str, other: str, answer: bool) -> None:
    assert together(one, other) is answer and together(other, one) is answer
