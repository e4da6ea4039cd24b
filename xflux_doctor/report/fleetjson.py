"""A fleet's report for programs. `report/fleet.schema.json` describes it, and a test holds them together."""

from __future__ import annotations

from typing import Any

import msgspec

from xflux_doctor import __version__
from xflux_doctor.fleet.fields import field
from xflux_doctor.fleet.values import Fleet

SCHEMA = 1


def document(fleet: Fleet) -> dict[str, Any]:
    """The merged report as plain values."""
    plain = msgspec.to_builtins(fleet)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "exit_code": fleet.exit_code,
        **plain,
        "differences": [{**found, "title": field(found["field"]).title} for found in plain["differences"]],
    }
