"""LA: the keys and words of accelerate's file, as the installed release takes them."""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Iterator

from packaging.version import Version

from xflux_doctor.accelerate_keys import PRECISIONS, accepted_keys, distributed_types, in_section, section_of
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.releases import key_span, local, release, stops_with, type_span
from xflux_doctor.facts import Gpu
from xflux_doctor.finding import Comment, Edit, Finding, Nest, Rename, error
from xflux_doctor.versions import version_of
from xflux_doctor.visible import selected

_ALIASES = {"GPU": "MULTI_GPU", "DDP": "MULTI_GPU", "CPU": "NO", "SINGLE_GPU": "NO", "NONE": "NO", "FALSE": "NO",
            "TPU": "XLA", "MPS": "NO"}  # fmt: skip
"""Words that people or older releases write for a distributed_type."""
_MANY = 40
"""No file of accelerate's has so many strange keys (all releases' top-level keys together are fewer)."""
_DIGITS = 18
"""A longer number is none that could be meant."""
_READ_WITH = {"deepspeed_config": "DEEPSPEED", "fsdp_config": "FSDP", "megatron_lm_config": "MEGATRON_LM"}
"""Sections that one strategy alone goes by."""


def _foreign(case: Case) -> bool:
    """Whether the file is for a service: its keys are then others, and none of ours to judge or to change."""
    return bool(case.job.get("compute_environment") == "AMAZON_SAGEMAKER")


@check("LA114", "accelerate's file is for this machine", needs=("accelerate",))
def for_this_machine(case: Case) -> Iterator[Finding]:
    """compute_environment AMAZON_SAGEMAKER sends the job to a service (accelerate, commands/launch.py)."""
    if _foreign(case):
        yield error(
            f"compute_environment is {case.job.get('compute_environment')!r}.",
            "`accelerate launch` would hand the job to a service and start nothing here; the file is left alone.",
            "Name a file with compute_environment: LOCAL_MACHINE, or let `fix --write-config` make one in a folder "
            "without this file.",
        )


@check("LA103", "accelerate knows every key of its file", needs=("accelerate",))
def keys_known(case: Case) -> Iterator[Finding]:
    """An unknown top-level key stops accelerate. A slip of the pen is renamed, a key that lost its section goes back
    into it, and a key that no release has is commented out; what another release knows is LA202's."""
    assert case.job.accelerate is not None
    version = release(case)
    local(case)
    unknown = unknown_keys(case, version)
    if len(unknown) > _MANY:
        first = next(iter(unknown))
        seen = f"accelerate {version} does not know {len(unknown)} keys of this file, {first!r} to begin with."
        yield error(seen, "It stops at them. The file is probably another program's.", "Name accelerate's own file.")
        return
    for key, near in unknown.items():
        seen, because = f"accelerate {version} does not know the key {key!r}.", stops_with(version, key)
        if near:
            rename = Rename("accelerate", (key,), near, f"unknown to accelerate {version}")
            yield error(seen, because, f"Did you mean {near}?", edits=(rename,))
        elif key_span(key) is None:
            yield _stray(case, key, seen, because)


def _stray(case: Case, key: str, seen: str, because: str) -> Finding:
    """A key that no release has at the top of its file."""
    section, value = section_of(key), case.job.get(key)
    wanted = _READ_WITH.get(section)
    if wanted and case.job.get("distributed_type") in [word for word in distributed_types(None) if word != wanted]:
        reason = f"accelerate reads it in {section} with distributed_type {wanted} only"
        out = Comment("accelerate", (key,), reason)
        return error(seen, because, f"Comment it out: {reason}.", edits=(out,))
    if section and (value is None or isinstance(value, str | int | float)):
        held = case.job.get(section)
        if held is None or (isinstance(held, dict) and held.get(key, value) == value):
            move = Edit("accelerate", (section, key), value, f"it is one of {section}'s keys")
            out = Comment("accelerate", (key,), f"it stands in {section} now")
            return error(seen, because, f"Move it into {section}.", edits=(move, out))
        return error(seen, because, f"Move it into {section}, which has another value for it, or is none.")
    if isinstance(value, dict) and value:
        return error(seen, because, f"No accelerate up to 1.15.0 has {key}. Say what it is meant for, or remove it.")
    out = Comment("accelerate", (key,), "no accelerate up to 1.15.0 has such a key")
    return error(seen, because, "Remove it: no release has ever read it.", edits=(out,))


