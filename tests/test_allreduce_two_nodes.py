"""The staged all-reduce between two network namespaces, over a cable that is cut, slow, or loses everything.

Rank 0 lives in one and rank 1 in the other: what stands in for the interpreter starts each in its own. They meet at
rank 0's TCP store, as machines do.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_allreduce_faults import WAIT, environment
from test_probes import assert_gone

from xflux_doctor.facts import AllReduce
from xflux_doctor.probes import reduction


def _permitted() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        return False
    name = f"xfd-cable-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made


pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch"),
    pytest.mark.skipif(not _permitted(), reason="network namespaces or TUN devices are not permitted here"),
]


def long(stage: str) -> Any:
    return pytest.param(stage, marks=pytest.mark.long)


ADDRESSES = ("10.213.9.1", "10.213.9.2")


@dataclass
class Cable:
    """Two namespaces and what joins them."""

    names: tuple[str, str]
    folder: Path

    @property
    def drop(self) -> Path:
        return self.folder / "drop"

    def inside(self, rank: int, *words: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.names[rank], *words], check=True, capture_output=True)

    def reduce(self, fault: dict[str, Any], *, seconds: float = WAIT, deep: bool = False) -> AllReduce:
        """One rank in each; the runner's arguments are -c START PROBE BACKEND RANK …, so the rank is the fifth."""
        program = self.folder / "python"
        program.write_text(
            f'#!/bin/sh\ncase "$5" in 0) node={self.names[0]};; *) node={self.names[1]};; esac\n'
            f'export GLOO_SOCKET_IFNAME="cable$5"\n'
            f'exec ip netns exec "$node" {sys.executable} {ROOT}/tests/fault_rank.py "$@"\n'
        )
        program.chmod(0o755)
        for deadline in (seconds, 3 * seconds):
            started = time.monotonic()
            result = reduction.all_reduce(
                str(program), "gloo", 2, environment(fault, self.folder), deadline,
                store=f"tcp://{ADDRESSES[0]}:29731", deep=deep,
            )  # fmt: skip
            assert time.monotonic() - started < deadline + 5
            assert_gone(str(self.folder))
            print(result)
            if result.stages[1] != "start":
                break  # else this machine takes longer to import torch, and nothing was tried
        return result


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[Cable]:
    names = (f"xfd{os.getpid()}c{time.monotonic_ns() % 10**6}", f"xfd{os.getpid()}d{time.monotonic_ns() % 10**6}")
    relay = None
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        found = Cable(names, tmp_path)
        command = [sys.executable, str(ROOT / "tests/relay.py"), *names, str(found.drop)]
        relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert relay.stdout and relay.stdout.readline() == "ready\n"
        for rank in (0, 1):
            found.inside(rank, "ip", "addr", "add", f"{ADDRESSES[rank]}/24", "dev", f"cable{rank}")
            found.inside(rank, "ip", "link", "set", f"cable{rank}", "up")
            found.inside(rank, "ip", "link", "set", "lo", "up")
        yield found
    finally:
        if relay is not None:
            relay.kill()
            relay.communicate()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_a_good_cable(cable: Cable) -> None:
    result = cable.reduce({"kind": "none"}, seconds=60)
    assert result.ok, result


@pytest.mark.parametrize("stage", ["import", long("versions"), long("tiny")])
def test_it_is_cut(cable: Cable, stage: str) -> None:
    """Its end at rank 1 goes down as rank 1 has reached a stage."""
    command = ["ip", "link", "set", "cable1", "down"]
    result = cable.reduce({"kind": "command", "stage": stage, "command": command})
    assert not result.ok and result.rank is not None, result
    assert result.stages[1] == stage, result
    if stage == "import":
        assert (result.rank, result.stage) == (1, "import")


@pytest.mark.parametrize("stage", [long("rendezvous"), "init"])
def test_all_is_lost(cable: Cable, stage: str) -> None:
    """The links stay up, and nothing arrives any more."""
    result = cable.reduce({"kind": "command", "stage": stage, "command": ["touch", str(cable.drop)]})
    assert not result.ok and result.rank is not None, result
    assert result.stages[1] == stage, result


@pytest.mark.long
def test_it_is_slow(cable: Cable) -> None:
    """20 Mbit/s: everything is right, and the sweep says how slow it is, or that there was no time."""
    if shutil.which("tc") is None:
        pytest.skip("tc is not here")
    for rank in (0, 1):
        cable.inside(rank, "tc", "qdisc", "add", "dev", f"cable{rank}", "root", "tbf", "rate", "20mbit",
                     "burst", "64kbit", "latency", "400ms")  # fmt: skip
    result = cable.reduce({"kind": "none"}, seconds=60, deep=True)
    assert result.ok, result
    assert max(one.busbw for one in result.bandwidth) < 0.01
    assert any("no time left" in words for words in result.skipped)
