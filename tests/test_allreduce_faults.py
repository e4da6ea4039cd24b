"""The staged all-reduce with every fault that we could think of in one of its ranks (gloo on CPU ranks).

For each: the right rank and stage, in the deadline and five seconds, and no process and no port left. The faults are
put in by `fault_rank.py`, which takes the interpreter's place. Several cases run at a time: most of them wait.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import ROOT, XFLUX_ACCELERATE, case, findings, job, machine
from test_probes import assert_gone, here

from xflux_doctor.checks import network
from xflux_doctor.commands import gate, together
from xflux_doctor.facts import AllReduce
from xflux_doctor.inputs import Inputs
from xflux_doctor.matrix import Matrix
from xflux_doctor.probes import level, reduction, retry
from xflux_doctor.probes.each_gpu import Ask

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
WAIT = 20.0
"""The deadline of a case that waits it out: enough for several torches to be imported at once."""


@dataclass(frozen=True)
class Fault:
    """One case: what is wrong, and what must come out."""

    name: str
    kind: str
    stage: str = "start"
    """The stage that must be named."""
    words: str = ""
    rank: int | None = 1
    ok: bool = False
    ranks: int = 2
    seconds: float = 60.0
    store: str = ""
    """`tcp://HOST`, to which a port is added."""
    busy: bool = False
    """Whether that port is taken."""
    more: dict[str, Any] = field(default_factory=dict)


STAGES = reduction.STAGES[:8]
FAULTS = (
    *(Fault(f"killed after {s}", "kill", s, "SIGKILL", more={"stage": s}) for s in STAGES),
    *(Fault(f"stopped after {s}", "stop", s, "SIGSTOP", seconds=WAIT, more={"stage": s}) for s in STAGES),
    *(
        Fault(f"wrong {name} {dtype}", "wrong", "tiny" if name == "all_reduce" else "values", f"{name} of {dtype}",
              more={"names": [name], "dtype": dtype})
        for name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
        for dtype in ("float32", "bfloat16")
    ),
    Fault("a rank gives what is wrong to all", "gives", "tiny", "must be", ranks=3,
          more={"names": ["all_reduce", "all_gather"], "dtype": "float32"}),
    Fault("rank 0 killed", "kill", "values", "SIGKILL", rank=0, more={"stage": "values", "ranks": [0]}),
    Fault("killed, and its output lost", "kill", "tiny", "SIGKILL", more={"stage": "tiny", "mute": True}),
    Fault("crashed in C", "segv", "init", "SIGSEGV", more={"stage": "init"}),
    Fault("hangs in Python", "hang", "init", "here (fault_rank.py:", seconds=WAIT, more={"stage": "init"}),
    Fault("never starts", "absent", "start", "was killed", seconds=WAIT, more={"seconds": 600}),
    Fault("starts late", "late", "done", rank=None, ok=True, more={"seconds": 4}),
    Fault("another library version", "version", "rendezvous", "version skew: rank 1 has torch 9.9.9", ranks=3),
    Fault("garbage on stdout", "garbage", "done", rank=None, ok=True),
    Fault("meets by TCP", "none", "done", rank=None, ok=True, store="tcp://127.0.0.1"),
    Fault("cannot bind", "none", "import", "Address already in use", rank=0, store="tcp://127.0.0.1", busy=True,
          seconds=WAIT),
    Fault("cannot resolve", "none", "import", "No host name resolves", rank=0, store="tcp://no-such-host.invalid"),
    Fault("stopped at a TCP store", "stop", "versions", "SIGSTOP", seconds=WAIT, store="tcp://127.0.0.1",
          more={"stage": "versions"}),
    Fault("no such interface", "interface", "versions", "Wrong interface", rank=0, more={"ranks": [0, 1]}),
)  # fmt: skip


def interpreter(folder: Path) -> str:
    """`fault_rank.py` as a program that takes an interpreter's arguments."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fault_rank.py "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def environment(fault: dict[str, Any], mark: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": json.dumps(fault), "STUB_MARK": str(mark)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def suffer(fault: Fault, folder: Path) -> tuple[AllReduce, float]:
    """Run one case; what came out, and how long it took."""
    folder.mkdir()
    holder, store, port = None, fault.store, 0
    if store:
        port = free_port()
        store = f"{store}:{port}"
    if fault.busy:
        holder = socket.create_server(("0.0.0.0", port))
    try:
        given = environment({"kind": fault.kind, **fault.more}, folder)
        started = time.monotonic()
        result = reduction.all_reduce(interpreter(folder), "gloo", fault.ranks, given, fault.seconds, store=store)
        took = time.monotonic() - started
    finally:
        if holder:
            holder.close()
    assert_gone(str(folder))
    assert not port or not listening(port)
    return result, took


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[tuple[AllReduce, float]]]:
    """The cases that were selected, six at a time."""
    folder = tmp_path_factory.mktemp("faults")
    parameters = [getattr(getattr(item, "callspec", None), "params", {}) for item in request.session.items]
    chosen = [one["fault"] for one in parameters if isinstance(one.get("fault"), Fault)]
    # Those that wait between those that work.
    long, short = ([one for one in chosen if (one.seconds < 60) is waits] for waits in (True, False))
    chosen = [one for pair in zip_longest(long, short[: len(long)]) for one in pair if one] + short[len(long) :]
    pool = ThreadPoolExecutor(6)
    request.addfinalizer(lambda: pool.shutdown(cancel_futures=True))
    return {fault.name: pool.submit(suffer, fault, folder / str(n)) for n, fault in enumerate(chosen)}


