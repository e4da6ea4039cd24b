"""Environment variables that change how a job starts and runs, by an allow-list. Never a token."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from xflux_doctor.gather.deadline import within

PREFIXES = (
    "CUDA_",
    "NCCL_",
    "TORCH_",
    "PYTORCH_",
    "NVSHMEM_",
    "GLOO_",
    "ACCELERATE_",
    "TORCHELASTIC_",
    "DS_BUILD_",
    "DS_SKIP_",
    "SLURM_STEP_",
)
NAMES = frozenset(
    "NVIDIA_VISIBLE_DEVICES OMP_NUM_THREADS MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE "
    "NODE_RANK HF_HOME HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_ENDPOINT "
    "TRANSFORMERS_CACHE XDG_CACHE_HOME TMPDIR TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR "
    "FLUX_DEV FLUX_SCHNELL FLUX_DEV_FP8 AE SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID SLURM_LOCALID SLURM_NNODES "
    "SLURM_GPUS_ON_NODE SLURM_JOB_NODELIST SLURM_NODEID SLURM_STEPID SLURM_TASKS_PER_NODE SLURM_NTASKS_PER_NODE "
    "SLURM_GPUS_PER_TASK SLURM_CPUS_PER_TASK GROUP_RANK HF_HUB_ENABLE_HF_TRANSFER PYTHONHOME NVIDIA_TF32_OVERRIDE "
    "COMPUTE_PROFILE NSIGHT_CUDA_DEBUGGER TP_SOCKET_IFNAME".split()
)
_PATH_LIBRARIES = ("libcuda.so.1", "libcudnn_graph.so.9")
"""What LD_LIBRARY_PATH can replace under pip's torch: its other CUDA libraries are found by RPATH, which comes first
(readelf -d of libtorch_cuda.so 2.4.0 to 2.13.0); cuDNN loads its own parts by RUNPATH, which comes after."""
_PRELOADED = r"lib(cuda|cudart|cudnn|nccl|cublas|nvrtc)[^/]*\.so"
_SECRET = ("TOKEN", "SECRET", "PASS", "AUTH", "KEY", "CREDENTIAL")
_SECONDS = 0.5
"""How long a file system may take to say whether a file is there: a home on a dead mount must not hold the doctor."""
_LOGIN = r"(?<=://)[^/@\s]+(?=@)"
"""User and password in a URL."""


def environment_facts(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the allow-list; a name that smells of a secret is left out even there."""
    found = {
        name: without_login(value.encode("utf-8", "backslashreplace").decode())
        for name, value in sorted(environ.items())
        if (name in NAMES or name.startswith(PREFIXES)) and not any(word in name for word in _SECRET)
    }
    return found | loaded_instead(environ)


def loaded_instead(environ: Mapping[str, str]) -> dict[str, str]:
    """Of LD_LIBRARY_PATH and LD_PRELOAD only the files that come before torch's and the driver's, links followed."""
    folders = [entry for entry in environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    first = {
        name: next((path for folder in folders if os.path.isfile(path := f"{folder}/{name}")), "")  # noqa: PTH113
        for name in _PATH_LIBRARIES
    }
    entries = environ.get("LD_PRELOAD", "").replace(":", " ").split()
    preloaded = [entry for entry in entries if re.search(_PRELOADED, entry)]
    files = {"LD_LIBRARY_PATH": [path for path in first.values() if path], "LD_PRELOAD": preloaded}
    return {name: ":".join(os.path.realpath(path) for path in paths) for name, paths in files.items() if paths}


def without_login(url: str) -> str:
    """The URL without user and password, to be shown."""
    return re.sub(_LOGIN, "***", url) if "@" in url else url


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether the hub library may open a socket, as it reads its variables (huggingface_hub/constants.py)."""
    named = environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE") or ""
    return named.upper() in ("1", "ON", "YES", "TRUE")


def has_hub_token(environ: Mapping[str, str]) -> bool:
    """Whether the hub library would find a token. Its value is not read."""
    if environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    named = environ.get("HF_TOKEN_PATH")
    path = _expand(named) if named else hf_home(environ) / "token"
    return within(_SECONDS, {"": path.exists}).get("", False)


def hf_home(environ: Mapping[str, str]) -> Path:
    """The hub library's folder, by its own precedence (huggingface_hub/constants.py)."""
    home = environ.get("HF_HOME")
    if home:
        return _expand(home)
    cache = environ.get("XDG_CACHE_HOME")
    base = _expand(cache) if cache else _expand(environ.get("HOME", "~")) / ".cache"
    return base / "huggingface"


def _expand(path: str) -> Path:
    """With the user's home folder; as it stands for a user who has none, where Path.expanduser would raise."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def default_accelerate_config(environ: Mapping[str, str]) -> Path | None:
    """The file that `accelerate launch` uses when it is given none, if it exists.

    Only the YAML file: accelerate's name for the JSON one is `default_config.yaml` too (0.10.0 to 1.15.0,
    commands/config/config_args.py, default_json_config_file), so that a default_config.json is never read.
    """
    file = hf_home(environ) / "accelerate" / "default_config.yaml"
    return file if within(_SECONDS, {"": file.is_file}).get("") else None
