"""An installed package's version, as PEP 440 reads it."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from xflux_doctor.facts import Facts


def version_of(facts: Facts, name: str) -> Version | None:
    """The installed version; None where the package is missing, or calls itself by no version that PEP 440 knows."""
    package = (facts.packages or {}).get(name)
    try:
        return Version(package.version) if package else None
    except InvalidVersion:
        return None
