"""What is installed, read from the names of folders as pip and setuptools really write them."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from xflux_doctor.errors import UsageError
from xflux_doctor.gather.interpreter import python_facts
from xflux_doctor.gather.packages import packages


def interpreter(prefix: Path, name: str = "python3.12") -> str:
    """A prefix with the places that a Python has; the executable is never started."""
    (prefix / "bin").mkdir(parents=True)
    (prefix / "lib" / name / "site-packages").mkdir(parents=True)
    executable = prefix / "bin" / name
    executable.write_text("")
    executable.chmod(0o755)
    return str(executable)


def install(site: Path, *names: str) -> None:
    for name in names:
        (site / name).mkdir(parents=True)


@pytest.mark.parametrize(("entry", "name", "version"), [
    ("deepspeed-0.14.4.dist-info", "deepspeed", "0.14.4"),
    ("deepspeed-0.14.4-py3.12.egg-info", "deepspeed", "0.14.4"),  # setup.py install, by pip before 23.1
    ("deepspeed-0.14.4.egg-info", "deepspeed", "0.14.4"),
    ("huggingface_hub-0.24.5.dist-info", "huggingface-hub", "0.24.5"),
    ("optimum_quanto-0.2.4.dist-info", "optimum-quanto", "0.2.4"),
    ("optimum-quanto-0.2.4-py3.12.egg-info", "optimum-quanto", "0.2.4"),
    ("torch-2.4.0+cu121.dist-info", "torch", "2.4.0+cu121"),
])  # fmt: skip
def test_every_form_of_metadata(tmp_path: Path, entry: str, name: str, version: str) -> None:
    python = python_facts(interpreter(tmp_path))
    install(tmp_path / "lib/python3.12/site-packages", entry)
    assert {p.name: p.version for p in packages(python).values()} == {name: version}


@pytest.mark.parametrize(("text", "build"), [
    ("__version__ = '2.4.0+cu121'\ncuda: Optional[str] = '12.1'\n", "cu121"),
    ('__version__ = "2.13.0+cpu"\n', "cpu"),
    ("__version__ = '2.10.0'\ncuda: Optional[str] = '12.8'\n", "cu128"),
    ("__version__ = '2.10.0'\ncuda: Optional[str] = None\n", "cpu"),
    ("raise SystemExit\n", ""),
])  # fmt: skip
def test_the_build_is_read_and_never_run(tmp_path: Path, text: str, build: str) -> None:
    python = python_facts(interpreter(tmp_path))
    site = tmp_path / "lib/python3.12/site-packages"
    install(site, "torch-2.4.0.dist-info", "torch")
    (site / "torch/version.py").write_text(text)
    assert packages(python)["torch"].build == build


def test_two_installs_of_one_name(tmp_path: Path) -> None:
    python = python_facts(interpreter(tmp_path))
    install(tmp_path / "lib/python3.12/site-packages", "torch-2.4.0.dist-info", "torch-2.5.0.dist-info", "torch")
    assert packages(python)["torch"].copies == 2


def test_metadata_without_a_module(tmp_path: Path) -> None:
    python = python_facts(interpreter(tmp_path))
    site = tmp_path / "lib/python3.12/site-packages"
    install(site, "torch-2.4.0.dist-info", "peft-0.13.2.dist-info", "peft")
    found = packages(python)
    assert not found["torch"].files and found["peft"].files


def test_one_prefix_with_several_pythons(tmp_path: Path) -> None:
    """Each interpreter has its own packages: 3.9 does not come after 3.11, and neither sees the other's."""
    eleven = interpreter(tmp_path, "python3.11")
    (tmp_path / "lib/python3.9/site-packages").mkdir(parents=True)
    install(tmp_path / "lib/python3.9/site-packages", "torch-1.0.0.dist-info", "torch")
    install(tmp_path / "lib/python3.11/site-packages", "torch-2.4.0.dist-info", "torch")
    (tmp_path / "bin/python3").symlink_to("python3.11")
    for executable in (eleven, str(tmp_path / "bin/python3")):
        python = python_facts(executable)
        assert python.version == "3.11"
        assert packages(python)["torch"].version == "2.4.0" and packages(python)["torch"].copies == 1


def test_debian_keeps_pip_s_packages_in_usr_local(tmp_path: Path) -> None:
    python = python_facts(interpreter(tmp_path / "usr", "python3.11"))
    install(tmp_path / "usr/local/lib/python3.11/dist-packages", "torch-2.4.0.dist-info", "torch")
    install(tmp_path / "usr/lib/python3/dist-packages", "numpy-1.24.2.egg-info", "numpy")
    assert set(packages(python)) == {"torch", "numpy"}


def test_a_real_venv_is_read_without_starting_it(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    executable = str(tmp_path / "venv/bin/python")
    ask = "import platform, sysconfig; print(platform.python_version(), sysconfig.get_path('purelib'))"
    asked = subprocess.run([executable, "-c", ask], capture_output=True, text=True, check=True)
    version, site = asked.stdout.split()
    install(Path(site), "torch-2.4.0.dist-info", "torch")
    python = python_facts(executable)
    assert python.version == version and python.prefix == str(tmp_path / "venv")
    assert packages(python)["torch"].location == site


def test_this_interpreter() -> None:
    python = python_facts()
    assert python.executable == sys.executable and python.version == ".".join(map(str, sys.version_info[:3]))
    assert "pytest" in packages(python, ("pytest",))
    assert python_facts(sys.executable) == python


def test_no_python(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no Python"):
        python_facts(str(tmp_path / "none"))
    (tmp_path / "bin").mkdir()
    for name, mode in (("tool", 0o755), ("python", 0o644)):
        (tmp_path / "bin" / name).write_text("")
        (tmp_path / "bin" / name).chmod(mode)
        with pytest.raises(UsageError, match="no Python that can be started"):
            python_facts(str(tmp_path / "bin" / name))
    (tmp_path / "bin/python").chmod(0o755)
    with pytest.raises(UsageError, match="does not look like"):
        python_facts(str(tmp_path / "bin/python"))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="There is no Python"):
        python_facts(str(tmp_path / "fifo"))