def unknown_keys(case: Case, version: Version | None) -> dict[str, str]:
    """{key that this accelerate does not know: the known one that is meant, or nothing}."""
    if version is None:
        return {}
    lost = {member for members in flattened(case).values() for member in members}  # LA113 moves them back
    present = {str(key) for key in case.job.accelerate or {} if key not in lost}
    known = accepted_keys(version)
    found: dict[str, str] = {}
    strange = list(
        dict.fromkeys(key for key in map(str, case.job.accelerate or {}) if key in present and key not in known)
    )
    if len(strange) > _MANY:
        return dict.fromkeys(strange, "")
    for key in strange:
        # The name of another release's key is no slip of the pen, and two keys cannot both be one.
        taken = present | set(found.values())
        close = difflib.get_close_matches(key, sorted(known - taken), n=1, cutoff=0.8)
        found[key] = close[0] if close and key_span(key) is None and not section_of(key) else ""
    return found


def flattened(case: Case) -> dict[str, tuple[str, ...]]:
    """{section without a value: the keys right below it that belong into it}, as after a copy that lost the spaces."""
    names = [str(key) for key in case.job.accelerate or {}]
    found = {}
    for at, name in enumerate(names):
        if case.job.get(name) is not None or not any(in_section(name, key) for key in names[at + 1 : at + 2]):
            continue
        found[name] = tuple(itertools.takewhile(functools.partial(in_section, name), names[at + 1 :]))
    return found


@check("LA113", "the sections of accelerate's file are indented", needs=("accelerate",))
def sections_indented(case: Case) -> Iterator[Finding]:
    """A file copied from a web page loses its indentation: a section's keys stand at the top, unknown there."""
    for section, members in flattened(case).items():
        yield error(
            f"{section} has no value, and {', '.join(members)} stand below it without indentation.",
            f"accelerate stops with: The config file had unknown keys ({list(members)}), or runs without them.",
            f"Indent them below {section}.",
            edits=(Nest("accelerate", (section,), members, f"they are {section}'s keys"),),
        )


@check("LA104", "accelerate's values are ones that it takes", needs=("accelerate",))
def values_known(case: Case) -> Iterator[Finding]:
    """distributed_type, mixed_precision, num_processes, num_machines and gpu_ids have their types and ranges."""
    job = case.job
    if _foreign(case):
        raise SkipCheck("the file is not for this machine (see LA114)")
    yield from _compute_environment(case)
    # A misspelt key is renamed first (LA103): it is not missing.
    coming = set(unknown_keys(case, installed(case, "accelerate")).values())
    if "distributed_type" not in (job.accelerate or {}):
        if "distributed_type" not in coming:
            edit = Edit("accelerate", ("distributed_type",), _meant(case), "what the rest of the file means")
            yield error("distributed_type is missing.", "accelerate refuses the file.", "Set it.", edits=(edit,))
    else:
        yield from _distributed_type(case)
    section = job.get("deepspeed_config")
    if job.deepspeed and section is not None and not isinstance(section, dict):
        yield error(
            f"deepspeed_config is {type(section).__name__} {section!r}, not keys and values.",
            f"accelerate dies with: '{type(section).__name__}' object has no attribute 'keys'.",
            "Indent DeepSpeed's keys below it.",
        )
    yield from _precision(case)
    for key, least in (("num_processes", 1), ("num_machines", 1), ("machine_rank", 0)):
        value = job.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            repaired = _repaired_number(value, least)
            if repaired is None and key == "num_processes":
                repaired = len(devices(case) or ()) or None
            edits = (Edit("accelerate", (key,), repaired, "a whole number"),) if repaired is not None else ()
            hint = f"Set {key} to {repaired if repaired is not None else least}."
            yield error(f"{key} is {value!r}.", f"It must be a whole number of at least {least}.", hint, edits=edits)
    if job.get("num_processes") is None and job.distributed_type != "NO" and "num_processes" not in coming:
        yield error(
            "num_processes is missing.",
            "accelerate refuses the file.",
            "Set it to the number of GPUs.",
            edits=(Edit("accelerate", ("num_processes",), max(1, len(devices(case) or ())), "one rank per device"),),
        )
    if isinstance(job.get("gpu_ids"), list):
        edit = Edit("accelerate", ("gpu_ids",), ",".join(map(str, job.get("gpu_ids"))), "accelerate splits it as text")
        because = "accelerate dies with: 'list' object has no attribute 'split'."
        yield error(f"gpu_ids is the list {job.get('gpu_ids')}.", because, "Write it as text.", edits=(edit,))
    if isinstance(job.get("gpu_ids"), int) and not isinstance(job.get("gpu_ids"), bool):
        edit = Edit("accelerate", ("gpu_ids",), str(job.get("gpu_ids")), "accelerate splits it as text")
        because = "accelerate dies with: 'int' object has no attribute 'split'."
        yield error(f"gpu_ids is the number {job.get('gpu_ids')}.", because, "Quote it.", edits=(edit,))


