"""When a run hangs and which rank is why, on made-up ranks; the stacks of a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from xflux_trainer.pulse import Pulse

from xflux_doctor.explain.diagnosis import diagnose
from xflux_doctor.hang import FLOOR, REMOTE, SLOW, Limits, Pace, Rank, judge, table, waits
from xflux_doctor.heartbeat import Beat, beats, state
from xflux_doctor.stacks import collect, innermost
from xflux_doctor.watcher import Watcher


def rank(
    number: int, phase: str = "forward", *, still: float = 0.0, state: str = "S", collective: bool = False,
    step: int = 9, world: int = 2, beat: int = 5,
) -> Rank:  # fmt: skip
    made = Beat(number, world, 100 + number, "host", phase, collective, step, 100, 0.5, beat, 0.0, 0.0)
    return Rank(made, still, state)


LATE = FLOOR + 1


@pytest.mark.parametrize(("ranks", "cause", "culprit"), [
    # Nobody stands still for too long, or whoever does waits for one that works.
    ([rank(0), rank(1)], None, None),
    ([rank(0, "train", collective=True, still=9999), rank(1, "checkpoint", still=SLOW - 1)], None, None),
    ([rank(0, "join", collective=True, still=9999, step=0), rank(1, "load", still=1, step=0)], None, None),
    ([rank(0, "cache", still=SLOW - 1)], None, None),
    ([rank(0, "forward", still=SLOW - 1, step=0)], None, None),  # the first step compiles
    ([rank(0, "train", collective=True, still=LATE, world=4), rank(1, "train", collective=True, still=LATE, world=4)],
     None, None),  # a rank of another machine may be busy
    ([rank(0, still=LATE, world=4), rank(1, still=LATE, world=4)], None, None),
    ([rank(0, still=LATE), rank(1, "train", still=LATE, state="D")], None, None),  # its disk may come back
    ([rank(0, still=LATE), rank(1, "checkpoint", still=LATE)], None, None),
    ([rank(0, "download", still=9999, step=0), rank(1, "join", collective=True, still=9999, step=0)], None, None),
    ([rank(0, "publish", still=9999), rank(1, "done", still=9999, state="")], None, None),
    ([rank(0, "end", still=LATE), rank(1, "end", still=LATE)], None, None),  # a tracker's last words
    # The culprit, by the surest sign.
    ([rank(0, still=LATE), rank(1, still=LATE, state="T")], "rank-stopped", 1),
    ([rank(0, "train", collective=True, still=LATE), rank(1, still=LATE, state="t")], "rank-stopped", 1),
    ([rank(0, still=LATE), rank(1, still=LATE, state="")], "rank-lost", 1),
    ([rank(0, "data", still=LATE), rank(1, still=LATE)], "loader-stuck", 0),
    ([rank(0, still=SLOW + 1), rank(1, "train", still=SLOW + 1, state="D")], "storage-stuck", 1),
    ([rank(0, "checkpoint", still=SLOW + 1), rank(1, "checkpoint", still=SLOW + 1, collective=True)], "rank-stuck", 0),
    ([rank(0, still=LATE), rank(1, "train", collective=True, still=LATE)], "rank-stuck", 0),
    ([rank(0, world=1, still=LATE)], "rank-stuck", 0),
    ([rank(0, still=LATE), rank(1, still=LATE, step=8)], "collective-stuck", 1),
    ([rank(0, "train", collective=True, still=LATE), rank(1, "train", collective=True, still=LATE + 1)],
     "collective-stuck", 1),
    ([rank(0, "train", collective=True, still=REMOTE + 1, world=4),
      rank(1, "train", collective=True, still=REMOTE + 1, world=4)], "collective-stuck", 0),
])  # fmt: skip
def test_the_verdict(ranks: list[Rank], cause: str | None, culprit: int | None) -> None:
    found = judge(ranks, Limits())
    assert (found and found.cause, found and found.rank) == (cause, culprit)
    if found is not None:
        assert f"rank {culprit} has stood still for" in found.words
        assert len(table(ranks).splitlines()) == len(ranks)


def test_the_limits() -> None:
    step, cache = rank(0), rank(0, "cache")
    assert Limits().of(step) == 60 and Limits(step=10).of(step) == 200  # 20 median steps
    assert Limits().of(cache) == 600 and Limits(step=100).of(cache) == 2000
    assert Limits(after=5).of(step) == 5 and Limits(after=5).of(cache) == 50
    pace = Pace()
    assert pace.median() == 0 and pace.take(step.beat) and not pace.take(step.beat) and pace.median() == 0.5


def test_nobody_is_no_hang() -> None:
    assert judge([], Limits()) is None


def test_a_run_that_goes_on_while_its_stacks_are_collected_is_left_alone(tmp_path: Path) -> None:
    """Nobody stands still any more when it is looked again: no signal, and no hang to tell at the end."""
    said: list[str] = []
    watcher = Watcher(tmp_path, tmp_path / "run", os.getpgid(0), said.append, after=5)
    (found,) = [judge([rank(0, world=1, still=LATE)], Limits())]
    assert found is not None and watcher._end(found, []) is False
    assert watcher.hang is None and "goes on again" in said[-1]


@pytest.mark.parametrize(("ranks", "wait"), [
    ([], True),  # the launcher waits for the other machines before it has any
    ([rank(0), rank(1, "train", collective=True)], True),
    ([rank(0), rank(1, state="Z")], True),
    ([rank(0, "join", collective=True, step=0)], True),
    ([rank(0, "checkpoint"), rank(1, "checkpoint", collective=True)], False),  # it saves
    ([rank(0, "publish"), rank(1, "done")], False),
    ([rank(0, "done"), rank(1, "done")], False),
    ([rank(0, "load", step=0)], False),
])  # fmt: skip
def test_ranks_that_can_only_wait(ranks: list[Rank], wait: bool) -> None:
    assert waits(ranks) is wait


def test_ranks_that_wait_for_a_machine_whose_part_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended after a while, in which they may say themselves what they saw, and not when they go on meanwhile."""
    monkeypatch.setattr("xflux_doctor.watcher._ABANDONED", 0.1)
    said: list[str] = []
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    words = ["the part of machine 1 ended with 137"]
    watcher = Watcher(tmp_path, tmp_path / "run", child.pid, said.append, after=0, elsewhere=lambda: words[0])
    still = [rank(0, world=2)]
    assert not any(watcher._abandoned(still) for _ in range(10))
    assert not watcher._abandoned([rank(0, "checkpoint", world=2)])
    assert not any(watcher._abandoned(still) for _ in range(10)) and child.poll() is None
    assert any(watcher._abandoned(still) for _ in range(10))
    assert child.wait(10) == -signal.SIGTERM and words[0] in said[-1]
    assert watcher.hang is not None and watcher.hang.line == f"xflux-doctor: peer-rank-died: {words[0]}"
    found = diagnose(f"{watcher.hang.line}\n")
    assert found is not None and found.cause == watcher.hang.cause


