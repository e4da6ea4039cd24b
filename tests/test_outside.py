"""DCGM and nccl-tests: what they print is read, and programs of their names are really run.

tests/outside holds what they print: `dcgmi diag -r 1 -j` of DCGM 4.2.3 on a GB10 whose persistence mode is off (it
ended with 226), the form of DCGM 2 and 3 as NVIDIA/DCGM's own TestDiagManager.cpp has it (four of its tests), two cards
of a `dcgmi discovery -l`, and all_reduce_perf over two A100-SXM4-80GB under NCCL 2.20.5. All are shortened.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import msgspec
import pytest
from conftest import ROOT, XFLUX_ACCELERATE, job, machine

from xflux_doctor.facts import DcgmResult, Facts, TorchFacts
from xflux_doctor.job import Job
from xflux_doctor.matrix import Matrix
from xflux_doctor.probes import level
from xflux_doctor.probes.each_gpu import Ask
from xflux_doctor.probes.outside import (
    ask_dcgm,
    ask_nccl_tests,
    read_all_reduce,
    read_diagnosis,
    read_discovery,
)

SAMPLES = ROOT / "tests/outside"
NO_ENGINE = """\
Error: unable to establish a connection to the specified host: localhost
Error: Unable to connect to host engine. Host engine connection invalid/disconnected.
"""
CUDA_FAILURE = """\
# nThread 1 nGpus 2 minBytes 268435456 maxBytes 268435456 step: 1048576(bytes) warmup iters: 3 iters: 10 validation: 1
node: Test NCCL failure common.cu:392 'unhandled cuda error (run with NCCL_DEBUG=INFO for details) / '
 .. node pid 5068: Test failure common.cu:590
"""
OLD_TABLE = "   268435456      67108864   float  11306.6   23.74   23.74  1e-07  11290.1   23.78   23.78  1e-07\n"
"""The columns of releases before 2.12: no redop or root, and the largest error."""


def sample(name: str) -> str:
    return (SAMPLES / name).read_text(encoding="utf-8")


def put(folder: Path, name: str, body: str) -> dict[str, str]:
    """An environment whose PATH has a shell script of this name first."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def printing(folder: Path, name: str, text: str, code: int = 0) -> dict[str, str]:
    (folder / "said").write_text(text, encoding="utf-8")
    return put(folder, name, f'echo "$@" >> {folder}/asked\ncat {folder}/said\nexit {code}')


