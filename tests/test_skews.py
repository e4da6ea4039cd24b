"""Real skews in real venvs: the doctor foretells each one before anything is imported, then the true error comes.

A skewed venv is a copy of a stack's venv by hard links into which pip installs. pip unlinks what it replaces, and
Python writes byte code by renaming, so the stack's own files stay as they are; a test looks.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, XFLUX_ACCELERATE
from skews import NOT_EXPLAINED, QUICK, SKEWS, Launch, Skew

from xflux_doctor.explain.diagnosis import diagnose

VENVS = ROOT / ".venvs"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
_GPU_JOB = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2")
LAUNCHES: dict[Launch, str] = {
    "cpu": _GPU_JOB.replace("use_cpu: false", "use_cpu: true"),
    "gpu": _GPU_JOB,
    "gpu-offload": _GPU_JOB.replace("offload_optimizer_device: none", "offload_optimizer_device: cpu"),
}


def base(skew: Skew) -> Path:
    """The venv that is copied. One of another Python is made here, from the stack's exported file."""
    venv = VENVS / (f"{skew.stack}-py{skew.python}" if skew.python else skew.stack)
    if not (venv / "ok").exists():
        if not skew.python:
            pytest.skip(f"there is no venv of stack {skew.stack}: tests/stack_venv.sh makes it")
        python = interpreter(skew.python)
        export = [sys.executable, "-m", "xflux_doctor.cli", "matrix", "export", skew.stack]
        subprocess.run([python, "-m", "venv", "--clear", venv], check=True, env=pip_environment())
        file = venv / "stack.txt"
        file.write_bytes(subprocess.run(export, check=True, capture_output=True).stdout)
        install = [venv / "bin/python", "-m", "pip", "--quiet", "install", "--requirement", file]
        subprocess.run(install, check=True, env=pip_environment())
        (venv / "ok").touch()
    return venv


def interpreter(version: str) -> str:
    """One of $PYTHONS (the long run names them), or of the PATH, that is of this release."""
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    for name in [*os.environ.get("PYTHONS", "").split(), f"python{version}"]:
        found = shutil.which(name)
        if found and subprocess.run([found, "-c", asked], capture_output=True, text=True).stdout.strip() == version:
            return found
    pytest.skip(f"there is no Python {version} in $PYTHONS or on the PATH")


def site(venv: Path) -> Path:
    return next(venv.glob("lib/python3.*/site-packages"))


