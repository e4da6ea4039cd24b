"""Every fault of a matrix file at once, each with its line: what a person who writes one wants to read."""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

import msgspec
import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from xflux_doctor import conditions
from xflux_doctor.matrix_types import SCHEMA, Matrix, Pin, Rule, Stack

_SOURCE = re.compile(
    r"https://\S+\.\S+|benchmarks/\S+( \S+)*|pypi:[\w.-]+==[\w.+!-]+|[\w.-]+/[\w.-]+@[\w./-]+:[^\s:][^\s]*"
)
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_SECTIONS: dict[str, type[Stack] | type[Rule]] = {"stacks": Stack, "rules": Rule}


def shape(raw: object) -> list[str]:
    """What does not fit the types: unknown and missing keys, values of another kind."""
    if not isinstance(raw, dict):
        return [f"the file holds {type(raw).__name__}, not keys and values"]
    known = Matrix.__struct_fields__
    problems = [f"unknown key {key!r}{_near(str(key), known)}" for key in raw if key not in known]
    head = {key: value for key, value in raw.items() if key in known and key not in _SECTIONS}
    problems += _fields(head, Matrix, "")
    for section, kind in _SECTIONS.items():
        rows = raw.get(section, ())
        if not isinstance(rows, list | tuple):
            problems.append(f"{section}: expected a list, got {type(rows).__name__}")
            continue
        for number, row in enumerate(rows):
            problems += _fields(row, kind, place_of(section, number, row))
    return problems


def place_of(section: str, number: int, row: object) -> str:
    """How a row is called in a message: by its name, or by its number where it has none."""
    name = row.get("id" if section == "rules" else "name") if isinstance(row, dict) else None
    return name if isinstance(name, str) and name else f"{section}[{number}]"


def _fields(row: object, kind: type[msgspec.Struct], place: str) -> list[str]:
    """Faults of one mapping, each field by itself, so that one fault does not hide the next."""
    dot = f"{place}." if place else ""
    if not isinstance(row, dict):
        return [f"{place}: expected keys and values, got {type(row).__name__}"]
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    problems = [f"{dot}{key}: unknown key{_near(str(key), fields)}" for key in row if key not in fields]
    for name, field in fields.items():
        if name not in row:
            if field.required:
                problems.append(f"{dot}{name}: it is missing")
        elif name == "packages" and isinstance(row[name], dict):
            for package, pin in row[name].items():
                problems += _fields(pin, Pin, f"{dot}{name}.{package}")
        else:
            try:
                msgspec.convert(row[name], field.type)
            except msgspec.ValidationError as error:
                problems.append(f"{dot}{name}: {str(error)[0].lower()}{str(error)[1:]}")
    return problems


