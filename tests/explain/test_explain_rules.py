"""The table as a whole: every mark in it is met by some excerpt, and none is hidden by another cause's."""

from __future__ import annotations

import re

import pytest
from excerpts import EXCERPTS
from excerpts_kit import crash

from xflux_doctor.explain import log
from xflux_doctor.explain.diagnosis import diagnose
from xflux_doctor.explain.reader import _LIVELY, Mark, Reader
from xflux_doctor.explain.rule import LEVELS, Rule, Sign
from xflux_doctor.explain.rules import RULES

SIGNS = [(rule, sign) for rule in RULES for sign in rule.signs]
BARE = [
    (r, s) for r, s in SIGNS if not (s.regex or s.within or s.near or s.after) and (s.level or r.level) != "warning"
]


def name(value: object) -> str:
    return value.id if isinstance(value, Rule) else value.key if isinstance(value, Sign) else ""


def test_ids_are_unique_and_plain() -> None:
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", one) for one in ids)
    assert not {"unknown", "none"} & set(ids)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_rule_says_all_that_it_must(rule: Rule) -> None:
    assert rule.signs
    assert not rule.title.endswith(".")
    assert rule.because.endswith(".")
    assert rule.hint.endswith(".")
    assert rule.level in LEVELS
    assert not rule.docs or rule.docs.startswith("https://")
    assert all(sign.regex for sign in rule.signs if sign.when is not None)


def test_keys_hold_no_digits() -> None:
    """Lines that differ in digits only are looked up once, so a digit in a key would be missed."""
    texts = [text for _, sign in SIGNS for text in (sign.key, sign.after)]
    assert [text for text in (*texts, *_LIVELY) if re.search(r"\d", text)] == []


def test_every_cause_has_excerpts_and_the_other_way_round() -> None:
    assert {rule.id for rule in RULES} == set(EXCERPTS)


@pytest.mark.parametrize(("rule", "sign"), BARE, ids=name)
def test_a_bare_mark_is_enough(rule: Rule, sign: Sign) -> None:
    """Also says that no other cause claims the same words with more weight."""
    found = diagnose(crash(f"RuntimeError: {sign.key}"))
    assert found is not None
    assert found.cause == rule.id


class _Watched(Reader):
    """Notes which signs leave marks."""

    def __init__(self) -> None:
        super().__init__(RULES)
        self.met: set[tuple[str, Sign]] = set()

    def _keep(self, mark: Mark, sign: Sign) -> None:
        assert mark.rule is not None
        self.met.add((mark.rule.id, sign))
        super()._keep(mark, sign)


def test_every_pattern_is_met_by_some_excerpt() -> None:
    met: set[tuple[str, Sign]] = set()
    for text in (text for texts in EXCERPTS.values() for text in texts):
        reader = _Watched()
        for line in log.lines(text):
            reader.take(line)
        met |= reader.met
    bare = {(rule.id, sign) for rule, sign in BARE}
    never = {(rule.id, sign) for rule, sign in SIGNS if (sign.level or rule.level) != "warning"} - met - bare
    assert sorted((rule, sign.key, sign.regex) for rule, sign in never) == []
