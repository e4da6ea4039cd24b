"""`fix --install`: what it says before it touches an interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

MODULE = [sys.executable, "-m", "xflux_doctor.cli", "fix", "--install", "--cpu"]


def install(folder: Path, python: Path, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [*MODULE, "--python", str(python), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )


def test_an_interpreter_that_the_system_manages(tmp_path: Path) -> None:
    """PEP 668: the marker file beside the standard library."""
    library = tmp_path / "usr/lib/python3.11"
    library.mkdir(parents=True)
    (library / "EXTERNALLY-MANAGED").write_text("[externally-managed]\n")
    (tmp_path / "usr/bin").mkdir()
    (tmp_path / "usr/bin/python3.11").write_text("")
    (tmp_path / "usr/bin/python3.11").chmod(0o755)
    done = install(tmp_path, tmp_path / "usr/bin/python3.11", "--yes")
    assert done.returncode == 1 and "EXTERNALLY-MANAGED" in done.stderr and "python3 -m venv" in done.stderr


def test_a_venv_without_pip(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    done = install(tmp_path, tmp_path / "venv/bin/python", "--yes")
    assert done.returncode == 1 and "has no pip" in done.stderr and "ensurepip" in done.stderr


def test_the_commands_are_shown_and_nothing_runs_without_an_answer(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    before = sorted(os.listdir(site))
    done = install(
        tmp_path, tmp_path / "venv/bin/python", "--stack", "cpu" if sys.version_info >= (3, 11) else "xflux-2024"
    )
    assert done.returncode == 2 and "Give --yes to agree" in done.stderr
    assert f"{tmp_path}/venv/bin/python -m pip install" in done.stdout and "torch==" in done.stdout
    assert "is no venv" not in done.stdout and sorted(os.listdir(site)) == before


def test_offline_fetches_nothing(tmp_path: Path) -> None:
    """A folder of wheels is the only place that pip may look at."""
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    stack = "cpu" if sys.version_info >= (3, 11) else "xflux-2024"
    refused = install(tmp_path, tmp_path / "venv/bin/python", "--stack", stack, "--offline", "--yes")
    assert refused.returncode == 2 and "PIP_FIND_LINKS" in refused.stderr
    argv = [*MODULE, "--python", str(tmp_path / "venv/bin/python"), "--stack", stack, "--offline", "--yes"]
    environment = {**os.environ, "PIP_FIND_LINKS": str(tmp_path), "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "--no-index" in done.stdout and "--find-links" not in done.stdout
    assert "pip ended with 1" in done.stderr
