"""This machine's names and addresses from /proc, and where the job's main_process_ip leads.

A name is looked up in /etc/hosts. Only where that does not know it, and neither --quick nor --offline was given, the
resolver is asked, in a thread with a deadline: it may send a packet, and may take half a minute where it is broken.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

from xflux_doctor.facts import Cluster
from xflux_doctor.gather.deadline import within

_SECONDS = 1.0


def cluster_facts(main: str, *, ask: bool, root: Path = Path("/"), seconds: float = _SECONDS) -> Cluster:
    """`main` is the job's main_process_ip; `ask`: whether the resolver may be asked."""
    names = _names()
    found, error = _resolved(main, ask, root, seconds)
    own, _ = _resolved(names[0], ask, root, seconds)
    return Cluster(names, _addresses(root), own, main, found, error)


def _names() -> tuple[str, ...]:
    name = os.uname().nodename
    return tuple(dict.fromkeys((name, name.partition(".")[0])))


def _addresses(root: Path) -> tuple[str, ...] | None:
    """This network namespace's own addresses. Source: proc(5), net/fib_trie and net/if_inet6."""
    found: dict[str, None] = {}
    read = False
    trie = _lines(root / "proc/net/fib_trie")
    for before, line in itertools.pairwise(trie):
        read = True
        if line.split()[:3] == ["/32", "host", "LOCAL"]:
            found[before.split()[-1]] = None
    for line in _lines(root / "proc/net/if_inet6"):
        read = True
        digits = line.split()[0] if line.split() else ""
        if re.fullmatch(r"[0-9a-f]{32}", digits):
            found[str(_ipaddress().IPv6Address(bytes.fromhex(digits)))] = None
    return tuple(found) if read else None


def _resolved(name: str, ask: bool, root: Path, seconds: float) -> tuple[tuple[str, ...] | None, str]:
    """(addresses, "") or (None, why not)."""
    try:
        return (str(_ipaddress().ip_address(name.strip("[]"))),), ""
    except ValueError:
        pass
    known = tuple(
        dict.fromkeys(
            words[0]
            for line in _lines(root / "etc/hosts")
            if (words := line.partition("#")[0].split()) and name.lower() in map(str.lower, words[1:])
        )
    )
    if known:
        return known, ""
    if not ask:
        return None, "not looked up: that would ask the network"
    answer = within(seconds, {"": lambda: _ask(name)}).get("")
    return answer if answer is not None else (None, f"the resolver gave no answer within {seconds:g} s")


def _ask(name: str) -> tuple[tuple[str, ...] | None, str]:
    socket: Any = importlib.import_module("socket")  # only where the resolver may be asked
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
            return (), error.strerror or "unknown name"
        return None, error.strerror or str(error)
    except UnicodeError:  # a name that no resolver can be asked for: an empty or overlong label
        return (), "no name that can be looked up"
    return tuple(dict.fromkeys(str(item[4][0]) for item in found)), ""


def _ipaddress() -> Any:
    return importlib.import_module("ipaddress")  # only for a job of several machines


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
