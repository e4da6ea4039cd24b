"""One package against its pin, in one word."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from conftest import packages

from xflux_doctor.facts import Package
from xflux_doctor.matrix import Matrix, Pin
from xflux_doctor.pins import installed, judge, table

PIN = Pin("2.4.0", accepts=">=2.4.0,<=2.4.1", build="cu121")


@pytest.mark.parametrize(("values", "word"), [
    ({}, "exact"),
    ({"version": "2.4.0+cu121"}, "exact"),
    ({"version": "2.4.0.post1"}, "compatible"),
    ({"version": "2.4.1"}, "compatible"),
    ({"version": "2.4.0+cu118", "build": "cu118"}, "wrong build"),
    ({"build": "cpu"}, "wrong build"),
    ({"build": "cu124", "version": "2.4.1"}, "wrong build"),
    ({"version": "2.3.1"}, "too old"),
    ({"version": "2.4.0rc1"}, "too old"),
    ({"version": "2.13.0", "build": "cu130"}, "too new"),
    ({"version": "2.4.2"}, "later patch"),
    ({"version": "2.4.1+cu121"}, "compatible"),
    ({"version": "2.4.2", "build": "cu118"}, "wrong build"),
    ({"version": "2.4.2rc1"}, "too new"),
    ({"version": "2.5.0"}, "too new"),
    ({"version": "nightly"}, "unreadable"),
    ({"files": False}, "broken"),
    ({"damaged": ("torch/lib/libtorch.so",)}, "broken"),
    ({"copies": 2}, "shadowed"),
    ({"editable": True}, "editable"),
])  # fmt: skip
def test_words(values: dict[str, Any], word: str) -> None:
    assert judge(PIN, msgspec.structs.replace(Package("torch", "2.4.0", "cu121", "/site"), **values)) == word


def test_missing() -> None:
    assert judge(PIN, None) == "missing" and installed(None) == ""


def test_a_pin_without_a_build_takes_any() -> None:
    assert judge(Pin("0.14.4"), Package("deepspeed", "0.14.4")) == "exact"


def test_what_is_no_later_patch() -> None:
    """A pin that stands alone, one above its own span, and a patch that is left out."""
    assert judge(Pin("0.14.4"), Package("deepspeed", "0.14.5")) == "too new"
    assert judge(Pin("2.3.9", accepts=">=2.3.0,<=2.3.5"), Package("numpy", "2.3.9")) == "exact"
    assert judge(Pin("2.3.5", accepts=">=2.3.0,<=2.3.5,!=2.3.7"), Package("numpy", "2.3.7")) == "too new"
    assert judge(Pin("2.3.5", accepts=">=2.3.0,<=2.3.5,!=2.3.7"), Package("numpy", "2.3.8")) == "later patch"


@pytest.mark.parametrize("stack", ["xflux-2024", "cuda12", "cuda13", "cpu"])
def test_table(matrix: Matrix, stack: str) -> None:
    found = packages(matrix, stack, transformers="1.0", diffusers="")
    rows = {name: (have, word) for name, have, _, word in table(matrix.stack(stack), found)}
    assert rows.pop("transformers") == ("1.0", "too old") and rows.pop("diffusers") == ("", "missing")
    assert {word for _, word in rows.values()} == {"exact"} and "hjson" not in rows
    assert table(None, found) == () and table(matrix.stack(stack), None) == ()
