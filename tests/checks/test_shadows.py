"""SW118: what lies in the working folder and has a package's name."""

from __future__ import annotations

from pathlib import Path

from conftest import case, findings, job, machine

from xflux_doctor.checks import software
from xflux_doctor.gather.shadows import shadows
from xflux_doctor.matrix import Matrix


def test_files_and_whole_packages_are_seen_and_plain_folders_are_not(tmp_path: Path) -> None:
    for name in ("torch.py", "random.py", "train.py", "diffusers", "datasets", "yaml.txt"):
        if "." in name:
            (tmp_path / name).touch()
        else:
            (tmp_path / name).mkdir()
    (tmp_path / "datasets/__init__.py").touch()
    assert shadows(tmp_path) == ("datasets", "random.py", "torch.py")
    assert shadows(tmp_path / "nowhere") == ()


def test_what_a_library_imports_unasked_wherever_it_finds_it(tmp_path: Path) -> None:
    """transformers dies of a kernels.py, the hub's library of a click.py; neither is imported by the job itself."""
    for name in ("kernels.py", "click.py", "torchvision.py", "helpers.py"):
        (tmp_path / name).touch()
    assert shadows(tmp_path) == ("click.py", "kernels.py", "torchvision.py")


def test_what_every_start_imports_is_an_error(matrix: Matrix) -> None:
    facts = machine(matrix, shadows=("datasets", "torch.py"))
    one, two = findings(case(matrix, facts, job()), software.shadowed_here)
    assert (one.severity, two.severity) == ("warning", "error") and "torch.py" in two.seen
    assert not findings(case(matrix, machine(matrix), job()), software.shadowed_here)
