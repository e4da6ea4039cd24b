"""Many reports into one: the planted nodes are found, each with its field, and no other."""

from __future__ import annotations

import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import fleet_kit as kit
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xflux_doctor.fleet.compare import near
from xflux_doctor.fleet.fields import FIELDS
from xflux_doctor.fleet.links import slow_ends
from xflux_doctor.fleet.merge import merge
from xflux_doctor.fleet.numbers import bound
from xflux_doctor.fleet.values import Broken, Fleet, Report
from xflux_doctor.floors import FLOORS, floor_of
from xflux_doctor.report.fleettext import hosts, render

WHOLE = sorted(path.stem for path in kit.MACHINES.glob("*.json"))
EIGHT = "h100-eight-shared"


def told(fleet: Fleet) -> dict[str, list[str]]:
    """{field: the nodes that are named}."""
    return {item.field: [member.node for member in item.members] for item in fleet.differences if item.members}


@pytest.mark.parametrize("machine", WHOLE)
def test_healthy_nodes_are_alike(machine: str) -> None:
    fleet = merge(kit.reports(machine, 24, seed=3))
    assert told(fleet) == {} or set(told(fleet)) == {"HW106"}  # the recorded lost card is lost on all
    assert fleet.blamed == frozenset() and fleet.missing == () and len(fleet.nodes) == 24


@pytest.mark.parametrize("what", kit.PLANTS)
def test_one_outlier_is_found_with_its_field(what: str) -> None:
    plant, key, severity = kit.PLANTS[what]
    fleet = merge(kit.reports("h100-two", 16, {5: plant}))
    assert told(fleet) == {key: ["node0006"]}
    (item,) = [item for item in fleet.differences if item.members]
    assert item.severity == severity and item.hint and fleet.exit_code == (severity == "error")
    text = render(fleet)
    assert "node0006" in text and "→" in text


def test_seven_of_a_thousand_in_time_and_memory() -> None:
    """The bar: the seven and no other, in under 5 s and 1 GB."""
    plants = {37 + 131 * at: kit.PLANTS[what][0] for at, what in enumerate(kit.SEVEN)}
    reports = kit.reports("h100-two", 1000, plants)
    started = time.perf_counter()
    fleet = merge(reports)
    seconds = time.perf_counter() - started
    assert fleet.blamed == {kit.name_of(number) for number in plants}
    assert told(fleet) == {
        kit.PLANTS[what][1]: [kit.name_of(number)] for what, number in zip(kit.SEVEN, plants, strict=True)
    }
    assert seconds < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 20
    assert fleet.exit_code == 1


@pytest.mark.long
def test_cost_grows_linearly(tmp_path: Path) -> None:
    """Four times the nodes cost less than seven times the time."""
    reports = kit.reports("h100-two", 1000)

    def seconds(count: int) -> float:
        found = []
        for _ in range(5):
            started = time.process_time()  # others work on this machine too
            merge(reports[:count])
            found.append(time.process_time() - started)
        return min(found)

    quarter, half, whole = (seconds(count) for count in (250, 500, 1000))
    assert whole < 7 * quarter and whole < 3.5 * half


@settings(max_examples=60, deadline=None)
@given(
    machine=st.sampled_from(["h100-two", "h200-two", EIGHT, "b200-eight"]),
    what=st.sampled_from(sorted(kit.PLANTS)),
    count=st.integers(5, 20),
    where=st.integers(0, 1 << 16),
    seed=st.integers(0, 1 << 16),
)
def test_any_outlier_is_the_only_one_named(machine: str, what: str, count: int, where: int, seed: int) -> None:
    plant, key, _ = kit.PLANTS[what]
    number = where % count
    if what in ("slow card",) and machine == "b200-eight":
        count = max(count, 7)  # no floor is known for it
    fleet = merge(kit.reports(machine, count, {number: plant}, seed))
    if machine == "h200-two" and what in ("model", "nvlink", "pcie"):
        assert fleet.blamed == frozenset()  # it is that model, and the others of this recording tell of no links
    else:
        assert fleet.blamed == {kit.name_of(number)} and key in told(fleet)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 16), copies=st.lists(st.integers(0, 11), max_size=30))
def test_neither_order_nor_copies_matter(seed: int, copies: list[int]) -> None:
    reports = kit.reports("h100-two", 12, {3: kit.version, 7: kit.clock, 9: kit.slow_link})
    first = merge(reports)
    mixed = [*reports, *(reports[at] for at in copies)]
    random.Random(seed).shuffle(mixed)
    again = merge(mixed)
    assert again.differences == first.differences and again.nodes == first.nodes
    assert again.again == {kit.name_of(at): 1 + copies.count(at) for at in copies}


def test_the_newest_report_of_a_node_counts() -> None:
    reports = kit.reports("h100-two", 6, {2: kit.other_config})
    mended = json.loads(kit.reports("h100-two", 6)[2].data)
    mended["created"] = "2026-11-24T15:55:00+00:00"
    mended["facts"]["gpus"] = json.loads(reports[2].data)["facts"]["gpus"]
    newer = Report("again", json.dumps(mended).encode())
    for order in ([*reports, newer], [newer, *reports]):
        fleet = merge(order)
        assert fleet.blamed == frozenset() and fleet.again == {"node0003": 2}
    assert "node0003 sent more than one report (2)" in render(merge([*reports, newer]))


