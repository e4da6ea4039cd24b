"""Which cards, and in which order, suit a job of so many ranks, and the cores beside them. Pure.

The cards whose slowest pair is fastest, then whose pairs are fastest together; the order is that of a ring whose
slowest step is fastest. NCCL looks for its rings by itself among the cards that it is given: the choice counts most.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from xflux_doctor.facts import CardPair, Topology

SIZES = (2, 4, 8)
_RANKS = {"board": 60, "pix": 50, "pxb": 40, "phb": 30, "node": 20, "sys": 10, "": 0}
_WORDS = {
    "board": "one board",
    "pix": "one PCIe switch",
    "pxb": "several PCIe switches",
    "phb": "a host bridge",
    "node": "one NUMA node",
    "sys": "the link between sockets",
    "": "a way that is not told",
}
_MOST = 10
"""Cards of which every choice is tried; above it only runs of neighbours."""
_RING = 6
"""Cards of which every ring is tried."""


def speed(pair: CardPair) -> int:
    """More is faster: NVLinks by their number, else by what lies between."""
    return 1000 + pair.nvlinks if pair.nvlinks else _RANKS.get(pair.path, 0)


def best(topology: Topology, size: int) -> tuple[int, ...]:
    """The cards in their order; empty where there are not so many. Of equals the lowest numbers."""
    cards = [place.index for place in topology.cards]
    if not 2 <= size <= len(cards):
        return ()
    speeds = {(pair.first, pair.second): speed(pair) for pair in topology.pairs}
    speeds |= {(second, first): value for (first, second), value in speeds.items()}

    def worth(chosen: Sequence[int]) -> tuple[int, int]:
        own = [speeds.get(pair, 0) for pair in itertools.combinations(chosen, 2)]
        return min(own), sum(own)

    if len(cards) <= _MOST:
        choices: Iterator[tuple[int, ...]] = itertools.combinations(cards, size)
    else:
        choices = (tuple(cards[at : at + size]) for at in range(len(cards) - size + 1))
    chosen = max(choices, key=lambda choice: (worth(choice), [-card for card in choice]))
    return _ring(chosen, speeds)


def _ring(cards: tuple[int, ...], speeds: dict[tuple[int, int], int]) -> tuple[int, ...]:
    """The order round which the slowest step is fastest; of many cards each next the fastest that is left."""

    def worth(order: Sequence[int]) -> tuple[int, int]:
        steps = [speeds.get(step, 0) for step in zip(order, (*order[1:], order[0]), strict=True)]
        return min(steps), sum(steps)

    if len(cards) <= _RING:
        orders = [(cards[0], *rest) for rest in itertools.permutations(cards[1:])]
        return max(orders, key=lambda order: (worth(order), [-card for card in order]))
    order, left = [cards[0]], list(cards[1:])
    while left:
        nearest = max(left, key=lambda card: (speeds.get((order[-1], card), 0), -card))
        left.remove(nearest)
        order.append(nearest)
    return max((cards, tuple(order)), key=worth)


def lines(topology: Topology | None) -> list[str]:
    """What a person is shown: how the cards are joined, which suit how many ranks, and the cores beside each."""
    if topology is None:
        return []
    found = [f"Cards: {_joined(topology.pairs)}"]
    for size in (size for size in SIZES if size <= len(topology.cards)):
        cards = best(topology, size)
        slowest = min((pair for pair in topology.pairs if {pair.first, pair.second} <= set(cards)), key=speed)
        every = len({speed(pair) for pair in topology.pairs}) == 1 and size < len(topology.cards)
        which = f"any {size} cards" if every else f"CUDA_VISIBLE_DEVICES={','.join(map(str, cards))}"
        found.append(f"  {size} ranks: {which} (slowest pair: {_way(slowest)})")
    near: dict[tuple[int | None, str], list[int]] = {}
    for place in topology.cards:
        if place.cpus or place.numa is not None:
            near.setdefault((place.numa, place.cpus), []).append(place.index)
    for (numa, cpus), cards_here in near.items():
        node = f"NUMA node {numa}" if numa is not None else "their cores"
        hint = f", numactl --cpunodebind={numa} --membind={numa}" if numa is not None and len(near) > 1 else ""
        cores = f": cores {cpus}" if cpus else ""
        found.append(f"  cards {','.join(map(str, cards_here))} are beside {node}{cores}{hint}")
    return found


def _joined(pairs: Sequence[CardPair]) -> str:
    ways: dict[str, list[str]] = {}
    for pair in pairs:
        ways.setdefault(_way(pair), []).append(f"{pair.first}-{pair.second}")
    if len(ways) == 1:
        return f"all {len(pairs) if len(pairs) > 1 else ''} pairs by {next(iter(ways))}".replace("  ", " ")
    return "; ".join(f"{', '.join(names)} by {way}" for way, names in ways.items())


def _way(pair: CardPair) -> str:
    if not pair.nvlinks:
        return _WORDS.get(pair.path, pair.path)
    links = f"{pair.nvlinks} NVLink{'s' if pair.nvlinks > 1 else ''}"
    return f"{links} through switches" if pair.switched else links


def canonical(topology: Topology) -> str:
    """One word for how the cards are joined, by which nodes are compared."""
    return _joined(topology.pairs)