def test_a_rank_number_that_is_none_is_left_to_the_launch(tmp_path: Path) -> None:
    Pulse().begin({"XFLUX_WATCH": str(tmp_path), "RANK": "one"})
    assert not list(tmp_path.iterdir())


SITS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from xflux_trainer.pulse import PULSE
PULSE.begin(os.environ)
def sits():
    time.sleep(60)
with PULSE.during("data"):
    sits()
"""


def test_the_beats_and_stacks_of_a_process(tmp_path: Path) -> None:
    env = {**os.environ, "XFLUX_WATCH": str(tmp_path), "RANK": "3", "WORLD_SIZE": "4"}
    # Nobody reads its pipe, so that its output stays where it was.
    child = subprocess.Popen([sys.executable, "-c", SITS, str(Path(__file__).parents[1])], env=env)
    try:
        until = time.monotonic() + 30
        while not (found := beats(tmp_path)) or found[3].phase != "data":
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        beat = found[3]
        assert (beat.rank, beat.world, beat.pid, beat.collective) == (3, 4, child.pid, False)
        assert state(child.pid) == "S" and abs(beat.monotonic - time.monotonic()) < 30
        standing = collect([Rank(beat, 61.0, "S")], tmp_path)[3]
        text = standing.text
        assert "in sits" in text and innermost("") == "" and "line 7 in sits" in standing.innermost
        assert "== kernel" in text and f"thread {child.pid}" in text and "State:" in text
        child.send_signal(signal.SIGSTOP)
        while state(child.pid) != "T":
            time.sleep(0.01)
        text = collect([Rank(beat, 61.0, "T")], tmp_path)[3].text
        assert "the process is stopped" in text
    finally:
        child.kill()
        child.wait()
    text = collect([Rank(beat, 61.0, "")], tmp_path)[3].text
    assert "the process is gone" in text
