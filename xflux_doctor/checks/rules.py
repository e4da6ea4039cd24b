"""SW105: the matrix's rules, held against what is installed here."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from xflux_doctor.check import Case, check
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.matrix import Rule

_INSTALL = "xflux-doctor fix --install"


@check("SW105", "the packages go together", needs=("packages",))
def rules(case: Case) -> Iterator[Finding]:
    """Every rule of the matrix whose conditions hold here."""
    for rule in case.matrix.rules:
        seen = broken(rule, versions(case))
        if seen:
            make = error if rule.severity == "error" else warning
            yield make(f"{seen} ({rule.id}: {rule.title}).", rule.because, f"Run `{_INSTALL}`.", docs=rule.source[0])


def versions(case: Case) -> dict[str, str]:
    """Version of every package, and of `python` and `driver`, for rules to look at."""
    found = {name: package.version for name, package in (case.facts.packages or {}).items()}
    if case.facts.python:
        found["python"] = case.facts.python.version
    if case.facts.driver and not case.job.use_cpu:
        found["driver"] = case.facts.driver.version
    return found


def broken(rule: Rule, found: dict[str, str]) -> str:
    """What breaks the rule, in words; empty when it holds or does not apply."""
    if rule.what not in found or not all(
        name in found and _within(found[name], need) for name, need in rule.when.items()
    ):
        return ""
    if _within(found[rule.what], rule.need):
        return ""
    beside = ", ".join(f"{name} {found[name]}" for name in rule.when)
    return f"{rule.what} {found[rule.what]}" + (f" beside {beside}" if beside else "") + f" must be {rule.need}"


def _within(version: str, specifier: str) -> bool:
    try:
        return SpecifierSet(specifier).contains(Version(version).public, prereleases=True)
    except InvalidVersion:
        return False
