"""What a distribution's own records say, on trees as pip, setuptools and conda write them, and on a real install."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import msgspec
from test_packages import interpreter

from xflux_doctor.facts import Package
from xflux_doctor.gather import metadata
from xflux_doctor.gather.interpreter import python_facts
from xflux_doctor.gather.packages import packages


def wheel(site: Path, name: str, version: str, *lines: str, files: dict[str, bytes] | None = None) -> Path:
    """An installed wheel: dist-info with METADATA, INSTALLER and RECORD, and its files."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    declared = "".join(f"Requires-Dist: {line}\n" for line in lines)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n{declared}\nRequires-Dist: not this one\n")
    (info / "INSTALLER").write_text("pip\n")
    rows = []
    for path, content in {f"{name}/__init__.py": b"x = 1\n", **(files or {})}.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
        rows.append(f"{path},sha256=abc,{len(content)}")
    (info / "RECORD").write_text("\n".join([*rows, f"{info.name}/RECORD,,"]) + "\n")
    return info


def found(tmp_path: Path, name: str = "torch", **environ: str) -> Package:
    return packages(python_facts(str(tmp_path / "bin/python3.12")), (), environ)[name]


def site_of(tmp_path: Path) -> Path:
    interpreter(tmp_path)
    return tmp_path / "lib/python3.12/site-packages"


