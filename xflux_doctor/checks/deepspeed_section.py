"""LA: the keys and values of DeepSpeed's section in accelerate's file, as the launch takes them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from xflux_doctor.accelerate_keys import SECTION_KEYS, accepted_keys
from xflux_doctor.check import Case, check
from xflux_doctor.checks.deepspeed import FALSE, TRUE, needs_deepspeed, number, setting, whole
from xflux_doctor.checks.words import installed
from xflux_doctor.deepspeed_file import KEY, SECTION
from xflux_doctor.deepspeed_keys import CLIPS_BY_DEFAULT
from xflux_doctor.finding import Change, Comment, Edit, Finding, Rename, error, warning

_DEVICES = ("none", "cpu", "nvme")
_SECTIONS_ONLY = frozenset(("compute_environment", "distributed_type"))
_FLAGS = frozenset(
    "cpu multi_gpu tpu use_fsdp use_deepspeed use_megatron_lm num_cpu_threads_per_process module no_python "
    "training_script training_script_args config_file quiet rdzv_conf max_restarts monitor_interval role".split()
)
_MEANT = {"stage": "zero_stage", "zero_optimization_stage": "zero_stage", "clip": "gradient_clipping",
          "max_grad_norm": "gradient_clipping", "offload_optimizer": "offload_optimizer_device",
          "offload_param": "offload_param_device"}  # fmt: skip
"""Names of DeepSpeed's own or of other tools, for accelerate's."""


@check("LA303", "accelerate reads every key of deepspeed_config", needs=("accelerate",))
def keys_read(case: Case) -> Iterator[Finding]:
    """accelerate sets every key there as a launch option: it ignores unknown ones, and others override the launch.

    Source: accelerate 0.30.1 and 1.15.0, commands/launch.py: `setattr(args, k, defaults.deepspeed_config[k])`.
    """
    needs_deepspeed(case)
    section, known = case.job.section(SECTION), SECTION_KEYS[SECTION]
    version = installed(case, "accelerate")
    top = accepted_keys(version) if version else frozenset(("num_processes", "mixed_precision"))
    for key in section:
        if not isinstance(key, str) or key in known:
            continue
        if key in top - _SECTIONS_ONLY and not key.endswith("_config"):
            yield _overrides(case, key, section[key])
        elif key in _FLAGS:
            seen = f"deepspeed_config has the key {key!r}, which is an option of `accelerate launch`."
            yield error(seen, "accelerate takes it for that option, whatever was given.", "Remove it.")
        else:
            yield _unknown(key, section[key], known - set(section))


def _overrides(case: Case, key: str, value: Any) -> Finding:
    """What happens stays: the value that wins moves to where it belongs."""
    top = (case.job.accelerate or {}).get(key)
    edits: list[Change] = []
    if isinstance(value, str | int | float | bool) and value != top:
        edits.append(Edit("accelerate", (key,), value, "the value in deepspeed_config wins"))
    if value == top or edits:
        edits.append(Comment("accelerate", (SECTION, key), "it is a key of the file itself, not of DeepSpeed"))
    said = "" if value == top else f", and {top!r} at the top level" if top is not None else ""
    return error(
        f"deepspeed_config.{key} is {value!r}{said}.",
        f"accelerate takes it for the launch option --{key}: {value!r} is what happens.",
        f"Write {key} at the top level.",
        edits=tuple(edits),
    )


def _unknown(key: str, value: Any, free: frozenset[str]) -> Finding:
    near = _MEANT.get(key, "")
    if near not in free or isinstance(value, dict):
        near = next(iter(difflib.get_close_matches(key, sorted(free), n=1, cutoff=0.8)), "")
    seen = f"accelerate does not know deepspeed_config.{key} ({value!r})."
    if near:
        edit = Rename("accelerate", (SECTION, key), near, "unknown to accelerate")
        return error(seen, "It is ignored without a word: the job trains without it.", f"Did you mean {near}?",
                     edits=(edit,))  # fmt: skip
    return warning(
        seen,
        "It is ignored without a word.",
        f"DeepSpeed's own keys go into a JSON file that {KEY} names; remove this one.",
    )


@check("LA304", "the values of deepspeed_config are ones that accelerate takes", needs=("accelerate",))
def values_taken(case: Case) -> Iterator[Finding]:
    """Types and words of the inline keys; quoted numbers are right, null is accelerate's own default."""
    needs_deepspeed(case)
    section = case.job.section(SECTION)
    if case.job.zero_file is None and not any(problem.file == "deepspeed" for problem in case.job.problems):
        yield from _stage(case, section.get("zero_stage"))
        yield from _accumulation(case, section.get("gradient_accumulation_steps"))
        yield from _clipping(case, section.get("gradient_clipping"))
        for what in ("optimizer", "param"):
            yield from _device(f"offload_{what}_device", section.get(f"offload_{what}_device"))
        yield from _saved(section.get("zero3_save_16bit_model"))
    yield from _init_flag(section.get("zero3_init_flag"))


def _literal(value: Any) -> str:
    return f"ValueError: invalid literal for int() with base 10: {str(value)!r}"


