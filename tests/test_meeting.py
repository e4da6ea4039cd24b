"""The meeting before a launch: threads with real sockets, each a machine of its own."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from conftest import case, findings, job, machine

from xflux_doctor.checks import network
from xflux_doctor.facts import Meeting
from xflux_doctor.matrix import Matrix
from xflux_doctor.probes.meeting import Gathering, Place

CONFIG = {"learning_rate": "0.001", "package torch": "2.4.0"}


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meet(
    ranks: Sequence[int], port: int, *, count: int | None = None, seconds: float = 2.0, host: str = "127.0.0.1",
    config: dict[int, dict[str, str]] | None = None, refuse: int | None = None, tolerant: bool = False,
    said: list[str] | None = None,
) -> list[Meeting]:  # fmt: skip
    """What each of the members, in order, makes of it. `config` and `refuse` go by position."""
    results: dict[int, Meeting] = {}

    def one(at: int, rank: int) -> None:
        place = Place("machine", rank, count or len(ranks), host, port, 1)
        gathering = Gathering(place, (config or {}).get(at, CONFIG), seconds, (said if said is not None else []).append)
        found = gathering.open(tolerant)
        if found.together or (tolerant and found.met):
            found = gathering.agree(at != refuse, seconds)
        gathering.close()
        results[at] = found

    threads = [threading.Thread(target=one, args=item, daemon=True) for item in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[at] for at in range(len(ranks))]


def test_all_come_and_the_port_is_free_again(port: int) -> None:
    started = time.monotonic()
    found = meet([0, 1, 2], port)
    assert all(meeting.together for meeting in found) and time.monotonic() - started < 15
    assert [peer.rank for peer in found[0].peers] == [1, 2]
    with socket.socket() as after:  # without SO_REUSEADDR: nothing of ours lingers on it
        after.bind(("127.0.0.1", port))
        after.listen()


def test_one_is_missing(port: int) -> None:
    said: list[str] = []
    found = meet([0, 2], port, count=3, seconds=2.5, said=said)
    assert [meeting.missing for meeting in found] == [(1,), (1,)]
    assert all(2 < meeting.seconds < 15 for meeting in found)
    assert any(line.startswith("waiting for machine 1 of 3") for line in said)


def test_two_with_one_number(port: int) -> None:
    found = meet([0, 1, 1], port)
    assert all(meeting.twice == (1,) and meeting.missing == (2,) for meeting in found)


def test_other_configs_and_counts(port: int) -> None:
    other = {**CONFIG, "learning_rate": "0.002", "extra": "1"}
    found = meet([0, 1], port, config={1: other})
    expected = {"1": {"learning_rate": ("0.001", "0.002"), "extra": ("not set", "1")}}
    assert all(meeting.unlike == expected and not meeting.together for meeting in found)


def test_differences_may_be_accepted(port: int) -> None:
    host, other = meet([0, 1], port, config={1: {}}, tolerant=True)
    assert host.together and other.together


@pytest.mark.parametrize("refuse", [0, 1])
def test_one_whose_checks_say_no_stops_all(port: int, refuse: int) -> None:
    assert [meeting.stopped for meeting in meet([0, 1], port, refuse=refuse)] == [(refuse,), (refuse,)]


def test_nobody_listens(port: int) -> None:
    (found,) = meet([1], port, count=2, seconds=1)
    assert (found.trouble, found.detail) == ("refused", "connection refused") and 1 <= found.seconds < 15


def test_an_unknown_name_is_said_at_once(port: int) -> None:
    (found,) = meet([1], port, count=2, seconds=20, host="nosuch.invalid")
    assert found.trouble in ("unknown name", "no resolver")
    if found.trouble == "unknown name":
        assert found.seconds < 15


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("host", ["a..b", "a" * 300])
def test_a_name_that_no_resolver_can_be_asked_for(port: int, rank: int, host: str) -> None:
    (found,) = meet([rank], port, count=2, seconds=20, host=host)
    assert (found.trouble, found.detail) == ("unknown name", "no name that can be looked up") and found.seconds < 15


def test_a_port_that_is_none() -> None:
    (found,) = meet([0], 99999, count=2)
    assert (found.trouble, found.detail) == ("no port", "a port is 0 to 65535")


def test_many_differences_reach_everybody(port: int) -> None:
    """All of them would be more than a line may hold; each is told its own first."""
    config = {at: {f"key {i}": f"{at and 1}" * 59 for i in range(50)} for at in range(24)}
    found = meet(range(24), port, config=config)
    assert len(found[0].unlike) == 23 and len(found[0].unlike["9"]) == 50
    assert all(str(at) in meeting.unlike and not meeting.trouble for at, meeting in enumerate(found) if at)


def test_a_busy_port(port: int) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        (found,) = meet([0], port, count=2)
    assert found.trouble == "busy"


@pytest.fixture(
    params=[b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"xflux-doctor": 99}\n', b"", b"x" * 200_000, b"[" * 9000]
)
def stranger(request: pytest.FixtureRequest, port: int) -> Iterator[int]:
    """A service that answers each connection with its own words and closes it."""
    server = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
                with client:
                    client.recv(100)
                    client.sendall(request.param)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield port
    server.close()


def test_a_foreign_service(stranger: int) -> None:
    (found,) = meet([1], stranger, count=2, seconds=20)
    assert found.trouble == "other service" and found.seconds < 18


def test_a_silent_service(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        (found,) = meet([1], port, count=2, seconds=20)
    assert (found.trouble, found.detail) == ("other service", "it does not answer") and found.seconds < 18


def reach(port: int) -> socket.socket:
    """A connection to the host of a meeting that opens at this moment."""
    until = time.monotonic() + 15
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_strangers_do_not_disturb_the_host(port: int) -> None:
    """Junk, silence, too much, and numbers that cannot be: the meeting goes on without them."""
    results: list[Meeting] = []
    thread = threading.Thread(target=lambda: results.extend(meet([0], port, count=2, seconds=20)), daemon=True)
    thread.start()
    held = []
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"{" * 5000 + b"\n", b"x" * 100_000, b"", b"[]\n", b"null\n",
                 json.dumps({"xflux-doctor": 1, "rank": "1"}).encode() + b"\n"):  # fmt: skip
        client = reach(port)
        held.append(client)
        with contextlib.suppress(OSError):
            client.sendall(data)
    (member,) = meet([1], port, count=2, seconds=20)
    thread.join(20)
    assert member.together and results[0].together
    for client in held:
        client.close()


def test_numbers_and_words_of_others_are_tamed(port: int) -> None:
    results: list[Meeting] = []
    thread = threading.Thread(target=lambda: results.extend(meet([0], port, count=2, seconds=2)), daemon=True)
    thread.start()
    hello = {"xflux-doctor": 1, "rank": 7, "count": 2, "host": "\x1b[31mevil\n" + "x" * 999, "devices": True,
             "config": {"learning_rate": "\x1b[2J" + "y" * 999, "package torch": None}}  # fmt: skip
    with reach(port) as client:
        client.sendall(json.dumps(hello).encode() + b"\n")
        thread.join(20)
    (found,) = results
    assert found.missing == (1,) and found.unlike["7"]["machine rank"] == ("1 to 1", "7")
    shown = found.unlike["7"]["learning_rate"][1] + found.peers[0].host
    assert shown.isprintable() and len(shown) <= 400 and found.peers[0].devices is None


def test_one_who_dies_is_missed_at_once(port: int) -> None:
    results: list[Meeting] = []

    def host() -> None:
        gathering = Gathering(Place("machine", 0, 2, "127.0.0.1", port), CONFIG, 10, lambda _: None)
        assert gathering.open().together
        results.append(gathering.agree(True, 60))

    thread = threading.Thread(target=host, daemon=True)
    thread.start()
    gathering = Gathering(Place("machine", 1, 2, "127.0.0.1", port), CONFIG, 10, lambda _: None)
    assert gathering.open().together
    started = time.monotonic()
    gathering.close()
    thread.join(20)
    assert results[0].left == (1,) and time.monotonic() - started < 15


# --- what is said of it -------------------------------------------------------------------------------------


def said(matrix: Matrix, **values: object) -> list[tuple[str, str]]:
    meeting = Meeting("machine", 1, 4, "n1:29500", seconds=20.0, **values)  # type: ignore[arg-type]
    subject = case(matrix, machine(matrix, meeting=meeting), job())
    return [(check.code, finding.seen) for check in network.MEETING for finding in findings(subject, check)]


def test_findings(matrix: Matrix) -> None:
    assert said(matrix) == []
    assert said(matrix, missing=(2, 3)) == [("NE102", "Machines 2, 3 of 4 did not come to n1:29500 within 20 s.")]
    assert said(matrix, left=(2,)) == [("NE102", "Machine 2 of 4 came and left before all were ready.")]
    assert said(matrix, stopped=(1,)) == []  # its own findings are above
    assert said(matrix, stopped=(0, 1)) == [("NE102", "The checks of machine 0 stop the launch.")]
    assert said(matrix, twice=(2,)) == [("NE104", "Machine 2 came twice.")]
    assert said(matrix, unlike={"2": {"learning_rate": ("0.1", "0.2")}}) == [
        ("NE104", "Machine 2 has another learning_rate: 0.2 (0.1 on number 0).")
    ]
    (found,) = said(matrix, trouble="refused", detail="connection refused")
    assert found == ("NE103", "Machine 0 was looked for at n1:29500, and nothing listens on that port (connection "
                     "refused) (20 s).")  # fmt: skip
    troubles = "timeout", "no route", "unknown name", "no resolver", "other service", "busy", "no port", "gone", "new"
    for trouble in troubles:
        assert [code for code, _ in said(matrix, trouble=trouble)] == ["NE103"]
