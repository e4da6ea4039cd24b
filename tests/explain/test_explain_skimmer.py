"""A log that is skimmed gives what one that is read line by line gives, and is read at the speed of the disk."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import pytest

from xflux_doctor.explain import skimmer
from xflux_doctor.explain.diagnosis import Diagnosis, diagnose, diagnose_stream
from xflux_doctor.explain.log import Lines
from xflux_doctor.explain.reader import Reader
from xflux_doctor.explain.rules import RULES

BAR = "steps: {0:3}%|{1}| {0}/5000 [00:{0:02}<2:10:11, 2.61it/s, lr=1e-05, step_loss=0.4{0:03}]\r"
LOGGED = "2026-11-24 10:11:{0:02} - INFO - __main__ - step {0} loss: 0.{0}"
PRINTED = "step {0}: loss {0}.25e-2"
PLAIN = "Downloading shards: {0} of 3, {0}.5 MB"
NAN = "step {0}: loss nan"
FAILURE = (
    "Traceback (most recent call last):\n"
    '  File "/x/train.py", line 3, in <module>\n    loss.backward()\n'
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB "
    "of which 812.50 MiB is free.\n"
)
FINISHED = "Training finished.\n"


def many(form: str, count: int, first: int = 0) -> str:
    end = "" if form.endswith("\r") else "\n"
    text = "".join(form.format(first + k, "#" * (k % 10)) + end for k in range(count))
    return text if text.endswith("\n") else text + "\n"


LOGS: dict[str, Callable[[], str]] = {
    "healthy": lambda: many(BAR, 20_000) + many(LOGGED, 5_000) + FINISHED,
    "failed at the end": lambda: many(BAR, 20_000) + FAILURE,
    "failed in the middle and went on": lambda: many(LOGGED, 9_000) + FAILURE + many(LOGGED, 9_000),
    "failed in the middle, prints in a buffer": lambda: many(PRINTED, 9_000) + FAILURE + many(PRINTED, 30),
    "printed on for long": lambda: many(PRINTED, 9_000) + FAILURE + many(PRINTED, 9_000),
    "nan to the end": lambda: many(PRINTED, 20_000) + many(NAN, 20_000),
    "nan that went away": lambda: many(PRINTED, 9_000) + many(NAN, 50) + many(PRINTED, 20_000),
    "finished after an error": lambda: many(PLAIN, 30_000) + FAILURE + FINISHED + many(PLAIN, 30_000),
    "ranks": lambda: "".join(f"[rank{k % 8}]: " + BAR.format(k, "#") + "\n" for k in range(20_000)) + FAILURE,
    "windows": lambda: (many(LOGGED, 9_000) + FAILURE).replace("\n", "\r\n"),
    "no last line end": lambda: many(LOGGED, 9_000) + FAILURE.rstrip("\n"),
    "one line": lambda: BAR.format(1, "#") * 90_000,
}


def same(one: Diagnosis | None, two: Diagnosis | None) -> bool:
    return one == two


@pytest.mark.parametrize("name", LOGS)
def test_skimmed_is_read(name: str) -> None:
    text = LOGS[name]()
    assert same(diagnose_stream(io.BytesIO(text.encode())), diagnose(text))


def test_pieces_of_any_mixture() -> None:
    """Whatever follows on whatever: the clock, the marks and the last lines are those of a reader."""
    dice = random.Random(0)
    parts = [many(form, 3_000) for form in (BAR, LOGGED, PRINTED, PLAIN)] + [FAILURE, FINISHED, many(NAN, 3), "\n\n"]
    for _ in range(12):
        text = "".join(dice.choice(parts) for _ in range(8))
        whole, skimmed = Reader(RULES), Reader(RULES)
        made, lines = Lines(), Lines()
        for line in made.of(text):
            whole.take(line)
        skim = skimmer.Skimmer(skimmed, lines)
        lined = [line + b"\n" for line in text.encode().split(b"\n")[:-1]]
        for start in range(0, len(lined), 100):
            piece = b"".join(lined[start : start + 100])
            if not skim.skim(piece):
                for line in lines.of(piece.decode()):
                    skimmed.take(line)
        assert lines.number == made.number
        assert (skimmed.clock.steady, skimmed.clock.done) == (whole.clock.steady, whole.clock.done)
        assert skimmed.clock.printed == pytest.approx(whole.clock.printed, rel=0.05)
        assert skimmed.marks.keys() == whole.marks.keys() and (skimmed.nan is None) == (whole.nan is None)
        near, meant = ([text for text in reader.recent if text][-20:] for reader in (skimmed, whole))
        assert near == meant


def test_most_of_a_long_log_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    take = Reader.take
    monkeypatch.setattr(Reader, "take", lambda self, line: (taken.append(line.number), take(self, line))[1])
    text = many(BAR, 50) * 2_000 + FAILURE
    found = diagnose_stream(io.BytesIO(text.encode()))
    assert found is not None and found.cause.startswith("cuda-oom") and found.evidence[0].line > 2_000
    assert len(taken) < text.count("\r") / 10
