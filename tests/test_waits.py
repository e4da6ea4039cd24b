"""What processes wait for, by what the kernel tells: real ones, in a lock, a pipe, a sleep, and a file system that does
not answer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuse_kit import Fuse

from xflux_doctor import stacks, syscalls, waits
from xflux_doctor.gather.mounts import Mount
from xflux_doctor.hang import Hang, Held, Rank, sharper
from xflux_doctor.heartbeat import Beat, state
from xflux_doctor.waits import Thread

SITS = """
import ctypes, os, sys, threading
def futex(_): lock = threading.Lock(); lock.acquire(); lock.acquire()
def read(name): os.read(os.open(name, os.O_RDWR), 1)
def opens(name): open(name)
def sleep(_): ctypes.CDLL(None).sleep(60)  # Python's own is another call before 3.11
def beside(name):  # a thread and a child that wait, and a main thread that does too
    if os.fork() == 0:
        read(name)
    threading.Thread(target=futex, args=(name,)).start()
    sleep(name)
def stat(name): os.stat(name)
globals()[sys.argv[1]](sys.argv[2])
"""
TELLS = Path("/proc/self/syscall").exists() and Path("/proc/self/wchan").read_text() == "0"
pytestmark = pytest.mark.skipif(not TELLS, reason="this kernel does not tell what processes wait in")
Sits = Callable[[str, Path], subprocess.Popen[bytes]]


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank here answers SIGUSR2."""
    monkeypatch.setattr(stacks, "_PYTHON", 0.2)


@pytest.fixture
def sits() -> Iterator[Sits]:
    started: list[subprocess.Popen[bytes]] = []

    def start(how: str, name: Path) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", SITS, how, str(name)], start_new_session=True))
        return started[-1]

    yield start
    for one in started:
        os.killpg(one.pid, signal.SIGKILL)
        one.wait()


