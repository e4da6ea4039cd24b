"""A fleet's values: what is kept of one node, what could not be read, and what differs. All frozen."""

from __future__ import annotations

from typing import Literal

import msgspec

from xflux_doctor.facts import Clock, Link
from xflux_doctor.finding import Severity

Kind = Literal["differs", "sides", "finding", "everywhere", "slow", "pair", "clock", "time", "missing"]


class Report(msgspec.Struct, frozen=True):
    """The bytes of one report, and where they come from."""

    source: str
    data: bytes


class Broken(msgspec.Struct, frozen=True):
    """A report that cannot be used, or a source that holds none."""

    source: str
    seen: str
    hint: str
    node: str = ""
    """Whose it is, where its first lines still tell."""


class Told(msgspec.Struct, frozen=True):
    """What one node's own report says is wrong."""

    severity: Severity
    seen: str
    hint: str


class Node(msgspec.Struct, frozen=True):
    """What a fleet keeps of one report: words and numbers to be compared, and nothing that is only this node's."""

    name: str
    created: str
    digest: str
    """Of the report's bytes: with `created`, one order for reports of one node, in whatever order they come."""
    source: str
    cards: frozenset[str] = frozenset()
    """The GPUs' UUIDs: two reports of one name and other cards are of two machines."""
    groups: frozenset[str] = frozenset()
    """Which groups of fields are known: within one, a field that is not there has a meaning."""
    words: dict[str, str] = {}
    """{field: value}, compared letter by letter."""
    sizes: dict[str, float] = {}
    """{field: bytes}, compared with a tolerance."""
    free: dict[str, float] = {}
    """{field: free bytes}, of which only far too few are told."""
    told: dict[str, Told] = {}
    """{check: what it found}."""
    checks: int = 0
    """How many checks the report holds; 0: it is facts alone."""
    card: str = ""
    """The GPUs' name where it is one: what a floor is looked up by."""
    speeds: dict[str, float] = {}
    links: tuple[Link, ...] = ()
    clock: Clock | None = None
    job: str = ""
    """The hash of the effective job; empty: the report tells none."""


class Member(msgspec.Struct, frozen=True):
    """One node in a difference, and its own value in words."""

    node: str
    value: str


class Difference(msgspec.Struct, frozen=True):
    """One thing in which nodes differ, or that only some have."""

    kind: Kind
    field: str
    severity: Severity
    usual: str
    """What most nodes have; empty where there is no majority, or none is asked."""
    count: int
    """How many nodes have the usual value; of a finding: how many have it."""
    total: int
    """How many nodes were asked."""
    members: tuple[Member, ...]
    """Those that differ; where there is no majority, all of them."""
    hint: str
    group: str = ""
    """What is told in one line where it is of the same nodes: packages, environment …"""
    because: str = ""


class Fleet(msgspec.Struct, frozen=True):
    """The merged report."""

    nodes: tuple[str, ...]
    differences: tuple[Difference, ...]
    broken: tuple[Broken, ...] = ()
    expected: tuple[str, ...] = ()
    expected_by: str = ""
    """Who says so: `--expect`, SLURM_JOB_NODELIST …"""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    again: dict[str, int] = {}
    """{node: how many reports it sent}, where that is more than one; the newest counts."""
    facts_only: int = 0
    """How many nodes sent facts without a check's findings."""

    @property
    def exit_code(self) -> int:
        """1 where something stops a job: a difference, a finding or a node that is not there."""
        stops = any(found.severity == "error" for found in self.differences)
        return 1 if stops or self.missing or not self.nodes else 0

    @property
    def blamed(self) -> frozenset[str]:
        """Every node that is named: not those of a finding that all have."""
        return frozenset(m.node for found in self.differences for m in found.members) | frozenset(self.missing)
