"""Each pair: `check` finds the fault before the start, and `explain` names it after the real death, by one code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from not_provoked import NOT_PROVOKED
from pair_kit import Pair, after, before, sound
from pairs_files import PAIRS as FILES
from pairs_launch import PAIRS as LAUNCH
from pairs_machine import PAIRS as MACHINE
from skews import NOT_EXPLAINED, SKEWS

from xflux_doctor.explain.codes import CODES

PAIRS: tuple[Pair, ...] = (*FILES, *LAUNCH, *MACHINE)


def marked(pair: Pair) -> object:
    return pytest.param(pair, id=pair.name, marks=() if pair.quick else pytest.mark.long)


@pytest.mark.parametrize("pair", [marked(pair) for pair in PAIRS])
def test_pair(pair: Pair, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    absent = [name for name in pair.needs if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}")
    place = sound(tmp_path, request.getfixturevalue("model"))
    place.write()
    usual = before(place)
    pair.break_it(place)
    place.write()
    try:
        found = before(place)
        told, log = after(place)
    finally:
        for close in place.closing:
            close()
    fault = {code: seen for code, seen in found.items() if seen != usual.get(code)}
    print(f"\n{pair.name}: before {fault}\n  after {told['cause']} {told['code']} {told['evidence'][-1:]}")
    assert pair.code in fault, f"check finds {fault} of it; the job says:\n{log[-2000:]}"
    assert (told["cause"], told["code"]) == (pair.cause, pair.code), log[-4000:]


def test_every_cause_with_a_code_is_provoked_or_says_why_not() -> None:
    provoked = {pair.cause for pair in PAIRS}
    assert set(CODES) <= provoked | set(NOT_PROVOKED)
    assert not provoked & set(NOT_PROVOKED) and set(NOT_PROVOKED) <= set(CODES)
    by_skews = {cause for cause, why in NOT_PROVOKED.items() if why.startswith("tests/test_skews.py: ")}
    named = {NOT_PROVOKED[cause].split(": ")[1].split()[0] for cause in by_skews}
    assert named <= {skew.name for skew in SKEWS} - set(NOT_EXPLAINED)


def test_there_are_enough_and_their_names_are_their_own() -> None:
    names = [pair.name for pair in PAIRS]
    assert len(set(names)) == len(names) >= 25
    assert sum(pair.quick for pair in PAIRS) <= 8
