"""The keys and words inside the sections of accelerate's file, release by release.

Source: the wheels of 42 releases from 0.10.0 to 1.15.0, read by benchmarks/accelerate_history.py: the launch flags
in commands/launch.py (each key of a section sets the flag of its name) and the word lists in utils/constants.py and
utils/dataclasses.py. "" as `since`: every release read.
"""

from __future__ import annotations

from typing import NamedTuple

from packaging.version import Version


class Span(NamedTuple):
    """From which release on something is known, and the first release that knows it no longer."""

    since: str = ""
    until: str = ""

    def has(self, version: Version) -> bool:
        return version >= Version(self.since or "0") and not (self.until and version >= Version(self.until))

    @property
    def words(self) -> str:
        """As part of a sentence: `accelerate 1.10.0 and newer`."""
        if self.until:
            return (
                f"accelerate {self.since} to before {self.until}" if self.since else f"accelerate before {self.until}"
            )
        return f"accelerate {self.since} and newer"


def _spans(prefix: str, *rows: tuple[str, str, str]) -> dict[str, Span]:
    return {prefix + name: Span(since, until) for since, until, names in rows for name in names.split()}


FLAGS: dict[str, dict[str, Span]] = {
    "deepspeed_config": _spans(
        "",
        ("", "", "deepspeed_config_file zero_stage offload_optimizer_device offload_param_device zero3_init_flag "
                 "gradient_accumulation_steps gradient_clipping zero3_save_16bit_model"),
        ("0.11.0", "", "deepspeed_exclusion_filter deepspeed_hostfile deepspeed_inclusion_filter "
                       "deepspeed_multinode_launcher"),
        ("0.20.0", "", "offload_optimizer_nvme_path offload_param_nvme_path"),
        ("0.30.0", "", "deepspeed_moe_layer_cls_names"),
    ),
    "fsdp_config": _spans(
        "fsdp_",
        ("", "", "min_num_params offload_params sharding_strategy"),
        ("0.11.0", "", "auto_wrap_policy transformer_layer_cls_to_wrap"),
        ("0.11.0", "1.0.0", "backward_prefetch_policy"),
        ("0.12.0", "", "state_dict_type"),
        ("0.21.0", "", "forward_prefetch sync_module_states use_orig_params"),
        ("0.24.0", "", "cpu_ram_efficient_loading"),
        ("0.26.0", "", "backward_prefetch"),
        ("0.31.0", "", "activation_checkpointing"),
        ("1.6.0", "", "reshard_after_forward version"),
        ("1.10.0", "", "ignored_modules"),
        ("1.15.0", "", "activation_checkpointing_offload"),
    ),
    "fp8_config": _spans(
        "fp8_",
        ("0.34.0", "", "amax_compute_algo amax_history_len backend format interval margin opt_level "
                       "override_linear_precision use_autocast_during_eval"),
        ("1.13.0", "", "enable_fsdp_float8_all_gather pad_inner_dim"),
    ),
    "dynamo_config": _spans(
        "dynamo_",
        ("0.15.0", "", "backend"),
        ("0.17.0", "", "mode use_dynamic use_fullgraph"),
        ("1.7.0", "", "use_regional_compilation"),
    ),
    "megatron_lm_config": _spans(
        "megatron_lm_",
        ("0.14.0", "", "gradient_clipping num_micro_batches pp_degree recompute_activations sequence_parallelism "
                       "tp_degree use_distributed_optimizer"),
        ("1.13.0", "", "attention_backend attention_dropout attention_softmax_in_fp32 calculate_per_token_loss "
                       "context_parallel_size decoder_last_pipeline_num_layers eod_mask_loss "
                       "expert_model_parallel_size expert_tensor_parallel_size hidden_dropout no_load_optim "
                       "no_save_optim optimizer_cpu_offload overlap_cpu_optimizer_d2h_h2d recompute_granularity "
                       "recompute_method recompute_num_layers use_custom_fsdp use_precision_aware_optimizer "
                       "use_rotary_position_embeddings"),
    ),
    "mpirun_config": _spans("mpirun_", ("0.28.0", "", "hostfile"), ("0.28.0", "1.13.0", "ccl")),
    "parallelism_config": _spans(
        "parallelism_config_",
        ("1.10.0", "", "cp_comm_strategy cp_size dp_replicate_size dp_shard_size tp_size"),
        ("1.12.0", "", "cp_backend sp_attn_implementation sp_backend sp_seq_length sp_seq_length_is_variable sp_size"),
    ),
    "tp_config": _spans("", ("1.4.0", "1.7.0", "tp_size")),
    "ipex_config": _spans("", ("0.20.0", "1.10.0", "ipex"), ("0.19.0", "0.20.0", "ipex_enabled"),
                          ("0.20.0", "1.13.0", "use_xpu")),
}  # fmt: skip