def _near(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f"; did you mean {found[0]}?" if found else ""


def lint(matrix: Matrix) -> list[str]:
    """Faults that types cannot see: bad versions, specifiers, dates and sources, double names, contradictions."""
    problems = [] if matrix.schema == SCHEMA else [f"schema: it is {matrix.schema}; this doctor reads {SCHEMA}"]
    if matrix.checked:
        problems += _dates("checked", matrix.checked)
    names = [stack.name for stack in matrix.stacks] + [rule.id for rule in matrix.rules]
    problems += [f"{name}: it stands twice" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"drop: {name} stands in this file too" for name in matrix.drop if name in names]
    for stack in matrix.stacks:
        problems += [f"{stack.name}.{fault}" for fault in _stack(stack)]
    pinned = {name for stack in matrix.stacks for name in stack.packages}
    for rule in matrix.rules:
        problems += [f"{rule.id}.{fault}" for fault in _rule(rule, pinned)]
    return problems + list(contradictions(matrix.rules))


def _stack(stack: Stack) -> Iterator[str]:
    for arch in stack.gpu_archs:
        if not re.fullmatch(r"sm_\d{2,3}[a-z]?", arch):
            yield f"gpu_archs: {arch!r} is no GPU architecture such as sm_90"
    for key in ("python", "driver", "driver_blackwell"):
        yield from _specifier(key, getattr(stack, key) or "")
    for key in ("cuda", "glibc", "nccl", "cudnn", "triton"):
        yield from _version(key, getattr(stack, key) or "0")
    for key in ("cpu", "gpu"):
        if getattr(stack.tested, key) != "never":
            yield from _dates(f"tested.{key}", getattr(stack.tested, key))
    yield from _sources(stack.source)
    for name, pin in stack.packages.items():
        if not _NAME.fullmatch(name):
            yield f"packages.{name}: write {re.sub(r'[-_.]+', '-', name).lower()}, as the package index does"
        yield from _version(f"packages.{name}.version", pin.version)
        yield from _specifier(f"packages.{name}.accepts", pin.accepts)
        if pin.index_required and not pin.index:
            yield f"packages.{name}.index: it is required and not named"
    torch = stack.packages.get("torch")
    build = "cpu" if stack.cuda is None else f"cu{stack.cuda.replace('.', '')}"
    if torch is not None and torch.build and torch.build.startswith(("cu", "cpu")) and torch.build != build:
        yield f"packages.torch.build: it is {torch.build}, and the stack's CUDA {stack.cuda} would be {build}"


def _rule(rule: Rule, pinned: set[str]) -> Iterator[str]:
    for key, name in (("what", rule.what), *(("when", name) for name in rule.when)):
        if name in conditions.SUBJECTS or name in pinned:
            continue
        if not _NAME.fullmatch(name):
            yield f"{key}: {name!r} is neither a package's name as the index writes it nor a subject"
        near = difflib.get_close_matches(name, list(conditions.SUBJECTS), n=1, cutoff=0.8)
        if near:
            yield f"{key}: there is no subject {name!r}; did you mean {near[0]}?"
    for key, need in (("need", rule.need), *((f"when.{name}", need) for name, need in rule.when.items())):
        if text := conditions.fault(need):
            yield f"{key}: {text}"
    for word in rule.job:
        if word not in conditions.JOBS:
            yield f"job: {word!r} is none of {', '.join(conditions.JOBS)}{_near(word, conditions.JOBS)}"
    if not rule.because.strip():
        yield "because: it is empty"
    yield from _sources(rule.source)
    yield from _dates("checked", rule.checked)


def _specifier(key: str, text: str) -> Iterator[str]:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        yield f"{key}: {text!r} is not a version specifier"


def _version(key: str, text: str) -> Iterator[str]:
    try:
        Version(text)
    except InvalidVersion:
        yield f"{key}: {text!r} is not a version"


def _dates(key: str, text: str) -> Iterator[str]:
    try:
        if len(text) != len("2026-11-24"):
            raise ValueError(text)
        datetime.date.fromisoformat(text)
    except ValueError:
        yield f"{key}: {text!r} is no date such as 2026-11-24"


def _sources(sources: tuple[str, ...]) -> Iterator[str]:
    """A source is a URL, repository@commit:path, a wheel of the public index, or a command in benchmarks/."""
    if not sources:
        yield "source: there is none"
    for text in sources:
        if not _SOURCE.fullmatch(text):
            yield f"source: {text!r} is no URL, owner/repository@commit:path, pypi:name==version or benchmarks/ command"


def contradictions(rules: tuple[Rule, ...]) -> Iterator[str]:
    """Rows with one subject and equal conditions that no version, or every version of the other, satisfies."""
    alike: dict[tuple[object, ...], list[Rule]] = {}
    for rule in rules:
        key = (rule.what, tuple(sorted(rule.when.items())), tuple(sorted(rule.job)))
        alike.setdefault(key, []).append(rule)
    for group in alike.values():
        for one, other in combinations(group, 2):
            if one.need == other.need:
                yield f"{other.id}.need: {one.id} says the same"
            elif any(map(conditions.fault, (one.need, other.need))):
                continue  # told already
            elif not conditions.together(one.need, other.need):
                yield f"{other.id}.need: {other.need} contradicts {one.id}, which wants {one.need}"


def doubled(text: str) -> list[str]:
    """Keys that stand twice in one mapping: YAML would keep the last without a word."""
    found: list[str] = []
    todo: list[yaml.Node | None] = [_tree(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if key.value in seen:
                    found.append(f"line {key.start_mark.line + 1}: the key {key.value!r} stands twice")
                seen.add(key.value)
                todo.append(value)
        elif isinstance(node, yaml.SequenceNode):
            todo.extend(node.value)
    return sorted(found)


def _tree(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def with_lines(problems: list[str], text: str) -> list[str]:
    """The problems with the line of their row before them, as far as it is found, in the file's order."""
    lines: dict[str, int] = {}
    root = _tree(text)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        lines.setdefault(key.value, key.start_mark.line + 1)
        if key.value in _SECTIONS and isinstance(value, yaml.SequenceNode):
            for number, row in enumerate(value.value):
                pairs: list[Any] = row.value if isinstance(row, yaml.MappingNode) else []
                plain = {k.value: v.value for k, v in pairs}
                lines[place_of(key.value, number, plain)] = row.start_mark.line + 1
    placed = []
    for problem in problems:
        head = problem.partition(":")[0]
        row = next((name for name in sorted(lines, key=len, reverse=True) if f"{head}.".startswith(f"{name}.")), "")
        placed.append((lines.get(row, 0), f"line {lines[row]}: {problem}" if row else problem))
    return [text for _, text in sorted(placed, key=lambda pair: pair[0])]
