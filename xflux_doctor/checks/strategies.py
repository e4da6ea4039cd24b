"""LA2: settings of accelerate's file that must go together, and what they need of the machine."""

from __future__ import annotations

import math
from collections.abc import Iterator

from packaging.version import Version

from xflux_doctor.accelerate_sections import FLAGS, as_bool
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.releases import local, release
from xflux_doctor.checks.sections import misspelt, settings, sharding_word
from xflux_doctor.finding import Edit, Finding, error, warning

_FSDP2 = Version("1.6.0")
_RESHARDS = {"FULL_SHARD": True, "SHARD_GRAD_OP": False, "HYBRID_SHARD": True, "HYBRID_SHARD_ZERO2": False,
             "NO_SHARD": False}  # fmt: skip
"""FSDP1's strategies as FSDP2's fsdp_reshard_after_forward. Source: accelerate 1.15.0, commands/to_fsdp2.py."""
Settings = dict[str, tuple[str, object]]


@check("LA205", "FSDP's settings go together", needs=("accelerate",))
def fsdp(case: Case) -> Iterator[Finding]:
    """What accelerate's launcher and plugin refuse together, or take without a word for something else.

    Source: accelerate 0.30.1 and 1.15.0, utils/launch.py (prepare_multi_gpu_env) and utils/dataclasses.py
    (FullyShardedDataParallelPlugin), each run with devices faked.
    """
    version = release(case)
    local(case)
    if case.job.distributed_type != "FSDP":
        raise SkipCheck("distributed_type is not FSDP")
    if misspelt(case, "fsdp_config", version):
        raise SkipCheck("a key of fsdp_config is misspelt (see LA201)")
    found = settings(case, "fsdp_config", version)
    two = version >= _FSDP2 and str(found.get("fsdp_version", ("", 1))[1]) == "2"
    asks_two = str(found.get("fsdp_version", ("", 1))[1]) == "2"
    if version >= Version("0.24.0"):
        yield from _loading(found)
    if two:
        yield from _fsdp2(found)
    elif not asks_two:  # with fsdp_version 2 on an older release LA202 has said it all
        yield from _sharding(found, version)
    yield from _size_based(found, version)
    yield from _checkpointing(found, version, two)


def _loading(found: Settings) -> Iterator[Finding]:
    """The launcher looks at both as Python does: text is true, whatever it says."""
    loading, sync = found.get("fsdp_cpu_ram_efficient_loading"), found.get("fsdp_sync_module_states")
    if sync is None or sync[1] or (loading is not None and not loading[1]) or sync[1] is None:
        return
    if loading is None:
        edit = Edit("accelerate", ("fsdp_config", "fsdp_cpu_ram_efficient_loading"), False, "needs the states synced")
        hint = "Set fsdp_cpu_ram_efficient_loading to false: it is true by default."
    else:
        reason = "what fsdp_cpu_ram_efficient_loading needs, and the plugin sets by itself"
        edit = Edit("accelerate", ("fsdp_config", sync[0]), True, reason)
        hint = "Set fsdp_sync_module_states to true."
    yield error(
        f"fsdp_sync_module_states is {sync[1]!r} and fsdp_cpu_ram_efficient_loading is "
        f"{repr(loading[1]) if loading else 'true by default'}.",
        "accelerate: When using `--fsdp_cpu_ram_efficient_loading` set `--fsdp_sync_module_states` to `True`",
        hint,
        edits=(edit,),
    )


def _fsdp2(found: Settings) -> Iterator[Finding]:
    key, value = found.get("fsdp_reshard_after_forward", ("", None))
    word = sharding_word(value) if value is not None else ""
    if word:
        edit = Edit("accelerate", ("fsdp_config", key), _RESHARDS[word], "as `accelerate to-fsdp2` converts it")
        because = f"accelerate stops in its ranks: invalid truth value {str(value).lower()}."
        yield error(
            f"fsdp_config.{key} is {value!r} with fsdp_version 2.", because, "Write true or false.", edits=(edit,)
        )
    elif value is not None and as_bool(value) is None:
        because = f"accelerate stops in its ranks: invalid truth value {str(value).lower()}."
        yield error(f"fsdp_config.{key} is {value!r} with fsdp_version 2.", because, "Write true or false.")
    old, strategy = found.get("fsdp_sharding_strategy", ("", "FULL_SHARD"))
    word = sharding_word(strategy)
    if word and not _RESHARDS[word] and value is None:
        new = Edit("accelerate", ("fsdp_config", "fsdp_reshard_after_forward"), False, f"what {word} means in FSDP2")
        yield warning(
            f"fsdp_config.{old} is {strategy!r} with fsdp_version 2.",
            "FSDP2 does not read it and shards again after each forward, as FULL_SHARD does.",
            "Set fsdp_reshard_after_forward to false.",
            edits=(new,),
        )
    state, kind = found.get("fsdp_state_dict_type", ("", ""))
    if str(kind).upper() in ("LOCAL_STATE_DICT", "2"):
        because = (
            "accelerate: FSDP2 does not support LOCAL_STATE_DICT. Please set `fsdp_state_dict_type` to "
            "`SHARDED_STATE_DICT` or `FULL_STATE_DICT`."
        )
        yield error(f"fsdp_config.{state} is {kind!r} with fsdp_version 2.", because, "Set SHARDED_STATE_DICT.")


