"""What travels in the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from conftest import ROOT

from xflux_doctor.gather.shadows import shadows


def test_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves its build/ behind, which the next one would ship
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "compat_matrix.yaml"):
        shutil.copy(ROOT / name, source)
    for name in ("xflux_doctor", "trainer"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)],
        check=True, timeout=300,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        matrix = archive.read("xflux_doctor/compat_matrix.yaml")
        compiled = archive.read("xflux_doctor/compat_matrix.json")
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert matrix == (ROOT / "compat_matrix.yaml").read_bytes()  # the content, not a link to it
    assert compiled == (ROOT / "xflux_doctor/compat_matrix.json").read_bytes()
    assert {"xflux_doctor/py.typed", "xflux_doctor/report/check.schema.json", "xflux_doctor/guard.py"} <= names
    assert {"xflux_trainer/py.typed", "xflux_trainer/config.py", "xflux_trainer/__main__.py"} <= names
    assert not any(name.startswith(("trainer/", "tests/", "benchmarks/")) for name in names)
    # the core brings no torch
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(core) == 5 and not any("torch" in line for line in core)


def test_every_package_is_listed() -> None:
    """setuptools ships only the packages that pyproject.toml names."""
    listed = (ROOT / "pyproject.toml").read_text()
    for init in (ROOT / "xflux_doctor").rglob("__init__.py"):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{name}"' in listed, name


def test_no_benchmark_bears_the_name_of_a_package() -> None:
    """A script's folder is the first on the path: transformers took a kernels.py of ours for the hub's `kernels`."""
    assert not shadows(ROOT / "benchmarks")
