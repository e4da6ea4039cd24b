"""The machines of a job meet once more after a launch that failed: each says how its part ended, number 0 decides.

The port may still be that of the ranks, which end one machine after the other, so both sides try until the time is up.
A member who is known not to come is not waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from xflux_doctor.facts import Meeting
from xflux_doctor.probes.meeting import Gathering, Place, Say

Decide = Callable[[dict[int, Any]], dict[str, object]]


class Reunion(Gathering):
    """`open` ends with `told`, the decision, wherever all came; `agree` as before, to start together."""

    _patient = True
    _thinks = 60.0

    def __init__(
        self, place: Place, config: Mapping[str, str], seconds: float, say: Say, *, word: dict[str, object],
        decide: Decide, absent: Callable[[], frozenset[int]],
    ) -> None:  # fmt: skip
        """`word`: what this one says. `decide`, number 0's: from everybody's word, by number, to what all are told."""
        super().__init__(place, config, seconds, say)
        self._word, self._decide, self._away = word, decide, absent
        self.told: dict[str, Any] = {}

    def _brings(self) -> dict[str, object]:
        return {"word": self._word}

    def _answers(self, found: Meeting) -> dict[str, object]:
        if not found.together:
            return {}
        words = {rank: (lines[0].said or {}).get("word") for rank, lines in self._here().items()}
        self.told = self._decide({self._place.rank: self._word, **words})
        return {"told": self.told}

    def _learns(self, answer: Mapping[str, Any]) -> None:
        told = answer.get("told")
        self.told = told if isinstance(told, dict) else {}

    def _absent(self) -> frozenset[int]:
        return self._away()
