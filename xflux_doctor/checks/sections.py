"""LA2: the sections of accelerate's file (all but DeepSpeed's), as the installed release reads them.

accelerate takes whatever key stands in a section without a word (0.30.1 and 1.15.0, commands/launch.py: `setattr`),
so that a misspelt key means: the run goes by a default.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from packaging.version import Version

from xflux_doctor.accelerate_keys import KEYS, TYPES
from xflux_doctor.accelerate_sections import (
    FLAGS,
    RENAMED,
    SHARDING,
    as_bool,
    flag_of,
    known_flags,
    span_of,
)
from xflux_doctor.check import Case, check
from xflux_doctor.checks.releases import harmless, install, local, other_release, release, stops_with
from xflux_doctor.finding import Change, Comment, Finding, Rename, error, warning

OURS = tuple(section for section in FLAGS if section != "deepspeed_config")
"""The sections judged here; DeepSpeed's has its own checks (LA301 …)."""
_USED_BY = {"fsdp_config": "FSDP", "megatron_lm_config": "MEGATRON_LM"}


def settings(case: Case, section: str, version: Version) -> dict[str, tuple[str, object]]:
    """{flag: (key as it is written, value)} of a section."""
    return {flag_of(section, str(key), version): (str(key), value) for key, value in case.job.section(section).items()}


def in_use(case: Case, section: str) -> bool:
    """Whether this job's launch goes by the section."""
    if section == "fp8_config":
        return str(case.job.get("mixed_precision")).lower() == "fp8"
    if section == "mpirun_config":
        return case.job.distributed_type in ("NO", "MULTI_CPU")
    return _USED_BY.get(section, case.job.distributed_type) == case.job.distributed_type


@check("LA201", "accelerate knows the keys of its file's sections", needs=("accelerate",))
def section_keys(case: Case) -> Iterator[Finding]:
    """A section's unknown key is taken without a word and does nothing: the run goes by the default."""
    version = release(case)
    local(case)
    for section in OURS:
        known = known_flags(section, version)
        present = settings(case, section, version)
        free = set(known - set(present))
        if not KEYS[section].has(version):
            continue  # the whole section is another release's: LA202
        for flag, (key, value) in present.items():
            if flag in known or (span_of(section, flag) is not None and not _renamed(section, flag)):
                continue
            near = _nearest(section, flag, frozenset(free))
            free.discard(near)  # two keys cannot both be one
            yield _unknown(section, key, flag, value, version, near)


def misspelt(case: Case, section: str, version: Version) -> bool:
    """Whether LA201 renames a key of the section: until then nobody can say what else is missing there."""
    known, present = known_flags(section, version), settings(case, section, version)
    strange = (
        flag for flag in present if flag not in known and (span_of(section, flag) is None or _renamed(section, flag))
    )
    return any(_nearest(section, flag, known - set(present)) for flag in strange)


def _renamed(section: str, flag: str) -> bool:
    return (section, flag) in RENAMED


def _unknown(section: str, key: str, flag: str, value: object, version: Version, near: str) -> Finding:
    seen = f"{section}.{key} is {value!r}; accelerate {version} has no such key."
    because = "It is taken without a word and does nothing: the run goes by accelerate's default."
    if not near:
        return warning(seen, because, "Remove it, or write the key that is meant.")
    prefix = flag[: len(flag) - len(key)] if flag.endswith(key) else ""
    new = near.removeprefix(prefix)
    edit = Rename("accelerate", (section, key), new, f"accelerate {version} has no {key}")
    return error(seen, because, f"Did you mean {new}?", edits=(edit,))


def _nearest(section: str, flag: str, free: frozenset[str]) -> str:
    named = RENAMED.get((section, flag))
    if named is not None:
        return named if named in free else ""
    close = difflib.get_close_matches(flag, sorted(free), n=1, cutoff=0.85)
    if close:
        return close[0]
    # A key without its section's prefix: `strategy` is no slip of the pen, `sharding_strategy` is one.
    return next(
        (full for full in sorted(free) if full.partition("_")[2] == flag or full.endswith("_config_" + flag)), ""
    )


