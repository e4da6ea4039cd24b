"""The output of ranks: whole lines in one log, each rank's own file, what the terminal shows, and what creeps."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xflux_doctor import progress
from xflux_doctor.launch import Launch
from xflux_doctor.outlets import Merged
from xflux_doctor.progress import Display, fitted
from xflux_doctor.supervise import Watching, run
from xflux_doctor.vitals import AGAIN, GIB, SPELL, WINDOW, Creep, Rates, Speed


def merged(tmp_path: Path) -> tuple[Merged, Path, list[bytes]]:
    shown: list[bytes] = []
    return Merged((tmp_path / "log").open("wb"), tmp_path / "ranks", shown.append), tmp_path / "log", shown


def test_lines_of_two_ranks_are_not_mixed(tmp_path: Path) -> None:
    one, log, shown = merged(tmp_path)
    one.take(0, b"step 1/2  lo")
    one.take(1, b"a note\nhal")
    one.take(0, b"ss 1\r")
    one.take(0, b"\nbar 1\rbar 2\r")
    one.take(None, b"the launcher\n")
    one.take(1, b"f\n[rank1]: its own mark\n\n")
    one.take(0, b"last words")
    one.close()
    text = log.read_bytes()
    assert text == (b"[rank1]: a note\nstep 1/2  loss 1\r\nbar 1\rthe launcher\n"
                    b"[rank1]: half\n[rank1]: its own mark\n\nbar 2\rlast words")  # fmt: skip
    assert b"".join(shown) == text
    assert (tmp_path / "ranks" / "rank1.log").read_bytes() == b"a note\nhalf\n[rank1]: its own mark\n\n"


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    shown: list[bytes] = []
    with open("/dev/full", "wb", buffering=0) as full:
        one = Merged(full, None, shown.append)
        one.take(None, b"a\n")
        one.take(None, b"b\n")
    assert b"no longer written: No space left on device" in b"".join(shown)
    assert b"".join(shown).endswith(b"a\nb\n")


RANKS = """
import ctypes, os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
if len(sys.argv) == 2:  # the launcher: its ranks in sessions of their own
    for rank in "01":
        subprocess.Popen([sys.executable, "-c", sys.argv[0], sys.argv[1], rank], start_new_session=True,
                         env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"})
    for _ in "01":
        os.wait()
    print("failed (exitcode: -9) local_rank: 1 (pid: 1)")
    sys.exit(1)
from xflux_trainer.pulse import PULSE
PULSE.begin(os.environ)
libc = ctypes.CDLL(None)
print("python", sys.argv[2], flush=True)
libc.puts(b"from C"); libc.fflush(None)
os.write(2, b"last words of " + sys.argv[2].encode())
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_last_words_of_every_rank_are_kept(tmp_path: Path) -> None:
    """Python's and C's, also without a line end, before the launcher's verdict."""
    code = RANKS.replace("sys.argv[0], ", "os.environ['CODE'], ")
    env = {**os.environ, "CODE": code}
    start = Launch((sys.executable, "-c", code, str(Path(__file__).parents[1])), env, {})
    shown: list[bytes] = []
    end = run(start, tmp_path / "run-1.log", shown.append, Watching(tmp_path))
    assert end.exit_code == 137
    for rank in "01":
        text = (tmp_path / "run-1" / f"rank{rank}.log").read_text()
        assert text == f"python {rank}\nfrom C\nlast words of {rank}"
    log = (tmp_path / "run-1.log").read_text()
    assert "[rank1]: from C" in log and log.index("from C") < log.index("failed (exitcode")
    assert b"".join(shown).decode() == log


def on_terminal(lines: list[bytes], *, raw: bool = False, between: float = 0.0) -> str:
    master, slave = pty.openpty()
    display = Display(raw=raw, number=slave)
    for line in lines:
        display(line)
        time.sleep(between)
    display.close()
    os.close(slave)
    found = b""
    try:
        while chunk := os.read(master, 65536):
            found += chunk
    except OSError:
        pass
    os.close(master)
    return found.decode()


LINES = [
    b"note: a\n",
    b"step 1/3  loss 1\n",
    b"step 2/3  loss 2\n",
    b"[rank1]: step 2/3  loss 9\n",
    b"step 3/3  loss 3\n",
]


def test_one_line_of_progress_on_a_terminal() -> None:
    text = on_terminal(LINES)
    assert text == ("note: a\r\n\r\x1b[Kstep 1/3  loss 1\r\x1b[Kstep 2/3  loss 2\r\x1b[K[rank1]: step 2/3  loss 9\r\n"
                    "\r\x1b[Kstep 3/3  loss 3\r\n")  # fmt: skip
    assert on_terminal(LINES, raw=True) == b"".join(LINES).decode().replace("\n", "\r\n")


def test_few_lines_of_progress_in_a_file(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        display = Display(number=file.fileno())
        for line in [*LINES[:4], *(b"step 2/3  loss 2\n" for _ in range(50)), LINES[4]]:
            display(line)
        display.close()
    assert (tmp_path / "out").read_bytes() == LINES[0] + LINES[1] + LINES[3] + LINES[4]


def test_a_reader_that_has_left_is_no_matter() -> None:
    read, write = os.pipe()
    display = Display(number=write)
    os.close(read)
    for _ in range(3):
        display(b"a line\n")
        time.sleep(0.05)
    display.close()
    os.write(write, b"goes nowhere")
    os.close(write)


def test_a_terminal_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_END", 0.2)
    read, write = os.pipe()
    display = Display(number=write)
    started = time.monotonic()
    for _ in range(5000):
        display(b"x" * 4000 + b"\n")
    display.close()
    assert time.monotonic() - started < 30
    os.close(read)


def test_what_goes_of_a_long_line() -> None:
    line = "step 3/9  loss 1.5  now 1.4  lr 1.00e-03  0.5 s/it  eta 00:00:03"
    assert fitted(line, 200) == line
    assert fitted(line, 45) == "step 3/9  loss 1.5  now 1.4  eta 00:00:03"
    assert fitted(line, 35) == "step 3/9  loss 1.5  eta 00:00:03"
    assert fitted(line, 6) == "step 3"


def test_slow_steps_are_told_once_a_window() -> None:
    speed = Speed()
    assert not any(speed.take(1.0) for _ in range(2 * WINDOW))
    assert not any(speed.take(1.2) for _ in range(2 * WINDOW))
    told = [text for text in (speed.take(2.0) for _ in range(2 * WINDOW)) if text]
    assert len(told) == 2 and "2.0 times" in told[1]
    rates = Rates()
    assert rates.may("speed", 1.0) and not rates.may("speed", AGAIN) and rates.may("speed", AGAIN + 2)


def test_memory_that_creeps() -> None:
    steady, creeping, sawing = Creep("it"), Creep("it", 100 * GIB), Creep("it")
    assert not any(steady.take(20 * GIB + k % 3 * GIB) for k in range(3 * SPELL))
    assert not any(sawing.take((20 + k % 45) * GIB) for k in range(3 * SPELL))
    told = [text for text in (creeping.take(20 * GIB + k * GIB // 10) for k in range(SPELL)) if text]
    assert len(told) == 1 and "it grows: 20.0 to 26.0 GiB" in told[0] and "it is full in" in told[0]


COST = """
import os, sys, tempfile, timeit
sys.path.insert(0, sys.argv[1])
from xflux_trainer.pulse import PULSE
os.environ["XFLUX_WATCH"] = sys.argv[2]
off = min(timeit.repeat(lambda: PULSE.at("data"), number=2000, repeat=5)) / 2000
PULSE.begin(os.environ)
print(off * 1e6, min(timeit.repeat(lambda: PULSE.at("data"), number=2000, repeat=9)) / 2000 * 1e6)
"""


def test_what_a_beat_costs(tmp_path: Path) -> None:
    """A step has about eight beats; the fastest step measured on a card takes 90 ms, and 0.5 % of that is 450 µs."""
    done = subprocess.run([sys.executable, "-c", COST, str(Path(__file__).parents[1]), str(tmp_path)],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    off, on = map(float, done.stdout.split())
    assert off < 2 and on < 50, done.stdout
