"""Kill a forked child at its n-th system call, by ptrace: what `kill -9` or a power cut may hit.

The child is traced from its first statement on, and every system call stops it twice, before and after. Nothing is
compiled and nothing is started, so that hundreds of kills take seconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

import pytest

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_SYSGOOD, _EXITKILL = 1, 1 << 20
_STOP = signal.SIGTRAP | 0x80
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def kill_at(act: Callable[[], object], number: int) -> str:
    """Run `act` in a child and kill it at its `number`-th stop; where that was, or "" when it ended before."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            if _libc.ptrace(_TRACEME, 0, None, None) == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
                act()
                code = 0
            else:
                code = 77
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        pytest.skip("ptrace is not permitted here")
    if _libc.ptrace(_SETOPTIONS, pid, None, _SYSGOOD | _EXITKILL) != 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pytest.skip("ptrace does not show system calls here")
    stops, deliver = 0, 0
    while True:
        _libc.ptrace(_SYSCALL, pid, None, deliver)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, f"the child failed at stop {stops}"
            return ""
        assert os.WIFSTOPPED(status), f"the child died of signal {os.WTERMSIG(status)}"
        deliver = 0 if os.WSTOPSIG(status) == _STOP else os.WSTOPSIG(status)
        stops += os.WSTOPSIG(status) == _STOP
        if stops == number:
            where = _where(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"stop {number}, {where}"


def _where(pid: int) -> str:
    """The number of the system call, for a failure's message (Linux 5.3 and newer)."""
    info = ctypes.create_string_buffer(88)
    if _libc.ptrace(_GET_SYSCALL_INFO, pid, len(info), ctypes.addressof(info)) <= 0:
        return "somewhere"
    before = info.raw[0] == 1
    call = int.from_bytes(info.raw[24:32], "little")
    return f"before system call {call}" if before else "after it"