def _sharding(found: Settings, version: Version) -> Iterator[Finding]:
    """Under FSDP1 only fsdp_sharding_strategy counts: the launcher sets it always, to FULL_SHARD without a key."""
    key, value = found.get("fsdp_reshard_after_forward", ("", None))
    if value is None or "fsdp_sharding_strategy" in found:
        return
    word = sharding_word(value) or ("SHARD_GRAD_OP" if as_bool(value) is False else "")
    if not word or word == "FULL_SHARD":
        return
    strategy = Edit("accelerate", ("fsdp_config", "fsdp_sharding_strategy"), word, f"what {key} asks for")
    yield warning(
        f"fsdp_config.{key} is {value!r}, and there is no fsdp_sharding_strategy.",
        f"accelerate {version} goes by fsdp_sharding_strategy alone in FSDP1 and takes FULL_SHARD.",
        f"Set fsdp_sharding_strategy to {word}.",
        edits=(strategy,),
    )


def _size_based(found: Settings, version: Version) -> Iterator[Finding]:
    """Before 1.13.0 the flag's default is the float 1e8, which int() refuses as text (commands/launch.py)."""
    policy = str(found.get("fsdp_auto_wrap_policy", ("", ""))[1]).upper()
    if policy != "SIZE_BASED_WRAP" or "fsdp_min_num_params" in found or version >= Version("1.13.0"):
        return
    edit = Edit("accelerate", ("fsdp_config", "fsdp_min_num_params"), 100_000_000, "accelerate's own default")
    yield error(
        "fsdp_auto_wrap_policy is SIZE_BASED_WRAP, and fsdp_min_num_params is missing.",
        f"accelerate {version} stops at its own default: invalid literal for int() with base 10: '100000000.0'.",
        "Set fsdp_min_num_params to 100000000.",
        edits=(edit,),
    )


def _checkpointing(found: Settings, version: Version, two: bool) -> Iterator[Finding]:
    key, value = found.get("fsdp_activation_checkpointing_offload", ("", False))
    if version < Version("1.15.0") or as_bool(value) is not True:
        return
    needed = (
        "" if as_bool(found.get("fsdp_activation_checkpointing", ("", False))[1]) else "activation_checkpointing=True"
    )
    needed = needed or ("" if two else "fsdp_version=2")
    if needed:
        because = f"accelerate: `activation_checkpointing_offload=True` requires `{needed}`."
        yield error(f"fsdp_config.{key} is {value!r}.", because, f"Set fsdp_{needed.replace('=', ': ').lower()}.")


@check("LA206", "parallelism_config is one that accelerate can build", needs=("accelerate",))
def parallelism(case: Case) -> Iterator[Finding]:
    """The product of the sizes is the number of ranks, and the dimensions are ones that compose.

    Source: accelerate 1.10.0 and 1.15.0, parallelism_config.py, __post_init__ and _validate_accelerator.
    """
    version = release(case)
    local(case)
    found = settings(case, "parallelism_config", version)
    if misspelt(case, "parallelism_config", version):
        raise SkipCheck("a key of parallelism_config is misspelt (see LA201)")
    if version < Version("1.10.0") or not found:
        raise SkipCheck("there is no parallelism_config that this accelerate reads")
    sizes = {flag.removeprefix("parallelism_config_"): found[flag][1] if flag in found else 1 for flag in _SIZES}
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes.values()):
        raise SkipCheck("a size is no whole number (see LA204)")
    yield from _attention(found, sizes["sp_size"])
    yield from _dimensions({name: int(str(size)) for name, size in sizes.items()}, case, version)


_SIZES = tuple(flag for flag in FLAGS["parallelism_config"] if flag.endswith("_size"))


def _attention(found: Settings, sp_size: object) -> Iterator[Finding]:
    """Source: accelerate 1.15.0, utils/dataclasses.py, DeepSpeedSequenceParallelConfig, which sp_size > 1 makes."""
    key, value = found.get("parallelism_config_sp_attn_implementation", ("", "sdpa"))
    text, known = str(value), ("flash_attention_2", "flash_attention_3", "sdpa")
    if sp_size != 1 and text not in known and not ("/" in text and "flash-attn" in text):
        because = f"accelerate stops in its ranks: Invalid sp_attn_implementation: {text}."
        yield error(f"parallelism_config.{key} is {value!r}.", because, f"Use one of: {', '.join(known)}.")


