"""LA: the DeepSpeed file's own keys and values, against the installed DeepSpeed and accelerate."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from packaging.version import Version

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.deepspeed import ABSENT, Path, file_of, name_of, number, on_file, value_at
from xflux_doctor.checks.words import installed
from xflux_doctor.deepspeed_keys import (
    CLEANED,
    COMPILE,
    PRECISION,
    REMOVED,
    REMOVED_ZERO,
    STRICT_COMPILE,
    STRICT_PRECISION,
    TOP,
    offload_keys,
    zero_keys,
)
from xflux_doctor.finding import Change, Edit, Finding, Remove, Rename, Scalar, error, warning

ZERO = "zero_optimization"
_HIDDEN = 3072
"""FLUX.1's width, where accelerate would read a language model's hidden_size."""
_SIZES: dict[str, int] = {
    "reduce_bucket_size": _HIDDEN * _HIDDEN,
    "stage3_prefetch_bucket_size": int(0.9 * _HIDDEN * _HIDDEN),
    "stage3_param_persistence_threshold": 10 * _HIDDEN,
}
"""accelerate's own formulas for "auto" (0.30.1 and 1.15.0, accelerator.py, `_prepare_deepspeed`)."""
_FILLED = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping fp16.enabled "
    "bf16.enabled zero_optimization.stage zero_optimization.stage3_gather_16bit_weights_on_model_save "
    "zero_optimization.offload_optimizer.device zero_optimization.offload_param.device "
    "zero_optimization.offload_optimizer.nvme_path zero_optimization.offload_param.nvme_path optimizer.params.lr "
    "optimizer.params.weight_decay scheduler.params.warmup_min_lr scheduler.params.warmup_max_lr "
    "scheduler.params.warmup_num_steps scheduler.params.total_num_steps".split()
)
"""Where accelerate knows a value for "auto"; transformers' Trainer knows more of them."""
_WORDS = ("true", "false", "yes", "no", "on", "off", "y", "n", "t", "f", "1", "0")
_BOOLEANS = frozenset(
    "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions load_from_fp32_weights "
    "round_robin_gradients ignore_unused_parameters stage3_gather_16bit_weights_on_model_save".split()
)
_COUNTS = frozenset(
    "reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size stage3_max_live_parameters "
    "stage3_param_persistence_threshold stage3_max_reuse_distance".split()
)


def _stray(key: object) -> bool:
    """A comment, as people write them into JSON."""
    return not isinstance(key, str) or key.lstrip().startswith(("_", "/", "#", "$")) or "comment" in key.lower()


@check("LA307", "DeepSpeed's file has a zero_optimization", needs=("accelerate",))
def has_zero(case: Case) -> Iterator[Finding]:
    """accelerate wants the block, as keys and values. Source: 0.30.1 and 1.15.0, `DeepSpeedPlugin.__post_init__`."""
    zero = file_of(case)
    value = zero.get(ZERO, ABSENT)
    if isinstance(value, dict) or (value is ABSENT and case.job.bundled):
        return
    place, edits = (ZERO, "stage"), tuple[Change, ...]()
    if value is ABSENT:
        stage = case.job.section("deepspeed_config").get("zero_stage")
        if stage is None:  # LA302 moves the inline stage there
            edits = (Edit("deepspeed", place, 0, "without the block DeepSpeed does no ZeRO"),)
        because = "accelerate: 'ValueError: Please specify the ZeRO optimization config in the DeepSpeed config.'"
        yield error(f"{name_of(case)} has no {ZERO}.", because, "Add it, with its stage.", edits=on_file(case, *edits))
        return
    kind = type(value).__name__
    because = f"accelerate stops with: '{kind}' object has no attribute 'get'."
    if value is None:
        edits = (Edit("deepspeed", place, 0, "null: no ZeRO"),)
        because = "DeepSpeed stops with: argument after ** must be a mapping, not NoneType."
    elif isinstance(value, bool):
        stage = 1 if value else 0
        gone = Remove("deepspeed", (ZERO,), f"the old form of stage {stage}")
        edits = (gone, Edit("deepspeed", place, stage, f"what {str(value).lower()} means"))
    yield error(f"{ZERO} is {value!r} in {name_of(case)}.", because, "Write keys and values there.",
                edits=on_file(case, *edits))  # fmt: skip