@check("LA202", "the installed accelerate is one that does what its file says", needs=("accelerate",))
def of_this_release(case: Case) -> Iterator[Finding]:
    """Keys, sections and words that another release knows: commented out where they change nothing in the training,
    and a reason to install that release where they do."""
    version = release(case)
    local(case)
    for key in case.job.accelerate or {}:
        span = KEYS.get(str(key))
        if span is None or span.has(version):
            continue
        reason = harmless(case, str(key))
        seen, stops = f"{key} is a key of {span.words}; {version} is installed.", stops_with(version, str(key))
        if reason:
            out = Comment("accelerate", (str(key),), f"accelerate {version} has no {key}, and {reason}")
            yield error(seen, stops, f"Comment it out: {reason}.", edits=(out,))
        else:
            yield other_release(case, seen, span, f"{stops} Without it the training would be another.")
    word = case.job.get("distributed_type")
    span = TYPES.get(word) if isinstance(word, str) else None
    if span is not None and not span.has(version) and word not in ("TPU", "MPS"):
        because = f"accelerate {version}: {word!r} is not a valid DistributedType."
        yield other_release(case, f"distributed_type is {word}.", span, because)
    for section in OURS:
        if KEYS[section].has(version) and in_use(case, section):
            yield from _keys_of_others(case, section, version)


_SLOWER = frozenset("fsdp_activation_checkpointing fsdp_activation_checkpointing_offload fsdp_forward_prefetch "
                    "fsdp_cpu_ram_efficient_loading dynamo_use_regional_compilation".split())  # fmt: skip
