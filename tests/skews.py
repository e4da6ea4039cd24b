"""Version skews that are made for real: what is laid over a stack, what breaks then, and which finding foretells it.

`tests/test_skews.py` makes each one in a copy of the stack's venv. The true errors were taken from such venvs; none is
written from memory.
"""

# ruff: noqa: E501 - a skew a line
from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Launch = Literal["cpu", "gpu", "gpu-offload"]


class Skew(NamedTuple):
    """One skew. The untouched venv must give neither the finding nor the error."""

    name: str
    stack: str
    """The stack whose venv is copied."""
    change: str
    """What is done to the copy: pip requirements, installed without their dependencies; `-NAME` is uninstalled,
    `rm:PATH` is removed from site-packages, `cut:PATH` loses its second half, `pip:OPTION` goes to pip."""
    probe: str
    """A function of benchmarks/toys.py, or Python code."""
    words: str
    """What the true error says; the finding says it too, unless `told` is given."""
    code: str
    seen: str
    """Words of the finding that belong to this skew alone, for example the rule's id."""
    told: str = ""
    """Words of the finding where it does not quote the error."""
    launch: Launch = "cpu"
    environment: Mapping[str, str] = {}
    """Set for the check and the probe. `{site}`, here and in `change`, is the venv's site-packages."""
    fails_anyway: bool = False
    """The probe fails in the untouched venv too, with another error: there is no GPU here, no toolkit, no torchvision."""
    python: str = ""
    """The Python of the venv, where it is not the one that runs the tests; such a venv is made when it is not there."""


_WEB = (
    "httpx httpcore h11 anyio sniffio hf-xet typer shellingham rich markdown-it-py mdurl pygments annotated-doc click"
)
"""What huggingface-hub 1 requires."""
_HUB = "huggingface-hub==0.36.2"
_TF5_HUB = f"transformers==5.12.1 tokenizers==0.22.2 {_WEB}"
_FOUND = "is required for a normal functioning of this module, but found"
_CPU_WHEELS = "pip:--find-links=https://download.pytorch.org/whl/cpu/torch/"
_TOOLKIT_13 = "nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.96"
"""A real nvcc 13.0 with cuda.h, from the public index."""


def _rule(rule: str, stack: str, change: str, probe: str, words: str, told: str = "", name: str = "") -> Skew:
    """A skew that a row of the matrix foretells."""
    return Skew(name or rule, stack, change, probe, words, "SW105", f"({rule}:", told)


