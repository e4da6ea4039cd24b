"""What the tests of the command line share: every call of the doctor is a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
from conftest import ROOT

SCHEMA = json.loads((ROOT / "xflux_doctor/report/check.schema.json").read_text())


def doctor(*arguments: str, cwd: Path, code: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "xflux_doctor.cli", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HOME": str(cwd / "hf"), "XDG_CACHE_HOME": str(cwd / "cache"), **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    if code is not None:
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def job_of(place: Path, machine_file: str, stack: str) -> list[str]:
    return [
        "--config",
        "train.yaml",
        "--accelerate-config",
        "accelerate.yaml",
        "--facts",
        machine_file,
        "--stack",
        stack,
    ]


def check_json(place: Path, *arguments: str) -> dict[str, Any]:
    done = doctor("check", "--format", "json", *arguments, cwd=place)
    report: dict[str, Any] = json.loads(done.stdout)
    jsonschema.validate(report, SCHEMA)
    assert report["exit_code"] == done.returncode
    return report