LONG = {f"wrong {name} bfloat16" for name in ("all_gather", "reduce_scatter", "broadcast")} | {"stopped at a TCP store"}


@pytest.mark.parametrize("fault", [
    pytest.param(fault, id=fault.name.replace(" ", "-"),
                 marks=[pytest.mark.long] if fault.name in LONG or fault.seconds == WAIT else [])
    for fault in FAULTS
])  # fmt: skip
def test_fault(fault: Fault, outcomes: dict[str, Future[tuple[AllReduce, float]]], matrix: Matrix) -> None:
    result, took = outcomes[fault.name].result()
    assert took < fault.seconds + 5
    if any(words.startswith("reduce_scatter") for words in result.skipped) and "reduce_scatter" in fault.name:
        assert result.ok  # this gloo has none, and says so
        return
    assert (result.ok, result.stage, result.rank) == (fault.ok, fault.stage, fault.rank), result
    assert len(result.stages) == fault.ranks
    found = findings(case(matrix, machine(matrix, allreduce=result), job(cpu=True)), network.all_reduce)
    if fault.ok:
        assert found == ()
        return
    (finding,) = found
    assert finding.code == "NE101" and finding.severity == "error" and finding.hint
    assert f"after stage '{fault.stage}'" in finding.seen
    assert fault.words in f"{finding.seen} {finding.because}", finding


def test_an_interpreter_that_is_not_there(matrix: Matrix) -> None:
    result = reduction.all_reduce("/nowhere/python", "gloo", 2, os.environ, 5)
    assert (result.ok, result.stage, result.rank) == (False, "start", 0) and "could not be started" in result.detail


@pytest.fixture
def full(tmp_path: Path) -> Any:
    """A file system without room."""
    place = tmp_path / "full"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    with (place / "all").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 4096)
            except OSError:
                break
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class TestNoRoom:
    def test_the_other_place_is_taken(self, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(full))
        assert reduction.all_reduce(sys.executable, "gloo", 1, os.environ, 60).ok

    def test_room_nowhere(self, full: Path, monkeypatch: pytest.MonkeyPatch, matrix: Matrix) -> None:
        monkeypatch.setattr(reduction, "PLACES", (str(full),))
        result = reduction.all_reduce(sys.executable, "gloo", 2, os.environ, 60)
        assert (result.ok, result.stage, result.rank) == (False, "start", None)
        (finding,) = findings(case(matrix, machine(matrix, allreduce=result), job(cpu=True)), network.all_reduce)
        assert finding.because.startswith("No room for files") and "TMPDIR" in finding.hint

    def test_a_folder_that_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
        monkeypatch.setattr(reduction, "PLACES", ("", "/proc/nowhere"))
        result = reduction.all_reduce(sys.executable, "gloo", 2, os.environ, 60)
        assert (result.ok, result.stage, result.rank) == (False, "start", None)

    def test_it_fills_up_in_between(self, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reduction, "PLACES", (str(full),))
        monkeypatch.setattr(reduction, "has_room", lambda folder: True)
        started = time.monotonic()
        result = reduction.all_reduce(sys.executable, "gloo", 2, os.environ, WAIT)
        assert time.monotonic() - started < WAIT + 5
        assert not result.ok and result.stage in ("start", "import") and "No space left" in result.detail


