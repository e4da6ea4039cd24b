"""How the cards are joined, asked of the real pynvml over a library that plays machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import test_gpus
from conftest import ROOT
from test_gpus import environment, needs_compiler

from xflux_doctor.facts import CardPair, CardPlace, Topology, from_json

fakes = test_gpus.libraries
"""The fixture of the fake libraries, by a name of this file."""


def told(folder: Path, script: str, place: Path) -> Topology | None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom xflux_doctor.facts import Facts, to_json\n"
        "from xflux_doctor.gather import gpus\ngot = gpus.read(10.0, Path(sys.argv[1]))\n"
        "assert not got.error, got.error\nprint(to_json(Facts(topology=got.topology)))\n"
    )
    (place / "root").mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code, str(place / "root")], env=environment(folder, script, place),
                          capture_output=True, text=True, timeout=30, cwd=ROOT)  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return from_json(done.stdout.encode()).topology


@needs_compiler
def test_eight_cards_on_switches(fakes: dict[str, Path], tmp_path: Path) -> None:
    script = "count 8\n" + "".join(f"{card}.cpus 0xff00\n{card}.numa 2\n" for card in range(4, 8))
    found = told(fakes["new"], script, tmp_path)
    assert found is not None and len(found.pairs) == 28
    assert set(found.pairs[1:3]) == {CardPair(0, 2, "node", 18, True), CardPair(0, 3, "node", 18, True)}
    assert found.cards[3] == CardPlace(3, 0, "0-7") and found.cards[4] == CardPlace(4, 1, "8-15")


@needs_compiler
def test_bridges_and_levels(fakes: dict[str, Path], tmp_path: Path) -> None:
    """Two pairs with bridges of four links, of which one is down in the second pair; no switch."""
    script = (
        "count 4\nlinks 4\nlinks_up 4\n2.links_up 3\n3.links_up 3\nlink_kind 0\n0.links.1 4\n1.links.0 4\n"
        "2.links.3 4\n3.links.2 4\nlevel 50\n0.level.1 10\n2.level.3 20\n"
    )
    found = told(fakes["new"], script, tmp_path)
    assert found is not None
    assert found.pairs[0] == CardPair(0, 1, "pix", 4) and found.pairs[5] == CardPair(2, 3, "pxb", 3)
    assert found.pairs[1] == CardPair(0, 2, "sys")


@needs_compiler
def test_the_kernel_knows_the_node_where_the_driver_does_not(
    fakes: dict[str, Path],
    tmp_path: Path,
) -> None:
    for card, node in ((0x10, "1"), (0x11, "-1")):
        folder = tmp_path / f"root/sys/bus/pci/devices/0000:{card:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(node + "\n")
    script = "count 2\nnvmlDeviceGetMemoryAffinity 3\nnvmlDeviceGetCpuAffinity 3\n"
    found = told(fakes["new"], script, tmp_path)
    assert found is not None and found.cards == (CardPlace(0, 1), CardPlace(1, None))


@needs_compiler
@pytest.mark.parametrize("script", [
    "count 1\n",
    "count 2\nnvmlDeviceGetTopologyCommonAncestor 3\nnvmlDeviceGetNvLinkState 3\n",
    "count 2\n1.nvmlDeviceGetHandleByIndex_v2 15\n",
])  # fmt: skip
def test_nothing_to_tell(fakes: dict[str, Path], tmp_path: Path, script: str) -> None:
    assert told(fakes["new"], script, tmp_path) is None


@needs_compiler
def test_an_old_driver_tells_what_it_can(fakes: dict[str, Path], tmp_path: Path) -> None:
    found = told(fakes["old"], "count 2\nnvmlDeviceGetNvLinkRemoteDeviceType 13\n", tmp_path)
    assert found is not None and found.pairs == (CardPair(0, 1, "node"),)
