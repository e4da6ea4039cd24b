"""LA203: the words inside the sections of accelerate's file, as the installed release takes them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import NamedTuple

from packaging.version import Version

from xflux_doctor.accelerate_sections import (
    DYNAMO_BACKENDS,
    DYNAMO_MODES,
    FP8_BACKENDS,
    FP8_FORMATS,
    PREFETCH,
    SHARDING,
    STATE_DICTS,
    WRAPPING,
    as_bool,
    span_of,
)
from xflux_doctor.check import Case, check
from xflux_doctor.checks.releases import local, other_release, release
from xflux_doctor.checks.sections import in_use, settings
from xflux_doctor.finding import Change, Comment, Edit, Finding, error

_ANY_CASE = Version("0.34.0")
"""First release whose FSDP plugin raises the case of its words. Source: utils/dataclasses.py."""


class _Rule(NamedTuple):
    """The words of one flag."""

    section: str
    flag: str
    words: tuple[str, ...]
    numbers: bool = False
    """Whether torch's own numbers, from 1, stand for the words."""
    any_case: bool = False
    """Whether every release takes any case."""
    because: str = ""
    """What the release says, with {value}; empty: that the rank stops at it."""
    aliases: tuple[tuple[str, str], ...] = ()


_PREFETCHES = ("fsdp_backward_prefetch", "fsdp_backward_prefetch_policy")
_FALSE_IS = {**dict.fromkeys(_PREFETCHES, "NO_PREFETCH"), "fsdp_auto_wrap_policy": "NO_WRAP", "dynamo_backend": "no"}
"""Where a bare no, which YAML reads as False, is a word that accelerate has."""
_SWITCHES = tuple(f"fsdp_{name}" for name in (
    "offload_params forward_prefetch use_orig_params cpu_ram_efficient_loading sync_module_states "
    "activation_checkpointing activation_checkpointing_offload".split()))  # fmt: skip
_TEXT_ONLY = frozenset({"dynamo_backend", "dynamo_mode"})
"""Flags that the launcher takes for text: no number, no null (utils/launch.py, 0.30.1 and 1.15.0)."""


def _rules(version: Version) -> tuple[_Rule, ...]:
    late = version >= _ANY_CASE
    hybrid = version >= Version("0.21.0")
    listed = "'{value}' is not in list" if not late else "KeyError: '{upper}'"
    wrapping = "Invalid auto wrap policy: {value}" if late else ""
    backends = tuple(word for word, span in DYNAMO_BACKENDS.items() if span.has(version))
    fp8 = tuple(word for word, span in FP8_BACKENDS.items() if span.has(version))
    formats = tuple(word for word, span in FP8_FORMATS.items() if span.has(version))
    zero = (("ZERO3", "FULL_SHARD"), ("ZERO2", "SHARD_GRAD_OP"), ("FULL", "FULL_SHARD"), ("HYBRID", "HYBRID_SHARD"))
    short = (("FULL", "FULL_STATE_DICT"), ("SHARDED", "SHARDED_STATE_DICT"), ("LOCAL", "LOCAL_STATE_DICT"))
    wraps = (("TRANSFORMER", "TRANSFORMER_BASED_WRAP"), ("SIZE", "SIZE_BASED_WRAP"), ("NONE", "NO_WRAP"))
    fetch = (("PRE", "BACKWARD_PRE"), ("POST", "BACKWARD_POST"), ("NONE", "NO_PREFETCH"))
    return (
        _Rule("fsdp_config", "fsdp_sharding_strategy", SHARDING[: 5 if hybrid else 3], True, late, listed, zero),
        _Rule("fsdp_config", "fsdp_auto_wrap_policy", WRAPPING, False, late, wrapping, wraps),
        _Rule("fsdp_config", "fsdp_backward_prefetch", PREFETCH, late, late, listed, fetch),
        _Rule("fsdp_config", "fsdp_backward_prefetch_policy", PREFETCH, late, late, listed, fetch),
        _Rule("fsdp_config", "fsdp_state_dict_type", STATE_DICTS, late, late, listed, short),
        _Rule("dynamo_config", "dynamo_backend", backends, False, True, "Unknown dynamo backend: {upper}",
              (("CUDAGRAPH", "CUDAGRAPHS"), ("AOT_CUDAGRAPHS", "CUDAGRAPHS"), ("NONE", "NO"), ("FALSE", "NO"))),
        _Rule("dynamo_config", "dynamo_mode", DYNAMO_MODES, False, False, "Unrecognized mode={value}"),
        _Rule("fp8_config", "fp8_backend", fp8, False, True, "",
              (("TRANSFORMER_ENGINE", "TE"), ("TRANSFORMERENGINE", "TE"), ("MS_AMP", "MSAMP"), ("TORCHAO", "AO"))),
        _Rule("fp8_config", "fp8_format", formats, False, True, "`fp8_format` must be one of " + " or ".join(formats)),
        _Rule("fp8_config", "fp8_opt_level", ("O1", "O2"), False, False, "`opt_level` must be one of O1 or O2"),
        _Rule("fp8_config", "fp8_amax_compute_algo", ("max", "most_recent"), False, True,
              "`amax_compute_algo` must be one of max or most_recent"),
        _Rule("parallelism_config", "parallelism_config_cp_backend", ("torch",), False, False,
              "cp_backend must be one of ['torch'], but got {value}"),
        _Rule("parallelism_config", "parallelism_config_sp_backend", ("deepspeed",), False, False,
              "sp_backend must be one of ['deepspeed'], but got {value}"),
        _Rule("fsdp_config", "fsdp_version", ("1", "2"), False, True,
              "invalid literal for int() with base 10: '{value}', or a strategy that it does not know"),
    )  # fmt: skip


