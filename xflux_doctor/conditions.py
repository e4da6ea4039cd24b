"""What a row of the matrix asks of a thing: a version range, or a word about presence or build.

A condition is a PEP 440 specifier (`>=2.4,<2.5`), `present`, `absent`, or `build` with one or more patterns
(`build cu12* cpu`), of which torch's and torchvision's own version.py must match one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

SUBJECTS: Mapping[str, str] = {
    "python": "Python",
    "driver": "driver",
    "driver-cuda": "a driver for CUDA",
    "glibc": "glibc",
    "kernel": "Linux",
    "nvcc": "nvcc",
    "gcc": "gcc",
    "cuda": "a torch built for CUDA",
    "capability": "compute capability",
    "gpus": "visible GPUs:",
}
"""What a row may speak of besides packages, and how it is called in a sentence."""
JOBS: Mapping[str, str] = {
    "deepspeed": "the job uses DeepSpeed",
    "compiles": "the job compiles DeepSpeed's operators (an offloaded optimizer)",
    "cuda-check": "DeepSpeed compares nvcc with torch (DS_SKIP_CUDA_CHECK is not 1)",
    "dynamo": "the accelerate file asks for torch.compile",
    "quantized": "the job quantizes its base model by optimum-quanto",
}
"""What a row may ask of the job."""
_BUILD = re.compile(r"(cpu|cu[0-9*?]+|rocm[0-9.*?]*|xpu)")


class Thing(NamedTuple):
    """A package or a subject as it was found. An empty version or build is not known."""

    there: bool
    version: str = ""
    build: str = ""


ABSENT = Thing(False)


def holds(need: str, thing: Thing) -> bool | None:
    """Whether the thing meets the condition; None where that cannot be known."""
    if need == "present":
        return thing.there
    if need == "absent":
        return not thing.there
    if not thing.there:
        return False
    if need.startswith("build "):
        return any(fnmatchcase(thing.build, pattern) for pattern in need.split()[1:]) if thing.build else None
    try:
        return SpecifierSet(need).contains(Version(thing.version).public, prereleases=True)
    except InvalidVersion:
        return None


def fault(need: str) -> str:
    """What is wrong with a condition's text; empty when it can be read."""
    if need in ("present", "absent"):
        return ""
    word, *rest = need.split() or [""]
    if word == "build":
        bad = [pattern for pattern in rest if not _BUILD.fullmatch(pattern)]
        if not rest or bad:
            return f"{need!r} names no build such as cu121, cu12* or cpu"
        return ""
    try:
        SpecifierSet(need)
    except InvalidSpecifier:
        if re.fullmatch(r"[a-z][\w -]*", need):
            return f"{need!r} is no condition: there are present, absent, build PATTERN and version specifiers"
        return f"{need!r} is not a version specifier"
    return "" if need.strip() else "it is empty: write present, absent or a version specifier"


def together(first: str, second: str) -> bool:
    """Whether one release can meet both conditions (tried at and just above the versions that they name)."""
    if "absent" in (first, second):
        return first == second
    ranges = [text for text in (first, second) if text != "present" and not text.startswith("build ")]
    if len(ranges) < 2:
        return True
    both = SpecifierSet(",".join(ranges))
    edges = [Version(clause.version.removesuffix(".*")) for clause in both]
    near = [candidate for edge in edges for candidate in (f"{edge}", f"{edge.public}.0.1", f"{edge.public}.1")]
    return any(both.contains(version, prereleases=True) for version in ("0", *near, "999999") if _is_version(version))


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True