def once(pid: int, call: str) -> Thread:
    """Its main thread, as soon as it waits in this call; while Python loads, a slow disk keeps it in state D there."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = waits.threads(pid)
        if found and found[0].call == call and found[0].state == "S":
            return found[0]
        time.sleep(0.02)
    raise AssertionError(waits.threads(pid))


@pytest.mark.parametrize(("how", "call", "function", "about"), [
    ("futex", "futex", "futex", ""), ("read", "read", "pipe_read", "image.png"),
    ("opens", "openat", "wait_for_partner", "image.png"), ("sleep", "clock_nanosleep", "nanosleep", ""),
])  # fmt: skip
def test_a_thread(sits: Sits, fifo: Path, how: str, call: str, function: str, about: str) -> None:
    found = once(sits(how, fifo).pid, call)
    assert found.main and found.state == "S" and function in found.function
    assert found.file == (str(fifo) if about else "")
    time.sleep(0.2)
    (later,) = waits.threads(found.pid)
    assert later == found  # it has not run
    assert waits.who_holds_up(found, later) == ""  # a pipe is no file system that is away
    assert f"state S: {found.function}, {call}" in waits.shown([found], [later]) and "now and then" not in found.line
    assert "(it runs now and then)" in waits.shown([found], [])


def test_a_relative_path_and_a_number_that_nobody_knows(fifo: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", SITS, "opens", "../there/image.png"], cwd=_there(fifo))
    try:
        assert once(child.pid, "openat").file == f"{fifo.parent}/there/image.png"
    finally:
        child.kill()
        child.wait()
    assert syscalls.name(9999) == "syscall 9999" and waits.threads(child.pid) == []


def _there(fifo: Path) -> Path:
    (fifo.parent / "here").mkdir()
    (fifo.parent / "there").symlink_to(fifo.parent)
    return fifo.parent / "here"


def test_all_of_a_rank(sits: Sits, fifo: Path, tmp_path: Path) -> None:
    """Its threads and its children, alike ones in one line; nobody was stopped or ended."""
    child = sits("beside", fifo)
    once(child.pid, "clock_nanosleep")
    beat = Beat(0, 1, child.pid, "host", "data", False, 5, 100, 0.5, 5, 0.0, 0.0)
    standing = stacks.collect([Rank(beat, 61.0, "S")], tmp_path)[0]
    below = waits.descendants([child.pid, os.getpid()])
    (reader,) = below[child.pid]
    assert {child.pid, reader} <= set(below[os.getpid()])
    kernel = standing.text.partition("== kernel")[2]
    assert f"thread {child.pid} (" in kernel and "nanosleep" in kernel and "state S: futex" in kernel
    assert f"child process {reader}:\n" in kernel and f"read of {fifo}" in kernel
    assert standing.held == Held()
    assert state(child.pid) == "S" and state(reader) == "S"


@pytest.mark.skipif(not any(map(shutil.which, ("py-spy", "eu-stack"))), reason="needs py-spy or eu-stack")
def test_stacks_of_c(sits: Sits, fifo: Path, tmp_path: Path) -> None:
    child = sits("sleep", fifo)
    once(child.pid, "clock_nanosleep")
    beat = Beat(0, 1, child.pid, "host", "data", False, 5, 100, 0.5, 5, 0.0, 0.0)
    text = stacks.collect([Rank(beat, 61.0, "S")], tmp_path)[0].text
    assert "clock_nanosleep" in text.partition("== C")[2].partition("== kernel")[0] and state(child.pid) == "S"


@pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb")
def test_gdb_is_for_a_rank_that_is_to_be_ended(
    sits: Sits, fifo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = sits("sleep", fifo)
    once(child.pid, "clock_nanosleep")
    (tmp_path / "gdb").symlink_to(shutil.which("gdb") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    ranks = [Rank(Beat(0, 1, child.pid, "host", "data", False, 5, 100, 0.5, 5, 0.0, 0.0), 61.0, "S")]
    assert "neither eu-stack (elfutils) nor py-spy" in stacks.collect(ranks, tmp_path)[0].text
    assert "clock_nanosleep" in stacks.debug(ranks)[0] and state(child.pid) == "S"
    (tmp_path / "gdb").unlink()
    assert stacks.debug(ranks) == {}


@pytest.mark.parametrize("kind", ["slow", "stops"])
def test_a_debugger_that_takes_too_long(
    sits: Sits, fifo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A program in py-spy's place that never ends, and one that stops the process: it is ended, the process goes on."""
    child = sits("sleep", fifo)
    once(child.pid, "clock_nanosleep")
    tool = tmp_path / "py-spy"
    stop = f"kill -STOP {child.pid}\n" if kind == "stops" else ""
    tool.write_text(f"#!/bin/sh\n{stop}exec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(stacks, "_NATIVE", 2.0)
    beat = Beat(0, 1, child.pid, "host", "data", False, 5, 100, 0.5, 5, 0.0, 0.0)
    text = stacks.collect([Rank(beat, 61.0, "S")], tmp_path)[0].text
    why = "kept the process from running for 1.0 s" if kind == "stops" else "took 2 s"
    assert f"{why}, and was ended" in text and state(child.pid) in ("S", "R")


NFS = Mount("0:50", "/data", "nfs4", frozenset())
ROOT = Mount("8:1", "/", "ext4", frozenset())


def waiting(**changes: object) -> Thread:
    known = {"pid": 7, "tid": 8, "name": "pt_data_worker", "state": "D", "switches": 12}
    return Thread(**{**known, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("thread", "words"), [
    (waiting(function="rpc_wait_bit_killable", call="openat", file="/data/1.png", mount=NFS),
     "the file system at /data (nfs4), which does not answer: rpc_wait_bit_killable, openat of /data/1.png"),
    (waiting(function="rpc_wait_bit_killable", call="page fault"), "a file system (NFS), which"),
    (waiting(function="folio_wait_bit_common", call="page fault",
             stack=("[<0>] folio_wait_bit_common+0x1/0x2", "[<0>] ll_fault0+0x1/0x2 [lustre]")), "system (Lustre)"),
    (waiting(function="cl_sync_io_wait"), "a file system (Lustre)"),
    (waiting(state="S", function="request_wait_answer", call="statx"), "a file system (FUSE)"),
    (waiting(function="folio_wait_bit_common", call="read", file="/data/1.png", mount=NFS), "the file system at /data"),
    (waiting(function="io_schedule", call="fsync", file="/out/a", mount=ROOT), "the disk under / (ext4)"),
    (waiting(function="io_schedule", call="openat", file="/out/a", mount=ROOT), "the file system of /out/a, which"),
    (waiting(function="nfs4_do_call", call="stat", file="/link/a", mount=ROOT), "a file system (NFS), which"),
    (waiting(function="rwsem_down_write_slowpath", call="ioctl", file="/dev/nvidia0",
             stack=("[<0>] rwsem_down_write_slowpath+0x1/0x2", "[<0>] nvidia_unlocked_ioctl+0x1/0x2 [nvidia]")),
     "the NVIDIA driver, which"),
    (waiting(function="uverbs_wait", call="ioctl", file="/dev/infiniband/uverbs0", mount=ROOT),
     "the driver of /dev/infiniband/uverbs0"),
    # Nobody is away.
    (waiting(state="S", function="anon_pipe_read", call="read", file="/data/fifo", mount=NFS), ""),
    (waiting(state="S", function="futex_do_wait", call="futex"), ""),
    (waiting(state="S", function="fuse_dev_do_read", call="read", file="/dev/fuse", mount=ROOT), ""),
    (waiting(state="S", function="nvidia_poll", call="poll"), ""),
    (waiting(function="wait_for_vfork_done", call="syscall 56"), ""),
    (waiting(function="rpc_wait_bit_killable", mount=NFS, switches=-1), ""),  # not told: it may have run
])  # fmt: skip
def test_who_holds_up(thread: Thread, words: str) -> None:
    found = waits.who_holds_up(thread, thread)
    assert (words in found and "thread 8 (pt_data_worker) waits in the kernel for" in found) if words else not found
    assert waits.who_holds_up(thread, waiting(switches=13)) == "" == waits.who_holds_up(thread, None)


@pytest.mark.parametrize(("cause", "phase", "main", "others", "becomes"), [
    ("loader-stuck", "data", "", ("thread 8 waits",), "storage-stuck"),
    ("rank-stuck", "checkpoint", "", ("thread 8 waits",), "storage-stuck"),
    ("rank-stuck", "forward", "", ("thread 8 waits",), "rank-stuck"),
    ("rank-stuck", "forward", "process 7 waits", (), "storage-stuck"),
    ("storage-stuck", "train", "process 7 waits", ("thread 8 waits",), "storage-stuck"),
    ("collective-stuck", "data", "process 7 waits", (), "collective-stuck"),
    ("rank-stopped", "data", "", ("thread 8 waits",), "rank-stopped"), ("loader-stuck", "data", "", (), "loader-stuck"),
])  # fmt: skip
def test_a_hang_is_named_by_it(cause: str, phase: str, main: str, others: tuple[str, ...], becomes: str) -> None:
    beat = Beat(1, 2, 7, "host", phase, False, 5, 100, 0.5, 5, 0.0, 0.0)
    before = Hang(cause, 1, 61.0, "rank 1 has stood still: it waits")
    found = sharper(before, [Rank(beat, 61.0, "S")], {1: Held(main, others)})
    assert found.cause == becomes and found.words.startswith("rank 1 has stood still")
    assert found.words.endswith(f": its {main or others[0]}") if becomes == "storage-stuck" else found == before


@pytest.mark.parametrize(("phase", "dead", "becomes"), [
    ("forward", False, "loader-stuck"), ("data", True, "storage-stuck"), ("checkpoint", False, "rank-stuck"),
])  # fmt: skip
def test_who_keeps_pythons_lock_is_the_cause(phase: str, dead: bool, becomes: str) -> None:
    """On another rank than the one that was behind, and in the midst of a pass."""
    ranks = [Rank(Beat(number, 2, 7, "host", phase, False, 5, 100, 0.5, 5, 0.0, 0.0), 61.0, "S") for number in (0, 1)]
    before = Hang("collective-stuck", 0, 61.0, "rank 0 has stood still: all ranks wait for each other")
    found = sharper(before, ranks, {0: Held(), 1: Held(locked="thread 8 (python) waits in openat", dead=dead)})
    assert (found.cause, found.rank) == (becomes, 1) and "rank 1 has stood still for 61 s after step 5" in found.words
    assert "its main thread waits for Python's lock, and its thread 8 (python) waits in openat" in found.words


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "data"
    place.mkdir()
    try:
        fuse = Fuse(place)
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")
    yield place
    fuse.close()


def test_a_file_system_that_does_not_answer(sits: Sits, dead: Path, tmp_path: Path) -> None:
    child = sits("stat", dead / "image.png")
    until = time.monotonic() + 20
    while not (found := waits.threads(child.pid)) or found[0].function != "request_wait_answer":
        assert time.monotonic() < until and child.poll() is None, found
        time.sleep(0.02)
    beat = Beat(0, 1, child.pid, "host", "data", False, 5, 100, 0.5, 5, 0.0, 0.0)
    started = time.monotonic()
    standing = stacks.collect([Rank(beat, 61.0, "S")], tmp_path)[0]
    assert time.monotonic() - started < 10
    assert f"process {child.pid} (python" in standing.held.main, standing
    assert f"waits in the kernel for the file system at {dead} (fuse.dead), which does not answer" in standing.held.main
    assert f"of {dead}/image.png" in standing.held.main and standing.held.main in standing.text
    assert child.poll() is None
