"""Who listens on the ports that the job's ranks would meet at, from /proc: no socket is opened."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Container
from pathlib import Path
from typing import Any

from xflux_doctor.facts import Listener
from xflux_doctor.gather.cards import process_facts

_LISTEN = "0A"
"""TCP_LISTEN of include/net/tcp_states.h."""


def listeners(ports: Container[int], root: Path = Path("/")) -> tuple[Listener, ...] | None:
    """Listeners on these ports of this network namespace; None where /proc does not tell."""
    inodes: dict[str, tuple[int, str]] = {}
    read = False
    for name in ("tcp", "tcp6"):
        try:
            lines = (root / "proc/net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        read = True
        for fields in map(str.split, lines):
            if len(fields) > 9 and fields[3] == _LISTEN:
                address, _, port = fields[1].rpartition(":")
                if int(port, 16) in ports:
                    inodes[fields[9]] = (int(port, 16), _address(address))
    if not read:
        return None
    owners = _owners(set(inodes), root) if inodes else {}
    return tuple(_listener(port, address, owners.get(inode)) for inode, (port, address) in sorted(inodes.items()))


def _listener(port: int, address: str, pid: int | None) -> Listener:
    if pid is None:
        return Listener(port, address)
    process = process_facts(pid, None)
    return Listener(port, address, pid, process.name, process.seconds)


def _address(text: str) -> str:
    """/proc writes words of the address in the machine's byte order."""
    ipaddress: Any = importlib.import_module("ipaddress")  # only where somebody listens
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(struct.pack(f"={len(words)}I", *words)))


def _owners(inodes: set[str], root: Path) -> dict[str, int]:
    """The process behind each socket, as far as this user may look."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[str, int] = {}
    for process in (root / "proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            for descriptor in (process / "fd").iterdir():
                inode = wanted.get(str(descriptor.readlink()))
                if inode is not None:
                    found[inode] = int(process.name)
        except OSError:
            continue
        if len(found) == len(wanted):
            break
    return found
