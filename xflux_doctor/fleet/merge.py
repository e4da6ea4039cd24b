"""Reports, one after the other, to one fleet. The order in which they come, and copies of one, change nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from xflux_doctor.fleet.compare import differences
from xflux_doctor.fleet.links import links
from xflux_doctor.fleet.node import node_of
from xflux_doctor.fleet.numbers import numbers
from xflux_doctor.fleet.values import Broken, Fleet, Node, Report


class Merger:
    """Takes reports and keeps of each no more than what is compared; of one node's only the newest."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[str, frozenset[str]], Node] = {}
        self._sent: dict[str, int] = {}
        self._broken: list[Broken] = []

    def take(self, item: Report | Broken) -> None:
        """One report, whole or not."""
        found = node_of(item) if isinstance(item, Report) else item
        if isinstance(found, Broken):
            self._broken.append(found)
            return
        self._sent[found.name] = self._sent.get(found.name, 0) + 1
        key = (found.name, found.cards)
        kept = self._nodes.get(key)
        self._nodes[key] = found if kept is None else max(kept, found, key=_age)

    def fleet(self, expected: Sequence[str] = (), expected_by: str = "") -> Fleet:
        """What all that was taken says together."""
        nodes, again = self._told_apart()
        names = {node.name for node in nodes}
        found = [*differences(nodes), *numbers(nodes), *links(nodes)] if len(nodes) > 1 else differences(nodes)
        known = {_short(name) for name in names} | names
        wanted = {_short(name) for name in expected} | set(expected)
        return Fleet(
            nodes=tuple(sorted(names)),
            differences=tuple(sorted(found, key=lambda item: (item.severity, item.kind == "everywhere"))),
            broken=tuple(sorted(self._broken, key=lambda item: (item.source, item.seen))),
            expected=tuple(expected),
            expected_by=expected_by,
            missing=tuple(name for name in expected if name not in known and _short(name) not in known),
            unexpected=tuple(sorted(n for n in names if expected and n not in wanted and _short(n) not in wanted)),
            again=again,
            facts_only=sum(node.checks == 0 for node in nodes),
        )

    def _told_apart(self) -> tuple[list[Node], dict[str, int]]:
        """One node for each machine: reports of one name are of one machine, unless both tell their cards and have
        none in common; such machines are told apart by a card."""
        named: dict[str, list[Node]] = {}
        for node in sorted(self._nodes.values(), key=_age, reverse=True):
            named.setdefault(node.name, []).append(node)
        nodes: list[Node] = []
        again: dict[str, int] = {}
        for name, reports in sorted(named.items()):
            machines: list[Node] = []
            for node in reports:  # the newest first
                if not any(_same(node, other) for other in machines):
                    machines.append(node)
            if len(machines) > 1:
                machines = [replace(node, name=f"{name} ({min(node.cards)[:12]})") for node in machines if node.cards]
            nodes += machines
            if self._sent[name] > len(machines):
                again[name] = self._sent[name]
        return sorted(nodes, key=lambda node: node.name), again


def _same(node: Node, other: Node) -> bool:
    return not node.cards or not other.cards or bool(node.cards & other.cards)


def _age(node: Node) -> tuple[str, str]:
    return node.created, node.digest


def _short(name: str) -> str:
    """The host's name without its domain; an address has no short form."""
    return name if name.replace(".", "").isdigit() else name.partition(".")[0]


def of_launch(items: Iterable[Report | Broken], named: Mapping[int, str], missing: Sequence[int], by: str) -> Fleet:
    """The fleet of one launch: `named` are the nodes' names where the launcher tells them, and `missing` the numbers
    that sent nothing; who sent what cannot be read is missing too."""
    fleet = merge(items)
    unread = {int(found[1]) for item in fleet.broken if (found := re.search(r"\bnode(\d{5})\b", item.source))}
    gone = tuple(named.get(number, f"number {number}") for number in sorted({*missing, *unread}))
    return replace(fleet, expected=(*fleet.nodes, *gone), expected_by=by, missing=gone)


def merge(items: Iterable[Report | Broken], expected: Sequence[str] = (), expected_by: str = "") -> Fleet:
    """All of them at once."""
    merger = Merger()
    for item in items:
        merger.take(item)
    return merger.fleet(expected, expected_by)
