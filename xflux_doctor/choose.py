"""Which stack fits a machine: the driver, the GPUs, the Python and the system's libraries decide together."""

from __future__ import annotations

import msgspec
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from xflux_doctor.facts import Facts, Gpu
from xflux_doctor.matrix_types import Matrix, Stack, has_kernels

NO_DRIVER = "there is no NVIDIA driver"
"""How the reason begins when there is none at all."""


class Choice(msgspec.Struct, frozen=True):
    """The stack chosen for a machine, and why each other one was not."""

    stack: str | None
    because: str
    refused: dict[str, str] = {}


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
    if old := _glibc_reason(stack, facts):
        return old
    if cpu or not facts.gpus:
        return ""  # a CUDA build runs on CPU ranks too
    if stack.is_cpu:
        return "is a CPU build and this machine has GPUs (give --cpu to train on the CPU)"
    return _driver_reason(stack, facts) or _arch_reason(stack, facts.gpus)


def _glibc_reason(stack: Stack, facts: Facts) -> str:
    """pip takes no wheel whose tag names a newer glibc (PEP 600)."""
    try:
        if stack.glibc and facts.host and Version(facts.host.glibc) < Version(stack.glibc):
            return f"its wheels want glibc {stack.glibc}; this is {facts.host.glibc}"
    except InvalidVersion:
        pass  # not known: the install will tell
    return ""


def driver_need(stack: Stack, gpus: tuple[Gpu, ...]) -> str:
    """The specifier of drivers that run the stack on these cards; Blackwell wants a newer one."""
    blackwell = any(gpu.capability[0] >= 10 for gpu in gpus)
    return (stack.driver_blackwell if blackwell else None) or stack.driver or ""


def _driver_reason(stack: Stack, facts: Facts) -> str:
    if facts.driver is None or not facts.gpus:
        return "the driver's version is unknown"
    need = driver_need(stack, facts.gpus)
    if not SpecifierSet(need).contains(facts.driver.version):
        return f"wants driver {need}; this one is {facts.driver.version}"
    return ""


def _arch_reason(stack: Stack, gpus: tuple[Gpu, ...]) -> str:
    for gpu in gpus:
        if not has_kernels(stack.gpu_archs, gpu.capability):
            major, minor = gpu.capability
            return f"has no kernels for {gpu.name} (sm_{major}{minor}): it ships {' '.join(stack.gpu_archs)}"
    return ""


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
