"""What the checks of accelerate's file share: the release that is installed, the one that is needed, and who has it."""

from __future__ import annotations

from packaging.version import Version

from xflux_doctor import choose
from xflux_doctor.accelerate_keys import KEYS, TYPES
from xflux_doctor.accelerate_sections import Span
from xflux_doctor.check import Case, SkipCheck
from xflux_doctor.finding import Finding, error
from xflux_doctor.versions import version_of

UNREAD_SINCE = Version("0.23.0")
"""First release that lists all unknown keys (huggingface/accelerate@cec5ae8e); older ones die of the first."""
_EMPTY: tuple[object, ...] = (None, "", [], {})


def release(case: Case) -> Version:
    """The installed accelerate; without one nothing can be said about its words."""
    version = version_of(case.facts, "accelerate")
    if version is None:
        raise SkipCheck("accelerate is not installed, so its keys are not known")
    return version


def local(case: Case) -> None:
    """A service's file has keys of its own (LA114)."""
    if case.job.get("compute_environment") == "AMAZON_SAGEMAKER":
        raise SkipCheck("the file is not for this machine (see LA114)")


def install(case: Case, span: Span) -> tuple[str, tuple[str, ...]]:
    """(the next step, the command): the best stack for this machine that has such a release, else pip."""
    best = choose.choose(case.matrix, case.facts, cpu=case.job.use_cpu).stack
    for stack in sorted(case.matrix.stacks, key=lambda stack: stack.name != best):
        pin = stack.packages.get("accelerate")
        fits = pin is not None and span.has(Version(pin.version))
        if pin is not None and fits and not choose.why_not(stack, case.facts, cpu=case.job.use_cpu):
            command = f"xflux-doctor fix --install --stack {stack.name}"
            return f"Install stack {stack.name}, which has accelerate {pin.version}.", (command,)
    wanted = f">={span.since}" if span.since else ""
    wanted += ("," if wanted and span.until else "") + (f"<{span.until}" if span.until else "")
    return f"Install accelerate {wanted}.", (f"python -m pip install 'accelerate{wanted}'",)


def other_release(case: Case, seen: str, span: Span, because: str) -> Finding:
    """What the file says means something to another release only: nothing is edited, the right release is named."""
    step, commands = install(case, span)
    hint = f"It is for {span.words}. {step} Or write what you mean in the words of {release(case)}."
    return error(seen, because, hint, commands=commands)


def stops_with(version: Version, key: str) -> str:
    """How this release dies of an unknown top-level key."""
    if version >= UNREAD_SINCE:
        return f"It stops with: The config file had unknown keys (['{key}'])."
    return f"It stops with: TypeError: __init__() got an unexpected keyword argument '{key}'."


def harmless(case: Case, key: str) -> str:
    """Why a top-level key of another release may go without changing the training; empty where it may not.

    Source: accelerate 0.30.1 and 1.15.0, commands/launch.py and utils/launch.py, run with each of these keys.
    """
    value = case.job.get(key)
    if value in _EMPTY or (isinstance(value, dict) and all(item in _EMPTY for item in value.values())):
        return "it says nothing"
    if key in ("enable_cpu_affinity", "same_network", "rdzv_backend"):
        return "no release's launch reads it out of a file"
    if value is False or (isinstance(value, str) and value.strip().lower() in ("no", "false")):
        return "it asks for nothing"
    if key == "debug":
        return "it only adds checks of every collective call"
    if key == "ipex_config":
        return "it concerns Intel's extension only, which newer releases leave to torch"
    if key == "mpirun_config" and case.job.distributed_type not in ("NO", "MULTI_CPU"):
        return f"mpirun is not used with distributed_type {case.job.distributed_type}"
    if key == "fp8_config" and str(case.job.get("mixed_precision")).lower() != "fp8":
        return "mixed_precision is not fp8"
    if key in ("tp_config", "parallelism_config") and isinstance(value, dict) and _sizes_are_one(value):
        return "every size in it is 1"
    return ""


def _sizes_are_one(section: dict[object, object]) -> bool:
    return all(value == 1 and value is not True for key, value in section.items() if str(key).endswith("_size"))


def key_span(key: str) -> Span | None:
    return KEYS.get(key)


def type_span(word: str) -> Span | None:
    return TYPES.get(word)
