"""Installed packages of an interpreter, from names of dist-info folders and `version.py` read as text.

Nothing is imported and no child is started, so a torch that crashes at import is still seen for what it is.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from xflux_doctor.errors import UsageError
from xflux_doctor.facts import Package, PythonFacts

OF_INTEREST = frozenset(
    "torch torchvision torchaudio triton deepspeed accelerate transformers tokenizers huggingface-hub diffusers "
    "peft optimum-quanto safetensors numpy pydantic setuptools sentencepiece protobuf pillow tensorboard wandb "
    "bitsandbytes torchao xformers flash-attn flash-attn-4 ninja nvidia-ml-py pynvml xflux-doctor "
    "nvidia-nccl-cu12 nvidia-nccl-cu13 nvidia-cudnn-cu12 nvidia-cudnn-cu13".split()
)
_MODULES = {
    "optimum-quanto": "optimum/quanto",
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "flash-attn": "flash_attn",
    "protobuf": "google/protobuf",
    "xflux-doctor": "",
}
"""Where a distribution's module lies when its name differs; empty: not looked for (editable installs)."""
# setup.py install, which pip before 23.1 still does, puts the Python behind the version.
_METADATA = re.compile(r"(.+?)-(\d[^-]*)(?:-py3\.\d+)?\.(?:dist|egg)-info")
_VERSION = re.compile(r"^__version__(?:\s*:\s*\w+)?\s*=\s*['\"]([^'\"]+)['\"]", re.M)
_CUDA = re.compile(r"^cuda(?:\s*:\s*[^=]+)?\s*=\s*(?:['\"]([\d.]+)['\"]|None)", re.M)


def normalize(name: str) -> str:
    """PEP 503: `huggingface_hub` and `Huggingface.Hub` are one name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def site_folders(python: PythonFacts) -> list[Path]:
    """Folders that the interpreter imports from, in its own order, without starting it."""
    if Path(python.executable) == Path(sys.executable):
        return [Path(entry) for entry in dict.fromkeys(sys.path) if entry and Path(entry).is_dir()]
    minor = ".".join(python.version.split(".")[:2])
    return [folder for folder in _site_packages(Path(python.prefix), minor) if folder.is_dir()]


def _site_packages(prefix: Path, minor: str) -> list[Path]:
    """Of a prefix and a Python such as "3.11". Debian's own Python has pip's packages in usr/local."""
    folders = [prefix / f"lib/python{minor}/site-packages"]
    folders += [base / f"lib/python{minor}/dist-packages" for base in (prefix / "local", prefix)]
    folders.append(prefix / "lib/python3/dist-packages")
    config = _pyvenv(prefix)
    if config.get("include-system-site-packages", "").lower() == "true" and config.get("home"):
        folders += _site_packages(Path(config["home"]).parent, minor)
    return folders


def _pyvenv(prefix: Path) -> dict[str, str]:
    try:
        lines = (prefix / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def python_facts(executable: str | None = None) -> PythonFacts:
    """The interpreter that would train: this one, or the one named. Raises UsageError when it is not there."""
    if executable is None:
        marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
        managed = sys.prefix == sys.base_prefix and marker.exists()
        return PythonFacts(sys.executable, sys.version.split()[0], sys.prefix, managed)
    path = Path(executable)
    if path.is_file() and not (re.match(r"(python|pypy)", path.name) and os.access(path, os.X_OK)):
        raise UsageError(f"{executable} is no Python that can be started.", "Name its bin/python.")
    if not path.is_file():
        raise UsageError(f"There is no Python at {executable}.", "Name an interpreter, such as venv/bin/python.")
    if path.samefile(sys.executable) and path.parent == Path(sys.executable).parent:
        return python_facts()
    prefix = path.absolute().parent.parent
    version = _pyvenv(prefix).get("version") or _pyvenv(prefix).get("version_info", "")
    if not version:  # no venv: links lead to the installation, whose executable carries the version
        real = path.resolve()
        prefix = real.parent.parent
        named = re.fullmatch(r"python(3\.\d+)", real.name)
        version = named[1] if named else _newest(prefix)
    if not version:
        raise UsageError(f"{executable} does not look like a Python installation.", "Name its bin/python.")
    managed = not (prefix / "pyvenv.cfg").exists() and any(prefix.glob("lib/python3*/EXTERNALLY-MANAGED"))
    return PythonFacts(str(path.absolute()), ".".join(version.split(".")[:3]), str(prefix), managed)


def _newest(prefix: Path) -> str:
    """The newest Python that has a library folder below a prefix, such as "3.11"; empty when there is none."""
    names = (re.fullmatch(r"python3\.(\d+)", folder.name) for folder in prefix.glob("lib/python3.*"))
    minors = [int(match[1]) for match in names if match]
    return f"3.{max(minors)}" if minors else ""


def packages(python: PythonFacts, names: Iterable[str] = ()) -> dict[str, Package]:
    """Distributions of interest (ours and `names`) that the interpreter would import."""
    wanted = OF_INTEREST | {normalize(name) for name in names}
    found: dict[str, list[tuple[str, Path]]] = {}
    for folder in site_folders(python):
        for entry in _entries(folder):
            match = _METADATA.fullmatch(entry)
            if match and (name := normalize(match[1])) in wanted:
                found.setdefault(name, []).append((match[2], folder))
    return {name: _package(name, copies) for name, copies in sorted(found.items())}


def _entries(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir() if entry.name.endswith("-info")]
    except OSError:
        return []


def _package(name: str, copies: list[tuple[str, Path]]) -> Package:
    version, folder = copies[0]
    module = _MODULES.get(name, name.replace("-", "_"))
    there = not module or (folder / module).exists() or (folder / f"{module}.py").exists()
    checked = name in ("torch", "torchvision", "deepspeed", "accelerate", "transformers", "diffusers", "peft")
    return Package(
        name=name,
        version=version,
        build=_build(folder / name / "version.py") if name in ("torch", "torchvision", "torchaudio") else "",
        location=str(folder),
        copies=len({(v, str(f)) for v, f in copies}),
        files=there or not checked or _is_editable(folder, name),
    )


def _is_editable(folder: Path, name: str) -> bool:
    stem = name.replace("-", "_")
    return any(folder.glob(f"__editable__*{stem}*")) or any(folder.glob(f"{stem}-*.dist-info/direct_url.json"))


def _build(path: Path) -> str:
    """`cu121` or `cpu`, from the text of torch/version.py; empty when it does not say."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    version = _VERSION.search(text)
    if version and "+" in version[1]:
        return version[1].split("+", 1)[1]
    cuda = _CUDA.search(text)
    if cuda is None:
        return ""
    return f"cu{cuda[1].replace('.', '')}" if cuda[1] else "cpu"
