"""docs/features.md: every row that says *done* names a test, and every test that it names is there."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| feature", "| #", "| ---"))
]
FEATURES = [row for row in ROWS if len(row) == 3]
DEFECTS = [row for row in ROWS if len(row) == 4]


def test_both_tables_are_whole() -> None:
    assert len(FEATURES) == 54
    assert [row[0] for row in DEFECTS] == [str(number) for number in range(1, 21)]


@pytest.mark.parametrize(("feature", "answer", "test"), FEATURES)
def test_a_feature_is_done_by_a_test_or_not_yet(feature: str, answer: str, test: str) -> None:
    assert answer.startswith(("done", "not yet")), feature
    assert bool(test) == answer.startswith("done"), feature


@pytest.mark.parametrize("test", sorted({row[-1] for row in ROWS if row[-1]}))
def test_the_test_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    path = ROOT / "tests" / "trainer" / file
    assert path.is_file(), path
    found = {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}
    assert not name or name in found
    assert any(re.match("test_", function) for function in found)