@check("LA203", "accelerate knows the words in its file's sections", needs=("accelerate",))
def section_words(case: Case) -> Iterator[Finding]:
    """Sharding strategies, wrapping, prefetching, state dicts, dynamo's backends and modes, fp8's formats; switches.

    accelerate before 0.34.0 wants FSDP's words in upper case and takes an unknown fsdp_auto_wrap_policy for none at
    all; every release dies of a bare no as dynamo_backend.
    """
    version = release(case)
    local(case)
    yield from _top_dynamo(case, version)
    for rule in _rules(version):
        found = settings(case, rule.section, version).get(rule.flag)
        span = span_of(rule.section, rule.flag)
        if found is None or not in_use(case, rule.section) or span is None or not span.has(version):
            continue
        if rule.flag != "dynamo_mode" or not isinstance(found[1], str) or _compiles(case, version):
            yield from _judge(case, rule, *found, version)
    for flag in _SWITCHES:
        key, value = settings(case, "fsdp_config", version).get(flag, ("", True))
        if in_use(case, "fsdp_config") and as_bool(value) is None:
            yield _switch(key, value)


def _compiles(case: Case, version: Version) -> bool:
    """Whether dynamo is on: without it torch never sees the mode."""
    value = settings(case, "dynamo_config", version).get("dynamo_backend", ("", "no"))[1]
    return str(value).strip().upper() not in ("NO", "FALSE")


def _top_dynamo(case: Case, version: Version) -> Iterator[Finding]:
    """The old form at the top (0.15.0 on): converted on load, where only the text NO is known as off."""
    if "dynamo_backend" in (case.job.accelerate or {}) and version >= Version("0.17.0"):
        rule = next(rule for rule in _rules(version) if rule.flag == "dynamo_backend")
        yield from _judge(case, rule._replace(section=""), "dynamo_backend", case.job.get("dynamo_backend"), version)


