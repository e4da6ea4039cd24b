"""The keys that each DeepSpeed release takes in its own JSON, and those that it took once.

Source: deepspeedai/DeepSpeed, deepspeed/runtime/zero/config.py, zero/offload_config.py, precision_config.py and
config.py at every tag from v0.8.0 to v0.19.5, and in the files of 0.19.6,
0.19.7 and 0.19.8 on PyPI; held against the installed release by tests/test_deepspeed_real.py.
"""

from __future__ import annotations

from packaging.version import Version

_ZERO = frozenset(
    "stage contiguous_gradients reduce_scatter reduce_bucket_size allgather_partitions allgather_bucket_size "
    "overlap_comm load_from_fp32_weights elastic_checkpoint offload_param offload_optimizer sub_group_size "
    "cpu_offload_param cpu_offload_use_pin_memory cpu_offload prefetch_bucket_size stage3_prefetch_bucket_size "
    "param_persistence_threshold stage3_param_persistence_threshold model_persistence_threshold "
    "stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters max_reuse_distance "
    "stage3_max_reuse_distance gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save "
    "stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1 round_robin_gradients".split()
)
_ZERO_SINCE = {
    "memory_efficient_linear": "0.9.0",
    "mics_shard_size": "0.9.2",
    "mics_hierarchical_params_gather": "0.9.2",
    "zero_hpz_partition_size": "0.10.0",
    "zero_quantized_gradients": "0.10.0",
    "zero_quantized_weights": "0.10.0",
    "override_module_apply": "0.10.1",
    "pipeline_loading_checkpoint": "0.10.1",
    "zero_quantized_nontrainable_weights": "0.10.2",
    "use_multi_rank_bucket_allreduce": "0.12.4",
    "use_all_reduce_for_fetch_params": "0.14.3",
    "stage3_use_all_reduce_for_fetch_params": "0.14.3",
    "module_granularity_threshold": "0.16.0",
    "stage3_module_granularity_threshold": "0.16.0",
    "zeropp_loco_param": "0.16.2",
    "log_trace_cache_warnings": "0.16.4",
    "zenflow": "0.17.5",
    "enable_sanity_checks": "0.17.6",
    "leaf_module": "0.18.0",
    "allgather_sequential": "0.18.5",
    "stage3_allgather_sequential": "0.18.5",
    "save_muon_momentum_buffer_in_memory": "0.18.9",
    "compute_grad_norm": "0.19.7",
    "parameter_alignment": "0.19.7",
}
CLEANED = Version("0.19.7")
"""First release that refuses the keys of REMOVED (`_reject_removed_config_keys`)."""
REMOVED_ZERO = frozenset(("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"))
REMOVED = {
    "nebula": "Nebula checkpointing has been removed.",
    "compression_training": "The DeepSpeed compression library has been removed.",
    "amp": "NVIDIA Apex AMP integration has been removed.",
    "quantize_training": "Mixture-of-Quantization (MoQ) / 'quantize_training' has been removed.",
    "sparse_gradients": "Sparse compression of dense torch.nn.Embedding gradients has been removed.",
    "eigenvalue": "Eigenvalue-based Mixture-of-Quantization (MoQ) has been removed",
    "sparse_attention": "DeepSpeed Sparse Attention has been removed",
    "elasticity": "Elastic training has been removed",
    "graph_harvesting": "Graph harvesting has been removed",
    "curriculum_learning": "Legacy top-level 'curriculum_learning' has been removed.",
    "progressive_layer_drop": "Progressive Layer Dropping has been removed",
}
"""Top-level keys that 0.19.8 refuses, with the beginning of its own sentence."""
OFFLOAD = {
    "offload_optimizer": frozenset("device nvme_path buffer_count pin_memory pipeline_read pipeline_write "
                                   "fast_init ratio super_offload cpuadam_cores_perc".split()),
    "offload_param": frozenset("device nvme_path buffer_count buffer_size max_in_cpu pin_memory".split()),
}  # fmt: skip
_OFFLOAD_SINCE = {"ratio": "0.12.3", "super_offload": "0.18.0", "cpuadam_cores_perc": "0.18.0"}
PRECISION = {
    "bf16": frozenset("enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads "
                      "bf16_optimizer_states".split()),
    "fp16": frozenset("enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis "
                      "consecutive_hysteresis min_loss_scale fp16_master_weights_and_grads".split()),
}  # fmt: skip
COMPILE = frozenset(
    "deepcompile free_activation free_activation_threshold offload_activation offload_activation_pin_memory "
    "offload_opt_states double_buffer symmetric_memory debug_log offload_parameters sync_before_reduce "
    "sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors keep_all_input_tensors passes "
    "autoep_non_moe".split()
)
STRICT_COMPILE = Version("0.16.6")
"""First release with these keys; 0.14.1 had enabled, backend and kwargs there, and those between read none."""
STRICT_PRECISION = Version("0.17.1")
"""First release whose bf16 and fp16 blocks refuse unknown keys; earlier ones ignore them."""
CLIPS_BY_DEFAULT = Version("0.19.3")
"""First release that clips gradients at 1.0 where nothing is said, instead of not at all (DeepSpeed#8068)."""
TOP = frozenset(
    "activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type "
    "compile compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last "
    "datastates_ckpt disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel "
    "flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor "
    "graph_harvesting hybrid_engine log_level managed_gradient_accumulation memory_breakdown msamp nebula optimizer "
    "pipeline prescale_gradients progressive_layer_drop quantize_training scheduler seq_parallel_comm_data_type "
    "seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients steps_per_print "
    "tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu "
    "use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization "
    "allgather_size".split()
)
"""Top-level keys of any release: what none of them reads is ignored without a word."""


def zero_keys(version: Version) -> frozenset[str]:
    """Keys of zero_optimization that this release takes; it refuses others."""
    gone = REMOVED_ZERO if version >= CLEANED else frozenset[str]()
    return _ZERO | {key for key, first in _ZERO_SINCE.items() if version >= Version(first)} - gone


def offload_keys(block: str, version: Version) -> frozenset[str]:
    late = {key for key, first in _OFFLOAD_SINCE.items() if version < Version(first)}
    return OFFLOAD[block] - late
