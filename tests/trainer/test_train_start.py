"""The benchmarks of a run's start, small: what they measure is the trainer's own, and the second start does less."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import ROOT, environment

pytest.importorskip("torch")

sys.path.insert(0, str(ROOT / "benchmarks"))

import start


def run(script: str, *arguments: object) -> tuple[str, Any]:
    out = Path(str(arguments[arguments.index("--out") + 1]))
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text("utf-8"))


def test_a_second_start_of_a_tiny_run(tmp_path: Path) -> None:
    shown, told = run("start.py", "--work", tmp_path / "w", "--tiny", "--no-warm", "--out", tmp_path / "out.json")
    first, second = told["rows"]
    weights = (tmp_path / "w" / "model" / "transformer").glob("*.safetensors")
    assert told["bytes"] == sum(file.stat().st_size for file in weights)
    assert "raw_seconds" not in first and 0 < second["raw_seconds"] < 10
    for row in (first, second):
        parts = sum(row[name] for name in ("launch", "between", "list", "cache", "load", "train"))
        assert row["seconds"] == pytest.approx(parts, abs=0.01) and row["first_step"] <= row["train"] + row["between"]
        assert row["seconds"] < row["process_seconds"] and row["host_bytes"] > 50e6
    log = (tmp_path / "w" / "second, cold.log").read_text()
    assert "encod" not in (tmp_path / "w" / "first.log").read_text() + log
    assert list((tmp_path / "w" / "cache").glob("index-*/index.json"))
    assert "raw read     beyond   host GiB" in shown


def test_the_bars_of_a_second_start() -> None:
    first = {"start": "first", "seconds": 99.0, "host_bytes": 1}
    good = {"start": "second", "seconds": 29.0, "raw_seconds": 10.0, "host_bytes": 7 << 30}
    assert start.missed([first, good]) == []
    (slow,) = start.missed([first, {**good, "seconds": 31.5}])
    assert "21.5 s beyond the raw read" in slow
    (large,) = start.missed([first, {**good, "host_bytes": 9 << 30}])
    assert "9.0 GiB of host memory" in large


@pytest.mark.parametrize("kind", ["tables", "files"])
def test_an_index_of_a_few_images(tmp_path: Path, kind: str) -> None:
    if kind == "tables":
        pytest.importorskip("pyarrow")
    shown, told = run("index.py", "--kind", kind, "--counts", "10,1500", "--out", tmp_path / "out.json")
    rows = told["rows"]
    assert [(row["count"], row["payload"]) for row in rows] == [(10, 20), (1500, 900)]
    for row in rows:
        assert row["first"]["entries"] == row["second"]["entries"] == row["count"]
        assert row["first"]["digest"] == row["second"]["digest"]
        assert row["second"]["seconds"]["entries"] < 5
    assert rows[1]["second"]["seconds"]["all"] < rows[1]["first"]["seconds"]["all"]
    assert "payload files" in shown