def test_two_machines_of_one_name_are_two() -> None:
    """Two containers called alike, told apart by their cards."""
    reports = [json.loads(report.data) for report in kit.reports("h100-two", 2, {1: kit.driver})]
    for document in reports:
        document["node"] = document["facts"]["host"]["name"] = "localhost"
    fleet = merge([Report(str(at), json.dumps(document).encode()) for at, document in enumerate(reports)])
    assert len(fleet.nodes) == 2 and all(name.startswith("localhost (GPU-") for name in fleet.nodes)
    assert [item.kind for item in fleet.differences if item.field == "driver"] == ["sides"]


@pytest.mark.parametrize("count", [2, 4])
def test_no_majority_blames_nobody(count: int) -> None:
    plants = dict.fromkeys(range(count // 2), kit.version)
    fleet = merge(kit.reports("h100-two", count, plants))
    (item,) = [item for item in fleet.differences if item.members]
    assert item.kind == "sides" and item.usual == "" and len(item.members) == count and fleet.exit_code == 1
    assert "no majority: " in render(fleet)


def test_a_fault_is_named_among_two() -> None:
    """An uncorrected error is no matter of majorities."""
    fleet = merge(kit.reports("h100-two", 2, {1: kit.ecc}))
    assert told(fleet) == {"HW110": ["node0002"]}


def test_facts_alone_tell_faults_too() -> None:
    documents = [json.loads(report.data)["facts"] for report in kit.reports("h100-two", 5, {1: kit.ecc})]
    fleet = merge([Report(str(at), json.dumps(document).encode()) for at, document in enumerate(documents)])
    assert told(fleet) == {"HW110": ["node0002"]} and fleet.facts_only == 5
    assert "only facts came" in render(fleet)


def test_a_floor_holds_one_node_of_two() -> None:
    fleet = merge(kit.reports("h100-two", 2, {0: kit.slow_card}))
    assert told(fleet) == {"matmul_bf16_tflops": ["node0001"]}
    (item,) = [item for item in fleet.differences if item.members]
    assert "594 TFLOP/s" in item.members[0].value and "measured" in item.because


def test_floors() -> None:
    assert all(row.source and row.value > 0 for row in FLOORS)
    assert floor_of("NVIDIA H100 80GB HBM3", "matmul_bf16_tflops") is not None
    for other in ("NVIDIA H100 NVL", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA H200 NVL", ""):
        assert floor_of(other, "matmul_bf16_tflops") is None, other
    assert bound([1.0] * 4) is None and bound([10.0] * 5) == 9.0


def test_the_node_at_the_slow_end_or_the_pair() -> None:
    ring = {name: [tuple(sorted((name, other))) for other in pair] for name, pair in
            {"a": "be", "b": "ac", "c": "bd", "d": "ce", "e": "da"}.items()}  # fmt: skip
    ends: Any = ring
    assert slow_ends(ends, {("a", "b"), ("b", "c")}) == ("b",)
    assert slow_ends(ends, {("a", "b")}) == ()
    assert slow_ends(ends, {("a", "b"), ("b", "c"), ("c", "d")}) == ()  # b or c: neither is blamed
    reports = kit.reports("h100-two", 9)
    document = json.loads(reports[4].data)
    document["facts"]["links"][0]["gbps"] = 80
    reports[4] = Report("x", json.dumps(document).encode())
    (item,) = [item for item in merge(reports).differences if item.members]
    assert item.kind == "pair" and [member.node for member in item.members] == ["node0005", "node0006"]


def test_clocks_of_two_nodes() -> None:
    fleet = merge(kit.reports("h100-two", 2, {1: kit.clock}))
    (item,) = [item for item in fleet.differences if item.members]
    assert (item.field, item.kind, len(item.members)) == ("clock", "sides", 2)


def test_who_was_expected() -> None:
    reports = kit.reports("h100-two", 3)
    fleet = merge(reports, ("node0001.cluster", "node0002", "node0004"), "--expect")
    assert fleet.missing == ("node0004",) and fleet.unexpected == ("node0003",) and fleet.exit_code == 1
    text = render(fleet)
    assert "1 expected node sent no report that could be read: node0004" in text and "node0003 sent a report" in text


def test_other_images_make_one_line() -> None:
    def older(document: dict[str, Any]) -> None:
        for name in ("requests", "pandas", "regex"):
            document["facts"]["packages"][name]["version"] = "1.0"
        del document["facts"]["packages"]["timm"]

    text = render(merge(kit.reports("h100-two", 8, {2: older})))
    assert text.count("packages: 7 of 8 nodes agree; node0003 has") == 1 and "timm not installed" in text


def test_errors_that_all_have_stop_the_job_too() -> None:
    fleet = merge(kit.reports("h100-two", 3, dict.fromkeys(range(3), kit.finding)))
    assert fleet.exit_code == 1 and fleet.blamed == frozenset()
    assert "ST101: all 3 nodes: The disk" in render(fleet)


def test_words_of_a_report() -> None:
    assert hosts(["n001", "n002", "n007", "gpu", "10.0.0.7"]) == "n[001-002,007], 10.0.0.7, gpu"
    assert near([(100.0, "a"), (101.0, "b"), (200.0, "c")]) == {"0.0 MiB": ["a", "b"], "0.0 MiB+": ["c"]}
    assert all(cause in FIELDS for row in FIELDS.values() for cause in row.follows)
    assert render(merge([])).startswith("No node sent") and merge([]).exit_code == 1
    assert "there is nothing to compare it with" in render(merge(kit.reports("h100", 1)))
    fleet = merge([Broken("a.json", "it is cut off after 10 bytes", "Make it anew.", "n1")], ("n1",), "--expect")
    assert "a.json (of n1): it is cut off" in render(fleet) and fleet.missing == ("n1",)
