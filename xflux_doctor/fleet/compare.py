"""Who has another word than most: by majority, field by field. Pure.

More than half of the nodes that tell a field are its majority, and the others are named. Without one (two nodes, a tie,
three ways) all are told and nobody is blamed. A finding is a fault whatever the others have: whoever has it is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec.structs import replace

from xflux_doctor.fleet.fields import Field, field
from xflux_doctor.fleet.values import Difference, Member, Node

_NEAR = 0.03
"""Sizes this close are one: kernels and firmware keep some of the memory for themselves."""
GIB = 1 << 30
Classes = dict[str, list[str]]
"""{value: the nodes that have it}."""


def differences(nodes: Sequence[Node]) -> list[Difference]:
    """All words, sizes and findings in which the nodes differ, by field and node, in one order."""
    found = {**_words(nodes), **_sizes(nodes)}
    told: list[Difference] = []
    for key in sorted(found, key=lambda key: (field(key).follows != (), key)):
        item = found[key]
        for cause in field(key).follows:
            if cause in found:
                item = _without(item, found[cause])
        if item.members:
            told.append(item)
    return [*told, *_findings(nodes)]


def _without(item: Difference, cause: Difference) -> Difference:
    """A card of another model has another memory: of those nodes the model alone is told."""
    explained = {member.node for member in cause.members}
    if item.kind == "sides":
        return replace(item, members=()) if cause.kind == "sides" else item
    left = tuple(member for member in item.members if member.node not in explained)
    return replace(item, members=left)


def _words(nodes: Sequence[Node]) -> dict[str, Difference]:
    keys = sorted({key for node in nodes for key in node.words})
    found = {}
    for key in keys:
        kind = field(key)
        classes: Classes = {}
        for node in nodes:
            value = node.words.get(key)
            if value is None and kind.absent and kind.group in node.groups:
                value = kind.absent
            if value is not None:
                classes.setdefault(value, []).append(node.name)
        difference = of_classes(key, kind, classes)
        if difference is not None:
            found[key] = difference
    return found


def _sizes(nodes: Sequence[Node]) -> dict[str, Difference]:
    found = {}
    for key in sorted({key for node in nodes for key in node.sizes}):
        values = [(node.sizes[key], node.name) for node in nodes if key in node.sizes]
        difference = of_classes(key, field(key), near(values))
        if difference is not None:
            found[key] = difference
    return found


def near(values: Iterable[tuple[float, str]]) -> Classes:
    """Sizes sorted into classes at every gap of more than 3 %; a class is called by its smallest size."""
    classes: Classes = {}
    last, name = 0.0, ""
    for value, node in sorted(values):
        if not name or value > last * (1 + _NEAR):
            name = size(value)
            while name in classes:
                name += "+"
        classes.setdefault(name, []).append(node)
        last = value
    return classes


def size(value: float) -> str:
    """Bytes as a person reads them."""
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / (1 << 20):.1f} MiB"


def of_classes(key: str, kind: Field, classes: Mapping[str, Sequence[str]]) -> Difference | None:
    """The difference, if there is one: with a majority those outside of it, else everybody."""
    if len(classes) < 2:
        return None
    total = sum(len(names) for names in classes.values())
    usual = next((value for value, names in classes.items() if 2 * len(names) > total), None)
    members = tuple(
        Member(name, value)
        for value, names in sorted(classes.items())
        if value != usual
        for name in sorted(names)
    )  # fmt: skip
    return Difference(
        kind="differs" if usual is not None else "sides",
        field=key,
        severity=kind.severity,
        usual=usual or "",
        count=len(classes[usual]) if usual is not None else 0,
        total=total,
        members=members,
        hint=kind.hint,
        group=kind.group,
        because=kind.because,
    )


def _findings(nodes: Sequence[Node]) -> Iterator[Difference]:
    """Errors first; what every checked node has is no difference, and is told without a name."""
    checked = sum(node.checks > 0 for node in nodes)
    codes: dict[str, list[Node]] = {}
    for node in nodes:
        for code in node.told:
            codes.setdefault(code, []).append(node)
    for code, having in sorted(codes.items()):
        worst = "error" if any(node.told[code].severity == "error" for node in having) else "warning"
        having = sorted(having, key=lambda node: (node.told[code].severity, node.name))
        everybody = len(having) == len(nodes) and len(nodes) > 1 and checked == len(nodes)
        first = having[0].told[code]
        yield Difference(
            kind="everywhere" if everybody else "finding",
            field=code,
            severity="error" if worst == "error" else "warning",
            usual=first.seen if everybody else "",
            count=len(having),
            total=len(nodes),
            members=() if everybody else tuple(Member(node.name, node.told[code].seen) for node in having),
            hint=first.hint or f"See that node's own report for {code}.",
        )
