"""How long a step of a case takes, as the trainer foretells it by its ranks, packages and what was measured. Pure."""

from __future__ import annotations

from typing import Any

from xflux_trainer import timing
from xflux_trainer.config import TrainConfig

from xflux_doctor.bill import has_triton
from xflux_doctor.check import Case

FLASH_4 = "flash-attn-4"


def step_time(case: Case, config: TrainConfig, model: Any, name: str) -> timing.Forecast | None:
    """The time of a step on a card of that name; None where there is no forecast of it."""
    try:
        return timing.seconds_per_step(config, model, name, **timed(case, name))
    except timing.NoForecast:
        return None


def timed(case: Case, name: str) -> dict[str, Any]:
    """What the time of a step depends on beside its settings."""
    return {
        "world_size": max(1, case.job.num_processes),
        "strategy": case.job.strategy,
        "device": "cuda",
        "triton": has_triton(case),
        "flash4": FLASH_4 in (case.facts.packages or {}),
        "rates": _rates(case, name),
    }


def _rates(case: Case, name: str) -> dict[str, float]:
    """What the deep level measured, where it was on cards of that name."""
    probes = case.facts.gpu_probes or ()
    return case.facts.speeds if probes and all(probe.name == name for probe in probes) else {}
