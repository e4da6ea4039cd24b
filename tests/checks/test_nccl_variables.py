"""EN2: NCCL's variables and gloo's; and the list of names against the library that is installed here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import ROOT, XFLUX_ACCELERATE, case, findings, job, machine, packages, verdict

from xflux_doctor.checks import nccl_variables
from xflux_doctor.facts import Package
from xflux_doctor.job import Job
from xflux_doctor.matrix import Matrix

TWO_MACHINES = job(XFLUX_ACCELERATE.replace("num_machines: 1", "num_machines: 2"))
ONE_RANK = job(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 1"))


def found(
    matrix: Matrix, check: Any, environment: dict[str, str], work: Job | None = None, nccl: str = "2.28.9", **host: Any
) -> str:
    there = packages(matrix, "cuda13") | {"nvidia-nccl-cu13": Package("nvidia-nccl-cu13", nccl)}
    facts = machine(matrix, count=8, environment=environment, packages=there)
    links = host.pop("nvlinks", None)
    facts = msgspec.structs.replace(
        facts,
        host=msgspec.structs.replace(facts.host, interfaces={"lo": "unknown", "eth0": "up", "ib0": "up"}, **host),
        gpus=tuple(msgspec.structs.replace(gpu, nvlinks=links) for gpu in facts.gpus or ()),
    )
    said = findings(case(matrix, facts, work or job()), check)
    return " ".join(" ".join((f.severity, f.seen, f.because, f.hint, *f.commands)) for f in said)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NCCL_SOCKET_IFNAMES", "Did you mean NCCL_SOCKET_IFNAME?"),
        ("NCCL_P2P_DISABLED", "Did you mean NCCL_P2P_DISABLE?"),
        ("NCCL_TIMEOUT", "init_process_group(timeout=…)"),
    ],
)
def test_names_that_nothing_reads(matrix: Matrix, name: str, words: str) -> None:
    assert words in found(matrix, nccl_variables.names_known, {name: "1"})


@pytest.mark.parametrize("name", ["NCCL_VERSION", "NCCL_FASTRAK_CTRL_DEV", "NCCL_ASYNC_ERROR_HANDLING", "NCCL_IB_HCA"])
def test_names_of_nccl_of_plugins_and_of_torch(matrix: Matrix, name: str) -> None:
    assert found(matrix, nccl_variables.names_known, {name: "1"}) == ""


def test_names_of_another_release(matrix: Matrix) -> None:
    check = nccl_variables.names_of_this_release
    assert "NCCL 2.29.7 is the first" in found(matrix, check, {"NCCL_GIN_PLUGIN": "x"})
    assert "NCCL 2.22.3 and newer do not read it" in found(matrix, check, {"NCCL_WORK_FIFO_DEPTH": "64"})
    assert found(matrix, check, {"NCCL_WORK_FIFO_DEPTH": "64", "NCCL_DEBUG": "WARN"}, nccl="2.20.5") == ""
    facts = machine(matrix, count=8, packages=packages(matrix, "cuda13", nvidia_nccl_cu13="", nvidia_nccl_cu12=""))
    assert verdict(case(matrix, facts, job()), check).status == "skipped"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("NCCL_IB_DISABLE", "true", "takes this for 0"),
        ("NCCL_BUFFSIZE", "4M", "takes this for 4"),
        ("NCCL_DEBUG", "DEBUG", "Its words are VERSION, WARN"),
        ("NCCL_P2P_LEVEL", "nvl", "Write NVL"),
        ("NCCL_ALGO", "rings", "error NCCL_ALGO is 'rings': 'rings' is no word"),
        ("NCCL_PROTO", "^LL256", "'ll256' is no word"),
        ("NCCL_ALGO", "allreduce:ring;alltoall:tree", "'alltoall'"),
    ],
)
def test_values_that_are_not_read_as_written(matrix: Matrix, name: str, value: str, words: str) -> None:
    assert words in found(matrix, nccl_variables.values_known, {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_IB_DISABLE", "1"),
        ("NCCL_BUFFSIZE", "0x400000"),
        ("NCCL_DEBUG", "info"),
        ("NCCL_P2P_LEVEL", "NVL"),
        ("NCCL_P2P_LEVEL", "3"),
        ("NCCL_ALGO", "Ring,Tree"),
        ("NCCL_ALGO", "^NVLS,NVLSTree"),
        ("NCCL_ALGO", "allreduce:ring;broadcast:tree"),
        ("NCCL_SOCKET_IFNAME", "eth0"),
        ("NCCL_TOPO_FILE", "/etc/topo.xml"),
    ],
)
def test_values_that_are(matrix: Matrix, name: str, value: str) -> None:
    assert found(matrix, nccl_variables.values_known, {name: value}) == ""


def test_an_algorithm_of_a_newer_release(matrix: Matrix) -> None:
    text = found(matrix, nccl_variables.values_known, {"NCCL_ALGO": "PAT"}, nccl="2.20.5")
    assert "warning" in text and "no word of it of NCCL 2.20.5" in text and "before 2.24 ignores" in text
    assert found(matrix, nccl_variables.values_known, {"NCCL_ALGO": "PAT"}) == ""


@pytest.mark.parametrize(
    ("value", "fires"),
    [
        ("eth1", True), ("=eth", True), ("^lo,eth,ib", True), ("eth", False), ("=eth0", False), ("^docker,lo", False),
        ("eth1,ib", False), ("ib0:5000", False),
    ],
)  # fmt: skip
def test_interfaces_by_nccls_rules(matrix: Matrix, value: str, fires: bool) -> None:
    text = found(matrix, nccl_variables.interfaces_exist, {"NCCL_SOCKET_IFNAME": value, "GLOO_SOCKET_IFNAME": "no"})
    assert ("Bootstrap : no socket interface found" in text) == fires
    assert "GLOO" not in text


@pytest.mark.parametrize(("value", "fires"), [("eth1", True), ("^lo", True), ("lo", False), ("lo,eth0", False)])
def test_interfaces_by_gloos(matrix: Matrix, value: str, fires: bool) -> None:
    work = job(XFLUX_ACCELERATE, cpu=True)
    text = found(matrix, nccl_variables.interfaces_exist, {"GLOO_SOCKET_IFNAME": value}, work)
    assert ("Unable to find address for: " in text) == fires


def test_nvlink_switched_off(matrix: Matrix) -> None:
    check = nccl_variables.links_on
    text = found(matrix, check, {"NCCL_P2P_DISABLE": "1"}, nvlinks=18)
    assert "8 cards have 18 NVLinks up" in text and "unset NCCL_P2P_DISABLE" in text
    assert found(matrix, check, {"NCCL_P2P_DISABLE": "1"}) == ""  # cards without NVLink, as RTX 40
    assert found(matrix, check, {"NCCL_P2P_DISABLE": "0", "NCCL_SHM_DISABLE": "1"}, nvlinks=18) == ""
    assert "network sockets" in found(matrix, check, {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"})


def test_infiniband_switched_off(matrix: Matrix) -> None:
    check = nccl_variables.infiniband_on
    adapters = {"infiniband": ("mlx5_0", "mlx5_1")}
    text = found(matrix, check, {"NCCL_IB_DISABLE": "1"}, TWO_MACHINES, **adapters)
    assert "2 machines" in text and "mlx5_0, mlx5_1" in text
    assert "NCCL_NET is 'Socket'" in found(matrix, check, {"NCCL_NET": "Socket"}, TWO_MACHINES, **adapters)
    assert found(matrix, check, {}, TWO_MACHINES, **adapters) == ""
    facts = machine(matrix, environment={"NCCL_IB_DISABLE": "1"}, count=8)
    assert verdict(case(matrix, facts, TWO_MACHINES), check).status == "skipped"


def test_log_level(matrix: Matrix) -> None:
    check = nccl_variables.log_level
    assert "TRACE" in found(matrix, check, {"NCCL_DEBUG": "trace"})
    assert found(matrix, check, {"NCCL_DEBUG": "INFO"}) == ""
    assert found(matrix, check, {"NCCL_DEBUG": "TRACE", "NCCL_DEBUG_FILE": "/tmp/n.%h.%p"}) == ""


def test_contradictions(matrix: Matrix) -> None:
    check = nccl_variables.no_contradictions
    assert "level is not looked at" in found(matrix, check, {"NCCL_P2P_DISABLE": "1", "NCCL_P2P_LEVEL": "NVL"})
    assert "least is above" in found(matrix, check, {"NCCL_MIN_NCHANNELS": "16", "NCCL_MAX_NCHANNELS": "2"})
    assert "may not use" in found(matrix, check, {"NCCL_IB_DISABLE": "1", "NCCL_NET": "IB"})
    assert found(matrix, check, {"NCCL_MIN_NCHANNELS": "2", "NCCL_MAX_NCHANNELS": "16"}) == ""


def test_one_rank_uses_no_nccl(matrix: Matrix) -> None:
    facts = machine(matrix, environment={"NCCL_TIMEOUT": "1"})
    assert verdict(case(matrix, facts, ONE_RANK), nccl_variables.names_known).status == "skipped"


LIBRARIES = sorted((ROOT / ".venvs").glob("*/lib/python3*/site-packages/nvidia/nccl/lib/libnccl.so.2"))


@pytest.mark.skipif(not LIBRARIES, reason="no NCCL wheel is installed in .venvs")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.parts[-8])
def test_the_list_is_what_the_library_reads(library: Path) -> None:
    spec = importlib.util.spec_from_file_location("known", ROOT / "benchmarks/known_variables.py")
    assert spec and spec.loader
    known = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(known)
    assert known.compare(library) == (set(), set())
