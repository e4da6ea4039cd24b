"""One installed package against its pin, in one word. Versions by PEP 440; torch's build by its own version.py."""

from __future__ import annotations

from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from xflux_doctor.facts import Package
from xflux_doctor.matrix import Pin, Stack

Word = Literal[
    "exact",
    "compatible",
    "editable",
    "shadowed",
    "wrong build",
    "later patch",
    "too old",
    "too new",
    "missing",
    "broken",
    "unreadable",
]
GOOD = ("exact", "compatible")


def judge(pin: Pin, package: Package | None) -> Word:
    """The gravest thing first: a package that is broken has no version worth comparing."""
    if package is None:
        return "missing"
    try:
        version = Version(package.version)
    except InvalidVersion:
        return "unreadable"
    if not package.files or package.damaged:
        return "broken"
    later = _patched(pin, version)
    if not later and not _allows(pin, version):
        return "too old" if Version(version.public) < Version(pin.version) else "too new"
    if pin.build and package.build and package.build != pin.build:
        return "wrong build"
    if later:
        return "later patch"
    if package.copies > 1:
        return "shadowed"
    if package.editable:
        return "editable"
    return "exact" if Version(version.public) == Version(pin.version) else "compatible"


def _allows(pin: Pin, version: Version) -> bool:
    """Whether an installed version is the pin, or inside `accepts`. Local parts do not count here."""
    public = Version(version.public)
    if public == Version(pin.version):
        return True
    return bool(pin.accepts) and SpecifierSet(pin.accepts).contains(public, prereleases=True)


def _patched(pin: Pin, version: Version) -> bool:
    """Whether it is a later bug-fix release (x.y.Z) of the newest that was tested, of a package of which several
    were fine."""
    public, spans = Version(version.public), SpecifierSet(pin.accepts)
    if _allows(pin, version) or any(one.operator == "!=" and not one.contains(public) for one in spans):
        return False
    bounds = [Version(one.version) for one in spans if one.operator == "<="]
    return not public.is_prerelease and any(
        bound.release[:2] == public.release[:2] and public > bound for bound in bounds
    )


def wanted(pin: Pin) -> str:
    """The pin as torch/version.py would put it: version and build."""
    return f"{pin.version}+{pin.build}" if pin.build else pin.version


def installed(package: Package | None) -> str:
    """The installed version with the build, where its own files name one."""
    if package is None:
        return ""
    version = package.version.partition("+")[0]
    return f"{version}+{package.build}" if package.build else package.version


def table(stack: Stack | None, packages: dict[str, Package] | None) -> tuple[tuple[str, str, str, Word], ...]:
    """Rows (name, installed, wanted, word) of every judged package of the stack."""
    if stack is None or packages is None:
        return ()
    judged = {name: pin for name, pin in stack.packages.items() if not pin.install_only}
    return tuple(
        (name, installed(packages.get(name)), wanted(pin), judge(pin, packages.get(name)))
        for name, pin in judged.items()
    )