@check("LA308", "DeepSpeed knows every key of its file", needs=("accelerate",))
def keys_known(case: Case) -> Iterator[Finding]:
    """Unknown keys at the top are ignored; in zero_optimization, and in bf16 and fp16 since 0.17.1, they stop it."""
    zero = file_of(case)
    version = installed(case, "deepspeed")
    if version is None:
        raise SkipCheck("DeepSpeed is not installed, so its keys are not known")
    yield from _top(case, zero, version)
    yield from _refused(case, (ZERO,), case.job.zero_block, zero_keys(version), version)
    for block in ("offload_optimizer", "offload_param"):
        yield from _refused(case, (ZERO, block), case.job.zero_block.get(block), offload_keys(block, version), version)
    if version >= STRICT_COMPILE:
        yield from _refused(case, ("compile",), zero.get("compile"), COMPILE, version)
    if version >= STRICT_PRECISION and not case.job.bundled:
        for name, known in PRECISION.items():
            yield from _refused(case, (name,), zero.get(name), known, version)


def _top(case: Case, zero: dict[str, Any], version: Version) -> Iterator[Finding]:
    for key, value in zero.items():
        if _stray(key) or key == "bfloat16":
            continue
        if key in REMOVED and version >= CLEANED:
            yield _removed(case, key, value, version)
        elif key not in TOP:
            near = next(iter(difflib.get_close_matches(key, sorted(TOP - set(zero)), n=1, cutoff=0.8)), "")
            seen = f"DeepSpeed does not know {key} in {name_of(case)}."
            if near:
                edit = Rename("deepspeed", (key,), near, "unknown to DeepSpeed")
                yield error(seen, "It is ignored without a word: the job trains without it.", f"Did you mean {near}?",
                            edits=on_file(case, edit))  # fmt: skip
            else:
                inside = key in zero_keys(version) and f"It belongs into {ZERO}."
                yield warning(seen, "It is ignored without a word.", inside or "Remove it.")


def _removed(case: Case, key: str, value: Any, version: Version) -> Finding:
    """A block that is switched off goes; one that is on was meant."""
    off = not value or (isinstance(value, dict) and not value.get("enabled", False) and "enabled" in value)
    change = on_file(case, Remove("deepspeed", (key,), f"DeepSpeed {version} refuses it"))
    return error(
        f"{name_of(case)} has {key}.",
        f"DeepSpeed {version} stops: '{REMOVED[key]}'",
        "Remove it." if off else "Remove it, or use a DeepSpeed before 0.19.7.",
        edits=change if off else (),
        offers=() if off else change,
    )


def _refused(case: Case, path: Path, block: Any, known: frozenset[str], version: Version) -> Iterator[Finding]:
    if not isinstance(block, dict):
        return
    for key in block:
        if not isinstance(key, str) or key in known or key == "auto":
            continue
        where, free = ".".join(path), known - set(block)
        near = next(iter(difflib.get_close_matches(key, sorted(free), n=1, cutoff=0.8)), "")
        change: Change = Remove("deepspeed", (*path, key), f"unknown to DeepSpeed {version}")
        hint = "Remove it."
        if near and key not in REMOVED_ZERO:
            change = Rename("deepspeed", (*path, key), near, f"unknown to DeepSpeed {version}")
            hint = f"Did you mean {near}?"
        told = f"Extra inputs are not permitted ({key})"
        if path == (ZERO,) and key in REMOVED_ZERO and version >= CLEANED:
            told = f"'{ZERO}.{key}' is no longer supported"
        elif version < Version("0.15"):
            told = f"{key}: extra fields not permitted"
        yield error(f"DeepSpeed {version} does not know {key} in {where} of {name_of(case)}.",
                    f"It stops with: {told}.", hint, edits=on_file(case, change))  # fmt: skip


@check("LA309", "DeepSpeed's file uses no old names", needs=("accelerate",))
def names_of_today(case: Case) -> Iterator[Finding]:
    """Old names that DeepSpeed translates with a warning, and that accelerate does not look at."""
    zero, block, file = file_of(case), case.job.zero_block, name_of(case)
    if "bfloat16" in zero and not case.job.bundled:
        if "bf16" in zero:
            yield warning(f"{file} has bfloat16 and bf16.", "bf16 counts.", "Remove bfloat16.")
        else:
            change: Change = Rename("deepspeed", ("bfloat16",), "bf16", "DeepSpeed's name of today")
            yield error(f"{file} has bfloat16.", "accelerate looks for bf16, does not find it and writes one of its "
                        "own, which counts: this one is ignored.",
                        "Rename it.", edits=on_file(case, change))  # fmt: skip
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if old in block:
            yield _old_offload(case, old, new, block)
    if "cpu_offload_use_pin_memory" in block:
        yield warning(f"{file} has cpu_offload_use_pin_memory.", "DeepSpeed reads it no more.",
                      "Write pin_memory into offload_optimizer or offload_param.")  # fmt: skip
    old, new = "stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"
    if old in block:
        if new in block:
            same = block[old] == block[new]
            gone = on_file(case, Remove("deepspeed", (ZERO, old), f"{new} says it"))
            yield error(f"{file} has {old} and {new}.", _together(old, new), "Keep the new name.",
                        edits=gone if same else (), offers=() if same else gone)  # fmt: skip
        else:
            change = Rename("deepspeed", (ZERO, old), new, "DeepSpeed's name of today")
            yield warning(f"{file} has {old}.", "It is deprecated, and accelerate does not look at it.", "Rename it.",
                          edits=on_file(case, change))  # fmt: skip


