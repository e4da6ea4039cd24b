"""LA: DeepSpeed's section of accelerate's file, alone and beside the DeepSpeed file that it names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from xflux_doctor import xflux_bill
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.deepspeed_file import KEY, SECTION
from xflux_doctor.finding import Change, Comment, Edit, Finding, Scalar, error, warning

Path = tuple[str, ...]
ABSENT = object()
"""The file does not say it: null is another thing."""
_IGNORED = (
    "ValueError: When using `deepspeed_config_file`, the following accelerate config variables will be ignored: "
    "['gradient_accumulation_steps', 'gradient_clipping', 'zero_stage', …, 'mixed_precision']"
)
PLACES: dict[str, Path] = {
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("gradient_clipping",),
    "zero_stage": ("zero_optimization", "stage"),
    "offload_optimizer_device": ("zero_optimization", "offload_optimizer", "device"),
    "offload_param_device": ("zero_optimization", "offload_param", "device"),
    "offload_optimizer_nvme_path": ("zero_optimization", "offload_optimizer", "nvme_path"),
    "offload_param_nvme_path": ("zero_optimization", "offload_param", "nvme_path"),
    "zero3_save_16bit_model": ("zero_optimization", "stage3_gather_16bit_weights_on_model_save"),
}
"""Inline keys that may not stand beside a file, and their places in it. Source: accelerate 0.30.1 and 1.15.0,
utils/dataclasses.py, `DeepSpeedPlugin._deepspeed_config_checks` and `plugin_to_config_mapping`."""
_MISSING: dict[str, Scalar] = {
    "gradient_accumulation_steps": 1, "zero_stage": 0, "offload_optimizer_device": "none",
    "offload_param_device": "none", "zero3_save_16bit_model": False,
}  # fmt: skip
"""What the ranks take where the file does not name it (the plugin's 1, DeepSpeed's own defaults)."""
_AUTO: dict[str, Scalar] = {**_MISSING, "zero_stage": 2, "gradient_clipping": 1.0}
"""What accelerate writes in the place of "auto"; accumulation comes from the script."""
TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
"""accelerate's words, utils/environment.py, `str_to_bool`."""


def needs_deepspeed(case: Case) -> None:
    if not case.job.deepspeed:
        raise SkipCheck("the job does not use DeepSpeed")


def file_of(case: Case) -> dict[str, Any]:
    """The DeepSpeed file's values. Raises SkipCheck where there are none."""
    needs_deepspeed(case)
    if case.job.zero_file is None:
        named = any(problem.file == "deepspeed" for problem in case.job.problems)
        raise SkipCheck("the DeepSpeed file cannot be read (see LA301)" if named else "no DeepSpeed file is named")
    return case.job.zero_file


def name_of(case: Case) -> str:
    """The DeepSpeed file in words."""
    path = case.job.deepspeed_path
    return path.name if path is not None else f"the {KEY} value"


def value_at(data: Any, path: Path) -> Any:
    for key in path:
        if not isinstance(data, dict) or key not in data:
            return ABSENT
        data = data[key]
    return data


def precision_of(case: Case) -> str:
    """The mixed precision that the trainer asks for, whatever a DeepSpeed file says."""
    if case.job.train is not None:
        return str(case.job.train.mixed_precision)
    if case.job.xflux is not None and case.job.xflux.config is not None:
        return str(xflux_bill.precision(case, case.job.xflux))
    value = case.job.get("mixed_precision", "no")
    return "no" if value in (None, False) else str(value).lower()


def number(value: Any) -> float | None:
    """A number, also one that is written as text; accelerate hands both on as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def setting(key: str, value: Scalar, reason: str) -> tuple[Change, ...]:
    """An edit of one key of the section."""
    return (Edit("accelerate", (SECTION, key), value, reason),)


def whole(value: Any) -> int | None:
    """As accelerate's `int(text)` takes it: 2 and "2", not 2.0."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def on_file(case: Case, *edits: Change) -> tuple[Change, ...]:
    """Edits of the DeepSpeed file; none where its values stand as base64 in accelerate's."""
    return edits if case.job.deepspeed_path is not None else ()


@check("LA301", "DeepSpeed's file can be read", needs=("accelerate",))
def file_readable(case: Case) -> Iterator[Finding]:
    """The file that deepspeed_config_file names is there and is JSON, without comments and without a key twice."""
    needs_deepspeed(case)
    for problem in case.job.problems:
        if problem.file == "deepspeed":
            yield error(f"{problem.seen.rstrip('.')}.", "The ranks stop before their first step.", problem.hint)


class _Beside(NamedTuple):
    """What becomes of the keys that stand beside a file: all edits, and the places where both differ."""

    edits: list[Change]
    differ: list[str]
    unwritable: bool = False


