"""What benchmarks/limits.py says of a limit: whether the plan trained inside it, and whether it was the fastest."""

from __future__ import annotations

import sys
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
    assert len(limits.plans([row(OWN), row(KEPT)])) == 3
