"""`fix --install`: what it says before it touches an interpreter."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MODULE = [sys.executable, "-m", "xflux_doctor.cli", "fix", "--install", "--cpu"]


def install(folder: Path, python: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = [*MODULE, "--python", str(python), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | variables
    return subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def with_pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv to copy: pip takes seconds to be unpacked."""
    folder = tmp_path_factory.mktemp("venv") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    return folder


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


def test_the_commands_are_shown_and_nothing_runs_without_an_answer(with_pip: Path, tmp_path: Path) -> None:
    shutil.copytree(with_pip, tmp_path / "venv", symlinks=True)
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    before = sorted(os.listdir(site))
    done = install(
        tmp_path, tmp_path / "venv/bin/python", "--stack", "cpu" if sys.version_info >= (3, 11) else "xflux-2024"
    )
    assert done.returncode == 2 and "Give --yes to agree" in done.stderr
    assert f"{tmp_path}/venv/bin/python -m pip install" in done.stdout and "torch==" in done.stdout
    assert "is no venv" not in done.stdout and sorted(os.listdir(site)) == before


def test_offline_fetches_nothing(with_pip: Path, tmp_path: Path) -> None:
    """A folder of wheels is the only place that pip may look at."""
    shutil.copytree(with_pip, tmp_path / "venv", symlinks=True)
    stack = "cpu" if sys.version_info >= (3, 11) else "xflux-2024"
    refused = install(tmp_path, tmp_path / "venv/bin/python", "--stack", stack, "--offline", "--yes")
    assert refused.returncode == 2 and "PIP_FIND_LINKS" in refused.stderr
    argv = [*MODULE, "--python", str(tmp_path / "venv/bin/python"), "--stack", stack, "--offline", "--yes"]
    environment = {**os.environ, "PIP_FIND_LINKS": str(tmp_path), "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "--no-index" in done.stdout and "--find-links" not in done.stdout
    assert "pip ended with 1" in done.stderr


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """Makes folders that are file systems of so many MiB."""
    mounted: list[Path] = []

    def make(name: str, mib: int) -> Path:
        (tmp_path / name).mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(tmp_path / name)]
        if not shutil.which("mount") or subprocess.run(words, capture_output=True, check=False).returncode != 0:
            pytest.skip("needs the right to mount")
        mounted.append(tmp_path / name)
        return tmp_path / name

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


BALLAST_MIB = 60


