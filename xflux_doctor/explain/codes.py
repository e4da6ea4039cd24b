"""Which check foresees a cause: the same code before the start and after the failure."""

from __future__ import annotations

CODES: dict[str, str] = {
    # The machine's setup
    "no-nvidia-driver": "HW101", "driver-too-old": "HW102", "torch-no-cuda-build": "SW103", "no-visible-gpu": "LA105",
    "invalid-device-ordinal": "LA105", "nccl-duplicate-gpu": "LA105", "bf16-unsupported": "HW104",
    "no-kernel-image": "HW103", "exclusive-process": "HW105", "fabric-manager": "HW117", "mig-device": "HW118",
    "gpu-ecc-error": "HW110", "gpu-fell-off-bus": "HW106", "gpu-gsp-timeout": "HW115", "gpu-xid-app-fault": "HW115",
    "gpu-hardware-failure": "HW106",
    # Packages and toolchain
    "version-skew-import": "SW105", "torchvision-mismatch": "SW105", "undefined-symbol-abi": "SW108",
    "numpy2-abi": "SW105", "xformers-mismatch": "SW105", "quanto-mismatch": "SW105",
    "checkpoint-weights-only": "SW105", "bitsandbytes-setup": "SW105",
    "tokenizer-deps-missing": "SW109", "protobuf-version": "SW109", "module-missing": "SW109",
    "missing-shared-library": "SW106", "cuda-home-not-set": "TC101",
    "cuda-version-mismatch": "SW105", "compiler-missing": "TC103", "python-headers-missing": "TC105",
    "ninja-missing": "TC104", "libaio-missing": "TC106",
    # The job's files
    "accelerate-config-unknown-keys": "LA103", "config-missing-key": "LA102", "deepspeed-config-mismatch": "LA312",
    "alloc-conf-unknown-key": "EN301", "dataset-file-missing": "DA101", "dataset-key-missing": "DA101",
    "image-decode": "DA101", "corrupt-checkpoint": "WE101", "hub-gated": "WE104", "hub-offline": "WE104",
    "model-file-missing": "WE101", "output-not-writable": "DA102", "variable-refused": "EN305",
    "module-shadowed": "SW118", "setting-refused": "LA111",
    # Memory, disks, limits
    "cuda-oom": "ME101", "cuda-oom-fragmentation": "ME101", "cuda-oom-optimizer-step": "ME101",
    "cuda-oom-validation": "ME101", "cuda-oom-other-process": "ME101", "host-oom-kill": "ME102",
    "dataloader-shm-bus-error": "HO103", "nccl-shm-full": "HO103", "disk-full": "ST102", "too-many-open-files": "HO105",
    # The network
    "port-in-use": "LA112", "nccl-socket-ifname": "EN204", "socket-ifname": "EN204", "nccl-peer-mapping": "NE101",
    "nccl-unhandled-cuda-error": "NE101", "nccl-connection-refused": "NE101", "nccl-ib-link": "NE101",
    "nccl-segfault": "NE101", "rendezvous-timeout": "NE102", "rendezvous-unreachable": "NE103",
}  # fmt: skip
"""By the cause's id; a sign may know it closer (`Sign.code`). What no look at a machine could foresee, such as a NaN
loss, has none."""