def living(pid: str) -> bool:
    """Whether it runs; one that ended may wait as a zombie for its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def two(matrix: Matrix) -> tuple[Facts, Job]:
    seen = TorchFacts("2.11.0", "13.0", ("NVIDIA H100 80GB HBM3",) * 2, ((9, 0),) * 2)
    work = job(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2"))
    assert work.local_processes == 2 and not work.use_cpu
    return machine(matrix, count=2, torch=seen), work


class TestDcgm:
    def test_version_4(self) -> None:
        found = read_diagnosis(sample("dcgm4_persistence.json"))
        assert isinstance(found, DcgmResult)
        assert found.version == "4.2.3" and found.passed == 0
        (failure,) = found.failures
        assert (failure.test, failure.gpus, failure.severity) == ("software", (0,), 5)
        assert failure.detail.startswith("Persistence Mode: Persistence mode for GPU 0 is disabled.")

    def test_versions_2_and_3_name_the_card_in_words(self) -> None:
        found = read_diagnosis(sample("dcgm3_persistence.json"))
        assert isinstance(found, DcgmResult)
        assert found.version == "1.7" and found.passed == 2
        (failure,) = found.failures
        assert (failure.test, failure.gpus, failure.severity) == ("Persistence Mode", (1,), None)

    @pytest.mark.parametrize(("change", "gpus"), [
        ({"gpu_id": 2}, (2,)), ({"gpu_id": "2"}, (2,)), ({"gpu_ids": "0, 2"}, (0, 2)), ({}, ()),
        ({"entity_group": "CPU", "entity_id": 0}, ()),
    ])  # fmt: skip
    def test_whose_result_it_is(self, change: dict[str, object], gpus: tuple[int, ...]) -> None:
        result = {"status": "Fail", "info": "it is bad", **change}
        document = {"DCGM GPU Diagnostic": {"test_categories": [{"tests": [{"name": "Memory", "results": [result]}]}]}}
        found = read_diagnosis("Successfully ran diagnostic for group.\n" + json.dumps(document))
        assert isinstance(found, DcgmResult)
        assert [(one.test, one.gpus, one.detail) for one in found.failures] == [("Memory", gpus, "it is bad")]

    @pytest.mark.parametrize(("text", "why"), [
        ("", ""), (NO_ENGINE, ""), ("{", ""), ("[1]", ""), ("{'a': 1}", "no JSON"), ("{}", "no test of it ran"),
        ('{"DCGM Diagnostic": {"runtime_error": "Feature not supported"}}', "Feature not supported"),
        ('{"DCGM Diagnostic": {"test_categories": [{"tests": [{"name": "a", "results": [{"status": "Skip"}]}]}]}}',
         "no test of it ran"),
        ('{"DCGM Diagnostic": {"test_categories": [7, {"tests": {"name": 1, "results": [null]}}]}}', "no test of it"),
    ])  # fmt: skip
    def test_what_is_no_result(self, text: str, why: str) -> None:
        found = read_diagnosis(text)
        assert isinstance(found, str) and why in found

    def test_discovery(self) -> None:
        assert read_discovery(sample("discovery.txt")) == {
            "0": "GPU-34bf77d1-c686-6821-79a8-32d326c5039c", "1": "GPU-f5046fa5-3db4-45e8-870a-dc1376becaa5",
        }  # fmt: skip
        assert read_discovery("") == read_discovery(NO_ENGINE) == {}

    def test_it_is_run(self, matrix: Matrix, tmp_path: Path) -> None:
        """A failed diagnosis ends with 226 and is a result; which cards it means is asked for then."""
        facts, work = two(matrix)
        (tmp_path / "diag").write_text(sample("dcgm4_persistence.json"), encoding="utf-8")
        (tmp_path / "discovery").write_text(sample("discovery.txt"), encoding="utf-8")
        environment = put(
            tmp_path, "dcgmi", f'cat {tmp_path}/$1\necho "$@" >> {tmp_path}/asked\n[ $1 != diag ] || exit 226'
        )
        found = ask_dcgm(facts, work, environment, 30).dcgm
        assert found and len(found.failures) == 1 and len(found.cards) == 2
        assert (tmp_path / "asked").read_text() == "diag -r 1 -j\ndiscovery -l\n"

    def test_the_deep_level_asks_it_even_where_torch_is_broken(self, matrix: Matrix, tmp_path: Path) -> None:
        facts, work = two(matrix)
        assert facts.python
        broken = msgspec.structs.replace(facts.python, executable="/bin/false")
        facts = msgspec.structs.replace(facts, python=broken, torch=None)
        environment = printing(tmp_path, "dcgmi", sample("dcgm3_persistence.json"))
        plain = level.probe(facts, work, environment, 30)
        assert plain.dcgm is None and not (tmp_path / "asked").exists()
        deep = level.probe(facts, work, environment, 60, Ask(("context",)))
        assert deep.dcgm and deep.torch is None

    def test_no_host_engine_is_unknown(self, matrix: Matrix, tmp_path: Path) -> None:
        facts, work = two(matrix)
        after = ask_dcgm(facts, work, printing(tmp_path, "dcgmi", NO_ENGINE, 1), 30)
        assert after.dcgm is None and after.unknown["dcgm"] == (
            "dcgmi diag gave no result: it exited with 1; Error: Unable to connect to host engine. Host engine "
            "connection invalid/disconnected."
        )

    def test_a_program_that_cannot_be_started(self, matrix: Matrix, tmp_path: Path) -> None:
        facts, work = two(matrix)
        environment = put(tmp_path, "dcgmi", "")
        (tmp_path / "dcgmi").write_bytes(b"\x7fELF of another machine")
        assert "could not be started" in ask_dcgm(facts, work, environment, 30).unknown["dcgm"]

    def test_when_it_is_not_run(self, matrix: Matrix, tmp_path: Path) -> None:
        facts, work = two(matrix)
        there = printing(tmp_path, "dcgmi", sample("dcgm3_persistence.json"))
        for machine_, doing, environment, seconds, why in (
            (facts, work, {"PATH": ""}, 30.0, "not on PATH"),
            (facts, job(cpu=True), there, 30.0, "runs on the CPU"),
            (msgspec.structs.replace(facts, gpus=()), work, there, 30.0, "no GPU"),
            (facts, work, there, 0.5, "no time"),
        ):
            after = ask_dcgm(machine_, doing, environment, seconds)
            assert after.dcgm is None and why in after.unknown["dcgm"]
        assert not (tmp_path / "asked").exists()


class TestNcclTests:
    def test_the_table(self) -> None:
        found = read_all_reduce(sample("nccl_a100.txt"), 2)
        assert (found.busbw, found.wrong, found.failed) == (185.74, 0, "")

    def test_wrong_values(self) -> None:
        text = sample("nccl_a100.txt").replace("185.74      0", "185.74     12")
        assert read_all_reduce(text, 2).wrong == 12
        text = sample("nccl_a100.txt").replace("186.17      0", "186.17    N/A").replace(": 0 OK", ": 3 FAILED")
        assert read_all_reduce(text, 2).wrong == 3

    def test_older_columns(self) -> None:
        found = read_all_reduce(OLD_TABLE + "# Out of bounds values : 0 OK", 2)
        assert (found.busbw, found.wrong) == (23.74, 0)

    def test_it_is_run(self, matrix: Matrix, tmp_path: Path) -> None:
        facts, work = two(matrix)
        after = ask_nccl_tests(facts, work, printing(tmp_path, "all_reduce_perf", sample("nccl_a100.txt")), 30)
        assert after.nccl_tests and after.nccl_tests.ranks == 2 and after.nccl_tests.busbw == 185.74
        assert after.speeds == {"nccl_tests_busbw_gbs": 185.74}
        assert (tmp_path / "asked").read_text() == "-b 268435456 -e 268435456 -g 2 -w 3 -n 10\n"

    def test_its_failure_is_kept_and_no_rate(self, matrix: Matrix, tmp_path: Path) -> None:
        facts, work = two(matrix)
        after = ask_nccl_tests(facts, work, printing(tmp_path, "all_reduce_perf", CUDA_FAILURE, 3), 30)
        assert after.nccl_tests and after.speeds == {}
        assert after.nccl_tests.failed.startswith("Test NCCL failure common.cu:392 'unhandled cuda error")

    def test_a_library_that_it_lacks_is_unknown(self, matrix: Matrix, tmp_path: Path) -> None:
        words = "all_reduce_perf: error while loading shared libraries: libmpi.so.40: cannot open shared object file"
        facts, work = two(matrix)
        after = ask_nccl_tests(facts, work, put(tmp_path, "all_reduce_perf", f"echo '{words}' >&2; exit 127"), 30)
        assert after.nccl_tests is None and "libmpi.so.40" in after.unknown["nccl_tests"]

    def test_a_hang_is_ended_with_all_that_it_started(self, matrix: Matrix, tmp_path: Path) -> None:
        facts, work = two(matrix)
        environment = put(tmp_path, "all_reduce_perf", f"sleep 300 &\necho $! $$ > {tmp_path}/pids\nwait")
        started = time.monotonic()
        after = ask_nccl_tests(facts, work, environment, 2.0)
        assert time.monotonic() - started < 20
        assert after.nccl_tests is None and "did not end within" in after.unknown["nccl_tests"]
        pids = (tmp_path / "pids").read_text().split()
        assert len(pids) == 2
        while any(map(living, pids)):  # a killed process needs a moment to go
            assert time.monotonic() - started < 40
            time.sleep(0.02)

    def test_when_it_is_not_run(self, matrix: Matrix, tmp_path: Path) -> None:
        facts, work = two(matrix)
        there = printing(tmp_path, "all_reduce_perf", sample("nccl_a100.txt"))
        one = msgspec.structs.replace(facts, torch=TorchFacts("2.11.0", "13.0", ("NVIDIA H100 80GB HBM3",)))
        for machine_, doing, environment, seconds, why in (
            (facts, work, {"PATH": ""}, 30.0, "not on PATH"),
            (facts, job(cpu=True), there, 30.0, "no two ranks"),
            (one, work, there, 30.0, "no two ranks"),
            (msgspec.structs.replace(facts, torch=None), work, there, 30.0, "no two ranks"),
            (facts, work, there, 0.5, "no time"),
        ):
            after = ask_nccl_tests(machine_, doing, environment, seconds)
            assert after.nccl_tests is None and why in after.unknown["nccl_tests"]
        assert not (tmp_path / "asked").exists()
