"""Which cards, and in which order, suit so many ranks."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from conftest import machine

from xflux_doctor.facts import CardPair, CardPlace, Topology
from xflux_doctor.matrix import Matrix
from xflux_doctor.report.summary import Summary
from xflux_doctor.report.text import render
from xflux_doctor.topology import best, canonical, lines


def joined(count: int, path: str = "sys", **pairs: Any) -> Topology:
    """Cards of which each pair has one path, but for `pairs`: p0_1="pix" or p0_1=4 (NVLinks)."""
    found = []
    for one, two in itertools.combinations(range(count), 2):
        way = pairs.get(f"p{one}_{two}", path)
        found.append(CardPair(one, two, way) if isinstance(way, str) else CardPair(one, two, path, way))
    places = tuple(CardPlace(card, card * 2 // count, f"{card * 2 // count * 8}-7") for card in range(count))
    return Topology(places, tuple(found))


def test_switches_make_all_cards_equal() -> None:
    pairs = tuple(CardPair(one, two, "node", 18, True) for one, two in itertools.combinations(range(8), 2))
    whole = Topology(tuple(CardPlace(card, card // 4, "0-15" if card < 4 else "16-31") for card in range(8)), pairs)
    assert [best(whole, size) for size in (2, 4, 8)] == [(0, 1), (0, 1, 2, 3), tuple(range(8))]
    assert lines(whole) == [
        "Cards: all 28 pairs by 18 NVLinks through switches",
        "  2 ranks: any 2 cards (slowest pair: 18 NVLinks through switches)",
        "  4 ranks: any 4 cards (slowest pair: 18 NVLinks through switches)",
        "  8 ranks: CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 (slowest pair: 18 NVLinks through switches)",
        "  cards 0,1,2,3 are beside NUMA node 0: cores 0-15, numactl --cpunodebind=0 --membind=0",
        "  cards 4,5,6,7 are beside NUMA node 1: cores 16-31, numactl --cpunodebind=1 --membind=1",
    ]


def test_bridged_pairs_go_before_neighbours() -> None:
    """Four cards with NVLink bridges between 0 and 2, and 1 and 3."""
    bridged = joined(4, "phb", p0_2=4, p1_3=4)
    assert best(bridged, 2) == (0, 2)
    assert best(bridged, 4) == (0, 1, 3, 2)  # both bridges are in the ring
    assert canonical(bridged) == "0-1, 0-3, 1-2, 2-3 by a host bridge; 0-2, 1-3 by 4 NVLinks"
    assert "2 ranks: CUDA_VISIBLE_DEVICES=0,2 (slowest pair: 4 NVLinks)" in "\n".join(lines(bridged))


def test_four_of_one_socket() -> None:
    """Cards 0 2 4 6 hang on one socket and 1 3 5 7 on the other."""
    near = {f"p{one}_{two}": "pxb" for one, two in itertools.combinations(range(8), 2) if one % 2 == two % 2}
    split = joined(8, "sys", **near)
    assert best(split, 4) == (0, 2, 4, 6)
    ring = best(split, 8)
    crossings = sum(one % 2 != two % 2 for one, two in zip(ring, (*ring[1:], ring[0]), strict=True))
    assert crossings == 2 and sorted(ring) == list(range(8))


def test_a_mesh_of_eight_without_switches() -> None:
    """A DGX-1: six links a card, some pairs by two, some by one, some by none."""
    links = {"p0_1": 1, "p0_2": 1, "p0_3": 2, "p0_4": 2, "p1_2": 2, "p1_3": 1, "p1_5": 2, "p2_3": 2, "p2_6": 1,
             "p3_7": 1, "p4_5": 1, "p4_6": 1, "p4_7": 2, "p5_6": 2, "p5_7": 1, "p6_7": 2}  # fmt: skip
    mesh = joined(8, "sys", **links)
    assert best(mesh, 2) == (0, 3)
    assert set(best(mesh, 4)) == {0, 1, 2, 3}


def test_few_cards_or_none() -> None:
    assert lines(None) == [] and best(joined(2), 4) == () and best(joined(2), 1) == ()
    assert len(lines(joined(2))) == 4
    assert best(joined(16), 8) == tuple(range(8))


@pytest.mark.parametrize("verbose", [True, False])
def test_check_shows_it_when_asked(matrix: Matrix, verbose: bool) -> None:
    facts = msgspec.structs.replace(machine(matrix, count=2), topology=joined(2, "phb"))
    assert ("Cards: all pairs by a host bridge" in render(Summary((), facts, None), verbose=verbose)) is verbose
