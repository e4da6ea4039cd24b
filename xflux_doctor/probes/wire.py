"""One JSON line at a time between two machines: limited in size, and no longer trusted than it must be."""

from __future__ import annotations

import errno
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any

PROTOCOL = 1
PROOF = 5.0
"""Seconds in which our own kind answers."""
_WORD = "xflux-doctor"
_LARGEST = 1 << 16
"""Bytes of one line."""


@dataclass
class Line:
    """One connection and what has come of its current line."""

    socket: socket.socket
    rest: bytes = b""
    gone: bool = False
    said: dict[str, Any] | None = None
    """Its hello."""
    ready: bool | None = None
    since: float = field(default_factory=time.monotonic)
    inbox: list[dict[str, Any]] = field(default_factory=list)

    def send(self, **values: object) -> None:
        try:
            self.socket.settimeout(PROOF)
            self.socket.sendall(json.dumps({_WORD: PROTOCOL, **values}).encode() + b"\n")
        except OSError:
            self.gone = True

    def receive(self) -> None:
        """Take in what has come. Whoever sends something else, or too much, is gone."""
        try:
            chunk = self.socket.recv(_LARGEST)
        except (BlockingIOError, TimeoutError):
            return
        except OSError:
            chunk = b""
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        self.gone = self.gone or not chunk or len(self.rest) > _LARGEST
        found = [_message(line) for line in lines]
        self.gone = self.gone or None in found
        self.inbox += [message for message in found if message is not None]


def _message(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line) if len(line) <= _LARGEST else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.get(_WORD) == PROTOCOL else None


def listen(host: str, port: int) -> socket.socket:
    """On all addresses of the family that the main address has: a name may lead here by another one."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen(128)
    except BaseException:
        server.close()
        raise
    return server


def why(error: OSError | OverflowError | UnicodeError, other: str = "timeout") -> tuple[str, str]:
    if isinstance(error, OverflowError):
        return "no port", "a port is 0 to 65535"
    if isinstance(error, UnicodeError):  # an empty or overlong label: no resolver can be asked for it
        return "unknown name", "no name that can be looked up"
    if isinstance(error, socket.gaierror):
        again = error.errno == socket.EAI_AGAIN
        return "no resolver" if again else "unknown name", error.strerror or str(error)
    if isinstance(error, ConnectionRefusedError):
        return "refused", "connection refused"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return "no route", (error.strerror or "no route to host").lower()
    if isinstance(error, TimeoutError):
        return "timeout", "no answer"
    return other, error.strerror or str(error)


def clean(value: object) -> str:
    """What came over the network, as it may be shown: one short line."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:200])
