"""CUDA_VISIBLE_DEVICES by torch's own rules."""

from __future__ import annotations

import msgspec
import pytest
from conftest import gpus

from xflux_doctor.facts import MigSlice
from xflux_doctor.visible import selected, visible

CARDS = gpus("H100", 4)


@pytest.mark.parametrize(("value", "indices"), [
    (None, [0, 1, 2, 3]),
    ("", []),
    ("0", [0]),
    ("3,1", [3, 1]),
    (" 2 , 0", [2, 0]),
    ("0,-1,2", [0]),
    ("-1", []),
    ("0,9,1", [0]),
    ("1,1", []),
    ("0,a,1", [0]),
    ("2x,1", [2, 1]),
    ("0," + "9" * 5000, [0]),
    ("GPU-00000002", [2]),
    ("GPU-00000002,GPU-00000000", [2, 0]),
    ("GPU-00000002,1", [2]),
    ("GPU-0000000", []),  # ambiguous
    ("GPU-00000001,GPU-00000001", []),
    ("GPU-00000001,GPU-00000001-0000", []),  # two names of one card
    ("GPU-ffff", []),
    ("MIG-ffff", []),
])  # fmt: skip
def test_values(value: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in visible(CARDS, value)] == indices


def test_gpu_ids_win_over_the_environment() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0"}
    assert [g.index for g in selected(CARDS, environment, "1,2")] == [1, 2]
    assert [g.index for g in selected(CARDS, environment, "all")] == [0]
    assert [g.index for g in selected(CARDS, {}, None)] == [0, 1, 2, 3]


def test_a_process_sees_one_slice() -> None:
    slices = tuple(MigSlice(f"MIG-{n}", f"H100 MIG {n}g", n << 30, n << 29) for n in (1, 2))
    split = msgspec.structs.replace(CARDS[2], mig=True, slices=slices)
    cards = (*CARDS[:2], split, CARDS[3])
    for value, name in (("MIG-2", "H100 MIG 2g"), ("MIG-2,MIG-1", "H100 MIG 2g"), ("2", "H100 MIG 1g"),
                        (None, "H100 MIG 1g"), ("0,2", "H100 MIG 1g")):  # fmt: skip
        (device,) = visible(cards, value)
        assert device.name == name and device.index == 2
        assert device.memory_total == (2 << 30 if name.endswith("2g") else 1 << 30)
    assert [gpu.index for gpu in visible(cards, "0,1,3")] == [0, 1, 3]
    assert visible(cards, "MIG-") == ()  # means both
    assert visible(cards, "MIG-9,MIG-1") == ()
