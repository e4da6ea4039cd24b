"""LA204: what in accelerate's file must be keys and values, a whole number, a switch or text."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.version import Version

from xflux_doctor.accelerate_keys import KEYS
from xflux_doctor.accelerate_sections import FLAGS, as_bool
from xflux_doctor.check import Case, check
from xflux_doctor.checks.releases import local, release
from xflux_doctor.checks.sections import OURS, in_use, settings
from xflux_doctor.finding import Comment, Edit, Finding, error


@check("LA204", "sections and numbers of accelerate's file have their types", needs=("accelerate",))
def types(case: Case) -> Iterator[Finding]:
    """A section is keys and values, a port a whole number, a switch true or false.

    Source: accelerate 0.30.1 and 1.15.0, run with each of these: 0.30.1 dies of a section that is text, 1.15.0
    ignores it; `debug: 'false'` is text that counts as true.
    """
    version = release(case)
    local(case)
    for section in OURS:
        if KEYS[section].has(version):
            yield from _section_type(case, section, version)
    yield from _port(case)
    for key in ("debug", "use_cpu"):
        yield from _switch(case, key, version)
    for section, flag in (("fsdp_config", "fsdp_min_num_params"), *_SIZES):
        yield from _number(case, section, flag, version)
    yield from _layers(case, version)


_SIZES = tuple(("parallelism_config", flag) for flag in FLAGS["parallelism_config"] if flag.endswith("_size"))


def _section_type(case: Case, section: str, version: Version) -> Iterator[Finding]:
    value = case.job.get(section)
    if value is None or isinstance(value, dict):
        return
    kind = type(value).__name__
    seen = f"{section} is {kind} {value!r}, not keys and values."
    old = version < Version("1.5.0")
    because = f"accelerate {version} stops at it with a TypeError." if old else "accelerate ignores it without a word."
    if not value or not in_use(case, section):
        out = Comment("accelerate", (section,), "it holds no keys and values")
        yield error(seen, because, "Comment it out: it says nothing that is used.", edits=(out,))
    else:
        yield error(seen, because, f"Write {section}'s keys below it, each indented by two spaces.")


def _port(case: Case) -> Iterator[Finding]:
    value = case.job.get("main_process_port")
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65535):
        return
    text = str(value).strip()
    whole = int(text) if text.isascii() and text.isdigit() and len(text) < 9 and int(text) <= 65535 else None
    edits = (Edit("accelerate", ("main_process_port",), whole, "a whole number"),) if whole is not None else ()
    because = (
        "accelerate dies when it looks whether the port is free: 'str' object cannot be interpreted as an integer."
    )
    if isinstance(value, int):
        because = "accelerate dies when it looks whether the port is free: port must be 0-65535."
    yield error(f"main_process_port is {value!r}.", because, "Use a number of 0 to 65535; 29500 is usual.", edits=edits)


def _switch(case: Case, key: str, version: Version) -> Iterator[Finding]:
    """Text counts as true in Python; a null use_cpu stops 1.8.0 and newer (utils/launch.py, str_to_bool)."""
    if key not in (case.job.accelerate or {}) or isinstance(value := case.job.get(key), bool):
        return
    meant = as_bool(value)
    if value is None:
        if key == "use_cpu" and version >= Version("1.8.0"):
            out = Comment("accelerate", (key,), "it has no value")
            yield error(
                f"{key} has no value.", "accelerate: invalid truth value none.", "Comment it out.", edits=(out,)
            )
        return
    edits = (Edit("accelerate", (key,), meant, "a switch is true or false"),) if meant is not None else ()
    yield error(
        f"{key} is {value!r}, which is not true or false.",
        "Python takes any such value but 0 for true.",
        f"Write {key}: true or {key}: false.",
        edits=edits,
    )


def _number(case: Case, section: str, flag: str, version: Version) -> Iterator[Finding]:
    """Whole numbers. YAML reads 1e8 as text, and accelerate's int() refuses it."""
    found = settings(case, section, version).get(flag)
    if found is None or not in_use(case, section) or not KEYS[section].has(version):
        return
    key, value = found
    if isinstance(value, int) and not isinstance(value, bool):
        return
    if isinstance(value, str) and section == "fsdp_config" and _reads(value):
        return  # it reaches int() as text in any case
    whole = _whole(value)
    edits = (Edit("accelerate", (section, key), whole, "a whole number"),) if whole is not None else ()
    because = f"accelerate: invalid literal for int() with base 10: {str(value)!r}."
    if section == "parallelism_config":
        because = f"accelerate dies with: '>' not supported between instances of '{type(value).__name__}' and 'int'."
    yield error(f"{section}.{key} is {value!r}.", because, "Write a whole number.", edits=edits)


def _reads(text: str) -> bool:
    """Whether Python's own int() takes it: `1_000`, and no superscripts."""
    try:
        return int(text) >= 0
    except ValueError:
        return False


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, str | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() and 0 < number < 2**53 else None


def _layers(case: Case, version: Version) -> Iterator[Finding]:
    """accelerate splits the class names at commas (utils/dataclasses.py); a list would become one odd name."""
    key, value = settings(case, "fsdp_config", version).get("fsdp_transformer_layer_cls_to_wrap", ("", None))
    if not in_use(case, "fsdp_config") or value is None or isinstance(value, str):
        return
    names = value if isinstance(value, list) and all(isinstance(name, str) for name in value) else None
    edits = (Edit("accelerate", ("fsdp_config", key), ",".join(names), "accelerate splits text"),) if names else ()
    because = "accelerate: Could not find the transformer layer class to wrap in the model."
    yield error(f"fsdp_config.{key} is {value!r}.", because, "Write the names as text, with commas.", edits=edits)