def test_a_doctor_that_is_killed_leaves_no_rank(tmp_path: Path) -> None:
    """One rank works and the other is stopped when it happens."""
    code = (
        "import os, sys\n"
        "from xflux_doctor.probes.reduction import all_reduce\n"
        "all_reduce(sys.argv[1], 'gloo', 2, os.environ, 60)\n"
    )
    given = {**environment({"kind": "stop", "stage": "init"}, tmp_path), "TMPDIR": str(tmp_path)}
    doctor = subprocess.Popen([sys.executable, "-c", code, interpreter(tmp_path)], env=given)
    deadline = time.monotonic() + 40
    while not any('"init"' in file.read_text() for file in tmp_path.glob("xflux-doctor-*/rank1.json")):
        assert time.monotonic() < deadline and doctor.poll() is None
        time.sleep(0.05)
    doctor.send_signal(signal.SIGKILL)
    doctor.wait()
    assert_gone(str(tmp_path))


class TestAnotherTry:
    """The deep level through `level.probe`, with the fault in every try."""

    def deep(self, matrix: Matrix, folder: Path, fault: dict[str, Any], **more: str) -> AllReduce:
        # What there is too little time for is left out, and said: of the usual minute a busy machine, where the first
        # try took 15 s, had too little for another one, or for the second size.
        facts = here(matrix)
        assert facts.python and facts.host
        facts = msgspec.structs.replace(
            facts,
            python=msgspec.structs.replace(facts.python, executable=interpreter(folder)),
            host=msgspec.structs.replace(facts.host, interfaces={"dead1": "down", "lo": "unknown"}),
        )
        work = job(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2"), cpu=True)
        after = level.probe(facts, work, {**environment(fault, folder), **more}, 300, Ask(("context",)))
        assert after.allreduce
        return after.allreduce

    def test_what_helps_is_proposed(self, matrix: Matrix, tmp_path: Path) -> None:
        result = self.deep(matrix, tmp_path, {"kind": "interface", "ranks": [0, 1]})
        assert not result.ok and result.helped == ("GLOO_SOCKET_IFNAME=lo",) and result.tried == ()
        (finding,) = findings(case(matrix, machine(matrix, allreduce=result), job(cpu=True)), network.all_reduce)
        assert finding.hint.startswith("With GLOO_SOCKET_IFNAME=lo, and nothing else changed, all stages passed")
        assert "one machine only" in finding.hint

    def test_run_adds_what_is_proved(self, matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The gate of `run`: the default level fails, the deep one finds the variable, the launch is given it."""
        for name, value in environment({"kind": "interface", "ranks": [0, 1]}, tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "passes"))
        facts = here(matrix)
        assert facts.python and facts.host
        facts = msgspec.structs.replace(
            facts,
            python=msgspec.structs.replace(facts.python, executable=interpreter(tmp_path)),
            host=msgspec.structs.replace(facts.host, interfaces={"lo": "unknown"}),
        )
        work = job(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2"), cpu=True)
        said: list[str] = []
        quick = case(matrix, facts, work)
        gated = gate.probed(quick, Inputs(cpu=True, deep_timeout=300), together.who(quick), said.append)
        assert gate.added(gated) == {"GLOO_SOCKET_IFNAME": retry.LOOPBACK}
        assert gated.facts.environment["GLOO_SOCKET_IFNAME"] == "lo" and "trying what may help" in said[0]
        (finding,) = findings(gated, network.all_reduce)
        assert finding.severity == "warning" and "GLOO_SOCKET_IFNAME=lo only" in finding.seen
        assert not (tmp_path / "passes").exists()  # it did not pass as the machine is

    def test_what_does_not_help_is_not_proposed(self, matrix: Matrix, tmp_path: Path) -> None:
        result = self.deep(matrix, tmp_path, {"kind": "kill", "stage": "init"})
        assert not result.ok and result.helped == () and result.tried == ("GLOO_SOCKET_IFNAME=lo",)
        (finding,) = findings(case(matrix, machine(matrix, allreduce=result), job(cpu=True)), network.all_reduce)
        assert "Tried without success: GLOO_SOCKET_IFNAME=lo." in finding.hint and "all stages" not in finding.hint

    def test_what_the_user_set_stays(self, matrix: Matrix, tmp_path: Path) -> None:
        result = self.deep(matrix, tmp_path, {"kind": "none"}, GLOO_SOCKET_IFNAME="dead0")
        assert not result.ok and (result.helped, result.tried) == ((), ()) and "dead0" in result.detail

    def test_it_is_timed(self, matrix: Matrix, tmp_path: Path) -> None:
        result = self.deep(matrix, tmp_path, {"kind": "none"})
        assert result.ok and [one.bytes for one in result.bandwidth] == [1 << 10, 1 << 20, 1 << 24]
        assert all(one.busbw == pytest.approx(one.bytes / one.seconds / 1e9) for one in result.bandwidth)