def _stage(case: Case, value: Any) -> Iterator[Finding]:
    stage = whole(value)
    if value is None or stage in (0, 1, 2, 3):
        return
    if stage is not None:
        if not case.job.bundled:  # LA111 says it in the bundled trainer's words
            yield error(f"zero_stage is {value!r}.", "DeepSpeed stops: 'Input should be 0, 1, 2, 3' or, before 0.15, "
                        "'value is not a valid enumeration member; permitted: 0, 1, 2, 3'.",
                        "Set it to 2.")  # fmt: skip
        return
    meant: int | None = None
    reason = "accelerate takes a whole number"
    if isinstance(value, float) and value in (0, 1, 2, 3):
        meant = int(value)
    elif value == "auto":
        meant, reason = 2, "accelerate's own default"
    elif isinstance(value, str) and (words := re.fullmatch(r"(?:zero|stage|[-_ ])*([0-3])(?:\.0)?", value.lower())):
        meant = int(words[1])
    edits = setting("zero_stage", meant, reason) if meant is not None else ()
    yield error(f"zero_stage is {value!r}.", f"accelerate's ranks stop with '{_literal(value)}'.",
                "Set it to 2." if meant is None else f"Set it to {meant}.", edits=edits)  # fmt: skip


def _accumulation(case: Case, value: Any) -> Iterator[Finding]:
    """The plugin would take "auto"; the Accelerator itself reads the same variable by `int`."""
    key, steps = "gradient_accumulation_steps", whole(value)
    if value is None or (value == "auto" and case.job.bundled):
        return
    if steps is None:
        edits: tuple[Change, ...] = ()
        if value == "auto":
            edits = (Comment("accelerate", (SECTION, key), "without it accelerate takes the script's own number"),)
        elif isinstance(value, float) and value >= 1 and value.is_integer():
            edits = setting(key, int(value), "accelerate takes a whole number")
        yield error(f"{key} is {value!r} in deepspeed_config.", f"The Accelerator stops with '{_literal(value)}'.",
                    "Set it to a whole number of at least 1, or leave it out.", edits=edits)  # fmt: skip
    elif steps < 1 and not (case.job.bundled and isinstance(value, int)):  # LA109's, with the training file's number
        yield error(f"{key} is {value!r} in deepspeed_config.",
                    "DeepSpeed stops: 'Train batch size: … has to be greater than 0'.",
                    "Set it to 1 or more.")  # fmt: skip


def _clipping(case: Case, value: Any) -> Iterator[Finding]:
    key, limit = "gradient_clipping", number(value)
    version = installed(case, "deepspeed")
    if value is None or value == "auto" or (limit is not None and limit > 0):
        return
    if limit is None:
        off = value is False or (isinstance(value, str) and value.lower() in ("none", "no", "false", "off", "null"))
        works = case.job.bundled or version is None or version < CLIPS_BY_DEFAULT  # see the 0 below
        edits = setting(key, 0.0, "no clipping") if off and works else ()
        yield error(f"{key} is {value!r} in deepspeed_config.",
                    f"accelerate's ranks stop with 'ValueError: could not convert string to float: "
                    f"{str(value).lower()!r}'.", "Set it to a number; 0 means no clipping.", edits=edits)  # fmt: skip
    elif limit == 0 and not case.job.bundled and version is not None and version >= CLIPS_BY_DEFAULT:
        yield error(f"{key} is {value!r} in deepspeed_config.",
                    f"accelerate does not hand a 0 on, and DeepSpeed {version} then clips at its own 1.0.",
                    f"To train without clipping, name a JSON with \"{key}\": 0.0 by {KEY}, or set a number that no "
                    "gradient reaches.",
                    offers=setting(key, 1e9, "no gradient reaches it"))  # fmt: skip


def _device(key: str, value: Any) -> Iterator[Finding]:
    if value is None or (isinstance(value, str) and value.lower() in _DEVICES):
        return
    off = value is False or (isinstance(value, str) and value.lower() in ("no", "false", "null", "off"))
    edits = setting(key, "none", "accelerate's own word") if off else ()
    yield error(f"{key} is {value!r}.", "DeepSpeed stops: it takes 'none', 'cpu' or 'nvme' for a device.",
                "Use one of: none, cpu, nvme.", edits=edits)  # fmt: skip


def _init_flag(value: Any) -> Iterator[Finding]:
    if value is None or str(value).lower() in (*TRUE, *FALSE):
        return
    edits: tuple[Change, ...] = ()
    if value == "auto":
        edits = (Comment("accelerate", (SECTION, "zero3_init_flag"), "without it accelerate decides by the stage"),)
    yield error(f"zero3_init_flag is {value!r}.", f"accelerate's ranks stop with 'ValueError: invalid truth value "
                f"{str(value).lower()}'.", "Use true or false.", edits=edits)  # fmt: skip


def _saved(value: Any) -> Iterator[Finding]:
    """Only the word true switches it on."""
    key = "zero3_save_16bit_model"
    if value is None or str(value).lower() in ("true", "false"):
        return
    meant = str(value).lower() in TRUE
    edits = setting(key, meant, "accelerate knows true and false") if meant or str(value).lower() in FALSE else ()
    if meant:
        yield error(f"{key} is {value!r}.", "accelerate takes everything but true for false, without a word.",
                    "Write true.", edits=edits)  # fmt: skip
    else:
        yield warning(f"{key} is {value!r}.", "accelerate takes it for false.", "Write false.", edits=edits)
