"""Which link is slow: numbers of pairs of nodes to the node, or the pair, that is the cause. Pure.

A pair is slow when it is a quarter and six robust deviations below the middle pair (numbers.bound): others use the
switches too, so that pairs spread more than cards. A node that is at the slow end of at least half of its pairs, and of
two or more, is named; a slow pair that no such node explains is named as a pair.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from xflux_doctor.fleet.numbers import bound, middle
from xflux_doctor.fleet.values import Difference, Member, Node

SHARE = 0.25
Pair = tuple[str, str]


def links(nodes: Sequence[Node]) -> Iterator[Difference]:
    """Nodes first, then the pairs that are left."""
    pairs = pairs_of(nodes)
    low = bound(list(pairs.values()), SHARE)
    if low is None:
        return
    ends: dict[str, list[Pair]] = {}
    for pair in pairs:
        for end in pair:
            ends.setdefault(end, []).append(pair)
    slow = {pair: value for pair, value in pairs.items() if value < low}
    named = slow_ends(ends, slow)
    if named:
        members = []
        for end in named:
            own = [slow[pair] for pair in ends[end] if pair in slow]
            members.append(Member(end, f"{middle(own, 'Gbit/s')} in {len(own)} of its {len(ends[end])} pairs"))
        hint = "Look at that node's network card, cable and switch port (`ibstat`, `ethtool`), or leave the node out."
        yield _difference("slow", pairs, slow, members, hint, low)
    hint = "Look at the way between the two (cable, switch, routing): neither is slow with most others."
    for pair, value in sorted(slow.items()):
        if not set(pair) & set(named):
            members = [Member(end, f"{value:.4g} Gbit/s between {pair[0]} and {pair[1]}") for end in pair]
            yield _difference("pair", pairs, slow, members, hint, low)


def slow_ends(ends: Mapping[str, Sequence[Pair]], slow: Collection[Pair]) -> tuple[str, ...]:
    """The nodes that explain the slow pairs: the one with the most of them first, then of the pairs that are left.

    Where two ends of one pair would explain as much, neither is named.
    """
    left, named = set(slow), []
    while left:
        counts: dict[str, int] = {}
        for pair in left:
            for end in pair:
                counts[end] = counts.get(end, 0) + 1
        found = {end: n for end, n in counts.items() if n > 1 and 2 * n >= len(ends[end])}
        if not found:
            break
        most = max((n / len(ends[end]), n) for end, n in found.items())
        best = {end for end, n in found.items() if (n / len(ends[end]), n) == most}
        if any(set(pair) <= best for pair in left):
            break
        named += sorted(best)
        left = {pair for pair in left if not set(pair) & best}
    return tuple(sorted(named))


def pairs_of(nodes: Sequence[Node]) -> dict[Pair, float]:
    """{(node, node): Gbit/s}, both ends by the names of their reports; of two numbers the lower."""
    names = {node.name for node in nodes}
    short = {name.partition(".")[0]: name for name in sorted(names)}
    found: dict[Pair, float] = {}
    for node in nodes:
        for link in node.links:
            peer = link.peer if link.peer in names else short.get(link.peer.partition(".")[0], link.peer)
            if peer != node.name:
                one, other = sorted((node.name, peer))
                found[one, other] = min(found.get((one, other), link.gbps), link.gbps)
    return found


def _difference(
    kind: str, pairs: Mapping[Pair, float], slow: Collection[Pair], members: list[Member], hint: str, low: float
) -> Difference:  # fmt: skip
    return Difference(
        kind="slow" if kind == "slow" else "pair",
        field="links",
        severity="warning",
        usual=middle(pairs.values(), "Gbit/s"),
        count=len(pairs) - len(slow),
        total=len(pairs),
        members=tuple(members),
        hint=hint,
        because=f"Below {low:.4g} Gbit/s is no chance among {len(pairs)} pairs.",
    )
