"""The compatibility matrix: stacks (whole pin sets) and rules, read from `compat_matrix.yaml`.

A stack keeps version and build apart, because the public index's wheel calls itself `2.4.0` and says
`2.4.0+cu121` only in `torch/version.py`, while the PyTorch index calls the same wheel `2.4.0+cu121`.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Literal

import msgspec
import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from xflux_doctor.errors import DoctorError
from xflux_doctor.facts import Facts, Gpu
from xflux_doctor.finding import Severity

NO_DRIVER = "there is no NVIDIA driver"
"""How the reason begins when there is none at all."""
Role = Literal["core", "deepspeed", "quant", "log", "install"]


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One package of a stack."""

    version: str
    accepts: str = ""
    """A specifier of versions that are fine though not the pin; empty: only the pin itself."""
    build: str = ""
    """The CUDA build that `version.py` must name, for example `cu121` or `cpu`."""
    index: str = ""
    """Where the wheel of that build comes from."""
    index_required: bool = False
    """True where the public index's wheel of this version is another build."""
    role: Role = "core"
    """What needs it. `core`: every job. `deepspeed`, `quant`, `log`: only jobs that use them."""
    install_only: bool = False
    """Pinned for the install, never judged."""
    note: str = ""

    def allows(self, version: Version) -> bool:
        """Whether an installed version is the pin, or inside `accepts`. Local parts do not count here."""
        public = Version(version.public)
        if public == Version(self.version):
            return True
        return bool(self.accepts) and SpecifierSet(self.accepts).contains(public, prereleases=True)


class Tested(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the stack was last installed and run; `never` is an honest answer."""

    cpu: str
    gpu: str


class Stack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole pin set that was installed, imported and trained with."""

    name: str
    summary: str
    python: str
    packages: dict[str, Pin]
    cuda: str | None
    driver: str | None
    tested: Tested
    driver_blackwell: str | None = None
    gpu_archs: tuple[str, ...] = ()
    nccl: str | None = None
    cudnn: str | None = None
    source: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        return self.cuda is None


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row: `what` must satisfy `need` when everything under `when` holds."""

    id: str
    title: str
    what: str
    need: str
    severity: Severity
    because: str
    source: tuple[str, ...]
    checked: str
    when: dict[str, str] = {}


class Matrix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    checked: str
    stacks: tuple[Stack, ...]
    rules: tuple[Rule, ...]

    def stack(self, name: str) -> Stack:
        for stack in self.stacks:
            if stack.name == name:
                return stack
        known = ", ".join(s.name for s in self.stacks)
        raise DoctorError(f"There is no stack {name!r} in the matrix.", f"Known stacks: {known}.", code=2)


class Choice(msgspec.Struct, frozen=True):
    """The stack chosen for a machine, and why each other one was not."""

    stack: str | None
    because: str
    refused: dict[str, str] = {}


def default_path() -> Path:
    return Path(__file__).with_name("compat_matrix.yaml")


def load(path: Path | None = None) -> Matrix:
    """Read and validate a matrix file. Raises DoctorError naming the place of the first fault."""
    path = path or default_path()
    try:
        # The C loader is as safe as SafeLoader and ten times faster; some builds of PyYAML lack it.
        raw = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except OSError as error:
        raise DoctorError(f"The matrix {path} cannot be read: {error.strerror}.", code=2) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DoctorError(f"The matrix {path} is not YAML: {error}.", "Repair the file.") from error
    try:
        matrix = msgspec.convert(_plain(raw), Matrix)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DoctorError(f"The matrix {path} does not fit its schema: {error}.", "Repair the file.") from error
    problems = lint(matrix)
    if problems:
        raise DoctorError(f"The matrix {path} has a fault: {problems[0]}", "Repair the file.")
    return matrix


def _plain(value: object) -> object:
    """YAML reads a bare 2026-11-24 as a date; the matrix keeps dates as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime.date) else value


def lint(matrix: Matrix) -> list[str]:
    """Faults that a schema cannot see: bad versions and specifiers, double ids, sources that name no place."""
    problems = [] if matrix.schema == 1 else [f"schema is {matrix.schema}; this doctor reads 1."]
    for stack in matrix.stacks:
        bad = [arch for arch in stack.gpu_archs if not re.fullmatch(r"sm_\d{2,3}[a-z]?", arch)]
        problems += [f"{stack.name}: {arch!r} is no GPU architecture such as sm_90." for arch in bad]
        problems += [f"{stack.name}: {fault}" for fault in _bad_specifiers((stack.python, stack.driver or ""))]
        for name, pin in stack.packages.items():
            problems += [f"{stack.name}.{name}: {fault}" for fault in _bad_specifiers((pin.accepts,))]
            try:
                Version(pin.version)
            except InvalidVersion:
                problems.append(f"{stack.name}.{name}: {pin.version!r} is not a version.")
    ids = [rule.id for rule in matrix.rules]
    problems += [f"{rule_id}: stands twice." for rule_id in sorted({i for i in ids if ids.count(i) > 1})]
    for rule in matrix.rules:
        problems += [f"{rule.id}: {fault}" for fault in _bad_specifiers((rule.need, *rule.when.values()))]
        if not rule.source or not rule.because:
            problems.append(f"{rule.id}: every row needs because and source.")
        problems += [f"{rule.id}: {s!r} is no public source." for s in rule.source if not _public(s)]
    return problems


def _bad_specifiers(texts: tuple[str, ...]) -> list[str]:
    faults = []
    for text in texts:
        try:
            SpecifierSet(text)
        except InvalidSpecifier:
            faults.append(f"{text!r} is not a version specifier.")
    return faults


