"""Each pair: `check` finds the fault before the start, and `explain` names it after the real death, by one code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from pair_kit import Pair, after, before, sound
from pairs_files import PAIRS as FILES

PAIRS: tuple[Pair, ...] = (*FILES,)


def marked(pair: Pair) -> object:
    return pytest.param(pair, id=pair.name, marks=() if pair.quick else pytest.mark.long)


@pytest.mark.parametrize("pair", map(marked, PAIRS))
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
    assert pair.words in log, log[-4000:]
