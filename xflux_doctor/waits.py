"""What each thread of a process that stands still waits for, by what Linux tells of it for nothing: its state, the
kernel's function, the system call and the file that this is about (proc(5)). Nobody is stopped, and no file system is
asked anything. A kernel that does not tell something, or not to this user, leaves that out.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections import defaultdict
from pathlib import Path

import msgspec

from xflux_doctor import syscalls
from xflux_doctor.gather.mounts import NETWORK, Mount, mounts, under

_LONGEST = 4096
"""Bytes of a path (PATH_MAX)."""
_FRAME = re.compile(r"\[<.*?>\] (?P<name>[^+\s]+)\S*(?: \[(?P<module>\w+)\])?")
_DRIVER = "the NVIDIA driver"
# Who the kernel waits for, by the module of a function of its stack, or by how the function's name begins.
_MODULES = {
    **dict.fromkeys(("nfs", "nfsv2", "nfsv3", "nfsv4", "sunrpc"), "NFS"),
    **dict.fromkeys(("lustre", "lov", "lmv", "osc", "mdc", "mgc", "ptlrpc", "obdclass", "ko2iblnd", "lnet"), "Lustre"),
    **dict.fromkeys(("ceph", "libceph"), "Ceph"), **dict.fromkeys(("9p", "9pnet", "9pnet_virtio"), "9p"),
    **dict.fromkeys(("mmfs26", "mmfslinux"), "GPFS"), **dict.fromkeys(("nvidia", "nvidia_uvm"), _DRIVER),
    "fuse": "FUSE", "virtiofs": "virtiofs", "cifs": "SMB", "beegfs": "BeeGFS", "wekafsio": "WekaFS",
    "autofs4": "autofs",
}  # fmt: skip
_NAMES = (
    ("NFS", ("nfs_", "nfs3_", "nfs4_", "nfs41_", "rpc_", "xprt_")), ("autofs", ("autofs_", "autofs4_")),
    ("Lustre", ("ldlm_", "ptlrpc_", "cl_sync_", "cl_lock_", "osc_", "mdc_", "ll_file_", "ll_lookup_", "lov_")),
    ("FUSE", ("request_wait_answer", "fuse_", "__fuse_")), ("SMB", ("cifs_", "smb2_", "SMB2_", "smb3_")),
    ("Ceph", ("ceph_",)), ("9p", ("p9_", "v9fs_")), ("GPFS", ("cxi", "kxWait")),
    ("BeeGFS", ("FhgfsOps", "MessagingTk")),
    (_DRIVER, ("nvidia_", "nv_", "os_acquire_", "uvm_", "_nv0")),
)  # fmt: skip
_SERVER = ("fuse_dev_", "rpc_async_", "rpc_recv")
"""A process that waits here is a file system's own server, and waits for work."""


class Thread(msgspec.Struct, frozen=True):
    """One thread as the kernel shows it."""

    pid: int
    tid: int
    name: str
    state: str = ""
    """The kernel's letter."""
    function: str = ""
    """Where in the kernel it waits; empty: not told, or it does not wait there."""
    call: str = ""
    """The system call; `page fault` where it waits outside of one."""
    file: str = ""
    """What the call is about: a path, or `socket:[N]`, `pipe:[N]`."""
    mount: Mount | None = None
    """The one that `file` lies on."""
    switches: int = -1
    """How often it was taken from or left a processor: the same twice means that it has not run."""
    stack: tuple[str, ...] = ()
    """The kernel's, innermost first; told to root only."""

    @property
    def main(self) -> bool:
        return self.pid == self.tid

    @property
    def line(self) -> str:
        """What it waits for, in one line without its number."""
        where = f" in {self.mount.kind} at {self.mount.place}" if self.mount and _remote(self.mount) else ""
        return f"({self.name}) state {self.state or '?'}: {self.doing}{where}"

    @property
    def doing(self) -> str:
        """The kernel's function, and the call with its file."""
        return ", ".join(filter(None, (self.function, f"{self.call} of {self.file}" if self.file else self.call)))