def _public(source: str) -> bool:
    """A source is a URL, repository@commit:path, a wheel of the public index, or a command in benchmarks/."""
    return source.startswith(("https://", "benchmarks/", "pypi:")) or ("@" in source and "/" in source)


def choose(matrix: Matrix, facts: Facts, *, cpu: bool = False) -> Choice:
    """Pick the stack for this driver, these GPUs and this Python, newest CUDA first.

    Stacks stand in the matrix in order of age. On a machine with GPUs a CPU stack is chosen only with `cpu`.
    """
    refused: dict[str, str] = {}
    trouble = "" if cpu else driver_trouble(facts)
    if trouble:
        refused = {stack.name: trouble for stack in matrix.stacks}
        return Choice(None, f"No stack fits while {trouble}: mend the driver, or give --cpu.", refused)
    fitting: list[Stack] = []
    for stack in matrix.stacks:
        why = why_not(stack, facts, cpu=cpu)
        if why:
            refused[stack.name] = why
        else:
            fitting.append(stack)
    if not fitting:
        return Choice(None, _no_stack(facts, refused, cpu), refused)
    best = max(fitting, key=lambda s: (_rank(s, facts, cpu), matrix.stacks.index(s)))
    for stack in fitting:
        if stack is not best:
            refused[stack.name] = f"fits too; {best.name} is preferred"
    return Choice(best.name, _reason(best, facts, cpu), refused)


def _rank(stack: Stack, facts: Facts, cpu: bool) -> tuple[int, ...]:
    """On CPU ranks a CPU build is 2 GB lighter; on GPUs the newest CUDA that the driver takes wins."""
    if cpu or not facts.gpus:
        return (1 if stack.is_cpu else 0,)
    return tuple(int(part) for part in (stack.cuda or "0").split("."))


def driver_trouble(facts: Facts) -> str:
    """Why the GPUs are unknown on a machine that has a driver; empty where they are known or there is none.

    Without this a driver that is out of order would look like a machine without GPUs, and get a CPU torch.
    """
    reason = facts.unknown.get("gpus", "")
    return "" if facts.gpus is not None or not reason or reason.startswith(NO_DRIVER) else reason


def why_not(stack: Stack, facts: Facts, *, cpu: bool = False) -> str:
    """The first reason why a stack does not fit this machine; empty where it fits."""
    if facts.python and not SpecifierSet(stack.python).contains(facts.python.version, prereleases=True):
        return f"wants Python {stack.python}; this is {facts.python.version}"
    if facts.host and (facts.host.system != "Linux" or facts.host.machine != "x86_64"):
        return f"its wheels are for Linux x86_64; this is {facts.host.system} {facts.host.machine}"
    if cpu or not facts.gpus:
        return ""  # a CUDA build runs on CPU ranks too
    if stack.is_cpu:
        return "is a CPU build and this machine has GPUs (give --cpu to train on the CPU)"
    return _driver_reason(stack, facts) or _arch_reason(stack, facts.gpus)


def _driver_reason(stack: Stack, facts: Facts) -> str:
    if facts.driver is None or not facts.gpus:
        return "the driver's version is unknown"
    blackwell = any(gpu.capability[0] >= 10 for gpu in facts.gpus)
    need = (stack.driver_blackwell if blackwell else None) or stack.driver or ""
    if not SpecifierSet(need).contains(facts.driver.version):
        return f"wants driver {need}; this one is {facts.driver.version}"
    return ""


def _arch_reason(stack: Stack, gpus: tuple[Gpu, ...]) -> str:
    for gpu in gpus:
        if not has_kernels(stack.gpu_archs, gpu.capability):
            major, minor = gpu.capability
            return f"has no kernels for {gpu.name} (sm_{major}{minor}): it ships {' '.join(stack.gpu_archs)}"
    return ""


def has_kernels(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """A cubin sm_XY runs on X.Z with Z >= Y and the same major (torch/cuda/__init__.py, _check_cubins)."""
    pairs = [(int(arch[3:-1]), int(arch[-1])) for arch in archs]
    return any(major == capability[0] and minor <= capability[1] for major, minor in pairs)


def _reason(stack: Stack, facts: Facts, cpu: bool) -> str:
    python = facts.python.version if facts.python else "unknown"
    if cpu or not facts.gpus:
        why = "--cpu was given" if cpu and facts.gpus else "no GPU is visible"
        return f"{why}; Python {python} fits {stack.python}"
    driver = facts.driver.version if facts.driver else "unknown"
    return f"driver {driver}, {facts.gpus[0].name} and Python {python} take CUDA {stack.cuda}"


def _no_stack(facts: Facts, refused: dict[str, str], cpu: bool) -> str:
    what = "CPU ranks" if cpu or not facts.gpus else f"{len(facts.gpus)} × {facts.gpus[0].name}"
    return f"No stack fits {what} here: " + "; ".join(f"{name} {why}" for name, why in refused.items()) + "."


def requirements(stack: Stack, *, with_optional: bool = True) -> list[str]:
    """Lines of a pip requirements file that installs the stack, index lines first."""
    pins = {n: p for n, p in stack.packages.items() if with_optional or p.role in ("core", "install")}
    indexes = dict.fromkeys(pin.index for pin in pins.values() if pin.index and pin.index_required)
    return [f"--extra-index-url {index}" for index in indexes] + [f"{n}=={p.version}" for n, p in pins.items()]
