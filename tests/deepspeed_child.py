"""Run by the tests as a program: accelerate's own launch, its plugin and DeepSpeed's config class, case by case.

Reads a JSON list of cases on standard input and answers with one. Each case names a folder that holds `accelerate.yaml`
and what that names; `world` is the number of ranks, `micro` the script's batch, `steps` its accumulation, `precision`
what it hands to Accelerator. One process for all cases: the imports are paid for once.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import socket
import sys
import types
import warnings
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
for _name in [name for name in os.environ if name.startswith("ACCELERATE")]:
    del os.environ[_name]


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _environment(path: str) -> tuple[dict[str, str], int]:
    """What `accelerate launch` hands to its ranks, and how many it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    args = launch_command_parser().parse_args(["--config_file", path, "script.py"])
    args, defaults, from_file = _validate_launch_command(args)
    if not args.use_deepspeed:
        raise LookupError("not DeepSpeed")
    fields = list(defaults.deepspeed_config)  # as launch_command does it
    args.deepspeed_fields_from_accelerate_config = ",".join([*fields, *(["mixed_precision"] if from_file else [])])
    args.main_process_port = _port()
    _, environment = prepare_deepspeed_cmd_env(args)
    return {key: value for key, value in environment.items() if key.startswith("ACCELERATE")}, args.num_processes


def _filled(plugin: Any, case: dict[str, Any], steps: int, world: int) -> None:
    """accelerator.py, `_prepare_deepspeed`, for a model without an HF config: what of it concerns the config."""
    auto = plugin.is_auto("train_micro_batch_size_per_gpu")
    micro = case.get("micro", 1) if auto else plugin.get_value("train_micro_batch_size_per_gpu")
    plugin.fill_match("gradient_accumulation_steps", must_match=False, gradient_accumulation_steps=steps)
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    keys = [f"zero_optimization.{name}" for name in sizes if plugin.is_auto(f"zero_optimization.{name}")]
    if keys:
        raise ValueError(
            f"Can't find `model.config` entry, therefore it's not possible to automatically fill out {keys}"
        )
    values = {
        "train_micro_batch_size_per_gpu": micro,
        "train_batch_size": micro * plugin.get_value("gradient_accumulation_steps") * world,
        "gradient_clipping": 1.0,
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
        "optimizer.params.lr": 1e-4,
        "optimizer.params.weight_decay": 0.01,
        "scheduler.params.warmup_min_lr": 0,
        "scheduler.params.warmup_max_lr": 1e-4,
        "scheduler.params.warmup_num_steps": 10,
        "scheduler.params.total_num_steps": 100,
    }
    plugin.deepspeed_config_process(must_match=False, **values)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """The values that the ranks would have, or the stage and the words of the failure."""
    import deepspeed.runtime.config as deepspeed_config
    from accelerate.utils import DeepSpeedPlugin, patch_environment

    os.chdir(case["folder"])
    at = "launch"
    told: list[str] = []
    try:
        environment, processes = _environment(case.get("file", "accelerate.yaml"))
        at, world = "plugin", case.get("world") or processes
        with patch_environment(**environment), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plugin = DeepSpeedPlugin()
            at = "precision"
            plugin.set_mixed_precision(case.get("precision") or environment["ACCELERATE_MIXED_PRECISION"])
            told = [str(item.message) for item in caught]
        at = "accelerator"
        steps = int(environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", case.get("steps", 1)))
        _filled(plugin, case, steps, world)
        at, values = "deepspeed", copy.deepcopy(plugin.deepspeed_config)
        deepspeed_config.dist = types.SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda *_: world)
        config = deepspeed_config.DeepSpeedConfig(copy.deepcopy(values))
    except BaseException as error:  # noqa: BLE001 - the failure is the answer
        return {"at": at, "error": f"{type(error).__name__}: {error}"}
    return {"values": _values(plugin, config, values, environment, processes), "warnings": told}


def _values(
    plugin: Any, config: Any, values: dict[str, Any], environment: dict[str, str], count: int
) -> dict[str, Any]:
    zero = config.zero_config
    offload = {
        what: [str(block.device), str(block.nvme_path)] if block is not None else ["none", "None"]
        for what, block in (("optimizer", zero.offload_optimizer), ("param", zero.offload_param))
    }
    return {
        "stage": int(config.zero_optimization_stage),
        "accumulation": config.gradient_accumulation_steps,
        "batch": config.train_batch_size,
        "micro": config.train_micro_batch_size_per_gpu,
        "clipping": float(config.gradient_clipping),
        "offload_optimizer": offload["optimizer"],
        "offload_param": offload["param"],
        "bf16": str(values["bf16"]["enabled"]).lower() == "true",
        "fp16": str(values["fp16"]["enabled"]).lower() == "true",
        "bucket": int(zero.reduce_bucket_size),
        "overlap_comm": zero.overlap_comm,
        "contiguous_gradients": zero.contiguous_gradients,
        "prefetch": int(zero.prefetch_bucket_size),
        "persistence": int(zero.param_persistence_threshold),
        "save_16bit": zero.gather_16bit_weights_on_model_save,
        "optimizer": config.optimizer_name,
        "init": plugin.zero3_init_flag,
        "processes": count,
        "accelerator_steps": environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    }


def fields() -> dict[str, Any]:
    """The keys that the installed DeepSpeed's own classes take."""
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def names(model: Any) -> list[str]:
        found = model.model_fields if hasattr(model, "model_fields") else model.__fields__
        return sorted({name for key, field in found.items() for name in (key, getattr(field, "alias", None) or key)})

    return {
        "zero_optimization": names(DeepSpeedZeroConfig),
        "offload_optimizer": names(offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        "offload_param": names(offload_config.DeepSpeedZeroOffloadParamConfig),
        "precision": _precision_fields(names),
        "compile": _compile_fields(names),
    }


def _compile_fields(names: Any) -> list[str] | None:
    try:
        from deepspeed.compile.config import CompileConfig
    except ImportError:
        return None
    return list(names(CompileConfig))


def _precision_fields(names: Any) -> dict[str, list[str]] | None:
    try:
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    except ImportError:
        return None
    return {"bf16": names(DeepSpeedBF16Config), "fp16": names(DeepSpeedFP16Config)}


def main() -> None:
    logging.disable(logging.CRITICAL)
    cases = json.load(sys.stdin)
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        answers = [run(case) for case in cases]
        known = fields()
    json.dump({"answers": answers, "fields": known}, sys.stdout)


if __name__ == "__main__":
    main()