def threads(pid: int, most: int = 200) -> list[Thread]:
    """The main thread first; none of a process that is gone."""
    try:
        numbers = sorted(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
    table = mounts(process=str(pid))
    return [found for number in numbers[:most] if (found := _thread(pid, number, table))]


def sleeps(pid: int) -> bool:
    """Whether one of its threads waits in the kernel where no debugger can stop it, or the process is gone."""
    stats = [_read(task / "stat") for task in Path(f"/proc/{pid}/task").glob("[0-9]*")]
    return not stats or any(stat.rpartition(")")[2].startswith(" D ") for stat in stats)


def descendants(pids: list[int]) -> dict[int, list[int]]:
    """The children of each of these processes, and theirs."""
    below = defaultdict(list)
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if entry.name.isdigit():
                stat = Path(entry.path, "stat").read_text(encoding="ascii", errors="replace")
                below[int(stat.rpartition(")")[2].split()[1])].append(int(entry.name))
    found = {}
    for pid in pids:
        todo, seen = [pid], list[int]()
        while todo:
            new = sorted(set(below[todo.pop()]) - {pid, *seen})
            seen += new
            todo += new
        found[pid] = seen
    return found


def who_holds_up(thread: Thread, later: Thread | None) -> str:
    """The file system or driver that a thread waits for without an answer, in words; empty: none that can be told.

    `later` is the same thread a second or more afterwards: one that has run in between has had an answer.
    """
    if later is None or thread.switches < 0 or later.switches != thread.switches or later.line != thread.line:
        return ""
    kind = _kind(thread)
    if thread.state != "D" and kind in ("", _DRIVER):
        return ""  # a pipe or a socket say, or a driver that has nothing to tell
    what = _what(thread, kind)
    name = f"{'process' if thread.main else 'thread'} {thread.tid} ({thread.name})"
    return what and f"{name} waits in the kernel for {what}, which does not answer: {thread.doing}"


def _what(thread: Thread, kind: str) -> str:
    mount = thread.mount
    if mount is not None and _remote(mount):
        return f"the file system at {mount.place} ({mount.kind})"
    if kind:
        return kind if kind == _DRIVER else f"a file system ({kind})"
    if thread.file.startswith("/dev/"):
        return f"the driver of {thread.file}"
    if mount is not None and thread.call in syscalls.BY_FD:
        return f"the disk under {mount.place} ({mount.kind})"
    return f"the file system of {thread.file}" if mount is not None else ""  # a link of its path may lead elsewhere


def shown(before: list[Thread], after: list[Thread]) -> str:
    """A process's threads, a line each, those that wait alike in one; which of them have not run between the looks."""
    later = {one.tid: one for one in after}
    alike: dict[tuple[str, bool, tuple[str, ...]], list[int]] = {}
    for one in before:
        now = later.get(one.tid)
        still = now is not None and now.switches == one.switches >= 0 and now.line == one.line
        alike.setdefault((one.line, still, one.stack), []).append(one.tid)
    lines = []
    for (line, still, stack), tids in alike.items():
        more = f" and {len(tids) - 1} more" if len(tids) > 1 else ""
        lines.append(f"thread {tids[0]}{more} {line}{'' if still else ' (it runs now and then)'}")
        lines += [f"    {frame}" for frame in stack]
    return "\n".join(lines) + "\n"


def _thread(pid: int, tid: int, table: tuple[Mount, ...]) -> Thread | None:
    task = Path(f"/proc/{pid}/task/{tid}")
    status = dict(line.split(":\t", 1) for line in _read(task / "status").splitlines() if ":\t" in line)
    if not status:
        return None  # it has ended meanwhile
    with contextlib.suppress(ValueError):
        switches = sum(int(status.get(f"{kind}voluntary_ctxt_switches", -1)) for kind in ("", "non"))
    stack = tuple(_read(task / "stack").splitlines())
    function = _read(task / "wchan")
    call, file = _call(pid, tid, _read(task / "syscall").split())
    mount = under(table, file) if file.startswith("/") else None
    return Thread(pid, tid, status.get("Name", ""), status.get("State", "?")[:1], "" if function == "0" else function,
                  call, file, mount, switches, stack)  # fmt: skip


def _call(pid: int, tid: int, words: list[str]) -> tuple[str, str]:
    """Its name, and the file that it is about."""
    try:
        number, values = int(words[0]), [int(word, 16) for word in words[1:]]
    except (IndexError, ValueError):  # not told, or `running`
        return ("running" if words == ["running"] else ""), ""
    if number < 0 or len(values) < 2:
        return "page fault", ""
    call, base = syscalls.name(number), f"/proc/{pid}/task/{tid}"
    with contextlib.suppress(OSError, struct.error):
        if call in syscalls.BY_FD:
            return call, os.readlink(f"{base}/fd/{values[0] & 0xFFFFFFFF}")  # noqa: PTH115 - pipe:[N] is no path
        if call in syscalls.BY_PATH:
            return call, _below(f"{base}/cwd", _text(pid, values[0]))
        if call in syscalls.BY_FOLDER:
            (folder,) = struct.unpack("<i", struct.pack("<I", values[0] & 0xFFFFFFFF))
            link = f"{base}/cwd" if folder == syscalls.AT_FDCWD else f"{base}/fd/{folder}"
            return call, _below(link, _text(pid, values[1]))
    return call, ""


def _below(link: str, path: str) -> str:
    """An absolute path: of the folder that this link names, where it is not one itself."""
    if path.startswith("/"):
        return os.path.normpath(path)
    return os.path.normpath(f"{os.readlink(link)}/{path}")  # noqa: PTH115 - must not be looked up on a dead disk


def _text(pid: int, address: int) -> str:
    """The text at this address of the process's memory. Raises OSError."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        data = b""
        while b"\0" not in data and len(data) < _LONGEST:
            data += os.pread(memory.fileno(), 256 - (address + len(data)) % 256, address + len(data)) or b"\0"
    return data.partition(b"\0")[0].decode(errors="backslashreplace")


def _kind(thread: Thread) -> str:
    """Who the kernel waits for, by the innermost of its functions that tells; empty: none does."""
    frames = [found for line in thread.stack if (found := _FRAME.match(line))]
    names = [frame["name"] for frame in frames] or [thread.function]
    if any(name.startswith(_SERVER) for name in names):
        return ""
    for name, module in [*((frame["name"], frame["module"]) for frame in frames), (thread.function, None)]:
        if module in _MODULES:
            return _MODULES[module]
        for kind, beginnings in _NAMES:
            if name.startswith(beginnings):
                return kind
    return ""


def _remote(mount: Mount) -> bool:
    return mount.kind in NETWORK or mount.kind.startswith("fuse.") or mount.kind == "fuse"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
