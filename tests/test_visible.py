"""CUDA_VISIBLE_DEVICES by torch's own rules."""

from __future__ import annotations

import pytest
from conftest import gpus

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
    ("GPU-00000002", [2]),
    ("GPU-00000002,GPU-00000000", [2, 0]),
    ("GPU-00000002,1", [2]),
    ("GPU-0000000", []),  # ambiguous
    ("GPU-00000001,GPU-00000001", []),
    ("GPU-ffff", []),
])  # fmt: skip
def test_values(value: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in visible(CARDS, value)] == indices


def test_gpu_ids_win_over_the_environment() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0"}
    assert [g.index for g in selected(CARDS, environment, "1,2")] == [1, 2]
    assert [g.index for g in selected(CARDS, environment, "all")] == [0]
    assert [g.index for g in selected(CARDS, {}, None)] == [0, 1, 2, 3]
