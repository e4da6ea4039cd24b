"""The accelerate file that the tool writes for a job that has none."""

from __future__ import annotations

_TEXT = """\
# Written by xflux-doctor: one rank per device; {because}.
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: {distributed_type}
downcast_bf16: 'no'
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: {processes}
rdzv_backend: static
same_network: true
use_cpu: {use_cpu}
"""


_DEEPSPEED = """\
deepspeed_config:
  gradient_accumulation_steps: {accumulation}
  gradient_clipping: 1.0
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: {stage}
"""


_FSDP = """\
fsdp_config:
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_version: 2
"""


def deepspeed_yaml(processes: int, accumulation: int, because: str, stage: int = 2) -> str:
    """A launch under DeepSpeed, with ZeRO-2 as X-Flux's README has it."""
    text = _TEXT.format(distributed_type="DEEPSPEED", processes=processes, use_cpu="false", because=because)
    before, mark, after = text.partition("distributed_type:")
    return before + _DEEPSPEED.format(accumulation=accumulation, stage=stage) + mark + after


def fsdp_yaml(processes: int, because: str) -> str:
    """A launch under FSDP2, for accelerate 1.6 and newer."""
    text = _TEXT.format(distributed_type="FSDP", processes=processes, use_cpu="false", because=because)
    before, mark, after = text.partition("machine_rank:")
    return before + _FSDP + mark + after


def accelerate_yaml(processes: int, *, cpu: bool, because: str = "the ranks share the gradients alone") -> str:
    """A DDP launch: the ranks share nothing but the gradients of what is trained.

    CPU ranks are launched as MULTI_GPU with use_cpu: accelerate starts only one process for MULTI_CPU without
    MPI (accelerate 1.15.0, commands/launch.py, launch_command).
    """
    return _TEXT.format(
        distributed_type="MULTI_GPU" if processes > 1 else "NO",
        processes=processes,
        use_cpu=str(cpu).lower(),
        because=because,
    )
