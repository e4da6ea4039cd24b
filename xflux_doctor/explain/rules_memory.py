"""Causes: memory of the GPU, of the host, of /dev/shm and of the disk; limits of the system."""

from __future__ import annotations

import re

from xflux_doctor.explain.rule import Rule, Sign

_OOM = r"(?:CUDA out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|cuda runtime error.*out of memory)"
_OOM_BARE = r"CUDA error: out of memory|Cuda failure \d* ?'out of memory'"
_SIZES = {"KiB": 2.0**-20, "MiB": 2.0**-10, "GiB": 1.0}
_ROOM = re.compile(
    r"Tried to allocate (?P<tried>[\d.]+) (?P<tried_unit>[KMG]iB).*?"
    r"of which (?P<free>[\d.]+) (?P<free_unit>[KMG]iB) is free"
)
_RESERVED = (
    r"CUDA out of memory.*?(?P<used>[\d.]+) (?P<used_unit>[KMG]iB) is allocated by PyTorch.*?"
    r"(?P<idle>[\d.]+) (?P<idle_unit>[KMG]iB) is reserved by PyTorch but unallocated"
)
_RESERVED_OLD = (
    r"CUDA out of memory.*?(?P<used>[\d.]+) (?P<used_unit>[KMG]iB) already allocated.*?"
    r"(?P<total>[\d.]+) (?P<total_unit>[KMG]iB) reserved in total"
)


def _gib(match: re.Match[str], name: str) -> float:
    return float(match[name].rstrip(".")) * _SIZES[match[name + "_unit"]]


def _much_idle(match: re.Match[str]) -> bool:
    """An eighth of what PyTorch holds lies idle: pieces too small for the request."""
    used = _gib(match, "used")
    idle = _gib(match, "idle") if "idle" in match.re.groupindex else _gib(match, "total") - used
    return idle > (used + idle) / 8


def _much_foreign(match: re.Match[str]) -> bool:
    """And it is what was missing: where the card had room, a limit of the job's own kept the allocator from it."""
    room = _ROOM.search(match[0])
    return _gib(match, "other") > 1.0 and not (room and _gib(room, "free") > _gib(room, "tried"))