_PREFIXED_SINCE = {"fsdp_config": ("fsdp_", "0.12.0"), "fp8_config": ("fp8_", "1.4.0"),
                   "dynamo_config": ("dynamo_", "1.14.0")}  # fmt: skip
"""Sections whose keys may leave the prefix of their flags away, and the first release that puts it before them."""

RENAMED = {
    ("fsdp_config", "fsdp_backward_prefetch_policy"): "fsdp_backward_prefetch",
    ("fp8_config", "fp8_amax_history_length"): "fp8_amax_history_len",
    ("fp8_config", "fp8_amax_compute_algorithm"): "fp8_amax_compute_algo",
    ("fp8_config", "fp8_optimization_level"): "fp8_opt_level",
    ("ipex_config", "ipex_enabled"): "ipex",
}
"""Keys under another name. The three of fp8 are written by `accelerate config` itself (0.34.0 to 1.15.0,
commands/config/cluster.py), and no release's launch reads them."""

SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""In the order of torch's own numbers, from 1. Source: utils/constants.py; the hybrid ones since 0.21.0."""
WRAPPING = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
PREFETCH = ("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH")
STATE_DICTS = ("FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT")
DYNAMO_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""The last is torch.compile's own (torch 2.4.0 and 2.13.0, torch/_inductor/__init__.py, list_mode_options)."""
FP8_BACKENDS = {"TE": Span("0.34.0"), "MSAMP": Span("0.34.0"), "AO": Span("1.13.0")}
FP8_FORMATS = {"HYBRID": Span("0.34.0"), "E4M3": Span("0.34.0"), "E5M2": Span("1.9.0")}
DYNAMO_BACKENDS: dict[str, Span] = _spans(
    "",
    ("0.15.0", "", "NO EAGER AOT_EAGER INDUCTOR FX2TRT OFI ONNXRT"),
    ("0.15.0", "0.24.0", "AOT_CUDAGRAPHS AOT_NVFUSER NVFUSER"),
    ("0.15.0", "1.13.0", "IPEX"),
    ("0.24.0", "", "AOT_TS_NVFUSER CUDAGRAPHS NVPRIMS_NVFUSER TENSORRT TVM"),
    ("0.32.0", "", "AOT_TORCHXLA_TRACE_ONCE TORCHXLA_TRACE_ONCE"),
    ("1.5.0", "", "HPU_BACKEND"),
    ("1.15.0", "", "NEURON"),
)  # fmt: skip

TRUE = frozenset("y yes t true on 1".split())
FALSE = frozenset("n no f false off 0".split())
"""Source: accelerate, utils/other.py, str_to_bool (0.30.1 and 1.15.0), which lowers the case first."""


def flag_of(section: str, key: str, version: Version) -> str:
    """The launch flag that a key of a section sets under this release.

    Source: accelerate, commands/launch.py, _validate_launch_command: 0.12.0 to 1.4.0 put `fsdp_` before what has no
    `fsdp` in it, 1.5.0 and newer before what does not begin so; fp8 since 1.4.0 and dynamo since 1.14.0 likewise.
    """
    prefix, first = _PREFIXED_SINCE.get(section, ("", "0"))
    if not prefix or version < Version(first):
        return key
    there = key.startswith(prefix[:-1]) if version >= Version("1.5.0") or section != "fsdp_config" else "fsdp" in key
    return key if there else prefix + key


def span_of(section: str, flag: str) -> Span | None:
    """When accelerate knows this flag; None: no release read does."""
    return FLAGS.get(section, {}).get(flag)


def known_flags(section: str, version: Version) -> frozenset[str]:
    return frozenset(flag for flag, span in FLAGS.get(section, {}).items() if span.has(version))


def as_bool(value: object) -> bool | None:
    """What accelerate's ranks make of a value that a flag hands them as text; None: they stop at it."""
    text = str(value).strip().lower()
    return True if text in TRUE else False if text in FALSE else None
