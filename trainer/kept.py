"""What follows from some of the settings alone is found once: a plan's search asks for a thousand bills and times.

Torch-free. `VARIED` are the settings that such a search changes; configs that differ in nothing else are of one family.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

from xflux_trainer.settings import VARIED, TrainConfig, altered

_T = TypeVar("_T")
_MOST = 8192
"""Results of one function that are kept: a search asks for some hundred."""
_DEFAULTS: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(TrainConfig) if one.name in VARIED}


def kept_by(*settings: str) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """For a pure function of a config and of hashable values: its results are kept by those of the `VARIED` settings
    that it reads, by all the others together, and by the values.

    The function is handed a config whose other `VARIED` settings are at their defaults, whatever was asked with.
    """
    rest = {name: value for name, value in _DEFAULTS.items() if name not in settings}
    read = operator.attrgetter(*settings) if settings else lambda config: None

    def keep(function: Callable[..., _T]) -> Callable[..., _T]:
        known: dict[Any, _T] = {}

        @functools.wraps(function)
        def found(config: TrainConfig, *values: Any) -> _T:
            key = (config.family, read(config), values)
            try:
                return known[key]
            except KeyError:
                if len(known) >= _MOST:
                    known.clear()
                result = known[key] = function(altered(config, **rest), *values)
                return result

        return found

    return keep
