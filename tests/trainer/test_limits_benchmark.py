"""What benchmarks/limits.py says of a limit: whether the plan trained inside it, and whether it was the fastest."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
limits = pytest.importorskip("limits")

OWN: dict[str, Any] = {"label": "own", "changes": {}, "lossy": False}
KEPT: dict[str, Any] = {"label": "kept", "changes": {"gradient_checkpointing": False}, "lossy": False}
FP8: dict[str, Any] = {"label": "fp8", "changes": {"quantization": "fp8-dynamic"}, "lossy": True}


def row(plan: dict[str, Any] | None, allow: tuple[str, ...] = (), outcome: str = "trained") -> dict[str, Any]:
    return {"mode": "lora", "limit_gib": 32, "allow": list(allow), "plan": plan, "rows": [OWN, KEPT, FP8],
            "outcome": outcome, "within": True, "seconds_per_step": 0.4}  # fmt: skip


def times(**more: tuple[float, float]) -> dict[str, Any]:
    named = {"own": OWN, "kept": KEPT, "fp8": FP8}
    return {
        limits.key("lora", named[name]["changes"]): {"outcome": "measured", "seconds": seconds, "nvml_gib": gib}
        for name, (seconds, gib) in more.items()
    }


@pytest.mark.parametrize(("chosen", "measured", "good"), [
    (row(KEPT), times(own=(0.4, 27), kept=(0.3, 31)), True),
    (row(OWN), times(own=(0.4, 27), kept=(0.3, 31)), False),  # the other is faster, and fits
    (row(OWN), times(own=(0.4, 27), kept=(0.3, 40)), True),  # it does not fit
    (row(OWN), times(own=(0.4, 27), kept=(0.39, 31)), True),  # by less than a twentieth
    (row(OWN), times(own=(0.4, 27), fp8=(0.2, 20)), True),  # it may not be taken
    (row(OWN, ("quantization",)), times(own=(0.4, 27), fp8=(0.2, 20)), False),
    (row(OWN, outcome="failed"), times(own=(0.4, 27)), False),
    (row(None, outcome="refused"), times(own=(0.4, 40)), True),
    (row(None, outcome="refused"), times(own=(0.4, 27)), False),  # it would have fitted
    (row(KEPT), {}, True),  # not timed yet
])  # fmt: skip
def test_the_verdict(chosen: dict[str, Any], measured: dict[str, Any], good: bool) -> None:
    assert limits.judge(chosen, measured)[1] is good


def test_every_plan_is_timed_once() -> None:
    assert len(limits.due([row(OWN), row(KEPT)], {})) == 3
    assert list(limits.due([row(OWN), row(KEPT)], times(own=(0.44, 27), kept=(0.4, 31)))) == [
        limits.key("lora", FP8["changes"])
    ]


def test_what_is_not_within_the_bar_is_timed_until_the_median_counts() -> None:
    slow = row(OWN)
    measured = times(own=(0.44, 27), kept=(0.4, 31), fp8=(0.2, 20))
    own, kept = (limits.key("lora", one["changes"]) for one in (OWN, KEPT))
    for taken in (0.38, 0.42):  # after the first of them it is within the bar, and still timed once more
        assert limits.due([slow], measured).keys() == {own, kept}
        for each, seconds in ((own, taken), (kept, 0.4)):
            measured[each] = limits.joined(measured[each], {"outcome": "measured", "seconds": seconds, "nvml_gib": 31})
    assert measured[own] == {"outcome": "measured", "seconds": 0.42, "nvml_gib": 27, "each_seconds": [0.44, 0.38, 0.42]}
    assert limits.due([slow], measured) == {}
    assert limits.judge(slow, measured)[1]


def test_what_is_within_the_bar_is_not_timed_again() -> None:
    assert limits.due([row(KEPT)], times(own=(0.44, 27), kept=(0.4, 31), fp8=(0.2, 20))) == {}


def test_a_plan_that_was_timed_often_enough_stays_too_slow() -> None:
    measured = times(own=(0.44, 27), kept=(0.4, 31), fp8=(0.2, 20))
    for each in measured.values():
        each["each_seconds"] = [each["seconds"]] * 3
    assert limits.due([row(OWN)], measured) == {}
    assert not limits.judge(row(OWN), measured)[1]


def test_a_failed_timing_changes_nothing() -> None:
    known = {"outcome": "measured", "seconds": 0.4, "nvml_gib": 27}
    assert limits.joined(known, {"outcome": "out of memory"}) == known
    assert limits.joined(None, {"outcome": "out of memory"}) == {"outcome": "out of memory"}
    assert limits.joined({"outcome": "out of memory"}, known) == known


def test_with_nothing_to_time(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "limits.py", "--work", tmp_path, "--time", "--results", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "has no plan to time" in done.stderr and not list(tmp_path.iterdir())


def test_a_plan_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / "transformer" / "config.json").write_text('{"num_layers": 1}')
    options = argparse.Namespace(out=tmp_path / "out", deadline=60)
    failed = limits.under(tmp_path, "lora", 24, ["nonsense"], options)
    assert failed["outcome"] == "failed" and any("nonsense" in line for line in failed["said"])
    assert not limits.judge(failed, {})[1] and not limits.plans([failed])