"""Without these the same steps are made with another need of memory or time."""
_BY_VARIABLE = {"fsdp_activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING"}
"""Source: accelerate 0.30.1, utils/dataclasses.py: the plugin reads it, and only 0.31.0's launcher sets it."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "fsdp_version": (1, "1"), "fsdp_forward_prefetch": (False,), "fsdp_cpu_ram_efficient_loading": (False,),
    "fp8_enable_fsdp_float8_all_gather": (True,), "fp8_pad_inner_dim": (True,),
    "parallelism_config_cp_backend": ("torch",), "parallelism_config_sp_backend": ("deepspeed",),
    "parallelism_config_sp_size": (1,), "parallelism_config_sp_attn_implementation": ("sdpa",),
    "parallelism_config_sp_seq_length_is_variable": (True,),
}  # fmt: skip
"""Values under which a key of a later release says what an older one does anyway."""
_READ_ELSEWHERE = frozenset({"fsdp_reshard_after_forward", "fsdp_backward_prefetch_policy", "mpirun_ccl"})
"""Judged by LA205 or renamed by LA201; mpirun_ccl sets a variable of oneCCL alone."""


def _keys_of_others(case: Case, section: str, version: Version) -> Iterator[Finding]:
    for flag, (key, value) in settings(case, section, version).items():
        span = span_of(section, flag)
        if span is None or span.has(version) or flag in _READ_ELSEWHERE:
            continue
        if value is None or value in _NEUTRAL.get(flag, ()) or (flag not in _NEUTRAL and as_bool(value) is False):
            continue
        seen = f"{section}.{key} is {value!r}, a key of {span.words}; {version} is installed."
        if flag in _SLOWER:
            variable = _BY_VARIABLE.get(flag)
            hint = f"Set {variable}=true in the job's environment" if variable else install(case, span)[0].rstrip(".")
            commands = (f"export {variable}=true",) if variable else install(case, span)[1]
            yield warning(seen, f"accelerate {version} ignores it without a word.", f"{hint}.", commands=commands)
        else:
            yield other_release(case, seen, span, f"accelerate {version} ignores it without a word.")


@check("LA211", "old forms do not contradict new ones", needs=("accelerate",))
def old_forms(case: Case) -> Iterator[Finding]:
    """fp16 and dynamo_backend at the top are forms of 0.10 to 0.16, converted on load (config_args.py).

    mixed_precision wins over fp16, and dynamo_backend over the whole of dynamo_config.
    """
    local(case)
    mapping = case.job.accelerate or {}
    if "fp16" in mapping and "mixed_precision" in mapping:
        precision = "no" if mapping["mixed_precision"] in (None, False) else str(mapping["mixed_precision"]).lower()
        if (precision == "fp16") != bool(mapping["fp16"]) and (precision == "no" or mapping["fp16"]):
            yield warning(
                f"fp16 is {mapping['fp16']!r} and mixed_precision is {mapping['mixed_precision']!r}.",
                "accelerate goes by mixed_precision and drops fp16 without a word.",
                "Remove fp16 once mixed_precision says what you mean.",
            )
    if "dynamo_backend" in mapping and case.job.section("dynamo_config"):
        yield warning(
            f"dynamo_backend is {mapping['dynamo_backend']!r} at the top, and there is a dynamo_config.",
            "accelerate drops the whole of dynamo_config without a word.",
            "Move dynamo_backend into dynamo_config.",
        )


@check("LA212", "the sections that are filled are used", needs=("accelerate",))
def sections_used(case: Case) -> Iterator[Finding]:
    """fsdp_config is read with distributed_type FSDP only, fp8_config with mixed_precision fp8 only, and so on."""
    version = release(case)
    local(case)
    kind = case.job.distributed_type
    for section, wanted in (("deepspeed_config", "DEEPSPEED"), *_USED_BY.items()):
        if case.job.section(section) and kind != wanted and kind in TYPES:
            yield warning(
                f"{section} is filled, and distributed_type is {kind}.",
                f"accelerate {version} goes by it with distributed_type {wanted} only; here nothing comes of it.",
                f"Set distributed_type to {wanted} if that is what you mean, or remove the section.",
            )
    if case.job.section("fp8_config") and not in_use(case, "fp8_config") and KEYS["fp8_config"].has(version):
        yield warning(
            f"fp8_config is filled, and mixed_precision is {case.job.get('mixed_precision')!r}.",
            "accelerate goes by it with mixed_precision fp8 only; here nothing comes of it.",
            "Set mixed_precision to fp8 if that is what you mean, or remove the section.",
        )


@check("LA209", "what accelerate's file sets reaches the launch", needs=("accelerate",))
def reaches_the_launch(case: Case) -> Iterator[Finding]:
    """enable_cpu_affinity does not, nor what LA409 names: a file fills only those flags whose default is None.

    Source: accelerate 0.30.1 and 1.15.0, commands/launch.py, `getattr(args, name, None) is None`; run with each.
    """
    version = release(case)
    local(case)
    if case.job.get("enable_cpu_affinity") is True and version >= Version("0.29.0"):
        yield warning(
            "enable_cpu_affinity is true in accelerate's file.",
            f"accelerate {version} reads it from its flag alone: nothing comes of it.",
            "Give `accelerate launch` the flag --enable_cpu_affinity, or set the variable.",
            commands=("export ACCELERATE_CPU_AFFINITY=1",),
        )


@check("LA210", "mpirun is called with a host file only", needs=("accelerate",))
def mpirun(case: Case) -> Iterator[Finding]:
    """mpirun starts the ranks of MULTI_CPU as soon as mpirun_hostfile has any value, even an empty one.

    Source: accelerate 0.30.1 and 1.15.0, utils/launch.py, prepare_simple_launcher_cmd_env.
    """
    local(case)
    release(case)
    section = case.job.section("mpirun_config")
    value = section.get("mpirun_hostfile")
    if value is None or case.job.distributed_type not in ("NO", "MULTI_CPU"):
        return
    if isinstance(value, str) and value.strip():
        if case.job.num_machines <= 1:
            yield warning(
                f"mpirun_config.mpirun_hostfile is {value!r}, for one machine.",
                "mpirun starts the ranks; without it: 'mpirun or mpiexec were not found'.",
                "Remove mpirun_config unless mpirun shall start them.",
            )
        return
    edits: tuple[Change, ...] = ()
    if value in ("", False, [], {}):
        edits = (Comment("accelerate", ("mpirun_config", "mpirun_hostfile"), "it names no file"),)
    because = "accelerate calls mpirun with it as soon as it is set."
    yield error(f"mpirun_config.mpirun_hostfile is {value!r}.", because, "Name a host file, or none.", edits=edits)


def sharding_word(value: object) -> str:
    """The name of a sharding strategy that stands as a name or as torch's number; empty where it is none."""
    text = str(value).strip().upper()
    if text.isascii() and text.isdigit() and len(text) < 9:
        return SHARDING[int(text) - 1] if 1 <= int(text) <= len(SHARDING) else ""
    return text if text in SHARDING else ""
