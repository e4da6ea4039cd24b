"""What several machines do after a launch that failed: the deciding alone, and the meeting with real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from xflux_doctor.commands import again, rejoin
from xflux_doctor.commands.again import RESUME, Attempt
from xflux_doctor.commands.rejoin import Decision, Fellows, Outcome, Word, decide, first
from xflux_doctor.explain.diagnosis import diagnose
from xflux_doctor.facts import Meeting
from xflux_doctor.finding import Edit
from xflux_doctor.probes.meeting import Gathering, Place
from xflux_doctor.roll import Line, Roll

KILLED = Word(137, 40.0, "host-oom-kill", "killed", rank=1)
PEER = Word(1, 5.0, "peer-rank-died", "consequence", rank=0)


def word(cause: str, level: str = "error", seconds: float = 10.0) -> Word:
    return Word(1, seconds, cause, level)


@pytest.mark.parametrize(("words", "machine"), [
    # what the others say of a lost rank is no cause, however early they said it
    ([PEER, KILLED], 1),
    ([PEER, PEER, word("cuda-oom", seconds=99)], 2),
    ([word("nccl-timeout", "consequence"), word("collective-stuck", "machine", 99)], 1),
    # ended by its doctor, because the part of another was gone: a consequence, though its mark is above the ranks'
    ([word("peer-rank-died", "error", 1), KILLED], 1),
    # a launcher ends its other ranks by SIGTERM
    ([word("sigterm", "stop", 1), KILLED], 1),
    ([word("sigterm", "stop", 1), PEER], 0),
    # nobody knows it, but it stood in that log alone
    ([PEER, word("unknown", "error")], 1),
    ([word("unknown"), KILLED], 1),
    # a healthy log says nothing
    ([Word(1, 1.0), PEER], 1),
    # the same twice: whose part ended first
    ([word("cuda-oom", seconds=12), word("cuda-oom", seconds=11)], 1),
    ([word("cuda-oom"), word("cuda-oom")], 0),
])  # fmt: skip
def test_whose_cause_it_is(words: list[Word], machine: int) -> None:
    assert first(dict(enumerate(words))) == machine


def test_a_word_is_what_the_log_shows() -> None:
    found = diagnose("xflux-doctor: peer-rank-died: the part of machine 1 ended with 137\nstopped by signal 15\n"
                     "[rank0]: RuntimeError: Connection closed by peer\nreceived SIGTERM\n")  # fmt: skip
    assert Word.of(found, 124, 3.0).cause == "peer-rank-died"
    assert Word.of(None, 1, 3.0) == Word(1, 3.0)


def test_the_decision_is_that_of_one_machine(tmp_path: Path) -> None:
    """The same deciding code, and what it gives survives the way over the network."""
    tried: set[str] = set()

    def following(cause: str) -> Attempt | None:
        return again.following(tmp_path, cause, tried)

    found = decide({0: PEER, 1: KILLED}, following)
    alone = again.following(tmp_path, "host-oom-kill", set())
    assert alone is not None and found.edits == (RESUME,) == alone.edits
    assert (found.machine, found.cause, found.mark) == (1, "host-oom-kill", alone.mark)
    assert found.words == f"machine 1: {alone.words}"
    assert rejoin._decision(msgspec.json.decode(msgspec.json.encode(found))) == found
    tried.add(found.mark)
    assert decide({0: PEER, 1: KILLED}, following).edits is None  # never the same twice
    last = decide({0: PEER, 1: word("caption-missing")}, following)
    assert last.edits is None and "machine 1 ended with 1: caption-missing" in last.words
    # out of memory there is no lighter plan of a folder that tells nothing
    assert decide({0: word("cuda-oom"), 1: PEER}, following).edits is None


@pytest.mark.parametrize("edit", [
    Edit("train", ("pretrained_model",), "/elsewhere"), Edit("train", ("output_dir",), "/"), Edit("train", (), 1),
    Edit("shell", ("resume_from_checkpoint",), "latest"),
])  # fmt: skip
def test_an_answer_may_change_only_what_an_attempt_changes(edit: Edit) -> None:
    told = msgspec.to_builtins(Decision(1, "cuda-oom", None, "words", (edit,)))
    assert rejoin._decision(told) is None
    assert rejoin._decision({}) is None and rejoin._decision({**told, "edits": [{"type": "remove"}]}) is None


def test_words_that_are_none() -> None:
    found = rejoin._words(
        {1: None, 2: {"exit_code": "x"}, 3: {"exit_code": 1, "seconds": 1, "cause": "\x1b[2J" + "y" * 999}}
    )
    assert found[1].cause == found[2].cause == "unknown"
    assert found[3].cause.isprintable() and len(found[3].cause) <= 200


# --- the meeting ----------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadlines are those of seconds here."""
    monkeypatch.setattr("xflux_doctor.commands.rejoin.ENDING", 1.0)
    monkeypatch.setattr("xflux_doctor.roll.LOOK", 0.2)


Does = Callable[[Fellows], Any]


def together(tmp_path: Path, port: int, *does: Does, count: int | None = None, wait: float = 4.0) -> list[Any]:
    """Each member does its own in a thread; what comes of it."""
    found: dict[int, Any] = {}

    def one(number: int, act: Does) -> None:
        total = count or len(does)
        place = Place("machine", number, total, "127.0.0.1", port)
        fellows = Fellows(place, "word", Roll(tmp_path, "word", number, total), wait, lambda _: None)
        try:
            found[number] = act(fellows)
        finally:
            fellows.leave()
            fellows.close()

    threads = [threading.Thread(target=one, args=item, daemon=True) for item in enumerate(does)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[number] for number in range(len(does))]


