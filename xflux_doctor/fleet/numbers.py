"""Numbers with spread: rates, free room, clocks and the reports' own times. Pure.

A rate is too low below a floor that is known for the card, which two nodes or one can be held to; else far below the
others, which wants at least five of them: more than a tenth and more than six robust deviations (1.4826 times the
median distance from the median) below the median. Of a thousand healthy nodes none is that far by chance.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterable, Iterator, Sequence

from xflux_doctor.finding import Severity
from xflux_doctor.fleet.compare import size
from xflux_doctor.fleet.values import Difference, Kind, Member, Node
from xflux_doctor.floors import floor_of

FEWEST = 5
"""Nodes, or pairs of nodes, of which a middle is taken."""
SHARE, DEVIATIONS = 0.10, 6.0
SKEW = 2.0
"""Seconds."""
_STALE = 600.0
_ROOM = 50 << 30
"""Above this much free room nothing of a job's own is in danger."""
_SCALE = 1.4826


def bound(values: Sequence[float], share: float = SHARE) -> float | None:
    """Below this a value is no chance; None: there are too few to tell."""
    if len(values) < FEWEST:
        return None
    middle = statistics.median(values)
    spread = _SCALE * statistics.median(abs(value - middle) for value in values)
    return min(middle * (1 - share), middle - DEVIATIONS * spread)


def numbers(nodes: Sequence[Node]) -> list[Difference]:
    """All that is too slow, too full, or at another time."""
    return [*_speeds(nodes), *_room(nodes), *_clocks(nodes), *_times(nodes)]


def _speeds(nodes: Sequence[Node]) -> Iterator[Difference]:
    for name in sorted({name for node in nodes for name in node.speeds}):
        values = {node.name: node.speeds[name] for node in nodes if name in node.speeds}
        floors = {node.name: floor_of(node.card, name) for node in nodes if name in node.speeds}
        low = bound(list(values.values()))
        members, because = [], ""
        for node, value in sorted(values.items()):
            known = floors[node]
            if known is not None and value < known.value:
                members.append(Member(node, f"{value:.4g}, below {known.value:g} {known.unit}"))
                because = f"{known.value:g} {known.unit}: {known.source}."
            elif low is not None and value < low:
                members.append(Member(node, f"{value:.4g}"))
        if members:
            why = because or f"A tenth and {DEVIATIONS:g} robust deviations below the middle, {low:.4g}, is the bound."
            hint = "Look at clocks, heat and PCIe of that node (`nvidia-smi -q`), or leave it out: all wait for it."
            yield slower("slow", name, middle(values.values()), len(values), members, hint, why)


def _room(nodes: Sequence[Node]) -> Iterator[Difference]:
    """Less than a quarter of what the middle node has free, and so little that a job may fill it."""
    for key in sorted({key for node in nodes for key in node.free}):
        values = {node.name: node.free[key] for node in nodes if key in node.free}
        if len(values) < FEWEST:
            continue
        low = min(_ROOM, statistics.median(values.values()) / 4)
        members = [Member(node, size(value)) for node, value in sorted(values.items()) if value < low]
        if members:
            hint = "Make room there, or point the job at another disk."
            usual = size(statistics.median(values.values()))
            yield slower("slow", key, usual, len(values), members, hint, "Less than a quarter of what most have.")


def _clocks(nodes: Sequence[Node]) -> Iterator[Difference]:
    """Only clocks that were held against one other: a report's own time says when it was made, not who is late."""
    told = [(node.name, node.clock) for node in nodes if node.clock is not None]
    if len(told) < 2 or len({clock.reference for _, clock in told}) > 1:
        return
    hint = "Have the time service of that node mended (`timedatectl`, `chronyc tracking`)."
    because = f"More than {SKEW:g} s: logs, certificates and files' times no longer go together."
    offsets = sorted(clock.offset for _, clock in told)
    if len(told) == 2:
        if offsets[1] - offsets[0] > SKEW + sum(clock.error for _, clock in told):
            members = [Member(node, f"{clock.offset:+.1f} s") for node, clock in sorted(told)]
            yield _difference("sides", "clock", "warning", "", 0, 2, members, hint, because)
        return
    middle = statistics.median_low(offsets)
    members = [
        Member(node, f"{clock.offset - middle:+.1f} s")
        for node, clock in sorted(told)
        if abs(clock.offset - middle) > SKEW + clock.error
    ]
    if members:
        others = len(told) - len(members)
        yield _difference("clock", "clock", "warning", "one time", others, len(told), members, hint, because)


def _times(nodes: Sequence[Node]) -> Iterator[Difference]:
    """A report that is far from all others in time is an old one, or of a clock that is wrong by minutes."""
    times = {node.name: seconds for node in nodes if (seconds := _seconds(node.created)) is not None}
    if len(times) < FEWEST:
        return
    middle = statistics.median(times.values())
    spread = _SCALE * statistics.median(abs(value - middle) for value in times.values())
    far = max(_STALE, DEVIATIONS * spread)
    members = [
        Member(node, f"{abs(value - middle) / 60:.0f} min {'after' if value > middle else 'before'} the others")
        for node, value in sorted(times.items())
        if abs(value - middle) > far
    ]
    if members:
        hint = "Make that report anew; if it is new, that node's clock is wrong (`timedatectl`)."
        others = len(times) - len(members)
        yield _difference("time", "report's time", "warning", "one time", others, len(times), members, hint,
                          "It is an old report, or that clock is wrong.")  # fmt: skip


def _seconds(created: str) -> float | None:
    try:
        found = datetime.datetime.fromisoformat(created.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found.timestamp() if found.tzinfo else found.replace(tzinfo=datetime.timezone.utc).timestamp()


def middle(values: Iterable[float], unit: str = "") -> str:
    """The median in words."""
    return f"about {statistics.median(values):.4g} {unit}".rstrip()


def slower(
    kind: Kind, field: str, usual: str, total: int, members: list[Member], hint: str, because: str
) -> Difference:  # fmt: skip
    """A warning about nodes below a bound."""
    return _difference(kind, field, "warning", usual, total - len(members), total, members, hint, because)


def _difference(
    kind: Kind, field: str, severity: Severity, usual: str, count: int, total: int, members: list[Member], hint: str,
    because: str,
) -> Difference:  # fmt: skip
    return Difference(kind, field, severity, usual, count, total, tuple(members), hint, because=because)
