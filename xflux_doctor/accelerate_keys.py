"""The keys and words that each accelerate release takes in its file.

Source: huggingface/accelerate, src/accelerate/commands/config/config_args.py, class ClusterConfig, at each tag
from v0.20.3 to v1.14.0, and the 1.15.0 wheel. `fp16` and `dynamo_backend` are old forms converted on load.
"""

from __future__ import annotations

from packaging.version import Version

DISTRIBUTED_TYPES = ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "FSDP", "XLA", "TPU", "MEGATRON_LM", "MULTI_NPU",
                     "MULTI_MLU", "MULTI_XPU", "MULTI_HPU", "MULTI_MUSA", "MULTI_SDAA", "MULTI_NEURON")  # fmt: skip
PRECISIONS = ("no", "fp16", "bf16", "fp8")

_BASE = frozenset(
    "compute_environment distributed_type mixed_precision use_cpu num_processes machine_rank num_machines gpu_ids "
    "main_process_ip main_process_port rdzv_backend same_network main_training_function deepspeed_config fsdp_config "
    "megatron_lm_config downcast_bf16 tpu_name tpu_zone tpu_use_cluster tpu_use_sudo command_file commands tpu_vm "
    "tpu_env dynamo_config fp16 dynamo_backend".split()
)
_SINCE = {
    "debug": "0.22.0",
    "mpirun_config": "0.28.0",
    "enable_cpu_affinity": "0.29.0",
    "fp8_config": "0.34.0",
    "tp_config": "1.4.0",
    "parallelism_config": "1.10.0",
}
_UNTIL = {"tp_config": "1.7.0", "ipex_config": "1.13.0"}
"""First release without the key."""


def accepted_keys(version: Version) -> frozenset[str]:
    """Top-level keys that this release reads without stopping."""
    since = {key for key, first in _SINCE.items() if version >= Version(first)}
    until = {key for key, end in _UNTIL.items() if version < Version(end) and (key not in _SINCE or key in since)}
    gone = {key for key in since if key in _UNTIL and key not in until}
    return _BASE | (since - gone) | until


SECTION_KEYS: dict[str, frozenset[str]] = {
    "deepspeed_config": frozenset(
        "deepspeed_config_file zero_stage offload_optimizer_device offload_param_device offload_optimizer_nvme_path "
        "offload_param_nvme_path gradient_accumulation_steps gradient_clipping zero3_init_flag zero3_save_16bit_model "
        "deepspeed_hostfile deepspeed_exclusion_filter deepspeed_inclusion_filter deepspeed_multinode_launcher "
        "deepspeed_moe_layer_cls_names".split()
    ),
    "fsdp_config": frozenset(
        "min_num_params sharding_strategy offload_params transformer_layer_cls_to_wrap activation_checkpointing".split()
    ),
}
"""Keys of a section that do not begin with its name. Source: accelerate, commands/launch.py, 0.30.1 and 1.15.0."""
_PREFIXES = {"fsdp_config": "fsdp_", "dynamo_config": "dynamo_", "megatron_lm_config": "megatron_lm_",
             "parallelism_config": "parallelism_config_", "mpirun_config": "mpirun_"}  # fmt: skip


def in_section(section: str, key: str) -> bool:
    """Whether accelerate has this key in that section of its file."""
    prefix = _PREFIXES.get(section)
    return key in SECTION_KEYS.get(section, ()) or (prefix is not None and key.startswith(prefix) and key != section)