def environment(skew: Skew, venv: Path) -> dict[str, str]:
    """This process's, without what would lead the venv's Python elsewhere, on CPU ranks."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CUDA_", "VIRTUAL_"))}
    quiet = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
             "TORCH_EXTENSIONS_DIR": f"{venv}.ops"}  # fmt: skip
    quiet["PATH"] = f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"  # as in an activated venv
    own = {name: value.format(site=site(venv)) for name, value in skew.environment.items()}
    return {**kept, **quiet, **own}


def probe(skew: Skew, venv: Path) -> str:
    """What the probe printed when it failed; empty when it passed."""
    toy = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import toys; toys.{skew.probe}()"
    code = toy if skew.probe.isidentifier() else skew.probe
    done = subprocess.run([venv / "bin/python", "-c", code], env=environment(skew, venv), cwd="/", capture_output=True,
                          text=True, timeout=1200)  # fmt: skip
    shutil.rmtree(f"{venv}.ops", ignore_errors=True)
    died = f"\nthe interpreter died of {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
    return (done.stdout + done.stderr + died or "no word") if done.returncode else ""


def foretold(skew: Skew, venv: Path, folder: Path) -> list[dict[str, Any]]:
    """The quick check's findings about this skew: no child, no import."""
    file = folder / "accelerate.yaml"
    file.write_text(LAUNCHES[skew.launch])
    command = [sys.executable, "-m", "xflux_doctor.cli", "check", "--quick", "--format", "json", "--stack", skew.stack,
               "--python", str(venv / "bin/python"), "--accelerate-config", str(file)]  # fmt: skip
    done = subprocess.run(command, env=environment(skew, venv), cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    found = [finding for result in json.loads(done.stdout)["results"] for finding in result["findings"]]
    return [finding for finding in found if finding["code"] == skew.code and skew.seen in finding["seen"]]


_PASSED: dict[tuple[str, str, str], str] = {}


def untouched(skew: Skew) -> str:
    """What the probe says in the stack's own venv, asked once for all skews with that probe."""
    key = (str(base(skew)), skew.probe, repr(skew.environment))
    if key not in _PASSED:
        _PASSED[key] = probe(skew, base(skew))
    return _PASSED[key]


def change(skew: Skew, venv: Path) -> None:
    """Do to the copy what the skew says."""
    pip = [venv / "bin/python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
    words = skew.change.format(site=site(venv)).split()
    options = [word.removeprefix("pip:") for word in words if word.startswith("pip:")]
    for word in words:
        kind, _, path = word.partition(":")
        if kind == "rm":
            shutil.rmtree(site(venv) / path)
        elif kind == "cut":
            whole = (site(venv) / path).read_bytes()
            (site(venv) / path).unlink()  # the stack's venv holds the other link
            (site(venv) / path).write_bytes(whole[: len(whole) // 2])
    gone = [word[1:] for word in words if word.startswith("-")]
    wanted = [word for word in words if not word.startswith(("-", "rm:", "cut:", "pip:"))]
    if gone:
        subprocess.run([*pip, "uninstall", "--yes", *gone], check=True)
    if wanted:
        subprocess.run([*pip, "install", "--no-deps", *options, *wanted], check=True, env=pip_environment())


def pip_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture
def copy(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where the copy goes: beside the venvs, since hard links do not cross file systems."""
    venv = VENVS / f"skew-{uuid.uuid4().hex[:8]}"
    yield venv
    shutil.rmtree(venv, ignore_errors=True)


def skewed(skew: Skew, venv: Path) -> None:
    subprocess.run(["cp", "-al", base(skew), venv], check=True)
    change(skew, venv)


def held(skew: Skew, venv: Path, folder: Path) -> dict[str, Any]:
    """Make the skew, foretell it, see it happen; returns the row of the result file."""
    assert not foretold(skew, base(skew), folder), "the untouched venv has this finding too"
    skewed(skew, venv)
    findings = foretold(skew, venv, folder)
    assert findings, f"nothing foretells {skew.change}; the true error is: {probe(skew, venv)[-600:]}"
    said = f"{findings[0]['seen']} {findings[0]['because']}"
    assert (skew.told or skew.words) in said
    true = probe(skew, venv)
    lines = [ANSI.sub("", line).strip() for line in true.splitlines() if skew.words in line]
    line = lines[-1] if lines else ""
    assert line, true[-1500:] or "nothing broke"
    explained = diagnose(true)
    if skew.name not in NOT_EXPLAINED:
        assert explained is not None and explained.code == skew.code, f"{explained}\n{true[-1500:]}"
    before = untouched(skew)
    assert skew.words not in before, before[-600:]
    assert skew.fails_anyway == bool(before), before[-600:]
    row = {
        "skew": skew.name,
        "stack": skew.stack,
        "python": skew.python or f"{sys.version_info.major}.{sys.version_info.minor}",
        "change": skew.change,
        "probe": skew.probe,
        "code": skew.code,
        "severity": findings[0]["severity"],
        "foretold": said.replace(str(site(venv)), "…").replace(str(venv), "…"),
        "explained": explained.cause if explained else None,
        "true_error": line.replace(str(site(venv)), "…")[:400],
    }
    print(f"\n{skew.name}: {skew.stack} with {skew.change}")
    print(f"  foretold {row['code']} {row['severity']}: {row['foretold']}\n  true     {row['true_error']}")
    return row


def mended(skew: Skew, venv: Path, folder: Path) -> None:
    """`fix --install` makes the skewed venv whole again."""
    command = [sys.executable, "-m", "xflux_doctor.cli", "fix", "--install", "--yes", "--stack", skew.stack, "--python",
               str(venv / "bin/python"), "--accelerate-config", str(folder / "accelerate.yaml")]  # fmt: skip
    done = subprocess.run(command, env=environment(skew, venv), cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert not foretold(skew, venv, folder)
    assert probe(skew, venv) == ""


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """Rows of the result file, written when all skews were made: `make test-long`, `benchmarks/stacks.sh breaks`."""
    found: list[dict[str, Any]] = []
    yield found
    if len(found) == len(SKEWS):
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        document = {"date": today, "skews": len(found), "rows": found}
        file = ROOT / f"benchmarks/results/skews-{today}.json"
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        print(f"\n{len(found)} skews foretold before import, each with its true error: {file.name}")


@pytest.mark.long
@pytest.mark.parametrize("skew", SKEWS, ids=lambda skew: skew.name)
def test_foretold_before_import(skew: Skew, copy: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    rows.append(held(skew, copy, tmp_path))


@pytest.mark.parametrize("name", QUICK)
def test_three_of_them(name: str, copy: Path, tmp_path: Path) -> None:
    """In the run of the tests that belongs to the skew's stack."""
    skew = next(skew for skew in SKEWS if skew.name == name)
    if Path(sys.prefix) != VENVS / skew.stack:
        pytest.skip(f"made where the tests run on stack {skew.stack}")
    original = site(base(skew))
    before = fingerprint(original)
    held(skew, copy, tmp_path)
    mended(skew, copy, tmp_path)
    assert fingerprint(original) == before, "the stack's own venv was changed"


def fingerprint(folder: Path) -> list[tuple[str, int, float]]:
    """Names, sizes and times of the venv's sources and records: pip must not write through a hard link."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".so") or path.parent.suffix == ".dist-info":
            status = path.stat()
            found.append((str(path), status.st_size, status.st_mtime))
    return found


def test_names_are_unique() -> None:
    names = [skew.name for skew in SKEWS]
    assert len(set(names)) == len(names)
    assert set(QUICK) <= set(names)