def _dimensions(sizes: dict[str, int], case: Case, version: Version) -> Iterator[Finding]:
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "every size 1"
    low = next((name for name, size in sizes.items() if size < 1), "")
    total, kind = math.prod(sizes.values()), case.job.distributed_type
    found = settings(case, "fsdp_config", version)
    two = kind == "FSDP" and str(found.get("fsdp_version", ("", 1))[1]) == "2"
    why = ""
    if low:
        why = f"{low} must be at least 1, but got {sizes[low]}"
    elif sizes["cp_size"] > 1 and sizes["sp_size"] > 1:
        why = "Context Parallelism (CP) and Sequence Parallelism (SP) are mutually exclusive."
    elif max(sizes["tp_size"], sizes["cp_size"]) > 1 and sizes["dp_replicate_size"] > 1 and sizes["dp_shard_size"] == 1:
        why = "Tensor/Context parallelism (tp/cp_size > 1) cannot be used with pure data parallelism"
    elif total > 1 and sizes["sp_size"] == 1 and total != case.job.num_processes:
        why = f"ParallelismConfig total_size ({total}) does not match num_processes ({case.job.num_processes})"
    elif kind == "FSDP" and not two and sizes["cp_size"] > 1:
        why = "Using `cp_size>1` requires FSDP2, but the provided `fsdp_plugin` is using FSDP1."
    elif two and total > 1 and sizes["dp_shard_size"] == 1 and sizes["cp_size"] == 1:
        why = "FSDP is enabled but the parallelism config has no dimension for FSDP to shard across"
    elif total > 1 and kind in ("NO", "MULTI_CPU", "MEGATRON_LM"):
        why = "ParallelismConfig is only compatible DistributedType.FSDP (version 2) or DistributedType.Multi{Device}"
    if why:
        ranks = case.job.num_processes
        hint = f"Choose sizes whose product is num_processes ({ranks}), with fsdp_version 2 where something is sharded."
        yield error(f"parallelism_config has {shown}.", f"accelerate stops in its ranks: {why}", hint)


@check("LA207", "fp8 has a library that computes in it", needs=("accelerate", "packages"))
def fp8(case: Case) -> Iterator[Finding]:
    """accelerate computes in fp8 by Transformer Engine, MS-AMP, or torchao (since 1.4.0) only.

    Source: accelerate 0.30.1, state.py, and 1.15.0, utils/launch.py and utils/imports.py (is_fp8_available).
    """
    assert case.facts.packages is not None
    version = release(case)
    local(case)
    if str(case.job.get("mixed_precision")).lower() != "fp8":
        raise SkipCheck("mixed_precision is not fp8")
    libraries = ("transformer-engine", "ms-amp", *(("torchao",) if version >= Version("1.4.0") else ()))
    late = version >= Version("0.34.0")
    if any(name in case.facts.packages for name in libraries) or (case.job.bundled and not late):
        return
    because = "accelerate: FP8 is not available on this machine. Please ensure that either Transformer Engine, MSAMP"
    if not late:
        because = "accelerate: Using `fp8` precision requires `transformer_engine` or `MS-AMP` to be installed."
    yield error(
        f"mixed_precision is fp8, and none of {', '.join(libraries)} is installed.",
        because,
        "Install one of them, or take bf16 (`--take LA207`).",
        offers=(Edit("accelerate", ("mixed_precision",), "bf16", "fp8 has no library here"),),
    )


_NEEDS = {"XLA": ("torch-xla",), "TPU": ("torch-xla",), "MEGATRON_LM": ("megatron-core", "megatron-lm")}
_ABSENT = {"XLA": "No module named 'torch_xla'", "TPU": "No module named 'torch_xla'",
           "MEGATRON_LM": "Megatron is not installed. please build it from source."}  # fmt: skip


@check("LA208", "distributed_type has its library", needs=("accelerate", "packages"))
def strategy_library(case: Case) -> Iterator[Finding]:
    """XLA (TPU before 0.28.0) needs torch_xla, MEGATRON_LM Megatron-LM.

    Source: accelerate 0.30.1 and 1.15.0, commands/launch.py (tpu_launcher) and accelerator.py.
    """
    assert case.facts.packages is not None
    local(case)
    kind = case.job.distributed_type
    needed = _NEEDS.get(kind)
    if needed is None or any(name in case.facts.packages for name in needed):
        return
    gpus = len(case.facts.gpus or ())
    edit = Edit("accelerate", ("distributed_type",), "MULTI_GPU" if gpus > 1 else "NO", f"{kind} has no library here")
    yield error(
        f"distributed_type is {kind}, and {' or '.join(needed)} is not installed.",
        f"The job stops with: {_ABSENT[kind]}",
        f"Run it where {needed[0]} is, or take {edit.value} for this machine's GPUs (`--take LA208`)."
        if gpus
        else f"Run it where {needed[0]} is.",
        offers=(edit,) if gpus else (),
    )