def pretend(place: Path, name: str, version: str) -> None:
    """The metadata of a package, as pip leaves it."""
    folder = next((place / "lib").glob("python*/site-packages")) / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def ballast(folder: Path, **sizes: float) -> tuple[str, ...]:
    """Options that install a stack of one wheel of 60 MiB, from a folder; the matrix says its `sizes` or does not."""
    meta = "Metadata-Version: 2.1\nName: ballast\nVersion: 1.0\n"
    with zipfile.ZipFile(folder / "ballast-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("ballast/data", os.urandom(BALLAST_MIB << 20))
        wheel.writestr("ballast-1.0.dist-info/METADATA", meta)
        wheel.writestr("ballast-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("ballast-1.0.dist-info/RECORD", "")
    stack = {
        "name": "ballast", "summary": "one wheel", "python": ">=3.10", "cuda": None, "driver": None,
        "tested": {"cpu": "never", "gpu": "never"}, "packages": {"ballast": {"version": "1.0"}}, "source": ["https://example.org/ballast"],
        **sizes,
    }  # fmt: skip
    (folder / "matrix.yaml").write_text(json.dumps({"schema": 1, "stacks": [stack]}))
    return ("--matrix", str(folder / "matrix.yaml"), "--stack", "ballast", "--offline", "--yes")


def packages(place: Path) -> list[str]:
    return sorted(os.listdir(next((place / "lib").glob("python*/site-packages"))))


def test_a_disk_too_small_for_the_stack_is_told_before_pip_starts(
    with_pip: Path, tmp_path: Path, disk: Callable[..., Path]
) -> None:
    place = disk("volume", 64)
    shutil.copytree(with_pip, place / "venv", symlinks=True)
    pretend(place / "venv", "nvidia-ml-py", "13.615.71")  # the doctor's own, which lies in the same venv
    before = packages(place / "venv")
    options = ballast(tmp_path, installed_gib=BALLAST_MIB / 1024)
    done = install(tmp_path, place / "venv/bin/python", *options, PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 1 and f"{place}/venv is on a disk with 0." in done.stderr, done.stderr
    assert "Free some room" in done.stderr and "pip install" not in done.stdout
    assert packages(place / "venv") == before


def test_nobody_is_refused_for_what_is_there_already(with_pip: Path, tmp_path: Path, disk: Callable[..., Path]) -> None:
    """pip leaves torch's libraries behind when a disk runs full; only the rest is missing at the next try."""
    place = disk("volume", 64)
    shutil.copytree(with_pip, place / "venv", symlinks=True)
    pretend(place / "venv", "nvidia-cudnn-cu12", "9.1.0.70")
    options = ballast(tmp_path, installed_gib=BALLAST_MIB / 1024)
    done = install(tmp_path, place / "venv/bin/python", *options, PIP_FIND_LINKS=str(tmp_path))
    assert "less what is there already" in done.stdout and "pip install" in done.stdout
    assert done.returncode == 1 and "A disk, or your share of it, is full" in done.stderr


def test_a_disk_that_runs_full_is_told_in_a_sentence(with_pip: Path, tmp_path: Path, disk: Callable[..., Path]) -> None:
    """A site's matrix need not know the sizes, and a quota is seen by nobody: pip itself finds out."""
    place = disk("volume", 64)
    shutil.copytree(with_pip, place / "venv", symlinks=True)
    done = install(tmp_path, place / "venv/bin/python", *ballast(tmp_path), PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 1 and "[Errno 28]" in done.stderr, done.stderr
    assert "A disk, or your share of it, is full: pip ended with 1" in done.stderr and "df -h" in done.stderr


def test_downloads_go_beside_the_packages_where_tmp_is_small(
    with_pip: Path, tmp_path: Path, disk: Callable[..., Path]
) -> None:
    """A container's own disk is small, the volume with the venv is not: pip gets another TMPDIR, and no cache."""
    place, tmp = disk("volume", 190), disk("tmp", 4)
    shutil.copytree(with_pip, place / "venv", symlinks=True)
    options = ballast(tmp_path, installed_gib=BALLAST_MIB / 1024, download_gib=BALLAST_MIB / 1024)
    shown = [option for option in options if option not in ("--yes", "--offline")]
    python = place / "venv/bin/python"
    done = install(tmp_path, python, *shown, TMPDIR=str(tmp), PIP_CACHE_DIR=str(tmp / "cache"))
    assert done.returncode == 2 and "Give --yes" in done.stderr, done.stderr
    command = f"$ TMPDIR={place}/venv {python} -m pip install --disable-pip-version-check --no-cache-dir ballast==1.0"
    assert command in done.stdout
    done = install(tmp_path, python, *options, TMPDIR=str(tmp), PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 0 and "ballast" in packages(place / "venv"), done.stderr


def test_pip_ends_with_the_doctor(with_pip: Path, tmp_path: Path) -> None:
    """`docker stop` sends SIGTERM to the doctor alone. The index takes the connection and never answers."""
    shutil.copytree(with_pip, tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    options = [option for option in ballast(tmp_path) if option != "--offline"]
    with socket.create_server(("127.0.0.1", 0)) as index:
        argv = [*MODULE, "--python", str(python), *options]
        (tmp_path / "tmp").mkdir()
        environment = {**os.environ, "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple"}
        environment["TMPDIR"] = str(tmp_path / "tmp")
        doctor = subprocess.Popen(argv, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        index.settimeout(60)
        connection, _ = index.accept()  # pip is at work
        children = Path(f"/proc/{doctor.pid}/task/{doctor.pid}/children").read_text().split()
        (pip,) = [Path("/proc", child) for child in children if b"pip" in Path("/proc", child, "cmdline").read_bytes()]
        doctor.terminate()
        _, said = doctor.communicate(timeout=20)
        connection.close()
    assert doctor.returncode != 0 and "Traceback" not in said, said
    assert not pip.exists() and not list((tmp_path / "tmp").iterdir())  # what it had fetched is gone too
