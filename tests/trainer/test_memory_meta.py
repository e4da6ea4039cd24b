"""The whole bill against the trainer's own steps at FLUX.1-dev's size, on torch's meta device."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from trainer_kit import ROOT, environment  # noqa: E402

sys.path.insert(0, str(ROOT / "benchmarks"))
import meta_device  # noqa: E402

OWN = ("lora-kept", "finetune-adafactor-tier28-512-batch4")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the benchmark found, in one process of its own, by the rows' names."""
    folder = tmp_path_factory.mktemp("results")
    names = ",".join([*OWN, "int8-kept", "diffusers-kept-512"])
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_meta.py"), "--rows", names]
    done = subprocess.run(
        [*command, "--results", str(folder)], capture_output=True, text=True, timeout=280, env=environment(), cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("memory-meta-*.json")
    return {row["row"]: row for row in json.loads(file.read_text("utf-8"))["rows"]}


@pytest.mark.parametrize("name", OWN)
def test_the_bill_of_the_trainers_blocks(rows: dict[str, Any], name: str) -> None:
    """Adapters' to a thousandth. Of a fine-tune the bill has a whole block's gradients at every moment."""
    row = rows[name]
    assert row["forecast_bytes"] == sum(row["terms"].values())
    assert abs(row["error"]) < (0.001 if name.startswith("lora") else 0.015), row


@pytest.mark.parametrize("name", OWN)
def test_the_steps_take_what_they_took_on_a_card(rows: dict[str, Any], name: str) -> None:
    """Within 1 % of an H200's allocator: so much is scratch of torch's own kernels."""
    if "seen_error" not in rows[name]:
        pytest.skip("no result of a card has this row")
    assert abs(rows[name]["seen_error"]) < 0.01, rows[name]


def test_the_bill_of_diffusers_blocks(rows: dict[str, Any]) -> None:
    """With the norms of the releases that are installed."""
    assert abs(rows["diffusers-kept-512"]["error"]) < 0.01


def test_what_needs_values_says_so(rows: dict[str, Any]) -> None:
    assert rows["int8-kept"]["outcome"] == "not there" and "fewer bits" in rows["int8-kept"]["why"]


def test_the_ledger_counts_each_place_once() -> None:
    ledger = meta_device.Ledger()
    with ledger:
        first = torch.empty(300, device="meta")  # 1200 bytes, rounded to 1536
        view = first[100:]
        assert ledger.live == ledger.peak == 1536
        second = first + 1
        assert ledger.live == 3072
        del first
        assert ledger.live == 3072, "a view holds the whole place"
        del view, second
        assert (ledger.live, ledger.peak) == (0, 3072)
        ledger.reset_peak()
        assert ledger.peak == 0
        assert float(torch.ones((), device="meta")) == 1.0


def test_places_lie_apart() -> None:
    with meta_device.Ledger() as ledger:
        tensors = [torch.empty(1000, device="meta") for _ in range(3)]
        places = [ledger.address(each.untyped_storage()) for each in tensors]
    assert places == sorted(places) and min(b - a for a, b in itertools.pairwise(places)) > 4000
