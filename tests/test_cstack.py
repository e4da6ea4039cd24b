"""The C stack of a waiting process without a debugger, held beside gdb's where that is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xflux_doctor import cstack, stacks, waits
from xflux_doctor.hang import Rank
from xflux_doctor.heartbeat import Beat, state

pytestmark = pytest.mark.skipif(
    os.uname().machine not in ("x86_64", "aarch64") or not Path("/proc/self/syscall").exists(),
    reason="where a waiting thread's stack ends is not told here",
)
SITS = """
import os, sys, threading
lock = threading.Lock()
lock.acquire()
{"futex": lock.acquire, "read": lambda: os.read(os.open(sys.argv[2], os.O_RDWR), 1)}[sys.argv[1]]()
"""


@pytest.mark.parametrize("how", ["futex", "read"])
def test_the_frames_of_a_process_that_waits(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    child = subprocess.Popen([sys.executable, "-c", SITS, how, str(tmp_path / "pipe")])
    try:
        until = time.monotonic() + 20
        found: list[waits.Thread] = []
        while not found or found[0].call != how or found != waits.threads(child.pid):
            assert time.monotonic() < until, found
            found = waits.threads(child.pid)
            time.sleep(0.1)
        text = cstack.stack(child.pid, child.pid)
        assert waits.threads(child.pid) == found  # nobody was stopped, or it would have run
        lines = text.splitlines()
        assert lines[0].startswith("#0 ") and "libc" in lines[0]
        assert sum("PyEval" in line for line in lines) >= 1 and "_start" in text
        if shutil.which("gdb"):
            done = subprocess.run(["gdb", "-nx", "-batch", "-p", str(child.pid), "-ex", "bt"], capture_output=True,
                                  text=True, timeout=60, check=False)  # fmt: skip
            theirs = [int(one, 16) for one in re.findall(r"^#\d+ +(0x[0-9a-f]+) in", done.stdout, re.MULTILINE)]
            ours = [int(line.split()[1], 16) for line in lines]
            common = [one for one in theirs if one in ours]
            # It also shows jumps from one function's end to another, which leave nothing on a stack.
            assert len(theirs) > 5 and len(common) >= len(theirs) - 5
            assert common == [one for one in ours if one in theirs]
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(stacks, "_PYTHON", 0.2)
        beat = Beat(0, 1, child.pid, "host", "data", False, 5, 100, 0.5, 5, 0.0, 0.0)
        kept = stacks.collect([Rank(beat, 61.0, "S")], tmp_path)[0].text
        assert "read from its memory" in kept and "PyEval" in kept.partition("== C")[2].partition("== kernel")[0]
        assert state(child.pid) == "S"
    finally:
        child.kill()
        child.wait()


KEEPS = """
import ctypes, sys, threading, time
pipe = sys.argv[1].encode()
# PyDLL keeps the interpreter's lock, as a library does that opens a file without giving it away.
threading.Thread(target=ctypes.PyDLL(None).open, args=(pipe, 0), daemon=True).start()
while True: time.sleep(0.001)
"""


def test_who_keeps_pythons_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread opens a pipe that nobody writes to, and all of Python waits with it."""
    monkeypatch.setattr(stacks, "_PYTHON", 0.2)
    os.mkfifo(tmp_path / "pipe")
    child = subprocess.Popen([sys.executable, "-c", KEEPS, str(tmp_path / "pipe")])
    try:
        until = time.monotonic() + 20
        while not any(one.file == str(tmp_path / "pipe") for one in waits.threads(child.pid)):
            assert time.monotonic() < until
            time.sleep(0.02)
        beat = Beat(0, 1, child.pid, "host", "forward", False, 5, 100, 0.5, 5, 0.0, 0.0)
        held = stacks.collect([Rank(beat, 61.0, "S")], tmp_path)[0].held
        assert f"openat of {tmp_path / 'pipe'}" in held.locked and not held.dead and not held.main, held
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(("frames", "waits_for_it"), [
    ("? pthread_cond_timedwait take_gil PyEval_RestoreThread", True),
    ("pthread_cond_timedwait ? PyEval_RestoreThread", True),
    ("pthread_cond_timedwait ? _PyEval_EvalFrameDefault", True),
    ("pthread_cond_timedwait ? PyThread_acquire_lock_timed", False),
    ("pthread_cond_timedwait std::wait PyEval_RestoreThread", False), ("read os_read", False), ("", False),
])  # fmt: skip
def test_the_wait_for_pythons_lock(frames: str, waits_for_it: bool) -> None:
    shown = "".join(f"#{number:<2} 0x01 {name} (lib.so)\n" for number, name in enumerate(frames.split()))
    assert cstack.wants_interpreter(shown) == waits_for_it


def test_a_process_that_runs_or_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline()
    assert cstack.stack(child.pid, child.pid) == ""
    child.kill()
    child.communicate()
    assert cstack.stack(child.pid, child.pid) == ""


@pytest.mark.parametrize(("before", "found"), [
    ("000000e811223344", True), ("000000000000ffd0", True), ("000000000041ffd4", True),  # call rel32, rax, r12
    ("00000000ff542408", True), ("0000ff1511223344", True), ("00ff942411223344", True),  # [rsp+8], [rip+…], [rsp+…]
    ("0000000000c39090", False), ("0000000000ffe090", False), ("000000000000ffe0", False),  # ret, jmp rax
])  # fmt: skip
def test_a_call_of_x86(before: str, found: bool) -> None:
    assert cstack._x86_64(bytes.fromhex(before)) == found


def test_a_call_of_arm() -> None:
    assert cstack._aarch64(bytes(4) + (0x97FFFFFF).to_bytes(4, "little"))  # bl
    assert cstack._aarch64(bytes(4) + (0xD63F0100).to_bytes(4, "little"))  # blr x8
    assert not cstack._aarch64(bytes(4) + (0xD65F03C0).to_bytes(4, "little"))  # ret
    assert not cstack._aarch64(bytes(4) + (0x14000001).to_bytes(4, "little"))  # b