def test_requirements_without_extras(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    wheel(site, "torch", "2.4.0", "filelock", 'triton==3.0.0; python_version < "3.13"', 'opt-einsum; extra == "opt"')
    assert found(tmp_path).requires == ("filelock", 'triton==3.0.0; python_version < "3.13"')
    assert found(tmp_path).installer == "pip"
    wheel(site, "filelock", "3.1")
    assert found(tmp_path, "filelock").version == "3.1"  # of interest because torch names it


def test_a_header_of_any_length_and_no_line_of_the_readme(tmp_path: Path) -> None:
    """It is read block by block, up to the empty line wherever that lies, with either end of line."""
    site = site_of(tmp_path)
    info = wheel(site, "torch", "2.4.0")
    names = [f"package-{n}" for n in range(3000)]
    for end in ("\n", "\r\n"):
        for filler in (0, 16343, 16344, 16345, 16346, 50_000):
            lines = ["Name: torch", f"Summary: Requires-Dist: {'x' * filler}", *[f"Requires-Dist: {n}" for n in names]]
            text = end.join([*lines, "", "Requires-Dist: not this one", "", "é" * 100_000])
            (info / "METADATA").write_bytes(text.encode())
            assert found(tmp_path).requires == tuple(names)
            (info / "METADATA").write_bytes(end.join(lines).encode())
            assert found(tmp_path).requires == tuple(names)
    (info / "METADATA").write_bytes(b"")
    (info / "PKG-INFO").write_text("Requires-Dist: older\n")
    assert found(tmp_path).requires == ("older",)


def test_egg_info_keeps_them_elsewhere(tmp_path: Path) -> None:
    info = site_of(tmp_path) / "deepspeed-0.14.4.egg-info"
    info.mkdir()
    (info / "requires.txt").write_text("hjson\npydantic\n\n[dev]\npytest\n")
    assert found(tmp_path, "deepspeed").requires == ("hjson", "pydantic")


def test_damage(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    files = {"torch/lib/libtorch_cuda.so": b"x" * 100, "torch/lib/libgomp-1.so.1": b"y" * 10, "torch/big.txt": b"z"}
    wheel(site, "torch", "2.4.0", files=files)
    assert found(tmp_path).damaged == ()
    (site / "torch/lib/libtorch_cuda.so").write_bytes(b"x" * 50)
    (site / "torch/lib/libgomp-1.so.1").unlink()
    (site / "torch/big.txt").unlink()  # not a library
    assert found(tmp_path).damaged == ("torch/lib/libtorch_cuda.so", "torch/lib/libgomp-1.so.1")
    unasked = packages(python_facts(str(tmp_path / "bin/python3.12")), (), {}, whole=False)["torch"]
    assert unasked == msgspec.structs.replace(found(tmp_path), damaged=())


def test_odd_records(tmp_path: Path) -> None:
    """Ends of line of both kinds, quoted and absolute names, a module that is named last, and a record cut short."""
    site = site_of(tmp_path)
    info = wheel(site, "torch", "2.4.0", files={"torch/lib/a,b.so": b"x" * 10, "torch/c.so": b"y"})
    apart = tmp_path / "elsewhere.so.2"
    apart.write_bytes(b"z" * 7)
    rows = ['"torch/lib/a,b.so",sha256=abc,10', f"{apart},sha256=abc,7", "old/torch/__init__.py,sha256=abc,1",
            "torch/c.so,sha256=abc,1", "torch/__init__.py,sha256=abc,6"]  # fmt: skip
    for end in ("\n", "\r\n"):
        (info / "RECORD").write_bytes(end.join(rows).encode())
        assert found(tmp_path).damaged == ()
    for order in (rows, rows[::-1]):
        (info / "RECORD").write_text("\n".join(order).replace(",10", ",11").replace(",7", ",8").replace(",6", ",5"))
        assert set(found(tmp_path).damaged) == {"torch/lib/a,b.so", str(apart), "torch/__init__.py"}
    (info / "RECORD").write_bytes(b"torch/c\0.so,sha256=abc,1\ntorch/c.so,sha2")
    assert found(tmp_path).damaged == ("torch/c\0.so",)
    (info / "RECORD").write_bytes(b"")
    assert found(tmp_path).damaged == ()


def test_links_of_setuptools(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    wheel(site, "peft", "0.13.2")
    wheel(site, "optimum_quanto", "0.2.4")
    (site / "__editable__.optimum_quanto-0.2.4.pth").write_text("/src\n")
    assert found(tmp_path, "optimum-quanto").editable and not found(tmp_path, "peft").editable
    (site / "peft.egg-link").write_text("/src\n")
    assert found(tmp_path, "peft").editable


def test_editable(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    info = wheel(site, "peft", "0.13.2")
    assert not found(tmp_path, "peft").editable
    (info / "direct_url.json").write_text(json.dumps({"url": "file:///src/peft", "dir_info": {"editable": True}}))
    assert found(tmp_path, "peft").editable
    (info / "direct_url.json").write_text(json.dumps({"url": "https://example.org/peft.whl", "archive_info": {}}))
    assert not found(tmp_path, "peft").editable
    (info / "direct_url.json").write_text("{")
    assert not found(tmp_path, "peft").editable


def test_origins(tmp_path: Path) -> None:
    """PYTHONPATH, then ~/.local, then the interpreter's own; a .pth file adds a folder to its own kind."""
    site = site_of(tmp_path)
    wheel(site, "torch", "2.4.0")
    assert (found(tmp_path).origin, found(tmp_path).version) == ("site", "2.4.0")
    home = tmp_path / "home"
    wheel(home / ".local/lib/python3.12/site-packages", "torch", "2.5.0")
    mine = found(tmp_path, HOME=str(home))
    assert (mine.origin, mine.version, mine.copies) == ("user", "2.5.0", 2)
    assert found(tmp_path, HOME=str(home), PYTHONNOUSERSITE="1").version == "2.4.0"
    named = found(tmp_path, HOME=str(home), PYTHONPATH=str(home / ".local/lib/python3.12/site-packages"))
    assert (named.origin, named.version) == ("path", "2.5.0")
    wheel(tmp_path / "elsewhere", "peft", "0.1")
    (site / "more.pth").write_text(f"{tmp_path / 'elsewhere'}\nimport os\n")
    assert found(tmp_path, "peft").origin == "site"


def test_a_venv_sees_the_system_only_when_it_is_told_to(tmp_path: Path) -> None:
    interpreter(tmp_path / "base")
    wheel(tmp_path / "base/lib/python3.12/site-packages", "torch", "2.4.0")
    interpreter(tmp_path / "venv")
    config = f"home = {tmp_path}/base/bin\nversion = 3.12.3\ninclude-system-site-packages = "
    python = str(tmp_path / "venv/bin/python3.12")
    (tmp_path / "venv/pyvenv.cfg").write_text(config + "false\n")
    assert packages(python_facts(python), (), {}) == {}
    (tmp_path / "venv/pyvenv.cfg").write_text(config + "true\n")
    assert packages(python_facts(python), (), {})["torch"].origin == "system"
    wheel(tmp_path / "venv/lib/python3.12/site-packages", "torch", "2.5.0")
    torch = packages(python_facts(python), (), {})["torch"]
    assert (torch.origin, torch.version, torch.copies) == ("site", "2.5.0", 1)


def test_conda(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    wheel(site, "torch", "2.4.0")
    (tmp_path / "conda-meta").mkdir()
    (tmp_path / "conda-meta/pytorch-2.1.0-py3.12_cuda12.1_0.json").write_text("{}")
    (tmp_path / "conda-meta/history").write_text("")
    assert python_facts(str(tmp_path / "bin/python3.12")).conda
    assert found(tmp_path).conda == "2.1.0"


def test_archs_are_read_only_of_unknown_builds(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    library = b"\0" * 5000 + b"\0sm_50 sm_80 sm_90a compute_90\0" + b"\0" * 100
    files = {"torch/lib/libtorch_python.so": library, "torch/version.py": b"__version__ = '2.9.1+cu128'\n"}
    wheel(site, "torch", "2.9.1", files=files)
    python = python_facts(str(tmp_path / "bin/python3.12"))
    assert packages(python, (), {})["torch"].archs == ("sm_50", "sm_80", "sm_90a")
    assert packages(python, (), {}, {("2.9.1", "cu128")})["torch"].archs == ()
    assert metadata.archs(tmp_path / "none") == ()


def test_torch_s_own_version(tmp_path: Path) -> None:
    files = {"torch/version.py": b"__version__ = '2.5.1+cu124'\n"}
    wheel(site_of(tmp_path), "torch", "2.4.0", files=files)
    torch = found(tmp_path)
    assert (torch.version, torch.module_version, torch.build) == ("2.4.0", "2.5.1", "cu124")


def test_a_real_install_is_whole(tmp_path: Path) -> None:
    """pip's own records of a real venv: nothing is damaged, and a torn file is."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    where = subprocess.run(
        [python, "-c", "import pip; print(pip.__file__)"], capture_output=True, text=True, check=True
    )
    facts = python_facts(str(python))
    assert packages(facts, ("pip",), {})["pip"].damaged == ()
    Path(where.stdout.strip()).write_text("")
    assert packages(facts, ("pip",), {})["pip"].damaged == ("pip/__init__.py",)
    assert sys.executable != str(python)
