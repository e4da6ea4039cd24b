"""What compiling a CUDA operator would find here, read from files: nothing is started.

The places are torch's own (torch/utils/cpp_extension.py, `_find_cuda_home`, `get_cxx_compiler`; pytorch v2.13.0).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xflux_doctor.facts import PythonFacts, Toolchain
from xflux_doctor.gather.deadline import within

_LOCK_SECONDS = 0.5
"""How long the cache's file system may take: ST101 names one that does not answer."""
_LIBRARIES = ("usr/lib", "usr/lib64", "usr/local/lib", "lib", "lib64")


def toolchain_facts(environ: Mapping[str, str], python: PythonFacts, root: Path = Path("/")) -> Toolchain:
    """Look for nvcc, a C++ compiler, ninja, and the headers that operators need."""
    home, named = _cuda_home(environ, root)
    nvcc = home / "bin/nvcc" if home else None
    there = nvcc is not None and nvcc.is_file()
    cxx = environ.get("CXX") or shutil.which("c++", path=environ.get("PATH", "")) or ""
    return Toolchain(
        cuda_home=str(home or ""),
        cuda_home_from=named,
        nvcc=str(nvcc) if there else "",
        cuda_version=_cuda_version(home, nvcc) if home and nvcc and there else "",
        cxx=cxx,
        gcc_version=_gcc_version(cxx, root),
        ninja=shutil.which("ninja", path=environ.get("PATH", "")) or "",
        python_headers=_has_headers(python),
        libaio=_has_libaio(Path(python.prefix), root),
        stale_locks=_locks(environ),
    )


def _cuda_home(environ: Mapping[str, str], root: Path) -> tuple[Path | None, str]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            return Path(environ[name]), name
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if nvcc:
        return Path(nvcc).parent.parent, "nvcc on PATH"
    usual = root / "usr/local/cuda"
    return (usual, str(usual)) if usual.exists() else (None, "")


def _cuda_version(home: Path, nvcc: Path) -> str:
    """The toolkit's release such as "12.1": from version.json, the header, or a wrapper script's own path."""
    try:
        found = json.loads(_read(home / "version.json"))["cuda"]["version"]
        return ".".join(str(found).split(".")[:2])
    except (ValueError, KeyError, TypeError):
        pass
    for header in (home / "include/cuda.h", *home.glob("targets/*/include/cuda.h")):
        number = re.search(r"#define CUDA_VERSION (\d+)", _read(header))
        if number:
            return f"{int(number[1]) // 1000}.{int(number[1]) % 1000 // 10}"
    if nvcc.stat().st_size < 4096:
        script = re.search(r"cuda-(\d+\.\d+)", _read(nvcc))
        return script[1] if script else ""
    real = re.search(r"cuda-(\d+\.\d+)", str(nvcc.resolve()))
    return real[1] if real else ""


def _gcc_version(cxx: str, root: Path) -> str:
    """The major version of a GNU compiler, from the name that it is a link to, or from gcc's library folder."""
    found = shutil.which(cxx) if cxx else None
    if not found:
        return ""
    name = os.path.basename(os.path.realpath(found))  # noqa: PTH119
    if "clang" in name:
        return ""
    number = re.search(r"(?:g\+\+|gcc|c\+\+)-(\d+)$", name)
    if number:
        return number[1]
    folders = [entry.name for entry in root.glob("usr/lib/gcc/*/*") if entry.name.split(".")[0].isdigit()]
    return str(max((int(entry.split(".")[0]) for entry in folders), default=""))


def _has_headers(python: PythonFacts) -> bool:
    minor = ".".join(python.version.split(".")[:2])
    if python.executable == sys.executable:
        usual = Path(sys.base_prefix, "include", f"python{minor}{getattr(sys, 'abiflags', '')}", "Python.h")
        if usual.is_file():
            return True
        sysconfig: Any = importlib.import_module("sysconfig")  # its data take 2 ms
        return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    config = re.search(r"^home\s*=\s*(.+)$", _read(Path(python.prefix) / "pyvenv.cfg"), re.M)
    prefix = Path(config[1].strip()).parent if config else Path(python.prefix)
    return (prefix / f"include/python{minor}/Python.h").is_file()


def _has_libaio(prefix: Path, root: Path) -> bool:
    headers = (root / "usr/include/libaio.h", root / "usr/local/include/libaio.h", prefix / "include/libaio.h")
    if not any(header.is_file() for header in headers):
        return False
    folders = [root / name for name in _LIBRARIES] + list(root.glob("usr/lib/*-linux-gnu")) + [prefix / "lib"]
    return any((folder / "libaio.so").exists() for folder in folders)


def _locks(environ: Mapping[str, str]) -> dict[str, float]:
    """Locks of torch's extension builds with their age: a build that was killed leaves its lock (file_baton.py)."""
    cache = environ.get("XDG_CACHE_HOME") or f"{environ.get('HOME', '/nowhere')}/.cache"
    base = Path(environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions")
    return within(_LOCK_SECONDS, {"": lambda: _locks_below(base)}).get("", {})


def _locks_below(base: Path) -> dict[str, float]:
    now = time.time()
    found = {}
    for pattern in ("*/lock", "*/*/lock"):
        for path in base.glob(pattern):
            try:
                found[str(path)] = max(0.0, now - path.stat().st_mtime)
            except OSError:
                continue
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
