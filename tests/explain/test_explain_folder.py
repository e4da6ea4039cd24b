"""Logs of many ranks in many files, rotated and packed: one cause, with the rank and the file that it stands in."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from xflux_doctor.cli import main
from xflux_doctor.explain.diagnosis import diagnose_file
from xflux_doctor.explain.folder import diagnose_folder, logs_in, rank_of

STEPS = "".join(f"step {k}: loss 0.5{k}\n" for k in range(3000))
KEY = STEPS + (
    "Traceback (most recent call last):\n  File \"/x/dataset.py\", line 7, in get\n    prompt = data['caption']\n"
    "KeyError: 'caption'\n"
)
TIMEOUT = STEPS + (
    "[rank{0}]:[E1124 10:00:00.123 ProcessGroupNCCL.cpp:629] [Rank {0}] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600010 milliseconds.\n"
)


@pytest.mark.parametrize(("name", "rank"), [
    ("rank3.log", 3), ("logs/task_12.err", 12), ("attempt_0/5/stderr.log", 5), ("node-a/worker-7.out.1.gz", 7),
    ("run.log", None), ("v2/run.log", None),
])  # fmt: skip
def test_ranks_by_names(name: str, rank: int | None) -> None:
    assert rank_of(Path(name)) == rank


@pytest.mark.parametrize("form", ["rank{}.log", "attempt_0/{}/stderr.log", "task_{}.err"])
def test_the_first_cause_and_not_what_the_others_say(tmp_path: Path, form: str) -> None:
    for rank in range(4):
        path = tmp_path / form.format(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(KEY if rank == 2 else TIMEOUT.format(rank))
    found = diagnose_folder(tmp_path)
    assert found is not None and found.cause == "dataset-key-missing" and found.rank == 2
    assert found.file == form.format(2) and found.evidence[-1].line == 3004


def test_healthy_ranks_are_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(3):
        (tmp_path / f"rank{rank}.log").write_text(STEPS + "Training finished.\n")
    assert len(logs_in(tmp_path)) == 3 and diagnose_folder(tmp_path) is None
    assert main(["explain", str(tmp_path)]) == 0 and "No known cause" in capsys.readouterr().out


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_packed_logs(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"run.log.1.{ending}"
    path.write_bytes(pack(KEY.encode()))
    found = diagnose_file(path)
    assert found is not None and found.cause == "dataset-key-missing"
    # Broken off: what is whole is read, and nothing is raised.
    path.write_bytes(pack(KEY.encode())[:-40])
    diagnose_file(path)
    path.write_bytes(pack(KEY.encode())[:20] + b"rubbish" * 9)
    assert diagnose_file(path) is None


def test_a_folder_without_logs_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(tmp_path)]) == 2 and "holds no logs" in capsys.readouterr().err
