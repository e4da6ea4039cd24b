"""For each cause, lines that real programs print in that case, written down by hand and shortened."""

from __future__ import annotations

# ruff: noqa: E501 - lines as the programs print them
from excerpts_kit import crash
from excerpts_start import MORE as START

CHILD_FAILED = """\
E1123 23:10:16.080000 139965274831744 torch/distributed/elastic/multiprocessing/api.py:833] failed (exitcode: 1) local_rank: 1 (pid: 26042) of binary: /usr/bin/python
Traceback (most recent call last):
  File "/usr/lib/python3/dist-packages/torch/distributed/launcher/api.py", line 264, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_23:10:16
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : 1 (pid: 26042)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""


_SITE = "/usr/lib/python3/dist-packages"
_OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 216.00 MiB. GPU 0 has a total capacity of 79.18 GiB "
    "of which 186.19 MiB is free. Including non-PyTorch memory, this process has 78.99 GiB memory in use. Of the "
    "allocated memory 76.90 GiB is allocated by PyTorch, and 1.42 GiB is reserved by PyTorch but unallocated. If "
    "reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)
_LOADER = (
    f"{_SITE}/torch/utils/data/_utils/fetch.py:52:fetch: data = [self.dataset[idx] for idx in index]",
    "/workspace/src/dataset.py:12:__getitem__: caption = json.load(f)",
)
_BACKWARD = (
    "/workspace/train.py:46:step: loss.backward()",
    f"{_SITE}/torch/autograd/graph.py:869:_engine_run_backward: return Variable._execution_engine.run_backward(",
)

EXCERPTS: dict[str, list[str]] = {
    "cuda-oom": [
        crash(_OOM, "/workspace/src/flux/layers.py:102:forward: result = result + lora_B(lora_A(x))"),
        "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 23.69 GiB total capacity; 22.10 GiB "
        "already allocated; 10.00 MiB free; 22.50 GiB reserved in total by PyTorch) If reserved memory is >> allocated",
        crash("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    "cuda-oom-fragmentation": [
        crash(_OOM.replace("76.90 GiB is allocated", "50.12 GiB is allocated").replace("1.42 GiB", "27.20 GiB")),
        "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 23.69 GiB total capacity; 14.10 GiB "
        "already allocated; 10.00 MiB free; 22.50 GiB reserved in total by PyTorch) If reserved memory is >> allocated",
    ],
    "cuda-oom-optimizer-step": [
        crash(
            _OOM,
            "/workspace/train.py:50:main: optimizer.step()",
            f"{_SITE}/torch/optim/adamw.py:220:step: has_complex = self._init_group(",
        ),
        crash(_OOM, f"{_SITE}/deepspeed/runtime/zero/stage_1_and_2.py:640:initialize_optimizer_states: self.x()"),
    ],
    "cuda-oom-validation": [
        crash(
            _OOM,
            "/workspace/train.py:50:main: log_validation(pipe, args)",
            f"{_SITE}/diffusers/models/autoencoders/autoencoder_kl.py:320:decode: decoded = self._decode(z).sample",
        ),
        crash(_OOM, "/workspace/src/flux/sampling.py:140:denoise: pred = model("),
    ],
    "cuda-oom-other-process": [
        crash(_OOM.replace("Including", "Process 817 has 60.51 GiB memory in use. Including")),
    ],
    "gpu-hardware-failure": [
        crash(
            "RuntimeError: CUDA error: out of memory",
            "/workspace/train.py:20:main: dist.barrier()",
            f"{_SITE}/torch/distributed/distributed_c10d.py:3703:barrier: work = group.barrier(opts=opts)",
        ),
    ],
    "host-oom-kill": [
        CHILD_FAILED.replace("exitcode: 1)", "exitcode: -9)").replace("exitcode  : 1", "exitcode  : -9"),
        "Loading checkpoint\nKilled\n",
        "train.sh: line 12: 12345 Killed                  python train.py\n",
        "subprocess.CalledProcessError: Command '['python', 'train.py']' died with <Signals.SIGKILL: 9>.\n",
        crash("ModuleNotFoundError: No module named 'diffusers.models'")
        + "xflux-doctor: the kernel's count of oom_kill events in this process's cgroup rose by 2 during the run\n",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=4242.batch. Some of the step tasks have been OOM Killed.\n",
        "[ 1234.5] Memory cgroup out of memory: Killed process 4242 (python) total-vm:98304000kB\n",
        crash("RuntimeError: DataLoader worker (pid 4242) is killed by signal: Killed."),
        crash("RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        crash("OSError: [Errno 12] Cannot allocate memory"),
        crash("MemoryError"),
        "[2026-11-23 23:05:38,123] [ERROR] [launch.py:325:sigkill_handler] ['python', 'train.py'] exits with return code = -9\n",
    ],
    "dataloader-shm-bus-error": [
        "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).\n"
        + crash("RuntimeError: DataLoader worker (pid 10576) is killed by signal: Bus error. It is possible that"),
        crash("RuntimeError: unable to write to file </torch_4242_123_7>: No space left on device (28)"),
    ],
    "nccl-shm-full": [
        "node:42:99 [0] misc/shmutils.cc:72 NCCL WARN Error: failed to extend /dev/shm/nccl-AbCdEf to 9637892 bytes\n"
        "node:42:99 [0] misc/shmutils.cc:113 NCCL WARN Error while creating shared memory segment /dev/shm/nccl-AbCdEf "
        "(size 9637888)\n"
        + crash("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:268, unhandled system error"),
        crash(
            "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:268, unhandled system error (run with "
            "NCCL_DEBUG=INFO for details), NCCL version 2.19.3\nncclSystemError: System call failed\nLast error:\n"
            "Error while creating shared memory segment /dev/shm/nccl-AbCdEf (size 9637888)"
        ),
    ],
    "disk-full": [
        crash("OSError: [Errno 28] No space left on device"),
        crash(
            "safetensors._safetensors_rust.SafetensorError: Error while serializing: IoError(Os { code: 122, message: "
            '"Disk quota exceeded" })'
        ),
        crash("RuntimeError: [enforce fail at inline_container.cc:595] . unexpected pos 1024 vs 960"),
    ],
    "too-many-open-files": [
        crash("OSError: [Errno 24] Too many open files"),
        crash("RuntimeError: received 0 items of ancdata"),
        crash(
            "RuntimeError: unable to open shared memory object </torch_1_2> in read-write mode: Too many open files (24)"
        ),
    ],
    "alloc-conf-unknown-key": [
        crash("RuntimeError: Unrecognized CachingAllocator option: expandable_segment"),
        crash("ValueError: Unrecognized key 'expandable_segment' in Accelerator allocator config."),
    ],
    "no-nvidia-driver": [
        crash("RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
        crash("ImportError: libcuda.so.1: cannot open shared object file: No such file or directory"),
        crash("RuntimeError: ProcessGroupNCCL is only supported with GPUs, no GPUs found!"),
        crash("ValueError: fp16 mixed precision requires a GPU (not 'cpu')."),
    ],
    "driver-too-old": [
        crash(
            "RuntimeError: The NVIDIA driver on your system is too old (found version 10010). Please update your GPU"
        ),
        crash("RuntimeError: CUDA error: CUDA driver version is insufficient for CUDA runtime version"),
        crash(
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted "
            "on non supported HW"
        ),
    ],
    "torch-no-cuda-build": [
        crash("AssertionError: Torch not compiled with CUDA enabled"),
        crash("AttributeError: module 'torch._C' has no attribute '_cuda_setDevice'"),
        crash("RuntimeError: Distributed package doesn't have NCCL built in"),
    ],
    "no-visible-gpu": [
        crash("RuntimeError: No CUDA GPUs are available"),
        crash("RuntimeError: CUDA error: no CUDA-capable device is detected"),
    ],
    "invalid-device-ordinal": [
        crash("RuntimeError: CUDA error: invalid device ordinal\nCUDA kernel errors might be asynchronously reported"),
        crash('RuntimeError: device >= 0 && device < num_gpus INTERNAL ASSERT FAILED at "CUDAContext.cpp":50'),
        crash("ValueError: No slot '4' specified on host 'localhost'"),
    ],
    "nccl-duplicate-gpu": [
        crash(
            "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:93, invalid usage (run with "
            "NCCL_DEBUG=WARN for details), NCCL version 2.28.9\nncclInvalidUsage: This usually reflects invalid usage "
            "of NCCL library.\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 60",
            rank=0,
        ),
    ],
    "bf16-unsupported": [
        crash("ValueError: bf16 mixed precision requires PyTorch >= 1.10 and a supported device."),
        crash(
            "ValueError: Your setup doesn't support bf16/gpu. You need torch>=1.10, using Ampere GPU with cuda>=11.0"
        ),
        crash("RuntimeError: Current CUDA Device does not support bfloat16. Please switch dtype to float16."),
        crash("ValueError: Type bf16 is not supported on your device."),
    ],
    "no-kernel-image": [
        crash("RuntimeError: CUDA error: no kernel image is available for execution on the device"),
    ],
    "exclusive-process": [
        crash("RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable"),
        crash("RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    ],
    "fabric-manager": [
        crash("RuntimeError: CUDA error: system not yet initialized"),
        crash(
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
            "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized"
        ),
        crash(
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO "
            "for details)\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
            "Cuda failure 802 'system not yet initialized'",
            rank=0,
        ),
    ],
    "mig-device": [
        "sbatch: error: Invalid generic resource (gres) specification\n",
        crash('RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":995'),
        "using NVIDIA A100-SXM4-80GB MIG 3g.40gb\n"
        + crash('RuntimeError: device >= 0 && device < num_gpus INTERNAL ASSERT FAILED at "CUDAContext.cpp":50'),
    ],
    "device-side-assert": [
        "../aten/src/ATen/native/cuda/Indexing.cu:1290: indexSelectLargeIndex: block: [3,0,0], thread: [31,0,0] Assertion "
        "`srcIndex < srcSelectDimSize` failed.\n" + crash("RuntimeError: CUDA error: device-side assert triggered"),
    ],
    "cudnn-attention-backward": [
        crash(
            "RuntimeError: Expected mha_graph.execute(handle, variant_pack, workspace_ptr.get()).is_good() to be true, "
            "but got false.",
            *_BACKWARD,
        ),
        crash("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", *_BACKWARD),
        crash("RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(`", *_BACKWARD),
    ],
    "cuda-kernel-fault": [
        crash("RuntimeError: CUDA error: an illegal memory access was encountered"),
        crash("RuntimeError: CUDA error: unspecified launch failure"),
    ],
    "gpu-ecc-error": [
        crash("RuntimeError: CUDA error: uncorrectable ECC error encountered"),
        "[ 99.1] NVRM: Xid (PCI:0000:3b:00): 48, pid=4242, An uncorrectable double bit error (DBE) has been detected\n",
        "[ 99.1] NVRM: Xid (PCI:0000:3b:00): 94, pid=4242, name=python, Contained ECC error\n",
    ],
    "gpu-fell-off-bus": [
        crash("RuntimeError: CUDA error: unspecified launch failure")
        + "[ 99.1] NVRM: Xid (PCI:0000:3b:00): 79, pid=4242, name=python, GPU has fallen off the bus.\n",
        "Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.  Reboot the system to recover this GPU\n",
    ],
    "gpu-gsp-timeout": [
        "[ 99.1] NVRM: Xid (PCI:0000:3b:00): 119, pid=4242, name=python, Timeout after 6s of waiting for RPC response from "
        "GPU3 GSP! Expected function 76 (GSP_RM_CONTROL)\n",
        "[ 99.1] NVRM: Xid (PCI:0000:3b:00): 119, pid=4242, name=python, Timeout waiting for RPC from GSP!\n",
    ],
    "gpu-xid-app-fault": [
        "[ 99.1] NVRM: Xid (PCI:0000:3b:00): 13, pid=4242, name=python, Graphics SM Warp Exception on (GPC 4, TPC 0, SM 1): "
        "Out Of Range Address\n",
        "[ 99.1] NVRM: Xid (PCI:0000:3b:00): 43, pid=4242, name=python, Ch 00000010\n",
    ],
    "gpu-peermem": [
        "[25033.266922] nvidia-peermem nv_get_p2p_free_callback:127 ERROR detected invalid context, skipping further "
        "processing\n",
    ],
    "port-in-use": [
        crash(
            "RuntimeError: The server socket has failed to listen on any local network address. useIpv6: 0, code: -98, "
            "name: EADDRINUSE, message: address already in use"
        ),
        crash(
            "ConnectionError: Tried to launch distributed communication on port `29500`, but another process is "
            "utilizing it. Please specify a different port"
        ),
        crash("OSError: [Errno 98] Address already in use"),
    ],
    "rendezvous-timeout": [
        crash("torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError"),
        crash("torch.distributed.DistStoreError: Timed out after 301 seconds waiting for clients. 1/2 clients joined."),
        crash("TimeoutError: The client socket has timed out after 300s while trying to connect to (10.0.0.1, 29500)."),
    ],
    "rendezvous-unreachable": [
        "[W1123 22:34:44.8 TCPStore.cpp:343] [c10d] TCP client failed to connect/validate to host 10.0.0.1:29500 - retrying\n"
        + crash(
            "torch.distributed.DistNetworkError: The client socket has timed out after 60000ms while trying to connect "
            "to (10.0.0.1, 29500)."
        ),
        "[W socket.cpp:697] [c10d] The IPv6 network addresses of (node-0, 29500) cannot be retrieved (gai error: -2 - Name "
        "or service not known).\n"
        + crash("TimeoutError: The client socket has timed out after 60s while trying to connect to (node-0, 29500)."),
        crash(
            "torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: The connection to the C10d store has "
            "failed. See inner exception for details."
        ),
    ],
    "socket-ifname": [
        crash(
            "RuntimeError: [enforce fail at gloo/transport/tcp/device.cc:83] ifa != nullptr. Unable to find address for: "
            "ib0"
        ),
    ],
    "nccl-socket-ifname": [
        "node:42:42 [0] misc/socket.cc:452 NCCL WARN Bootstrap : no socket interface found\n"
        + crash(
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, internal error - please report this issue"
        ),
    ],
    "nccl-connection-refused": [
        "node:42:99 [0] misc/socket.cc:483 NCCL WARN socketStartConnect: Connect to 10.0.0.2<39423> failed : Connection "
        "refused\n" + crash("torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled system error"),
        crash(
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled system error (run with NCCL_DEBUG=INFO "
            "for details)\nncclSystemError: System call (e.g. socket, malloc) failed.\nLast error:\n"
            "socketStartConnect: Connect to 10.0.0.2<39423> failed : Connection refused",
            rank=1,
        ),
    ],
    "nccl-ib-link": [
        "node:42:99 [0] misc/ibvwrap.cc:187 NCCL WARN Call to ibv_modify_qp failed with error Connection timed out\n"
        + crash("torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled system error"),
        "node:42:99 [4] ib_plugin.c:1615 NCCL WARN NET/IB : Got completion from peer 10.0.0.2<54862> with status=12 "
        "opcode=0 len=0 vendor err 129 (Recv)\n",
    ],
    "nccl-peer-mapping": [
        "node:42:42 [0] allocator.cc:79 NCCL WARN Cuda failure 711 'peer mapping resources exhausted'\n"
        + crash(
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled cuda error (run with "
            "NCCL_DEBUG=INFO for details)"
        ),
        "node:42:42 [0] transport/p2p.cc:275 NCCL WARN Cuda failure 'peer access is not supported between these two "
        "devices'\n",
    ],
    "nccl-segfault": [
        "[node:42:0:42] Caught signal 11 (Segmentation fault: address not mapped to object at address 0x10)\n"
        "==== backtrace (tid: 42) ====\n 0 0x42990 __sigaction()  ???:0\n"
        " 1 0x51234 ncclCommInitRank()  /usr/lib/libnccl.so.2(+0x51234)\n",
        "[ 99.1] python[4242]: segfault at 10 ip 00007f sp 00007f error 4 in libnccl.so.2[7f0000000000+a000000]\n",
    ],
    "segfault": [
        CHILD_FAILED.replace("exitcode: 1)", "exitcode: -11)"),
        "Fatal Python error: Segmentation fault\n\nThread 0x00007f (most recent call first):\n",
    ],
    "nccl-unhandled-cuda-error": [
        crash(
            "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled cuda error (run with "
            "NCCL_DEBUG=INFO for details), NCCL version 2.26.2\nncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 1 'invalid argument'",
            rank=0,
        ),
    ],
    "collective-timeout": [
        crash(
            "RuntimeError: [unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete", rank=1
        ),
        "step 500: saving checkpoint to out/checkpoint-500\n"
        "[rank1]:[E1123 23:10:16.0 ProcessGroupNCCL.cpp:607] [Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=812, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600042 milliseconds before timing out.\n",
    ],
    "nccl-timeout": [
        "[rank1]:[E1123 23:10:16.0 ProcessGroupNCCL.cpp:607] [Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=812, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600042 milliseconds before timing out.\n"
        "[rank1]:[E1123 23:10:16.1 ProcessGroupNCCL.cpp:621] [Rank 1] Some NCCL operations have failed or timed out.\n"
        "[rank1]:[E1123 23:10:16.2 ProcessGroupNCCL.cpp:627] [Rank 1] To avoid data inconsistency, we are taking the "
        "entire process down.\n",
    ],
    "peer-rank-died": [
        crash("RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:28809", rank=0),
    ],
    "slurm-time-limit": [
        "slurmstepd: error: *** JOB 4242 ON node7 CANCELLED AT 2026-11-23T23:10:16 DUE TO TIME LIMIT ***\n",
    ],
    "sigterm": [
        "slurmstepd: error: *** STEP 4242.0 ON node7 CANCELLED AT 2026-11-23T23:10:16 ***\n",
        "slurmstepd: error: *** JOB 4242 ON node7 CANCELLED AT 2026-11-23T23:10:16 DUE TO PREEMPTION ***\n",
        "W1123 23:06:55.9 139700 torch/distributed/elastic/agent/server/api.py:688] Received 15 death signal, shutting down "
        "workers\n"
        + crash("torch.distributed.elastic.multiprocessing.api.SignalException: Process 15394 got signal: 15"),
        'Traceback (most recent call last):\n  File "train.py", line 3, in <module>\n    step()\nKeyboardInterrupt\n',
        "Terminated\n",
    ],
    "version-skew-import": [
        crash(
            "ImportError: cannot import name 'cached_download' from 'huggingface_hub' (/x/huggingface_hub/__init__.py)"
        ),
        crash(
            "ImportError: tokenizers>=0.19,<0.20 is required for a normal functioning of this module, but found "
            "tokenizers==0.22.2."
        ),
        crash(
            "ImportError: \nT5EncoderModel requires PyTorch >= 2.6, but PyTorch was not found or an older version is "
            "installed."
        ),
        crash("AttributeError: module 'torch' has no attribute 'float8_e8m0fnu'"),
        crash("ModuleNotFoundError: No module named 'transformers.modeling_layers'"),
        crash("ModuleNotFoundError: No module named 'distutils'"),
    ],
    "pip-local-version": [
        "ERROR: Could not find a version that satisfies the requirement torch==2.4.0+cu121 (from versions: 2.3.1, 2.4.0, 2.4.1, 2.5.0)\n"
        "ERROR: No matching distribution found for torch==2.4.0+cu121\n",
    ],
    "module-missing": [crash("ModuleNotFoundError: No module named 'cv2'")],
    "numpy2-abi": [
        crash("ValueError: numpy.dtype size changed, may indicate binary incompatibility. Expected 96 from C header"),
        crash("RuntimeError: Numpy is not available"),
        crash("AttributeError: `np.float_` was removed in the NumPy 2.0 release. Use `np.float64` instead."),
    ],
    "protobuf-version": [
        crash(
            "TypeError: Descriptors cannot be created directly.\nIf this call came from a _pb2.py file, your generated "
            "code is out of date and must be regenerated with protoc >= 3.19.0."
        ),
        crash(
            "google.protobuf.runtime_version.VersionError: Detected incompatible Protobuf Gencode/Runtime versions when "
            "loading x.proto: gencode 6.31.1 runtime 5.29.0."
        ),
        crash("ImportError: cannot import name 'builder' from 'google.protobuf.internal' (/x/__init__.py)"),
    ],
    "tokenizer-deps-missing": [
        crash(
            "ImportError: \nT5Tokenizer requires the SentencePiece library but it was not found in your environment."
        ),
        crash("ModuleNotFoundError: No module named 'sentencepiece'"),
        crash(
            "OSError: Can't load tokenizer for 'models/flux'. If you were trying to load it from "
            "'https://huggingface.co/models', make sure you don't have a local directory with the same name."
        ),
    ],
    "quanto-mismatch": [
        crash("ModuleNotFoundError: No module named 'optimum.quanto'"),
        crash("ModuleNotFoundError: No module named 'optimum'"),
        crash("ImportError: cannot import name 'requantize' from 'optimum.quanto' (/x/optimum/quanto/__init__.py)"),
    ],
    "xformers-mismatch": [
        "WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions. xFormers was built for:\n"
        + crash(
            "ModuleNotFoundError: No module named 'torch.distributed._symmetric_memory'",
            f"{_SITE}/xformers/ops/__init__.py:25:<module>: from .modpar_layers import ColumnParallelLinear",
        ),
        crash("ModuleNotFoundError: Refer to https://github.com/facebookresearch/xformers for more information"),
        crash("NotImplementedError: No operator found for `memory_efficient_attention_forward` with inputs:"),
    ],
    "torchvision-mismatch": [
        crash("RuntimeError: operator torchvision::nms does not exist"),
        crash("RuntimeError: operator torchvision::nms does not exist")
        + "\nThe above exception was the direct cause of the following exception:\n\n"
        + crash(
            "RuntimeError: Failed to import transformers.models.t5 because of the following error (look up to see its "
            "traceback):\noperator torchvision::nms does not exist"
        ),
    ],
    "undefined-symbol-abi": [
        crash("ImportError: /x/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3c105ErrorC2E"),
        crash(
            "ImportError: /x/libcusparse.so.12: undefined symbol: __nvJitLinkComplete_12_4, version libnvJitLink.so.12"
        ),
        "python: symbol lookup error: /x/libcudnn_cnn_infer.so.8: undefined symbol: _ZN5cudnn, version libcudnn_ops\n",
    ],
    "missing-shared-library": [
        crash("ImportError: libcudnn.so.9: cannot open shared object file: No such file or directory"),
        "Could not load library libcudnn_cnn_infer.so.8. Error: libcuda.so: cannot open shared object file\n".replace(
            "libcuda.so: cannot open shared object file", "libnvrtc.so: cannot open shared object file"
        ),
    ],
    "bitsandbytes-setup": [
        crash(
            "RuntimeError: \n        CUDA Setup failed despite GPU being available. Please run the following command"
        ),
        "/x/bitsandbytes/libbitsandbytes_cpu.so: undefined symbol: cadam32bit_grad_fp32\n"
        + crash("NameError: name 'str2optimizer32bit' is not defined"),
        "/x/bitsandbytes/libbitsandbytes_cpu.so: undefined symbol: cadam32bit_grad_fp32\n"
        "Above we output some debug information. Please provide this info when creating an issue\n",
        crash("AttributeError: 'NoneType' object has no attribute 'cadam32bit_grad_fp32'"),
    ],
    "cuda-home-not-set": [
        crash("OSError: CUDA_HOME environment variable is not set. Please set it to your CUDA install root."),
        "      op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)\n",
        crash("FileNotFoundError: [Errno 2] No such file or directory: '/usr/local/cuda/bin/nvcc'"),
    ],
    "cuda-version-mismatch": [
        crash(
            "RuntimeError: \nThe detected CUDA version (13.0) mismatches the version that was used to compile\nPyTorch "
            "(12.6). Please make sure to use the same CUDA versions."
        ),
        crash(
            "deepspeed.ops.op_builder.builder.CUDAMismatchException: >- DeepSpeed Op Builder: Installed CUDA version 13.0 "
            "does not match the version torch was compiled with 12.1, unable to compile cuda/cpp extensions"
        ),
    ],
    "compiler-missing": [
        crash(
            "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found in "
            "torch._inductor.config.cpp.cxx: (None, 'g++')"
        ),
        crash("RuntimeError: Failed to find C compiler. Please specify via CC environment variable."),
        crash("subprocess.CalledProcessError: Command '['which', 'c++']' returned non-zero exit status 1."),
        crash("FileNotFoundError: [Errno 2] No such file or directory: 'g++'"),
        "error: command 'x86_64-linux-gnu-gcc' failed: No such file or directory\n",
        "/bin/sh: 1: c++: not found\nninja: build stopped: subcommand failed.\n",
    ],
    "python-headers-missing": [
        "/tmp/x.cpp:86:10: fatal error: Python.h: No such file or directory\n   86 | #include <Python.h>\n",
    ],
    "ninja-missing": [
        crash("RuntimeError: Ninja is required to load C++ extensions (pip install ninja to get it)"),
        crash("FileNotFoundError: [Errno 2] No such file or directory: 'ninja'"),
    ],
    "libaio-missing": [
        " [WARNING]  async_io requires the dev libaio .so object and headers but these were not found.\n"
        + crash("RuntimeError: Unable to JIT load the async_io op due to it not being compatible"),
        "csrc/aio/py_lib/x.cpp:10:10: fatal error: libaio.h: No such file or directory\n",
    ],
    "accelerate-config-unknown-keys": [
        crash(
            "ValueError: The config file at c.yaml had unknown keys (['fp8_config']), please try upgrading your "
            "`accelerate` version or fix (and potentially remove) these keys from your config file."
        ),
        crash("TypeError: ClusterConfig.__init__() got an unexpected keyword argument 'enable_cpu_affinity'"),
    ],
    "config-missing-key": [
        crash("omegaconf.errors.ConfigAttributeError: Missing key rank\n    full_key: rank\n    object_type=dict"),
        crash(
            "yaml.scanner.ScannerError: while scanning for the next token\nfound character '\\t' that cannot start any "
            "token"
        ),
        "usage: train.py [-h]\ntrain.py: error: the following arguments are required: --config\n",
        crash("KeyError: 'learning_rate'", "/workspace/train.py:9:main: lr = cfg['train']['learning_rate']"),
        crash("ValueError: 'DEEP_SPEED' is not a valid DistributedType"),
        crash("TypeError: ClusterConfig.__init__() missing 1 required positional argument: 'distributed_type'"),
        crash(
            "AttributeError: 'bool' object has no attribute 'lower'", f"{_SITE}/accelerate/commands/launch.py:9:x: y()"
        ),
    ],
    "deepspeed-config-mismatch": [
        crash(
            "AssertionError: Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
            "gradient_acc_step * world_size 256 != 4 * 8 * 1",
            rank=0,
        ),
        crash("AssertionError: bfloat16 and fp16 modes cannot be simultaneously enabled", rank=0),
        crash(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for DeepSpeedZeroConfig\nstage\n  Input "
            "should be 0, 1, 2, 3 or 3",
            rank=0,
        ),
        crash("AssertionError: Micro batch size per gpu: 0 has to be greater than 0"),
        crash(
            "ValueError: When using `deepspeed_config_file`, the following accelerate config variables will be ignored: "
            "['zero_stage']."
        ),
    ],
    "deepspeed-multiple-models": [
        crash("AssertionError: You can't use same `Accelerator()` instance with multiple models when using DeepSpeed"),
    ],
    "ddp-unused-parameters": [
        crash(
            "RuntimeError: Expected to have finished reduction in the prior iteration before starting a new one. This "
            "error indicates that your module has parameters that were not used in producing loss.",
            rank=0,
        ),
    ],
    "no-trainable-parameters": [
        crash("ValueError: optimizer got an empty parameter list"),
        crash("RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"),
        crash("ValueError: Target modules {'to_qq'} not found in the base model. Please check the target modules"),
    ],
    "fp16-grad-scaler": [
        crash("ValueError: Attempting to unscale FP16 gradients."),
        crash("AssertionError: No inf checks were recorded for this optimizer."),
    ],
    "dtype-mismatch": [
        crash("RuntimeError: mat1 and mat2 must have the same dtype, but got Float and BFloat16"),
        crash("RuntimeError: expected scalar type Half but found Float"),
        crash("RuntimeError: Input type (float) and bias type (c10::BFloat16) should be the same"),
        crash("RuntimeError: expected m1 and m2 to have the same dtype, but got: c10::BFloat16 != float"),
    ],
    "shape-mismatch": [
        crash("RuntimeError: mat1 and mat2 shapes cannot be multiplied (16x64 and 16x64)"),
        crash("RuntimeError: stack expects each tensor to be equal size, but got [3, 512, 512] at entry 0"),
        crash(
            "RuntimeError: Given groups=1, weight of size [320, 4, 3, 3], expected input[1, 16, 64, 64] to have 4 "
            "channels, but got 16 channels instead"
        ),
    ],
    "checkpoint-mismatch": [
        crash(
            "RuntimeError: Error(s) in loading state_dict for FluxTransformer:\n\tsize mismatch for img_in.weight: x"
        ),
        crash(
            "ValueError: loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        ),
        crash(
            "deepspeed.runtime.zero.utils.ZeRORuntimeException: The checkpoint being loaded used a DP world size of 8"
        ),
    ],
    "checkpoint-weights-only": [
        crash(
            "_pickle.UnpicklingError: Weights only load failed. This file can still be loaded\n\tWeightsUnpickler error: "
            "Unsupported global: GLOBAL deepspeed.runtime.fp16.loss_scaler.LossScaler"
        ),
    ],
    "corrupt-checkpoint": [
        crash(
            "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer"
        ),
        crash("_pickle.UnpicklingError: invalid load key, 'v'."),
        crash("RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory"),
        crash("EOFError: Ran out of input"),
    ],
    "dataset-file-missing": [
        crash("FileNotFoundError: [Errno 2] No such file or directory: 'data/0002.json'", *_LOADER),
        crash(
            "FileNotFoundError: [Errno 2] No such file or directory: '/mnt/data/images'",
            "/workspace/src/dataset.py:6:__init__: self.files = sorted(os.listdir(img_dir))",
        ),
        crash("ValueError: num_samples should be a positive integer value, but got num_samples=0"),
    ],
    "dataset-key-missing": [
        crash("KeyError: 'caption'", *_LOADER, rank=1),
        crash("KeyError: 'my_text'", *_LOADER),
        crash("ValueError: `--caption_column` value 'text' needs to be one of: image, prompt"),
    ],
    "image-decode": [
        crash(
            "OSError: Caught OSError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n  File "
            '"/workspace/src/dataset.py", line 10, in __getitem__\nOSError: image file is truncated (23 bytes not '
            "processed)"
        ),
        crash("PIL.UnidentifiedImageError: cannot identify image file 'data/0001.jpg'"),
        crash("PIL.Image.DecompressionBombError: Image size (400000000 pixels) exceeds limit of 178956970 pixels"),
    ],
    "nan-loss": [
        "step 0 loss 1.3389\nstep 1 loss nan\nstep 2 loss nan\n",
        "Steps:  3%|▎ | 30/1000 [00:12<06:40, 2.4it/s, loss=0.3, lr=1]\rSteps:  4%|▎ | 40/1000 [00:16<06:40, loss=nan, lr=1]\n",
        "{'loss': nan, 'grad_norm': nan, 'learning_rate': 0.0001, 'epoch': 0.1}\n",
        crash("Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."),
    ],
    "hub-gated": [
        crash(
            "huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: x)\n\nCannot access gated repo for url "
            "https://huggingface.co/black-forest-labs/FLUX.1-dev/resolve/main/ae.safetensors.\nAccess to model "
            "black-forest-labs/FLUX.1-dev is restricted and you are not in the authorized list."
        ),
        crash(
            "OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/x"
        ),
    ],
    "hub-offline": [
        crash(
            "huggingface_hub.errors.OfflineModeIsEnabled: Cannot reach https://huggingface.co/api/models/x: offline mode "
            "is enabled. To disable it, please unset the `HF_HUB_OFFLINE` environment variable."
        ),
        crash("socket.gaierror: [Errno -3] Temporary failure in name resolution", "/usr/lib/python3/socket.py:9:x: y()")
        + "\nDuring handling of the above exception, another exception occurred:\n\n"
        + crash(
            "OSError: We couldn't connect to 'https://huggingface.co' to load this file, couldn't find it in the cached "
            "files"
        ),
        crash(
            "requests.exceptions.ConnectionError: (MaxRetryError(\"HTTPSConnectionPool(host='huggingface.co', port=443): "
            'Max retries exceeded with url: /black-forest-labs/FLUX.1-dev/resolve/main/x"))'
        ),
    ],
    "wandb-login": [
        "wandb: ERROR api_key not configured (no-tty). call wandb.login(key=[your_api_key])\n"
        + crash(
            "wandb.errors.errors.UsageError: api_key not configured (no-tty). call wandb.login(key=[your_api_key])"
        ),
        crash("wandb.errors.errors.UsageError: No API key configured. Use `wandb login` to log in."),
    ],
}

for _cause, _texts in {
    "cuda-oom": [
        crash(
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled cuda error (run with NCCL_DEBUG=INFO)\n"
            "Last error:\nCuda failure 2 'out of memory'"
        ),
    ],
    "gpu-hardware-failure": [
        "[ 99.1] NVRM: Xid (PCI:0000:3b:00): 74, pid=4242, NVLink: fatal error detected on link 3\n"
    ],
    "host-oom-kill": [
        crash("subprocess.CalledProcessError: Command 'python train.py' returned non-zero exit status 137."),
        "srun: error: node7: task 0: Exited with exit code 137\n",
        "[ 1234.5] Out of memory: Killed process 4242 (python) total-vm:98304000kB\n",
    ],
    "dataloader-shm-bus-error": [
        "  exitcode  : -7 (pid: 4242)\n  traceback : Signal 7 (SIGBUS) received by PID 4242\n",
        "train.sh: line 3: 4242 Bus error (core dumped) python train.py\n",
    ],
    "nccl-shm-full": [
        "node:42:99 [0] include/shm.h:28 NCCL WARN Call to posix_fallocate failed : No space left on device\n",
    ],
    "alloc-conf-unknown-key": [
        crash("RuntimeError: CachingAllocator option max_split_size_mb too small, must be > 20"),
    ],
    "bf16-unsupported": [
        crash("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0."),
        "ptxas /tmp/x.ptx, line 99; error   : Feature '.bf16' requires .target sm_80 or higher\n",
    ],
    "invalid-device-ordinal": [crash("AssertionError: Invalid device id")],
    "mig-device": [
        "GPU 0: NVIDIA A100\n  MIG 1g.10gb Device 0: (UUID: MIG-2)\n"
        + crash("RuntimeError: No CUDA GPUs are available"),
        "using MIG-2\n" + crash('RuntimeError: device >= 0 && device < num_gpus INTERNAL ASSERT FAILED at "x.cpp":50'),
        "using MIG-2\n" + crash("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        "using NVIDIA A100-SXM4-80GB MIG 1g.10gb\n" + crash(_OOM),
        "using NVIDIA A100-SXM4-80GB MIG 1g.10gb\n" + crash("RuntimeError: No CUDA GPUs are available"),
        "nvidia-container-cli: device error: MIG-GPU-2: unknown device\n",
    ],
    "rendezvous-unreachable": [
        "[E socket.cpp:922] [c10d] The client socket has failed to connect to any network address of (10.0.0.1, 29500).\n",
        crash(
            "ConnectionRefusedError: [Errno 111] Connection refused",
            f"{_SITE}/torch/distributed/rendezvous.py:1:x: y()",
        ),
        crash("OSError: [Errno 113] No route to host"),
    ],
    "nccl-connection-refused": [
        "Last error: connecting to 10.0.0.2<3> failed : No route to host\n",
    ],
    "nccl-peer-mapping": [
        crash(
            "NotImplementedError: Using RTX 4000 series doesn't support faster communication broadband via P2P or IB."
        ),
    ],
    "nccl-segfault": [
        " 1 0x51234 ncclCommInitRank()  /usr/lib/libnccl.so.2(+0x51234)\n"
        "  traceback : Signal 11 (SIGSEGV) received by PID 4242\n",
        " 1 0x51234 ncclCommInitRank()  /usr/lib/libnccl.so.2(+0x51234)\nSegmentation fault (core dumped)\n",
    ],
    "segfault": [crash("torch.multiprocessing.spawn.ProcessExitedException: process 0 terminated with signal SIGSEGV")],
    "peer-rank-died": [
        crash("RuntimeError: [gloo/transport/tcp/pair.cc:598] Connection reset by peer"),
        "[E TCPStore.cpp:331] [c10d] send failed: Broken pipe\n",
    ],
    "slurm-time-limit": ["=>> PBS: job killed: walltime 3610 exceeded limit 3600\n"],
    "sigterm": [
        "[2026-11-23 23:05:38,123] [INFO] [launch.py:319:sigkill_handler] Main process received SIGTERM, exiting\n",
        "Received SIGTERM, stopping\n",
        "train.sh: line 12: 12345 Hangup                  python train.py\n",
    ],
    "version-skew-import": [
        crash("ImportError: pyarrow requires NumPy 2.0 or newer, found 1.26.4"),
        crash(
            "TypeError: LoraConfig.__init__() got an unexpected keyword argument 'use_dora'",
            "/venv/lib/python3.11/site-packages/peft/config.py:9:x: y()",
        ),
        crash("RuntimeError: Failed to import diffusers.loaders.lora because of the following error (look up): x"),
    ],
    "numpy2-abi": [
        crash("ImportError: numpy.core.multiarray failed to import"),
    ],
    "quanto-mismatch": [
        crash("ImportError: Loading an optimum-quanto quantized model requires optimum-quanto library")
    ],
    "xformers-mismatch": [
        crash("ModuleNotFoundError: No module named 'xformers'"),
        crash("ImportError: cannot import name 'x' from 'torch.utils' (x)", f"{_SITE}/xformers/ops/fmha.py:9:x: y()"),
        crash("OSError: /x/xformers/_C.so: undefined symbol: _ZN3c10"),
    ],
    "torchvision-mismatch": [
        crash("RuntimeError: Detected that PyTorch and torchvision were compiled with different CUDA major versions."),
        crash("AttributeError: partially initialized module 'torchvision' has no attribute 'extension'"),
    ],
    "undefined-symbol-abi": [
        crash("ImportError: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.32' not found (required by x)")
    ],
    "missing-shared-library": ["Unable to load any of {libcudnn_ops.so.9.1.0, libcudnn_ops.so.9}\n"],
    "bitsandbytes-setup": [crash("ImportError: The bitsandbytes library requires CUDA but it could not be loaded")],
    "cuda-home-not-set": ["/bin/sh: 1: nvcc: not found\n"],
    "compiler-missing": ["unable to execute 'gcc': No such file or directory\n"],
    "ninja-missing": ["/bin/sh: 1: ninja: not found\n"],
    "libaio-missing": [
        "/usr/bin/ld: cannot find -laio: No such file or directory\n",
        crash("ImportError: libaio.so.1: cannot open shared object file: No such file or directory"),
        crash("RuntimeError: Error building extension 'async_io'"),
    ],
    "accelerate-config-unknown-keys": [
        crash(
            "TypeError: __init__() got an unexpected keyword argument 'x'",
            f"{_SITE}/accelerate/commands/config/config_args.py:9:x: y()",
        ),
    ],
    "config-missing-key": [
        crash("FileNotFoundError: [Errno 2] No such file or directory: 'configs/train.yaml'"),
        crash(
            "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
            "/x.py:9:load_config: json.load(f)",
        ),
        crash(
            "TypeError: TrainConfig.__init__() missing 1 required positional argument: 'rank'", "/x/config.py:9:x: y()"
        ),
        crash("TypeError: TrainArgs.__init__() got an unexpected keyword argument 'rnk'"),
    ],
    "deepspeed-config-mismatch": [
        crash("AssertionError: Gradient accumulation steps: 0 has to be greater than 0"),
    ],
    "deepspeed-multiple-models": [crash("ValueError: DeepSpeed cannot prepare multiple models at once")],
    "no-trainable-parameters": [
        crash(
            "RuntimeError: DistributedDataParallel is not needed when a module doesn't have any parameters that require a gradient."
        ),
    ],
    "dtype-mismatch": [crash("RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'")],
    "shape-mismatch": [
        crash(
            "RuntimeError: The size of tensor a (64) must match the size of tensor b (16) at non-singleton dimension 2"
        ),
        crash("RuntimeError: shape '[1, 16, 64]' is invalid for input of size 4096"),
    ],
    "checkpoint-mismatch": [crash("RuntimeError: Missing key(s) in state_dict: 'x'")],
    "corrupt-checkpoint": [crash("OSError: Unable to load weights from pytorch checkpoint file for 'x' at 'y'.")],
    "dataset-file-missing": [
        crash("NotADirectoryError: [Errno 20] Not a directory: 'x.zip'", "/x/dataset.py:6:x: os.listdir(img_dir)"),
    ],
    "dataset-key-missing": [
        crash("json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)", *_LOADER),
    ],
    "nan-loss": [
        crash("RuntimeError: Loss is nan, stopping training"),
        crash("ValueError: the loss became NaN at step 7"),
    ],
    "hub-gated": [
        crash(
            "requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url: https://huggingface.co/x/resolve/main/y"
        ),
    ],
    "hub-offline": [
        crash("httpx.ReadTimeout: The read operation timed out", f"{_SITE}/huggingface_hub/file_download.py:9:x: y()"),
        crash("requests.exceptions.ConnectTimeout: timed out", f"{_SITE}/huggingface_hub/file_download.py:9:x: y()"),
        crash(
            "urllib3.exceptions.NameResolutionError: <x>: Failed to resolve 'huggingface.co' ([Errno -2] Name or service)"
        ),
        crash("OSError: offline mode is enabled"),
    ],
    "wandb-login": [
        crash("wandb.errors.CommError: permission denied (login again)"),
        crash("ValueError: API key must be 40 characters long, yours was 12"),
    ],
}.items():
    EXCERPTS[_cause] += _texts
for _cause, _texts in START.items():
    EXCERPTS.setdefault(_cause, []).extend(_texts)
EXCERPTS |= {
    cause: [f"[rank1]: xflux-doctor: {cause}: rank 1 has stood still for 61 s after step 12 in {where}\n"]
    for cause, where in (
        ("rank-stopped", "the forward and backward pass: it is stopped by a signal (SIGSTOP, Ctrl-Z, a debugger)"),
        ("rank-lost", "the forward and backward pass: its process is gone, and nobody noticed"),
        ("loader-stuck", "waiting for a batch: it waits for data that does not come"),
        ("storage-stuck", "a step: it waits for a disk or a driver that does not answer (state D)"),
        ("rank-stuck", "saving a checkpoint: it does not go on"),
        ("collective-stuck", "a step, in a collective call: all ranks wait for each other"),
    )
}
EXCERPTS["corrupt-checkpoint"] += [
    "error: The cache entry /c/image-5f.safetensors cannot be read: Error while deserializing header: header too small.\n"
    + CHILD_FAILED,
    "error: The cache entry /c/image-5f.safetensors was damaged on the disk (its checksum differs) and was removed.\n"
    + CHILD_FAILED,
]