def _together(old: str, new: str) -> str:
    new = new.removeprefix("stage3_")
    return f"DeepSpeed: \"Cannot provide deprecated parameter '{old}' and replacing parameter '{new}' together\"."


def _old_offload(case: Case, old: str, new: str, block: dict[str, Any]) -> Finding:
    device = "cpu" if block[old] is True else "none"
    gone: Change = Remove("deepspeed", (ZERO, old), f"deprecated for {new}")
    if block.get(new) is not None:
        same = value_at(block, (new, "device")) == device
        return error(f"{name_of(case)} has {old} and {new}.", _together(old, new), "Keep the new name.",
                     edits=on_file(case, gone) if same else (), offers=() if same else on_file(case, gone))  # fmt: skip
    edits: tuple[Change, ...] = (gone,)
    because = "It is deprecated."
    if device == "cpu":
        edits = (gone, Edit("deepspeed", (ZERO, new, "device"), "cpu", f"{old}: true means this"))
        because = "It is deprecated, and accelerate does not look at it" + (
            ": it keeps a torch optimizer, and DeepSpeed stops with 'You are using ZeRO-Offload with a client provided "
            "optimizer'." if new == "offload_optimizer" else ".")  # fmt: skip
    return warning(f"{name_of(case)} has {old}.", because, f"Write {new}.", edits=on_file(case, *edits))


@check("LA310", "the values of DeepSpeed's file are ones that DeepSpeed takes", needs=("accelerate",))
def values_known(case: Case) -> Iterator[Finding]:
    """Types and ranges, and every "auto" that nobody fills for a FLUX transformer."""
    zero, block = file_of(case), case.job.zero_block
    if block:
        yield from _stage(case, block.get("stage", ABSENT))
    for name in ("offload_optimizer", "offload_param"):
        yield from _offload(case, name, block.get(name))
    for key in sorted(_BOOLEANS | _COUNTS):
        yield from _plain(case, key, block.get(key, ABSENT))
    for name in ("bf16", "fp16"):
        yield from _switch(case, name, zero.get(name, ABSENT))
    if not case.job.bundled:  # the bundled trainer leaves "auto" to DeepSpeed, which drops it
        for path in _autos(zero, ()):
            yield _unfilled(case, path)


def _stage(case: Case, value: Any) -> Iterator[Finding]:
    place, file = (ZERO, "stage"), name_of(case)
    if case.job.bundled and value not in (ABSENT, "auto") and str(value) not in ("1", "2", "3"):
        meant = 1 if value is True else 2
        yield error(f"{ZERO}.stage is {value!r} in {file}; the bundled trainer does ZeRO 1, 2 and 3.",
                    "It stops before its first step.", f"Set it to {meant}.",
                    edits=on_file(case, Edit("deepspeed", place, meant, "it does ZeRO 1, 2 and 3")))  # fmt: skip
    elif case.job.bundled or value is ABSENT or value == "auto":
        return
    elif isinstance(value, bool):
        change = Edit("deepspeed", place, int(value), "what DeepSpeed takes it for")
        yield warning(f"{ZERO}.stage is {value!r} in {file}.", f"DeepSpeed takes it for stage {int(value)}.",
                      "Write the number.", edits=on_file(case, change))  # fmt: skip
    elif isinstance(value, str) and value in ("0", "1", "2", "3"):
        yield error(f"{ZERO}.stage is the text {value!r} in {file}.",
                    "DeepSpeed before 0.15 stops: 'value is not a valid enumeration member'; accelerate does not see "
                    "stage 3 in it.", "Write the number.",
                    edits=on_file(case, Edit("deepspeed", place, int(value), "a number")))  # fmt: skip
    elif not isinstance(value, int | float) or value not in (0, 1, 2, 3):
        yield error(f"{ZERO}.stage is {value!r} in {file}.",
                    "DeepSpeed stops: 'Input should be 0, 1, 2, 3' or 'value is not a valid enumeration member'.",
                    "Set it to 2.")  # fmt: skip


