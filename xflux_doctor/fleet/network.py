"""The nodes of a launch send their reports to node 0, where they share no folder: JSON lines of limited size.

A report travels packed and in parts, each no larger than a line may be (probes/wire.py). Before it each node asks node
0 for its time, and so knows how far apart their clocks are, to half of what the answer took.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import gzip
import selectors
import socket
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

import msgspec

from xflux_doctor.errors import DoctorError
from xflux_doctor.facts import Clock
from xflux_doctor.fleet.collect import Document, Say, Seat
from xflux_doctor.fleet.reading import LARGEST
from xflux_doctor.fleet.values import Broken, Report
from xflux_doctor.probes.wire import PROOF, Line, listen, why

_PART = 45000
"""Bytes of a part: 60,000 letters, which one line holds."""
_MOST_PARTS = LARGEST // _PART
_CROWD = 16384
_TICK = 0.2
_BY_FOLDER = "Or give --shared DIR, a folder on a disk that all nodes share."


@dataclass
class _Guest:
    """One connection, and the parts that came over it."""

    line: Line
    number: int | None = None
    parts: dict[int, bytes] = field(default_factory=dict)
    wanted: int = 0


class Host:
    """Node 0. It listens before it makes its own report, and answers after."""

    def __init__(self, address: str, port: int) -> None:
        try:
            self._server = listen(address, port)
        except (OSError, OverflowError, UnicodeError) as error:
            raise DoctorError(
                f"Node 0 cannot listen on {address}, port {port}: {why(error, 'no port')[1]}.",
                f"Give --port a free one, the same on all nodes. {_BY_FOLDER}",
            ) from error
        self._server.setblocking(False)
        self._guests: dict[socket.socket, _Guest] = {}
        self._done: dict[int, Report | Broken] = {}

    def gather(self, seat: Seat, document: Document, say: Say) -> tuple[list[Report | Broken], tuple[int, ...]]:
        """All reports that come in time, and the numbers of those that do not."""
        _with_clock(document, Clock(0.0, 0.0, "node 0"))
        self._done[0] = Report("node00000", msgspec.json.encode(document))
        until, spoken = time.monotonic() + seat.seconds, 0.0
        with contextlib.closing(self._server), selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            while len(self._done) < seat.count and (now := time.monotonic()) < until:
                if now - spoken > 10:
                    say(f"waiting for the reports of {seat.count - len(self._done)} of {seat.count} nodes, "
                        f"{until - now:.0f} s")  # fmt: skip
                    spoken = now
                for key, _ in selector.select(_TICK):
                    if key.fileobj is self._server:
                        self._accept(selector)
                    else:
                        self._hear(key.data, seat, selector)
            for guest in self._guests.values():
                guest.line.socket.close()
        missing = tuple(number for number in range(seat.count) if number not in self._done)
        return [self._done[number] for number in sorted(self._done)], missing

    def _accept(self, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._server.accept()
            client.setblocking(False)
            if len(self._guests) >= _CROWD:
                client.close()
                return
            guest = _Guest(Line(client))
            self._guests[client] = guest
            selector.register(client, selectors.EVENT_READ, guest)

    def _hear(self, guest: _Guest, seat: Seat, selector: selectors.BaseSelector) -> None:
        line = guest.line
        line.socket.setblocking(False)
        line.receive()
        while line.inbox:
            self._answer(guest, line.inbox.pop(0), seat)
        if line.gone:
            selector.unregister(line.socket)
            line.socket.close()
            self._guests.pop(line.socket, None)

    def _answer(self, guest: _Guest, message: dict[str, Any], seat: Seat) -> None:
        number, part, count = message.get("node"), message.get("part"), message.get("of")
        if type(number) is int and 0 < number < seat.count and guest.number is None:
            guest.number = number
            guest.line.send(time=time.time())
        elif message.get("asks") == "time":
            guest.line.send(time=time.time())
        elif guest.number is not None and type(part) is int and type(count) is int and 0 <= part < count <= _MOST_PARTS:
            with contextlib.suppress(binascii.Error, ValueError):
                guest.parts[part] = base64.b64decode(str(message.get("data")), validate=True)
            if len(guest.parts) == count:
                packed = b"".join(guest.parts[at] for at in sorted(guest.parts))
                self._done.setdefault(guest.number, _unpacked(f"node{guest.number:05d}", packed))
                guest.line.send(taken=True)
        else:
            guest.line.gone = True


def send(address: str, port: int, seat: Seat, document: Document) -> None:
    """The others: reach node 0, compare clocks, hand the report over. Raises DoctorError where that fails."""
    until, last = time.monotonic() + seat.seconds, "no answer"
    while time.monotonic() < until:
        try:
            client = socket.create_connection((address, port), timeout=max(0.1, min(3.0, until - time.monotonic())))
        except (OSError, OverflowError, UnicodeError) as error:
            kind, last = why(error)
            if kind in ("unknown name", "no port"):
                break
            time.sleep(_TICK)
            continue
        line = Line(client)
        with contextlib.closing(client):
            if _handed_over(line, seat, document, until):
                return
        last = "it closed the connection, or answers in another way"
        time.sleep(_TICK)
    raise DoctorError(
        f"Node {seat.number} could not hand its report to node 0 at {address}, port {port}: {last}.",
        f"See whether node 0 runs and a firewall is between. {_BY_FOLDER}",
    )


def _handed_over(line: Line, seat: Seat, document: Document, until: float) -> bool:
    line.send(node=seat.number)
    if _next(line, until, "time") is None:  # node 0 may still be making its own report
        return False
    _with_clock(document, _clock(line))
    packed = gzip.compress(msgspec.json.encode(document))
    parts = [packed[at : at + _PART] for at in range(0, len(packed), _PART)]
    for at, part in enumerate(parts):
        line.send(part=at, of=len(parts), data=base64.b64encode(part).decode())
    return _next(line, time.monotonic() + 6 * PROOF, "taken") is True


def _clock(line: Line) -> Clock | None:
    """The best of three questions."""
    found = []
    for _ in range(3):
        before = time.time()
        line.send(asks="time")
        answer = _next(line, time.monotonic() + PROOF, "time")
        after = time.time()
        if isinstance(answer, float):
            found.append(((after - before) / 2, (before + after) / 2 - answer))
    return Clock(min(found)[1], min(found)[0], "node 0") if found else None


def _with_clock(document: Document, clock: Clock | None) -> None:
    facts = document.get("facts")
    if isinstance(facts, dict) and clock is not None:
        facts["clock"] = msgspec.to_builtins(clock)


def _next(line: Line, until: float, key: str) -> object:
    while not line.inbox and not line.gone and (left := until - time.monotonic()) > 0:
        line.socket.settimeout(min(1.0, left))
        line.receive()
    return line.inbox.pop(0).get(key) if line.inbox else None


def _unpacked(source: str, packed: bytes) -> Report | Broken:
    """No more than a report may hold, whatever was packed."""
    try:
        unpacker = zlib.decompressobj(wbits=31)
        data = unpacker.decompress(packed, LARGEST)
    except zlib.error:
        data = b""
    if not data or unpacker.unconsumed_tail:
        return Broken(source, "what came over the network is no report", "Start the launch again.")
    return Report(source, data)