def following(cause: str) -> Attempt | None:
    return Attempt((RESUME,), f"{cause}: once more", cause) if cause == "host-oom-kill" else None


def comes(say: Word, *, late: float = 0.0, ready: bool = True, attempt: int = 0) -> Does:
    def act(fellows: Fellows) -> tuple[Outcome, str]:
        time.sleep(late)
        fellows.attempt = attempt
        outcome = fellows.meet(say, following)
        return outcome, fellows.start(ready) if outcome.attempt else outcome.words

    return act


def test_all_start_again_by_the_same_edits(tmp_path: Path, port: int) -> None:
    found = together(tmp_path, port, comes(PEER, late=0.5), comes(KILLED), comes(PEER, late=0.3))
    attempts = {outcome.attempt for outcome, _ in found}
    assert attempts == {Attempt((RESUME,), "machine 1: host-oom-kill: once more", "host-oom-kill")}
    assert [why for _, why in found] == ["", "", ""]
    assert {outcome.decision.machine for outcome, _ in found} == {1}
    with socket.socket() as after:  # the ranks can have the port at once
        after.bind(("127.0.0.1", port))


def test_nobody_starts_again_what_would_only_fail_again(tmp_path: Path, port: int) -> None:
    for outcome, why in together(tmp_path, port, comes(PEER), comes(word("caption-missing"))):
        assert outcome.attempt is None and "machine 1 ended with 1: caption-missing" in why and "Nobody starts" in why


def test_one_that_does_not_come_is_named(tmp_path: Path, port: int) -> None:
    started = time.monotonic()
    found = together(tmp_path, port, comes(PEER), comes(KILLED), count=3, wait=1.0)
    assert 2 < time.monotonic() - started < 12
    for outcome, why in found:
        assert outcome.decision is None and "machine 2 did not come to 127.0.0.1" in why and "within 2 s" in why
        assert "start all machines again with resume_from_checkpoint: latest" in why
    ((_, why),) = together(tmp_path, port, lambda _: (None, None), comes(PEER), wait=1.0)[1:]
    assert "machine 0 did not come to 127.0.0.1" in why and "connection refused" in why


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_was_told_to_end_is_not_waited_for(tmp_path: Path, port: int, number: int) -> None:
    def parts(fellows: Fellows) -> tuple[None, str]:
        fellows.tell(130, "was told to end by signal 2")
        return None, ""

    does = [comes(PEER, late=0.1), comes(PEER, late=0.1)]
    does[number] = parts
    started = time.monotonic()
    outcome, why = together(tmp_path, port, *does, wait=60.0)[1 - number]
    assert time.monotonic() - started < 10 and outcome.decision is None
    assert f"machine {number} was told to end by signal 2. Nobody starts again." in why


def test_one_that_cannot_write_its_files_stops_all(tmp_path: Path, port: int) -> None:
    found = together(tmp_path, port, comes(PEER), comes(KILLED, ready=False))
    assert all("machine 1 could not make its files ready" in why for _, why in found)


def test_another_attempt_is_told_apart(tmp_path: Path, port: int) -> None:
    found = together(tmp_path, port, comes(PEER, attempt=2), comes(KILLED, attempt=1))
    assert all("machine 1 is of another run, or of another attempt" in why for _, why in found)


def test_the_port_may_still_be_the_ranks_for_a_while(tmp_path: Path, port: int) -> None:
    """Machine 1 comes first and meets what is left of machine 0's ranks."""
    store = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        client, _ = store.accept()
        client.recv(100)
        client.close()
        time.sleep(0.5)
        store.close()

    threading.Thread(target=serve, daemon=True).start()
    found = together(tmp_path, port, comes(PEER), comes(KILLED), wait=10.0)
    assert [why for _, why in found] == ["", ""]


def test_a_word_is_agreed_on_before_the_launch(port: int) -> None:
    words: list[str] = []

    def one(number: int) -> None:
        gathering = Gathering(Place("machine", number, 2, "127.0.0.1", port), {}, 4, lambda _: None)
        found: Meeting = gathering.open()
        assert found.together and gathering.agree(True, 4).together
        words.append(gathering.run)

    threads = [threading.Thread(target=one, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(words) == 2 and len(set(words)) == 1 and len(words[0]) == 16


def test_the_roll(tmp_path: Path) -> None:
    """Lines of another run, of oneself and of nobody are none; a line of an attempt is not one of the next."""
    own, other = Roll(tmp_path / "ended", "run", 0, 3), Roll(tmp_path / "ended", "run", 1, 3)
    other.tell(0, 137)
    Roll(tmp_path / "ended", "older", 2, 3).tell(0, 1)
    own.tell(0, 1)
    (tmp_path / "ended/x.json").write_text("{}")
    (tmp_path / "ended/7.json").write_text("{")
    own.look()
    assert own.ended(0) == {1: Line("run", 0, 137)} and own.ended(1) == {} and own.parted() == {}
    other.tell(1, 0, "is done")
    own.look()
    assert own.parted() == {1: "is done"} and own.ended(1) == {}
    for roll in (own, other):
        roll.close()
