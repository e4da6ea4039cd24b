"""Installed packages of an interpreter, from names of dist-info folders and `version.py` read as text.

Nothing is imported and no child is started, so a torch that crashes at import is still seen for what it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from xflux_doctor.facts import Package, PythonFacts
from xflux_doctor.gather import metadata
from xflux_doctor.gather.interpreter import site_folders

OF_INTEREST = frozenset(
    "torch torchvision torchaudio triton deepspeed accelerate transformers tokenizers huggingface-hub diffusers "
    "peft optimum-quanto safetensors numpy pydantic setuptools sentencepiece protobuf pillow tensorboard wandb "
    "bitsandbytes torchao xformers flash-attn flash-attn-4 ninja nvidia-ml-py pynvml pip xflux-doctor "
    "transformer-engine ms-amp megatron-core megatron-lm torch-xla "
    "nvidia-nccl-cu12 nvidia-nccl-cu13 nvidia-cudnn-cu12 nvidia-cudnn-cu13 hf-transfer".split()
)
PRESENT = frozenset(
    "einops omegaconf timm matplotlib pandas datasets onnxruntime onnxruntime-gpu opencv-python "
    "opencv-python-headless opencv-contrib-python opencv-contrib-python-headless pyarrow".split()
)
"""What X-Flux's own scripts and some data sets want besides: whether it is there is all that is asked."""
_MODULES = {
    "optimum-quanto": "optimum/quanto",
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "flash-attn": "flash_attn",
    "protobuf": "google/protobuf",
    "xflux-doctor": "",
}
"""Where a distribution's module lies when its name differs; empty: not looked for (editable installs)."""
_CHECKED = frozenset("torch torchvision deepspeed accelerate transformers diffusers peft".split())
"""Distributions whose module must lie beside the metadata."""
# setup.py install, which pip before 23.1 still does, puts the Python behind the version.
_METADATA = re.compile(r"(.+?)-(\d[^-]*)(?:-py3\.\d+)?\.(?:dist|egg)-info")
_VERSION = r"(?m)^__version__(?:\s*:\s*\w+)?\s*=\s*['\"]([^'\"]+)['\"]"
_NAME = re.compile(r"[A-Za-z0-9._-]*")
_SEPARATORS = re.compile(r"[-_.]+")
_CUDA = r"(?m)^cuda(?:\s*:\s*[^=]+)?\s*=\s*(?:['\"]([\d.]+)['\"]|None)"


def normalize(name: str) -> str:
    """PEP 503: `huggingface_hub` and `Huggingface.Hub` are one name."""
    return _SEPARATORS.sub("-", name).lower()


def packages(
    python: PythonFacts,
    names: Iterable[str] = (),
    environ: Mapping[str, str] = os.environ,
    known: Container[tuple[str, str]] = (),
    *,
    whole: bool = True,
) -> dict[str, Package]:
    """Distributions of interest (ours and `names`) that the interpreter would import, and what those require.

    `known` holds pairs (version, build) of torch whose architectures need not be searched for in its library. `whole`:
    whether their libraries are held against their RECORDs.
    """
    wanted = OF_INTEREST | {normalize(name) for name in names}
    installed: dict[str, list[_Copy]] = {}
    for path, origin in site_folders(python, environ):
        beside = _names(path)
        folder = _Folder(str(path), origin, beside, metadata.links(beside))
        for entry in beside:
            match = _METADATA.fullmatch(entry) if entry.endswith("-info") else None
            if match:
                copy = _Copy(match[2], folder, f"{folder.path}/{entry}")
                installed.setdefault(normalize(match[1]), []).append(copy)
    conda = metadata.conda_versions(Path(python.prefix)) if python.conda else {}
    found = {
        name: _package(name, installed[name], conda, known, whole=whole) for name in sorted(wanted & set(installed))
    }
    required = {normalize(_NAME.match(line)[0]) for p in found.values() for line in p.requires}  # type: ignore[index]
    for name in sorted(((required | PRESENT) & set(installed)) - set(found)):
        first = installed[name][0]
        found[name] = Package(name, first.version, location=first.folder.path, origin=first.folder.origin)
    return found


class _Folder(NamedTuple):
    """A folder that the interpreter imports from."""

    path: str
    origin: str
    beside: frozenset[str]
    """All names in it."""
    links: tuple[str, ...]


class _Copy(NamedTuple):
    """One place where a distribution is installed."""

    version: str
    folder: _Folder
    info: str


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))  # noqa: PTH208 - names are enough, and there are many
    except OSError:
        return frozenset()


def _package(
    name: str, copies: list[_Copy], conda: Mapping[str, str], known: Container[tuple[str, str]], *, whole: bool
) -> Package:
    version, folder, info = copies[0]
    module = _MODULES.get(name, name.replace("-", "_"))
    there = not module or module in folder.beside or f"{module}.py" in folder.beside
    there = there or os.path.exists(f"{folder.path}/{module}")  # noqa: PTH110 - for each package, as in metadata
    of_torch = name in ("torch", "torchvision", "torchaudio")
    says, build = _version_file(Path(folder.path, name, "version.py")) if of_torch else ("", "")
    looked_for = name == "torch" and build not in ("", "cpu") and (version.partition("+")[0], build) not in known
    linked = metadata.editable(info, name, folder.beside, folder.links)
    # a venv's own copy over the system's is what such venvs are made for
    rivals = [copy for copy in copies if copy.folder.origin == folder.origin or copy.folder.origin != "system"]
    return Package(
        name=name,
        version=version,
        build=build,
        module_version=says,
        location=folder.path,
        copies=len({(copy.version, copy.folder.path) for copy in rivals}),
        files=there or name not in _CHECKED or linked,
        requires=metadata.requires(info),
        editable=linked,
        origin=folder.origin,
        installer=metadata.installer(info),
        conda=conda.get(name, ""),
        damaged=() if linked or not there or not whole else metadata.damaged(folder.path, info, module),
        archs=metadata.archs(Path(folder.path, "torch")) if looked_for else (),
    )


def _version_file(path: Path) -> tuple[str, str]:
    """Version and build (`cu121`, `cpu`) from the text of torch/version.py; empty where it does not say."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    match = re.search(_VERSION, text)
    version, _, build = match[1].partition("+") if match else ("", "", "")
    if not build:
        cuda = re.search(_CUDA, text)
        if cuda is not None:
            build = f"cu{cuda[1].replace('.', '')}" if cuda[1] else "cpu"
    return version, build
