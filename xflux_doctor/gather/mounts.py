"""The mount table of this process, and which mount a path lies on. Reading it asks no file system anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/run", "/usr", "/lib", "/lib64", "/bin", "/boot", "/var/lib", "/snap")
_PSEUDO = frozenset(
    "proc sysfs tmpfs ramfs devtmpfs devpts cgroup cgroup2 mqueue overlay squashfs hugetlbfs debugfs tracefs bpf "
    "securityfs fusectl nsfs autofs binfmt_misc pstore configfs rpc_pipefs efivarfs iso9660 fuse.lxcfs fuse.snapfuse "
    "fuse.fuse-overlayfs".split()
)
NETWORK = frozenset("nfs nfs4 lustre cifs smb3 ceph beegfs gpfs glusterfs fuse.glusterfs 9p afs wekafs panfs".split())
"""File systems whose disks are another machine's."""
_ESCAPE = r"\\([0-7]{3})"


class Mount(NamedTuple):
    """One line of /proc/PID/mountinfo (proc(5))."""

    device: str
    """major:minor; mounts of one file system share it."""
    place: str
    kind: str
    options: frozenset[str]

    @property
    def holds_data(self) -> bool:
        """Whether it may be a volume that somebody mounted for data."""
        system = any(self.place == name or self.place.startswith(f"{name}/") for name in _SYSTEM)
        return self.place != "/" and self.kind not in _PSEUDO and "ro" not in self.options and not system


def mounts(root: Path = Path("/"), process: str = "self") -> tuple[Mount, ...]:
    """In the order of the table: of two mounts on one place, the later one is seen. `process`: whose table it is."""
    try:
        text = (root / f"proc/{process}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ()
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        head, tail = left.split(), right.split()
        if len(head) >= 6 and tail:
            options = frozenset(head[5].split(",")) | ({"ro"} & set(tail[-1].split(",")))
            found.append(Mount(head[2], _plain(head[4]), tail[0], options))
    return tuple(found)


def under(table: tuple[Mount, ...], path: str) -> Mount | None:
    """The mount with the longest place that the path begins with."""
    best = None
    for mount in table:
        place = mount.place.rstrip("/")
        inside = path == place or path.startswith(f"{place}/")
        if inside and (best is None or len(place) >= len(best.place.rstrip("/"))):
            best = mount
    return best


def _plain(text: str) -> str:
    """Blanks and backslashes are written as octal numbers."""
    return re.sub(_ESCAPE, lambda match: chr(int(match[1], 8)), text) if "\\" in text else text
