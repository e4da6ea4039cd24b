"""Causes with a code that no pair here provokes: where they are provoked instead, or why that cannot be done."""

from __future__ import annotations

_GPU = "benchmarks/pairs_gpu.py, on a machine with GPUs"
_BROKEN = "it wants broken hardware"
_OTHER = "it wants another driver, card or mode of the card than a lent machine may be given"
_TWO = "it wants cards of two machines, or a broken link between them"

NOT_PROVOKED: dict[str, str] = {
    # Provoked by the skewed venvs, each with its finding before and its diagnosis after
    "version-skew-import": "tests/test_skews.py: R-TF-HUB-4",
    "torchvision-mismatch": "tests/test_skews.py: R-TV-24",
    "undefined-symbol-abi": "tests/test_skews.py: nccl-too-old",
    "missing-shared-library": "tests/test_skews.py: cudnn-missing",
    "numpy2-abi": "tests/test_skews.py: R-TORCH-NUMPY2",
    "torch-no-cuda-build": "tests/test_skews.py: torch-of-the-cpu-build",
    "cuda-version-mismatch": "tests/test_skews.py: R-NVCC-12-0144",
    "checkpoint-weights-only": "tests/test_skews.py: R-DS-RESUME",
    # On GPUs
    "no-visible-gpu": _GPU,
    "invalid-device-ordinal": _GPU,
    "nccl-duplicate-gpu": _GPU,
    "mig-device": _GPU,
    "alloc-conf-unknown-key": _GPU,
    "nccl-socket-ifname": _GPU,
    "cuda-oom": _GPU,
    "cuda-oom-optimizer-step": "what cuda-oom is, at another line of the program",
    "cuda-oom-fragmentation": "what cuda-oom is, with another state of the allocator",
    "cuda-oom-validation": "what cuda-oom is, at another line of the program",
    "cuda-oom-other-process": "what cuda-oom is, beside another process",
    "nccl-shm-full": "it wants two GPUs of one machine and a /dev/shm that can be made small",
    # Nowhere
    "no-nvidia-driver": "torch's CUDA build on a machine without a driver: only one of the stacks is such a build",
    "driver-too-old": _OTHER,
    "bf16-unsupported": _OTHER,
    "no-kernel-image": _OTHER,
    "exclusive-process": _OTHER,
    "fabric-manager": _OTHER,
    "gpu-ecc-error": _BROKEN,
    "gpu-fell-off-bus": _BROKEN,
    "gpu-gsp-timeout": _BROKEN,
    "gpu-xid-app-fault": "the kernel log of a machine is read, and its programs cannot write there",
    "gpu-hardware-failure": _BROKEN,
    "nccl-peer-mapping": _TWO,
    "nccl-unhandled-cuda-error": _TWO,
    "nccl-connection-refused": _TWO,
    "nccl-ib-link": _TWO,
    "nccl-segfault": _TWO,
    "xformers-mismatch": "no stack has xformers",
    "quanto-mismatch": "the trainer says it as module-missing, SW116; other scripts are judged by no check",
    "bitsandbytes-setup": "bitsandbytes is no part of a stack's own pins",
    "tokenizer-deps-missing": "every stack's transformers has its tokenizers whole; the older ones only warn",
    "protobuf-version": "no package of a stack brings generated code of another protobuf",
    "python-headers-missing": "the headers belong to the interpreter that runs the tests",
    "rendezvous-timeout": "tests/test_meeting.py and test_two_nodes.py wait for machines that do not come",
}