RULES: tuple[Rule, ...] = (
    Rule(
        "cuda-oom",
        "the GPU ran out of memory",
        (
            Sign("CUDA out of memory"),
            Sign("CUDA error: out of memory"),
            Sign("CUDA_ERROR_OUT_OF_MEMORY"),
            Sign("CUBLAS_STATUS_ALLOC_FAILED"),
            Sign("Failed to CUDA calloc", weight=60),
            Sign("Cuda failure", r"Cuda failure \d* ?'out of memory'", weight=60),
        ),
        "The weights, gradients, optimizer states and activations of this job do not fit on the card.",
        "Cast the frozen weights to bf16, turn on gradient checkpointing, cache the text encoders' and the VAE's "
        "outputs, or lower the batch size, the resolution or the rank; `xflux-doctor check` shows the bill.",
        ("xflux-doctor check", "nvidia-smi"),
        "https://pytorch.org/docs/stable/notes/cuda.html#memory-management",
        weight=40,
    ),
    Rule(
        "cuda-oom-fragmentation",
        "the GPU ran out of memory in pieces: much is reserved and lies idle",
        (
            Sign("reserved by PyTorch but unallocated", _RESERVED, when=_much_idle),
            Sign("reserved in total by PyTorch", _RESERVED_OLD, when=_much_idle),
        ),
        "PyTorch holds enough memory, but in blocks too small for this request.",
        "Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before the job starts; equal image sizes help too.",
        ("export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",),
        "https://pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf",
        weight=45,
    ),
    Rule(
        "cuda-oom-optimizer-step",
        "the GPU ran out of memory at the optimizer's first step",
        (
            Sign(
                "out of memory",
                _OOM,
                within=r"optimizer\.step\(|/optim/\w+\.py|in _init_group|in init_state|initialize_optimizer_states",
            ),
        ),
        "Forward and backward fit, but the optimizer makes its states (8 bytes a trained parameter for AdamW) at "
        "its first step.",
        "Train fewer parameters (LoRA), use an 8-bit or factored optimizer, or spread the states with ZeRO stage 2.",
        ("xflux-doctor check",),
        weight=55,
    ),
    Rule(
        "cuda-oom-validation",
        "the GPU ran out of memory while it made sample images",
        (
            Sign(
                "out of memory",
                _OOM,
                within=r"in (?:log_)?validat\w*|in denoise|in sample\w*|pipeline_flux|xflux_pipeline"
                r"|in (?:tiled_|_)?decode\b",
            ),
        ),
        "Training fits; the sampler or the VAE decoder needs its activations on top of the training state.",
        "Sample at a lower resolution, one image at a time, with VAE tiling, or turn validation off.",
        weight=56,
    ),
    Rule(
        "cuda-oom-other-process",
        "another process holds the GPU's memory",
        (
            Sign(
                "memory in use",
                r"CUDA out of memory.*?Process \d+ has (?P<other>[\d.]+) (?P<other_unit>[KMG]iB) memory in use"
                r".*this process has",
                when=_much_foreign,
            ),
        ),
        "The message names another process with memory on the same card: an earlier run, a neighbor, or a second "
        "rank on this card.",
        "Look at it with nvidia-smi, end it if it is yours, or take another card with CUDA_VISIBLE_DEVICES.",
        ("nvidia-smi --query-compute-apps=pid,used_memory,name --format=csv",),
        weight=60,
    ),
    Rule(
        "gpu-hardware-failure",
        "a GPU fails before the job has put anything on it",
        (
            Sign("out of memory", _OOM_BARE, within=r"\bbarrier\(|in barrier\b"),
            Sign("CUDA error: hardware stack error"),
            Sign("uncorrectable NVLink error"),
            Sign("Xid", r"Xid\b.*?: (?:62|74|92|109|140), ", level="machine"),
        ),
        "At a barrier a process needs a few megabytes only. Either the card is full already, or it is broken.",
        "If nvidia-smi shows free memory on that card, take the node out (Slurm: --exclude) and have it checked.",
        ("nvidia-smi", "nvidia-smi -q -d ECC,ROW_REMAPPER", "dcgmi diag -r 1"),
        "https://docs.nvidia.com/deploy/xid-errors/",
        weight=58,
    ),
    Rule(
        "host-oom-kill",
        "the host ran out of memory",
        (
            Sign("exitcode", r"exitcode\s*:\s*-9\b", level="killed"),
            Sign(
                "SIGKILL",
                r"Signal 9 \(SIGKILL\) received|Signals\.SIGKILL|terminated with signal SIGKILL",
                level="killed",
            ),
            Sign("exit status", r"exit status (?:137|-9)\b", level="killed"),
            Sign("exit code", r"exit code:? (?:137|-9)\b", level="killed"),
            Sign("return code", r"return code = -9\b", level="killed"),
            Sign("Killed", r"^(?:\S+: line \d+: +\d+ )?Killed\b(?! process)", level="killed"),
            Sign("killed by signal: Killed"),
            Sign("Out of memory: Killed process", level="machine"),
            Sign("Memory cgroup out of memory", level="machine"),
            Sign("oom_kill event", level="machine"),
            Sign("oom-kill:", level="machine"),
            Sign("DefaultCPUAllocator", r"can't allocate memory|not enough memory"),
            Sign("MemoryError", r"^(?:\w+\.)*_?(?:Array)?MemoryError\b"),
            Sign("Cannot allocate memory", r"OSError: \[Errno 12\]|os error 12"),
        ),
        "The kernel ends a process with SIGKILL when the machine or its container has no memory left. FLUX.1's "
        "weights alone are 24 GB in bf16 and 48 GB in fp32, for each rank that loads them on the CPU.",
        "Give the job more memory (container limit, Slurm --mem), start fewer ranks or workers, or load the "
        "weights in bf16 straight to the GPU.",
        ("free -g", "cat /sys/fs/cgroup/memory.max", "dmesg | grep -i 'killed process'"),
    ),
    Rule(
        "dataloader-shm-bus-error",
        "the shared memory (/dev/shm) is too small for the DataLoader's workers",
        (
            Sign("insufficient shared memory (shm)"),
            Sign("killed by signal: Bus error"),
            Sign("SIGBUS", r"Signal 7 \(SIGBUS\) received|Signals\.SIGBUS", level="killed"),
            Sign("Bus error (core dumped)", level="killed"),
            Sign("No space left on device", r"unable to (?:write to file|open shared memory object|mmap).*torch_"),
            Sign("No space left on device", r"unable to allocate shared memory"),
        ),
        "Workers hand batches over in shared memory; containers get only 64 MB of it unless told otherwise.",
        "Start the container with --shm-size=16g or --ipc=host, or set the number of workers to 0.",
        ("df -h /dev/shm",),
        weight=60,
    ),
    Rule(
        "nccl-shm-full",
        "the shared memory (/dev/shm) is too small for NCCL",
        (
            Sign("Error while creating shared memory segment"),
            Sign("shared memory", r"NCCL WARN.*(?:/dev/shm|shmOpen|shared memory)"),
            Sign("No space left on device", r"NCCL WARN.*posix_fallocate|posix_fallocate failed|/dev/shm/nccl"),
        ),
        "The ranks of one machine talk through shared memory; containers get only 64 MB of it unless told otherwise.",
        "Start the container with --shm-size=16g or --ipc=host.",
        ("df -h /dev/shm",),
        "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html",
        weight=70,
    ),
    Rule(
        "disk-full",
        "no space is left on the disk, or the quota is used up",
        (
            Sign("No space left on device"),
            Sign("Disk quota exceeded"),
            Sign("no space left on device"),
            Sign("PytorchStreamWriter failed writing file", weight=45),
            Sign("inline_container.cc", r"enforce fail at inline_container\.cc.*unexpected pos", weight=45),
        ),
        "The checkpoint, the cache or the download could not be written whole; a half-written file may be left.",
        "Free space or point the output and cache folders to a larger disk, keep fewer checkpoints, and delete the "
        "last, incomplete one.",
        ("df -h .", "df -i ."),
    ),
    Rule(
        "too-many-open-files",
        "the limit of open files is reached",
        (
            Sign("Too many open files"),
            Sign("items of ancdata", r"received \d+ items of ancdata"),
        ),
        "Every tensor that a DataLoader worker hands over keeps a file open; the default limit is often 1024.",
        "Raise the limit in the shell that starts the job, or use fewer workers.",
        ("ulimit -n 65536",),
    ),
    Rule(
        "alloc-conf-unknown-key",
        "PYTORCH_CUDA_ALLOC_CONF holds an option that this torch does not know",
        (
            Sign("Unrecognized CachingAllocator option"),
            Sign("Unrecognized key", r"Unrecognized key '[^']*' in (?:Accelerator|CUDA) allocator config"),
            Sign("argument for expandable_segments"),
            Sign("CachingAllocator option", r"CachingAllocator option \w+ (?:too small|must be)"),
            Sign("in ConfigTokenizer"),
        ),
        "The variable is read when CUDA starts, and a wrong word in it ends the program.",
        "Correct or unset PYTORCH_CUDA_ALLOC_CONF; its options differ between torch releases.",
        ("unset PYTORCH_CUDA_ALLOC_CONF",),
        "https://pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf",
    ),
)