def _compute_environment(case: Case) -> Iterator[Finding]:
    """accelerate reads a file with any word but LOCAL_MACHINE as SageMaker's (0.30.1 and 1.15.0, config_args.py)."""
    value = case.job.get("compute_environment", "LOCAL_MACHINE")
    if value == "LOCAL_MACHINE":
        return
    word = "LOCAL_MACHINE" if value is None else str(value).upper()  # without a value it says nothing
    near = difflib.get_close_matches(word, ["LOCAL_MACHINE"], n=1, cutoff=0.5)
    edits = (Edit("accelerate", ("compute_environment",), near[0], "accelerate's own word"),) if near else ()
    because = "accelerate takes the file for SageMaker's, whose keys are others: The config file had unknown keys."
    yield error(f"compute_environment is {value!r}.", because, "Use LOCAL_MACHINE.", edits=edits)


def _meant(case: Case) -> str:
    if isinstance(case.job.get("deepspeed_config"), dict):
        return "DEEPSPEED"
    value = case.job.get("num_processes")
    return "MULTI_GPU" if isinstance(value, int) and value > 1 else "NO"


def _distributed_type(case: Case) -> Iterator[Finding]:
    """accelerate takes these words in upper case only; a bare no is read as False, which it takes.

    What another release takes is LA202's, unless it has a word of today: TPU became XLA in 0.28.0, and since 0.20.0
    a Mac's GPU is found without MPS.
    """
    value, version = case.job.get("distributed_type"), installed(case, "accelerate")
    known = distributed_types(version)
    if value is False or (isinstance(value, str) and value in known):
        return
    word = str(value).strip().upper().replace("-", "_")
    near = [word] if word in known else [_ALIASES[word]] if _ALIASES.get(word) in known else []
    if not near and type_span(word) is not None:
        return
    usual = ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP")
    near = near or difflib.get_close_matches(word, usual, n=1, cutoff=0.6)
    edits = (Edit("accelerate", ("distributed_type",), near[0], "accelerate's own word"),) if near else ()
    seen = f"distributed_type is {value!r}."
    yield error(seen, f"accelerate: {value!r} is not a valid DistributedType.", _one_of(usual), edits=edits)


def _precision(case: Case) -> Iterator[Finding]:
    value = case.job.get("mixed_precision")
    if value is None or (isinstance(value, str) and value.lower() in PRECISIONS):
        return  # accelerate lowers its case
    if value is False:
        version = installed(case, "accelerate")
        if version is None or version >= Version("0.34.0"):
            edit = Edit("accelerate", ("mixed_precision",), "no", "a bare no is read as False")
            because = "YAML reads a bare no as False, and accelerate dies: 'bool' object has no attribute 'lower'."
            yield error("mixed_precision is a bare no.", because, "Quote it.", edits=(edit,))
        return
    near = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "fp32": "no", "float32": "no", "none": "no"}
    word = str(value).strip().lower()
    guess = word if word in PRECISIONS else near.get(word)
    edits = (Edit("accelerate", ("mixed_precision",), guess, "accelerate's own word"),) if guess else ()
    seen = f"mixed_precision is {value!r}."
    because = "accelerate: Unknown mixed_precision mode."
    if not isinstance(value, str):
        because = f"accelerate dies with: '{type(value).__name__}' object has no attribute 'lower'."
    yield error(seen, because, _one_of(PRECISIONS), edits=edits)


def _one_of(words: tuple[str, ...]) -> str:
    return "Use one of: " + ", ".join(words) + "."


def _repaired_number(value: object, least: int) -> int | None:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal() or len(text) > _DIGITS:
        return None
    return int(text) if int(text) >= least else None


def installed(case: Case, name: str) -> Version | None:
    return version_of(case.facts, name)


def devices(case: Case) -> tuple[Gpu, ...] | None:
    """The GPUs that this job's ranks would share; `None` when the GPUs are unknown."""
    if case.facts.gpus is None:
        return None
    return selected(case.facts.gpus, case.facts.environment, case.job.gpu_ids)