SKEWS: tuple[Skew, ...] = (
    _rule("R-TV-24", "xflux-2024", "torchvision==0.20.0", "lora_steps", "operator torchvision::nms does not exist"),
    _rule("R-DS-RESUME", "cpu", "deepspeed==0.15.4", "zero2", "Weights only load failed"),
    _rule("R-DS-PYDANTIC", "xflux-2024", "deepspeed==0.15.4 pydantic==1.10.19", "import deepspeed", "field_serializer"),
    _rule("R-TF-HUB-4", "xflux-2024", f"huggingface-hub==1.33.0 {_WEB}", "import transformers", "huggingface-hub>=0.23.2,<1.0 is required"),
    _rule("R-TF-HUB-5", "cpu", "transformers==5.17.0", "encoders", "No module named 'httpx'"),
    _rule("R-TF-HUB-518", "cpu", f"huggingface-hub==1.30.0 {_WEB}", "encoders", "cannot import name 'httpx'"),
    _rule("R-TF-HUB-518", "cpu", _HUB, "encoders", "ResolvedRevision", name="R-TF-HUB-518-old"),
    _rule("R-TF-TOK-443", "xflux-2024", "tokenizers==0.22.2", "import transformers", f"{_FOUND} tokenizers==0.22.2"),
    _rule("R-TF-TOK-517", "cpu", "tokenizers==0.22.2", "import transformers", f"{_FOUND} tokenizers==0.22.2"),
    _rule("R-TF-SAFE", "cpu", "safetensors==0.7.0", "import transformers", "safetensors>=0.8.0 is required"),
    _rule("R-TF-TORCH-25", "xflux-2024", f"transformers==5.17.0 tokenizers==0.23.3 huggingface-hub==1.33.0 {_WEB}", "encoders", "PyTorch >= 2.5 is required but found 2.4.0"),
    _rule("R-TF-TORCH-26", "xflux-2024", f"transformers==5.23.0 tokenizers==0.23.3 huggingface-hub==1.33.0 {_WEB}", "encoders", "PyTorch >= 2.6 is required but found 2.4.0"),
    _rule("R-DIF-IDS", "xflux-2024", "diffusers==0.30.3", "lora_steps", "Sizes of tensors must match except in dimension 1"),
    _rule("R-DIF-TORCH-24", "xflux-2024", f"diffusers==0.35.2 {_HUB} peft==0.17.1 accelerate==1.0.1 transformers==4.44.2", "lora_steps", "unexpected keyword argument 'enable_gqa'"),
    _rule("R-DIF-TORCH-24", "xflux-2024", f"diffusers==0.37.1 {_HUB} peft==0.17.1 accelerate==1.0.1 transformers==4.44.2 {_WEB}", "lora_steps", "Parameter q has unsupported type torch.Tensor", name="R-DIF-TORCH-24-import"),
    _rule("R-DIF-HUB-33", "xflux-2024", "diffusers==0.33.1", "lora_steps", "DDUFEntry"),
    _rule("R-DIF-HUB-40", "cpu", f"diffusers==0.40.0 huggingface-hub==1.22.0 {_TF5_HUB}", "lora_steps", "get_cached_repo_tree"),
    _rule("R-DIF-HUB-41", "cpu", f"diffusers==0.41.0 huggingface-hub==1.30.0 {_TF5_HUB}", "lora_steps", "cannot import name 'httpx'"),
    _rule("R-DIF-HUB-41", "cpu", f"diffusers==0.41.0 huggingface-hub==1.25.0 {_TF5_HUB}", "lora_steps", "resolve_revision", name="R-DIF-HUB-41-old"),
    _rule("R-DIF-TF-5", "cpu", "diffusers==0.35.1", "lora_steps", "FLAX_WEIGHTS_NAME"),
    _rule("R-DIF-TF-448", "cpu", f"diffusers==0.37.1 transformers==4.43.3 tokenizers==0.19.1 {_HUB} peft==0.18.1 accelerate==1.0.1 {_WEB}", "lora_steps", "Dinov2WithRegistersConfig"),
    _rule("R-DIF-PEFT-34", "xflux-2024", f"diffusers==0.34.0 {_HUB}", "lora_steps", "peft>=0.15.0 is required"),
    _rule("R-DIF-PEFT-35", "xflux-2024", f"diffusers==0.35.2 {_HUB}", "lora_steps", "peft>=0.17.0 is required"),
    _rule("R-PEFT-ACC", "xflux-2024", f"peft==0.15.2 {_HUB}", "import peft", "clear_device_cache"),
    _rule("R-PEFT-HUB", "xflux-2024", "peft==0.14.0", "import peft", "LocalEntryNotFoundError"),
    _rule("R-PEFT-TF-44", "xflux-2024", f"peft==0.17.1 accelerate==1.0.1 {_HUB}", "import peft", "HybridCache"),
    _rule("R-PEFT-TF-5", "cpu", "peft==0.17.1", "import peft", "HybridCache"),
    _rule("R-PEFT-TORCHAO", "cpu", "torchao==0.15.0", "lora_steps", "Found an incompatible version of torchao"),
    _rule("R-NVML-SHADOW", "cpu", "pynvml==11.5.3", "import pynvml; pynvml.nvmlDeviceGetGpuFabricInfoV", "has no attribute 'nvmlDeviceGetGpuFabricInfoV'", "calls for newer cards are missing"),
    # libraries beside torch
    Skew("nccl-too-old", "xflux-2024", "nvidia-nccl-cu12==2.18.1", "import torch", "undefined symbol: nccl", "SW108", "nvidia-nccl-cu12 is 2.18.1", launch="gpu"),
    Skew("cudnn-of-another-major", "xflux-2024", "nvidia-cudnn-cu12==8.9.2.26", "import torch", "libcudnn.so.9: cannot open shared object file", "SW108", "nvidia-cudnn-cu12 is 8.9.2.26", "does not find the library", launch="gpu"),
    Skew("cudnn-missing", "xflux-2024", "-nvidia-cudnn-cu12", "import torch", "cannot open shared object file", "SW108", "nvidia-cudnn-cu12", launch="gpu"),
    Skew("torch-of-the-cpu-build", "xflux-2024", f"{_CPU_WHEELS} torch==2.13.0+cpu", "import torch; torch.zeros(1).cuda()", "Torch not compiled with CUDA enabled", "SW103", "2.13.0+cpu", launch="gpu", fails_anyway=True),
    _rule("R-CV2-NUMPY", "xflux-2024", "numpy==2.2.6 opencv-python-headless==4.9.0.80", "import cv2", "numpy.core.multiarray failed to import"),
    _rule("R-ORT-NUMPY", "xflux-2024", "numpy==2.2.6 onnxruntime==1.17.1", "import onnxruntime", "ImportError")._replace(fails_anyway=True),
    _rule("R-TV-CPU", "cpu", "torchvision==0.28.0", "import torchvision", "operator torchvision::nms does not exist")._replace(fails_anyway=True),
    _rule("R-TORCH-NUMPY2", "xflux-2024", "numpy==2.2.6 torch==2.2.2 nvidia-cudnn-cu12==8.9.2.26", "import numpy, torch; torch.from_numpy(numpy.zeros(1))", "Numpy is not available"),
    # the toolkit
    _rule("R-NVCC-12-0144", "xflux-2024", _TOOLKIT_13, "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()", "CUDAMismatchException: ")._replace(launch="gpu-offload", environment={"DS_ACCELERATOR": "cuda", "CUDA_HOME": "{site}/nvidia/cu13"}, fails_anyway=True, told="CUDAMismatchException: Installed CUDA version"),
    # installs that are not whole
    Skew("module-removed", "cpu", "rm:diffusers", "import diffusers", "No module named 'diffusers'", "SW103", "diffusers 0.42.1 has metadata in", "its import fails"),
    Skew("library-cut-short", "cpu", "cut:tokenizers/tokenizers.abi3.so", "import tokenizers", "the interpreter died of SIG", "SW110", "tokenizers.abi3.so of tokenizers", "the import fails or crashes"),
    Skew("requirement-removed", "cpu", "-regex", "import transformers", "No module named 'regex'", "SW109", "requires regex, which is not installed", "No module named"),
    Skew("setuptools-removed", "xflux-2024", "-setuptools", "import torch.utils.cpp_extension", "No module named 'setuptools'", "SW109", "requires setuptools, which is not installed", "No module named"),
    _rule("R-DS-DISTUTILS", "xflux-2024", "-setuptools", "import deepspeed", "No module named 'distutils'")._replace(python="3.12"),
    Skew("shadowed-by-PYTHONPATH", "xflux-2024", f"pip:--target={{site}}/../../other huggingface-hub==1.33.0 {_WEB}", "import transformers", "huggingface-hub>=0.23.2,<1.0 is required", "SW111", "huggingface-hub", "come from PYTHONPATH", environment={"PYTHONPATH": "{site}/../../other"}),
)  # fmt: skip

QUICK = ("R-TF-HUB-4", "R-TF-TOK-517", "module-removed")
"""The three that continuous integration makes as well: small downloads, and errors that come at import."""

NOT_EXPLAINED = {
    "R-DIF-IDS": "shapes that do not meet have other causes far more often",
    "R-ORT-NUMPY": "the extension's ImportError has no words",
    "library-cut-short": "a signal kills the interpreter without a word",
    "shadowed-by-PYTHONPATH": "the log does not tell where the package came from: it is told as SW105",
}
"""Skews after whose true error `explain` cannot come to the check's code, and why."""