def _offload(case: Case, name: str, value: Any) -> Iterator[Finding]:
    if value is None:
        return
    if not isinstance(value, dict):
        edits: tuple[Change, ...] = ()
        if value in ("none", "cpu"):
            edits = (Remove("deepspeed", (ZERO, name), "it wants keys and values"),
                     Edit("deepspeed", (ZERO, name, "device"), value, "keys and values"))  # fmt: skip
        yield error(f"{ZERO}.{name} is {value!r} in {name_of(case)}.",
                    f"accelerate stops with: '{type(value).__name__}' object has no attribute 'get'.",
                    'Write {"device": …} there.', edits=on_file(case, *edits))  # fmt: skip
        return
    device = value.get("device", "none")
    if device not in ("none", "cpu", "nvme", "auto"):
        word = str(device).lower()
        meant = "none" if device in (None, False) else word if word in ("none", "cpu", "nvme") else ""
        change = Edit("deepspeed", (ZERO, name, "device"), meant, "DeepSpeed's own word")
        yield error(f"{ZERO}.{name}.device is {device!r} in {name_of(case)}.",
                    "DeepSpeed stops: it takes 'none', 'cpu' or 'nvme' for a device.", "Use one of: none, cpu, nvme.",
                    edits=on_file(case, change) if meant else ())  # fmt: skip


def _plain(case: Case, key: str, value: Any) -> Iterator[Finding]:
    if value is ABSENT or value == "auto":
        return
    seen, file = f"{ZERO}.{key} is {value!r} in {name_of(case)}.", name_of(case)
    if value is None:
        gone = Remove("deepspeed", (ZERO, key), "null is no value to DeepSpeed; without the key it takes its default")
        yield error(seen, "DeepSpeed stops: it takes no null there.", f"Remove it from {file}.",
                    edits=on_file(case, gone))  # fmt: skip
    elif key in _BOOLEANS:
        if not isinstance(value, bool) and str(value).lower() not in (*_WORDS, "1.0", "0.0"):
            yield error(seen, "DeepSpeed stops: it is no boolean.", "Write true or false.")
    else:
        amount = number(value)
        if amount is None or amount < 0 or (amount != int(amount)):
            yield error(seen, "DeepSpeed stops: it wants a whole number, not below 0.", "Write a whole number.")


def _switch(case: Case, name: str, value: object) -> Iterator[Finding]:
    """bf16 and fp16 are blocks; DeepSpeed takes no null or true for them, and accelerate neither."""
    if value is ABSENT or isinstance(value, dict) or case.job.bundled:
        return
    edits: tuple[Change, ...] = ()
    if isinstance(value, bool):
        edits = (Remove("deepspeed", (name,), "it wants keys and values"),
                 Edit("deepspeed", (name, "enabled"), value, "keys and values"))  # fmt: skip
    yield error(f"{name} is {value!r} in {name_of(case)}.",
                f"accelerate stops with: '{type(value).__name__}' object has no attribute 'get'.",
                f'Write "{name}": {{"enabled": true}} or false.', edits=on_file(case, *edits))  # fmt: skip


def _autos(data: dict[Any, Any], path: Path) -> Iterator[Path]:
    """Every "auto" that accelerate has no value for. Source: `DeepSpeedPlugin.deepspeed_config_process`."""
    for key, value in data.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, dict):
            yield from _autos(value, (*path, key))
        elif value == "auto" and ".".join((*path, key)) not in _FILLED:
            yield (*path, key)


def _unfilled(case: Case, path: Path) -> Finding:
    name, key = ".".join(path), path[-1]
    if path[0] == ZERO and key in _SIZES and len(path) == 2:
        value: Scalar = _SIZES[key]
        edits: tuple[Change, ...] = (
            Edit("deepspeed", path, value, f"accelerate's formula with FLUX's width {_HIDDEN}"),
        )
        because = (f"accelerate: \"Can't find `model.config` entry, therefore it's not possible to automatically fill "
                   f"out the following `auto` entries in the DeepSpeed config file: ['{name}']\".")  # fmt: skip
        hint = f"Write a number, for example {value}."
    else:
        edits = (Remove("deepspeed", path, "without it DeepSpeed takes its default"),)
        because = f"accelerate: '`{name}` not found in kwargs. Please specify `{name}` without `auto`'."
        hint = "Write a value, or remove it: DeepSpeed then takes its default. Only transformers' Trainer fills it."
    return error(f'{name} is "auto" in {name_of(case)}.', because, hint, edits=on_file(case, *edits))