def _judge(case: Case, rule: _Rule, key: str, value: object, version: Version) -> Iterator[Finding]:
    path = (rule.section, key) if rule.section else (key,)
    seen = f"{'.'.join(path)} is {value!r}."
    if value is None:
        if rule.flag in ("fsdp_sharding_strategy", *_TEXT_ONLY):
            out = Comment("accelerate", path, "it has no value")
            because = "accelerate hands the word None on, or dies of it; without the key it takes its default."
            yield error(seen, because, "Comment it out.", edits=(out,))
        return
    text = str(value).strip()
    if _taken(rule, value, text):
        return
    because = _because(rule, value, text, version)
    span = DYNAMO_BACKENDS.get(text.upper()) if rule.flag == "dynamo_backend" else None
    meant = _meant(rule, value, text)
    if not meant and span is not None:
        yield other_release(case, seen, span, because)
        return
    edits: tuple[Change, ...] = (Edit("accelerate", path, meant, "accelerate's own word"),) if meant else ()
    yield error(seen, because, "Use one of: " + ", ".join(rule.words) + ".", edits=edits)


def _taken(rule: _Rule, value: object, text: str) -> bool:
    if isinstance(value, bool) or (rule.flag in _TEXT_ONLY and not isinstance(value, str)):
        return False
    if rule.numbers and _small(text):
        return 1 <= int(text) <= len(rule.words) - (rule.flag in _PREFETCHES)
    if rule.any_case:
        return text.upper() in map(str.upper, rule.words)
    return str(value) in rule.words


def _small(text: str) -> bool:
    """A number as torch numbers its words; Python's int() refuses thousands of digits."""
    return text.isascii() and text.isdigit() and len(text) < 9


def _because(rule: _Rule, value: object, text: str, version: Version) -> str:
    kind = type(value).__name__
    if rule.flag == "dynamo_backend" and not isinstance(value, str):
        return f"accelerate dies with: '{kind}' object has no attribute 'upper'."
    if rule.flag == "dynamo_mode" and not isinstance(value, str):
        return f"accelerate dies with: expected str, bytes or os.PathLike object, not {kind}; or torch of mode={value}."
    if rule.flag == "fsdp_auto_wrap_policy" and version < _ANY_CASE:
        return f"accelerate {version} takes it for no wrapping, without a word: every rank gathers the whole model."
    if rule.numbers and text.isascii() and text.isdigit():
        return f"accelerate stops in its ranks: {text} is no number of torch's for it."
    sentence = rule.because.format(value=value, upper=text.upper())
    return f"The job stops with: {sentence}." if sentence else "accelerate stops at it."


def _meant(rule: _Rule, value: object, text: str) -> str:
    """The one word that must be meant; empty where it might be another."""
    if value is False:
        return _FALSE_IS.get(rule.flag, "")
    if isinstance(value, bool | list | dict):
        return ""
    word = text.upper().replace("-", "_").replace(" ", "_")
    whole = {known.upper().replace("-", "_"): known for known in rule.words}
    if word in whole:
        return whole[word]
    if dict(rule.aliases).get(word) in rule.words:
        return dict(rule.aliases)[word]
    if rule.flag in (*_PREFETCHES, "fsdp_state_dict_type") and _small(word):
        names = rule.words[:2] if rule.flag in _PREFETCHES else rule.words
        return names[int(word) - 1] if 1 <= int(word) <= len(names) else ""
    close = difflib.get_close_matches(word, list(whole), n=2, cutoff=0.75)
    return whole[close[0]] if len(close) == 1 or (close and _clear(word, close)) else ""


def _clear(word: str, close: list[str]) -> bool:
    """Whether the first of two near words is much nearer than the second."""
    first, second = (difflib.SequenceMatcher(None, word, other).ratio() for other in close[:2])
    return first - second > 0.1


def _switch(key: str, value: object) -> Finding:
    path = ("fsdp_config", key)
    seen = f"fsdp_config.{key} is {value!r}."
    because = f"accelerate stops in its ranks: invalid truth value {str(value).lower()}."
    if value is None:
        out = Comment("accelerate", path, "it has no value")
        return error(seen, because, "Comment it out: without the key accelerate takes its default.", edits=(out,))
    return error(seen, because, f"Write {key}: true or {key}: false.")
