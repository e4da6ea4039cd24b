"""The keys and words at the top of accelerate's file, release by release.

Source: huggingface/accelerate, src/accelerate/commands/config/config_args.py, class ClusterConfig, and
utils/dataclasses.py, class DistributedType, in the wheels of 42 releases from 0.10.0 to 1.15.0
(benchmarks/accelerate_history.py). `fp16` and `dynamo_backend` are old forms converted on load.
"""

from __future__ import annotations

from packaging.version import Version

from xflux_doctor.accelerate_sections import FLAGS, RENAMED, Span

TYPES: dict[str, Span] = {
    "NO": Span(), "MULTI_GPU": Span(), "MULTI_CPU": Span(), "DEEPSPEED": Span(), "FSDP": Span(),
    "MPS": Span("0.12.0", "0.20.0"), "MEGATRON_LM": Span("0.14.0"), "MULTI_XPU": Span("0.20.0"),
    "MULTI_NPU": Span("0.21.0"), "TPU": Span("", "0.28.0"), "XLA": Span("0.28.0"), "MULTI_MLU": Span("0.29.0"),
    "MULTI_MUSA": Span("0.33.0"), "TP": Span("1.4.0", "1.10.0"), "MULTI_HPU": Span("1.5.0"),
    "MULTI_SDAA": Span("1.5.0"), "MULTI_NEURON": Span("1.13.0"),
}  # fmt: skip
DISTRIBUTED_TYPES = tuple(TYPES)
"""Every word that some release takes."""
PRECISIONS = ("no", "fp16", "bf16", "fp8")

KEYS: dict[str, Span] = {
    **dict.fromkeys(
        "compute_environment distributed_type mixed_precision use_cpu num_processes machine_rank num_machines "
        "main_process_ip main_process_port main_training_function deepspeed_config fsdp_config fp16".split(), Span()),
    **dict.fromkeys("downcast_bf16".split(), Span("0.12.0")),
    **dict.fromkeys("gpu_ids rdzv_backend same_network".split(), Span("0.13.0")),
    **dict.fromkeys("command_file commands megatron_lm_config tpu_name tpu_zone".split(), Span("0.14.0")),
    "dynamo_backend": Span("0.15.0"),
    **dict.fromkeys("dynamo_config tpu_env tpu_use_cluster tpu_use_sudo tpu_vm".split(), Span("0.17.0")),
    "ipex_config": Span("0.19.0", "1.13.0"),
    "debug": Span("0.22.0"),
    "mpirun_config": Span("0.28.0"),
    "enable_cpu_affinity": Span("0.29.0"),
    "fp8_config": Span("0.34.0"),
    "tp_config": Span("1.4.0", "1.7.0"),
    "parallelism_config": Span("1.10.0"),
}  # fmt: skip


def accepted_keys(version: Version) -> frozenset[str]:
    """Top-level keys that this release reads without stopping."""
    return frozenset(key for key, span in KEYS.items() if span.has(version))


def distributed_types(version: Version | None) -> tuple[str, ...]:
    """The words of distributed_type that this release takes; without a version, those of any."""
    return tuple(word for word, span in TYPES.items() if version is None or span.has(version))


SECTION_KEYS: dict[str, frozenset[str]] = {
    section: frozenset(flags) | {old for owner, old in RENAMED if owner == section} for section, flags in FLAGS.items()
}
"""Whatever key some release has, or a file of its time has, in each section."""
_BARE = {"fsdp_config": "fsdp_", "fp8_config": "fp8_"}
"""Sections whose keys are also written without the prefix: by accelerate 0.10 and 0.11, and for fp8 to this day."""
_PREFIXES = {"fsdp_config": "fsdp_", "dynamo_config": "dynamo_", "megatron_lm_config": "megatron_lm_",
             "parallelism_config": "parallelism_config_", "mpirun_config": "mpirun_", "fp8_config": "fp8_"}  # fmt: skip


def in_section(section: str, key: str) -> bool:
    """Whether accelerate has this key in that section of its file."""
    if key in KEYS:
        return False
    prefix, bare = _PREFIXES.get(section), _BARE.get(section)
    known = SECTION_KEYS.get(section, frozenset())
    return key in known or (bare is not None and bare + key in known) or (prefix is not None and key.startswith(prefix))


def section_of(key: str) -> str:
    """The one section that a key by its full name belongs into; empty where there is none or it is a top-level key."""
    if key in KEYS:
        return ""
    return next((section for section, known in SECTION_KEYS.items() if key in known), "")