@check("LA302", "what DeepSpeed's file says stands there alone", needs=("accelerate",))
def alone(case: Case) -> Iterator[Finding]:
    """accelerate refuses inline keys and a mixed_precision beside a deepspeed_config_file, whatever they say."""
    zero, section = file_of(case), case.job.section(SECTION)
    keys = [key for key in PLACES if key in section]
    precise = case.job.get("mixed_precision") is not None and not case.job.source("mixed_precision")
    if not keys and not precise:
        return
    found = _Beside([], [])
    for key in keys:
        _judge(case, zero, key, section, found)
    if precise:
        _judge_precision(case, zero, found)
    names = ", ".join([*keys, *(["mixed_precision"] if precise else [])])
    writes = any(change.file == "deepspeed" for change in found.edits)
    stuck = writes and case.job.deepspeed_path is None
    because = f"accelerate stops its ranks with: {_IGNORED}."
    if case.job.bundled:
        because = f"Every script that uses accelerate's Accelerator stops with: {_IGNORED}. The bundled trainer takes "
        because += f"what {name_of(case)} says."
    if found.differ or stuck:
        where = "; ".join(found.differ) or "accelerate's file says what the base64 text does not"
        yield error(
            f"{KEY} is set beside {names}: {where}.",
            because,
            f"Decide which is meant. --take LA302 lets {name_of(case)} win and comments out accelerate's keys.",
            offers=() if stuck else tuple(found.edits),
        )
        return
    make = warning if case.job.bundled and not writes else error
    yield make(
        f"{KEY} is set beside {names}.",
        because,
        f"Leave them to {name_of(case)} alone.",
        edits=tuple(found.edits),
    )


def _judge(case: Case, zero: dict[str, Any], key: str, section: dict[str, Any], found: _Beside) -> None:
    """One inline key: equal, said here only (then it moves into the file), or another value."""
    mine, theirs, file = _said(key, section[key]), value_at(zero, PLACES[key]), name_of(case)
    if key == "zero3_save_16bit_model" and theirs is ABSENT:
        theirs = value_at(zero, ("zero_optimization", "stage3_gather_fp16_weights_on_model_save"))
    comment = Comment("accelerate", (SECTION, key), f"{file} says it: accelerate takes it from one place only")
    if mine is ABSENT:
        found.edits.append(comment)
    elif theirs is ABSENT or theirs == "auto":
        known = (_MISSING if theirs is ABSENT else _AUTO).get(key, ABSENT)
        idle = key.endswith("nvme_path") and section.get(key.replace("nvme_path", "device")) != "nvme"
        scripts_own = key == "gradient_accumulation_steps" and theirs == "auto"
        if not idle and (scripts_own or mine != known):
            found.edits.append(Edit("deepspeed", PLACES[key], mine, f"accelerate's file said {key}: {mine}"))
        found.edits.append(comment)
    else:
        if not _same(mine, _said(key, theirs)):
            found.differ.append(f"{key} is {section[key]!r} in accelerate's file and {theirs!r} in {file}")
        found.edits.append(comment)


def _said(key: str, value: Any) -> Any:
    """What the value means to accelerate; ABSENT where it leaves the choice to others."""
    if value is None or (value == "auto" and not key.endswith("device")):
        return ABSENT
    if key in ("gradient_accumulation_steps", "zero_stage"):
        found = whole(value)
        return value if found is None else found
    if key == "gradient_clipping":
        amount = number(value)
        return value if amount is None else amount
    if key.endswith("_device"):
        return "none" if value is False else str(value).lower()
    if key.endswith("_path"):
        return ABSENT if value == "none" else value
    return str(value).lower() == "true"


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _judge_precision(case: Case, zero: dict[str, Any], found: _Beside) -> None:
    """A top-level mixed_precision: the file's bf16 and fp16 say it; "auto" there would become false without it."""
    value = case.job.get("mixed_precision")
    word, file = "no" if value is False else str(value).lower(), name_of(case)
    reason = f"{file} says it: accelerate takes no mixed_precision beside a DeepSpeed file"
    found.edits.append(Comment("accelerate", ("mixed_precision",), reason))
    if case.job.train is not None or (case.job.xflux is not None and case.job.training("mixed_precision") is not None):
        return  # the training file's precision is what counts
    on = {name: _enabled(zero, name) for name in ("bf16", "fp16")}
    if word not in ("no", "bf16", "fp16") or any(flag is True for name, flag in on.items() if name != word):
        said = ", ".join(f"{name}.enabled {str(flag).lower()}" for name, flag in on.items() if flag is not ABSENT)
        found.differ.append(f"mixed_precision is {word} in accelerate's file and {said or 'nothing'} in {file}")
        return
    if word == "no" or on[word] is True:
        return
    if on[word] is not ABSENT and on[word] != "auto":
        found.differ.append(f"mixed_precision is {word} in accelerate's file and {word}.enabled is false in {file}")
        return
    said = f"accelerate's file said mixed_precision: {word}"
    found.edits.append(Edit("deepspeed", (word, "enabled"), True, said))
    if word == "fp16" and on[word] is ABSENT:
        found.edits.append(Edit("deepspeed", (word, "auto_cast"), True, "accelerate's own choice for fp16"))


def _enabled(zero: dict[str, Any], name: str) -> Any:
    """True, False, "auto" or ABSENT."""
    value = value_at(zero, (name, "enabled"))
    if isinstance(value, str) and value != "auto":
        return value.lower() == "true"
    return value
