"""Causes: the GPU, its driver and the kernels that run on it."""

from __future__ import annotations

from xflux_doctor.explain.rule import Rule, Sign

_XID = "https://docs.nvidia.com/deploy/xid-errors/"
_BACKWARD = r"_engine_run_backward|run_backward|accelerator\.backward\(|\.backward\("


def _xid(*numbers: int) -> str:
    return rf"Xid\b.*?: (?:{'|'.join(map(str, numbers))})\b"


RULES: tuple[Rule, ...] = (
    Rule(
        "no-nvidia-driver",
        "no NVIDIA driver or GPU can be seen here",
        (
            Sign("Found no NVIDIA driver on your system", r"Error.{0,30}Found no NVIDIA driver"),
            Sign("ProcessGroupNCCL is only supported with GPUs"),
            Sign("libcuda.so", r"libcuda\.so\S*: cannot open shared object file", weight=60),
            Sign("couldn't communicate with the NVIDIA driver"),
            Sign("Attempting to deserialize object on a CUDA device but", weight=40),
            Sign("mixed precision requires a GPU", weight=40),
        ),
        "torch is a CUDA build, but the machine or container has no driver or no GPU was passed into it.",
        "Run on a GPU host; start the container with --gpus all; on Slurm ask for --gres=gpu.",
        ("nvidia-smi", "ls /dev/nvidia*"),
        weight=55,
    ),
    Rule(
        "driver-too-old",
        "the NVIDIA driver is too old for this torch",
        (
            Sign("NVIDIA driver on your system is too old"),
            Sign("CUDA driver version is insufficient"),
            Sign("forward compatibility was attempted on non supported HW"),
            Sign("PTX was compiled with an unsupported toolchain"),
        ),
        "torch's CUDA release needs a newer driver than the one that is installed.",
        "Update the driver, or install a torch built for an older CUDA release (such as cu118 or cu121).",
        ("nvidia-smi",),
        "https://docs.nvidia.com/deploy/cuda-compatibility/",
        weight=60,
    ),
    Rule(
        "torch-no-cuda-build",
        "this torch was built without CUDA",
        (
            Sign("Torch not compiled with CUDA enabled"),
            Sign("module 'torch._C' has no attribute '_cuda", weight=60),
            Sign("have NCCL built in", r"Distributed package doesn't have NCCL built in"),
            Sign("PyTorch was not compiled with CUDA"),
        ),
        "A CPU-only wheel of torch is installed; the GPU cannot be used whatever the driver is.",
        "Install the CUDA build of torch, from the index for your CUDA release.",
        ("python -c 'import torch; print(torch.__version__, torch.version.cuda)'",),
        "https://pytorch.org/get-started/locally/",
        weight=60,
    ),
    Rule(
        "no-visible-gpu",
        "no GPU is visible to this process",
        (
            Sign("No CUDA GPUs are available"),
            Sign("no CUDA-capable device is detected"),
            Sign("CUDA_ERROR_NO_DEVICE"),
        ),
        "The driver works, but CUDA_VISIBLE_DEVICES (empty, -1 or wrong) or the container hides every card.",
        "Unset or correct CUDA_VISIBLE_DEVICES, also where the scheduler or a notebook sets it.",
        ("echo $CUDA_VISIBLE_DEVICES", "nvidia-smi -L"),
    ),
    Rule(
        "invalid-device-ordinal",
        "a rank asks for a GPU that is not there",
        (
            Sign("invalid device ordinal"),
            Sign("device < num_gpus INTERNAL ASSERT"),
            Sign("Invalid device id", r"Error: Invalid device id"),
            Sign("CUDA_ERROR_INVALID_DEVICE"),
            Sign("specified on host", r"No slot '\d+' specified on host"),
        ),
        "More processes are started than GPUs are visible, or gpu_ids names a card that does not exist.",
        "Set num_processes (and gpu_ids) in the accelerate config to the cards that `nvidia-smi -L` shows.",
        ("nvidia-smi -L", "xflux-doctor fix"),
        weight=60,
    ),
    Rule(
        "nccl-duplicate-gpu",
        "two ranks use the same GPU",
        (Sign("Duplicate GPU detected"),),
        "NCCL wants a card for each rank: more processes are started than GPUs are visible, or every rank takes "
        "card 0.",
        "Set num_processes to the number of visible cards; check CUDA_VISIBLE_DEVICES and gpu_ids.",
        ("nvidia-smi -L", "echo $CUDA_VISIBLE_DEVICES", "xflux-doctor fix"),
        weight=60,
    ),
    Rule(
        "bf16-unsupported",
        "the GPU has no bf16",
        (
            Sign("bf", r"[Yy]our setup doesn't support bf16|bf16 mixed precision requires"),
            Sign("Device does not support bfloat"),
            Sign("is not supported", r"Type bf16 is not supported|bf16 is not supported|BFloat16 is not supported"),
            Sign("is only supported on GPUs with compute capability", r"(?i)b(?:float|f)16"),
            Sign("requires .target sm_", r"Feature '[\w.]*bf16"),
        ),
        "bf16 needs compute capability 8.0 (Ampere) or newer.",
        "Set mixed_precision to fp16 with the trained parameters in fp32, or use a newer card.",
        ("nvidia-smi --query-gpu=name,compute_cap --format=csv",),
    ),
    Rule(
        "no-kernel-image",
        "torch has no kernels for this GPU",
        (
            Sign("no kernel image is available for execution"),
            Sign("CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ),
        "The installed build of torch (or of an extension) was made for other architectures than this card's.",
        "Install a torch release whose wheels cover the card: newer cards want newer CUDA builds.",
        ("python -c 'import torch; print(torch.cuda.get_arch_list())'",),
        "https://pytorch.org/get-started/locally/",
        weight=60,
    ),
    Rule(
        "exclusive-process",
        "the GPU is in exclusive mode and taken",
        (
            Sign("busy or unavailable", r"CUDA-capable device(?:s\)?|\(s\))? (?:is/)?are busy or unavailable"),
            Sign("CUDA_ERROR_DEVICE_UNAVAILABLE"),
        ),
        "In the compute mode Exclusive_Process only one process may use a card, and one does already.",
        "End the other process, take another card, or have the mode set back to Default.",
        ("nvidia-smi --query-gpu=index,compute_mode --format=csv", "sudo nvidia-smi -c DEFAULT"),
        weight=60,
    ),
    Rule(
        "fabric-manager",
        "the NVSwitch fabric is not initialized",
        (
            Sign("system not yet initialized"),
            Sign("CUDA_ERROR_SYSTEM_NOT_READY"),
            Sign("Error ", r"Error 802\b"),
        ),
        "With NVSwitch, CUDA waits for the Fabric Manager, which does not run here or does not match the driver.",
        "Start nvidia-fabricmanager in the release of the driver, or leave this node out (Slurm: --exclude).",
        ("systemctl status nvidia-fabricmanager", "nvidia-smi -q | grep -A2 Fabric"),
        "https://docs.nvidia.com/datacenter/tesla/fabric-manager-user-guide/",
        level="machine",
    ),
    Rule(
        "mig-device",
        "a MIG slice is named wrongly or too small",
        (
            Sign("Invalid generic resource (gres) specification"),
            Sign("NVML_SUCCESS", r"NVML_SUCCESS == .* INTERNAL ASSERT FAILED"),
            Sign("MIG-", r"(?i)(?:error|invalid|unable|failed|cannot|not found).*\bMIG-"),
            *(
                Sign(key, after=name, weight=weight)
                for name in ("MIG-", "GB MIG ")
                for key, weight in (
                    ("device < num_gpus INTERNAL ASSERT", 65),
                    ("No CUDA GPUs are available", 55),
                    ("CUDA out of memory", 42),
                )
            ),
        ),
        "Parts of a GPU have names of their own, and torch sees one of them at a time.",
        "Take the name from `nvidia-smi -L` (CUDA_VISIBLE_DEVICES=MIG-…), one slice for each process, large enough.",
        ("nvidia-smi -L",),
        "https://docs.nvidia.com/datacenter/tesla/mig-user-guide/",
        weight=60,
    ),
    Rule(
        "device-side-assert",
        "an index is out of range on the GPU",
        (
            Sign("device-side assert triggered"),
            Sign("Assertion", r"Assertion .*(?:index out of bounds|srcIndex <|t >= 0 && t <|idx_dim|ind >=).* failed"),
        ),
        "A kernel met an index outside its table: a token, a class, a timestep or a position that is too large.",
        "Run once with CUDA_LAUNCH_BLOCKING=1 (or on the CPU) to see the line that did it; check token lengths.",
        ("export CUDA_LAUNCH_BLOCKING=1",),
        weight=60,
    ),
    Rule(
        "cudnn-attention-backward",
        "cuDNN's attention fails in the backward pass",
        (
            Sign("mha_graph", r"Expected mha_graph.*is_good\(\) to be true"),
            Sign("cuDNN Frontend error", weight=55),
            Sign("CUDA error: an illegal memory access", within=_BACKWARD, weight=52),
            Sign("CUBLAS_STATUS_EXECUTION_FAILED", within=_BACKWARD, weight=52),
        ),
        "The fused attention of cuDNN is known to break in the backward pass of FLUX.1 on recent cards; without "
        "CUDA_LAUNCH_BLOCKING=1 it shows as an illegal access reported somewhere else.",
        "Turn this backend off with torch.backends.cuda.enable_cudnn_sdp(False). If the fault stays, run once with "
        "CUDA_LAUNCH_BLOCKING=1 to find the kernel.",
        ("TORCH_CUDNN_SDPA_DEPRIORITIZED=1", "CUDA_LAUNCH_BLOCKING=1"),
        weight=60,
    ),
    Rule(
        "cuda-kernel-fault",
        "a kernel on the GPU failed",
        (
            Sign("illegal memory access was encountered"),
            Sign("CUDA error: unspecified launch failure"),
            Sign("CUDA error: misaligned address"),
            Sign("CUDA error: an illegal instruction"),
            Sign("CUDA error: invalid argument"),
            Sign("CUBLAS_STATUS_EXECUTION_FAILED"),
            Sign("CUBLAS_STATUS_INTERNAL_ERROR"),
            Sign("CUDNN_STATUS_EXECUTION_FAILED"),
        ),
        "The error is reported some calls after the kernel that caused it: the line in the traceback may be innocent.",
        "Run once with CUDA_LAUNCH_BLOCKING=1, switch off extra kernels (xformers, flash-attn, bitsandbytes, "
        "torch.compile) one by one, and check the card with dcgmi.",
        ("CUDA_LAUNCH_BLOCKING=1", "compute-sanitizer python train.py", "dmesg | grep -i xid"),
        weight=35,
    ),
    Rule(
        "gpu-ecc-error",
        "the GPU's memory has an error that cannot be corrected",
        (
            Sign("uncorrectable ECC error"),
            Sign("CUDA_ERROR_ECC_UNCORRECTABLE"),
            Sign("Xid", _xid(48, 63, 64, 94, 95)),
            Sign("DBE (double bit error)"),
        ),
        "The hardware found damaged data in the card's memory; the job cannot go on there.",
        "Reset the card or reboot the node; if it comes again, take the node out and have the card replaced.",
        ("nvidia-smi -q -d ECC,ROW_REMAPPER",),
        _XID,
        level="machine",
        weight=60,
    ),
    Rule(
        "gpu-fell-off-bus",
        "a GPU is gone from the PCIe bus",
        (
            Sign("fallen off the bus"),
            Sign("Xid", _xid(79)),
            Sign("GPU is lost", r"GPU is lost|GPU_IS_LOST"),
            Sign("Unable to determine the device handle for GPU"),
        ),
        "The card stopped answering: power, heat, cabling or a defect. All processes on it are lost.",
        "Drain the node and reboot it; have the hardware checked if it comes again.",
        ("nvidia-smi", "dmesg | grep -i xid"),
        _XID,
        level="machine",
        weight=65,
    ),
    Rule(
        "gpu-gsp-timeout",
        "the GPU's own processor (GSP) does not answer",
        (
            Sign("Xid", _xid(119, 120)),
            Sign("Timeout waiting for RPC from GSP", r"GSP"),
            Sign("Timeout after", r"Timeout after \d+s? of waiting for RPC response from GPU\d* GSP"),
        ),
        "The driver waits for the firmware on the card in vain; every program on the card hangs or fails.",
        "Reset the card or reboot the node; updating the driver helps, as does switching the GSP firmware off.",
        ("dmesg | grep -i xid", "nvidia-smi -q | grep GSP"),
        _XID,
        level="machine",
        weight=62,
    ),
    Rule(
        "gpu-xid-app-fault",
        "the driver reports a fault made by the program on the GPU (Xid 13, 31, 43)",
        (
            Sign("Xid", _xid(13, 31, 43, 45)),
            Sign("Graphics SM", r"Graphics SM .*Exception"),
        ),
        "A kernel of the job read or wrote where it may not, or the channel was torn down after that.",
        "Find the kernel with CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer; other jobs on other cards failing too "
        "would speak for the hardware.",
        ("CUDA_LAUNCH_BLOCKING=1", "dmesg | grep -i xid"),
        _XID,
        level="machine",
        weight=30,
    ),
    Rule(
        "gpu-peermem",
        "the RDMA module nvidia-peermem complains after a process has died",
        (
            Sign("nvidia-peermem", r"invalid context|ERROR|error|failed"),
            Sign("nv_get_p", r"nv_get_p2p_free_callback.*invalid context"),
        ),
        "The messages follow the death of a process that had GPU memory registered with the network card.",
        "Look in the ranks' logs for the one that died first; the messages themselves need no repair.",
        ("dmesg | grep -i -e peermem -e xid",),
        level="consequence",
        weight=60,
    ),
)
