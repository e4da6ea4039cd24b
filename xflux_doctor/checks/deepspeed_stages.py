"""LA: what DeepSpeed's stage allows: offloading, and the flags of stage 3."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.deepspeed import PLACES, TRUE, name_of, needs_deepspeed, on_file, setting, value_at
from xflux_doctor.deepspeed_file import KEY, SECTION
from xflux_doctor.finding import Change, Comment, Edit, Finding, error, warning


@check("LA305", "what DeepSpeed shall offload can be offloaded", needs=("accelerate",))
def offloads(case: Case) -> Iterator[Finding]:
    """Weights leave the GPU under stage 3 only, states from stage 1 on; NVMe needs a path, which inline never arrives.

    Source: accelerate 0.30.1 and 1.15.0, utils/launch.py, `prepare_deepspeed_cmd_env` exports no nvme_path;
    DeepSpeed 0.14.4 and 0.19.8, zero/offload_config.py ("Valid only with stage 3", "with stage 1, 2, and 3").
    """
    needs_deepspeed(case)
    if case.job.bundled:
        yield from _bundled(case)
        return
    stage, inline = case.job.zero_stage, case.job.zero_file is None
    optimizer, param = case.job.offload_device("optimizer"), case.job.offload_device("param")
    if param in ("cpu", "nvme") and stage in (0, 1, 2):
        yield _param_below_three(case, param, stage)
    elif param == "nvme":
        yield from _nvme(case, "param", inline)
    if optimizer in ("cpu", "nvme") and stage == 0:
        file, path = ("accelerate", (SECTION, "zero_stage")) if inline else ("deepspeed", PLACES["zero_stage"])
        yield error(
            f"The optimizer is offloaded to {optimizer} under ZeRO stage 0.",
            "accelerate makes a DeepSpeedCPUAdam and DeepSpeed leaves the weights on the GPU: its step stops with "
            "'CPUAdam param is on cuda:0 and must be 'cpu''.",
            "Set the stage to 2, or offload nothing: a LoRA's states are small.",
            offers=(Edit(file, path, 2, "the optimizer is offloaded from stage 1 on"),),
        )
    elif optimizer == "nvme":
        yield from _nvme(case, "optimizer", inline)


def _bundled(case: Case) -> Iterator[Finding]:
    """The bundled trainer offloads to the CPU, weights under stage 3 only, and to no disk (zero_settings.py)."""
    stage, inline = case.job.zero_stage, case.job.zero_file is None
    for what in ("optimizer", "param"):
        device, key = case.job.offload_device(what), f"offload_{what}_device"
        if what == "param" and stage in (1, 2) and device in ("cpu", "nvme"):
            yield _param_below_three(case, device, stage)
        elif device == "nvme":
            change = setting(key, "cpu", "the trainer offloads to no disk")
            if not inline:
                change = on_file(case, Edit("deepspeed", PLACES[key], "cpu", "the trainer offloads to no disk"))
            yield error(
                f"offload_{what} asks for nvme.",
                "The bundled trainer stops before its first step: DeepSpeed compiles a module of its own against "
                "libaio for it.",
                f"Set {key} to cpu in the accelerate config, or the device of offload_{what} in the DeepSpeed file.",
                offers=change,
            )


def _param_below_three(case: Case, device: str, stage: int) -> Finding:
    if case.job.zero_file is None:
        edits: tuple[Change, ...] = setting("offload_param_device", "none", "weights stay where they are below stage 3")
    else:
        reason = "weights stay where they are below stage 3"
        edits = on_file(case, Edit("deepspeed", PLACES["offload_param_device"], "none", reason))
    because = "Only stage 3 offloads them: they stay on the GPU, and nobody says so."
    hint = "Set it to none. A LoRA's frozen base leaves the GPU by a quantized base, not by this."
    if case.job.bundled:
        because = f"ZeRO {stage} computes with whole weights, only 3 cuts them up: they stay on the GPU."
        hint = "Set it to none. Where the weights do not fit, set quantization or stream_blocks, or the stage to 3."
    make = error if case.job.bundled and device == "nvme" else warning  # its trainer stops at the word
    return make(f"The weights are offloaded to {device} under ZeRO stage {stage}.", because, hint, edits=edits)


def _nvme(case: Case, what: str, inline: bool) -> Iterator[Finding]:
    key = f"offload_{what}_nvme_path"
    path = (
        case.job.section(SECTION).get(key)
        if inline
        else value_at(case.job.zero_block, (f"offload_{what}", "nvme_path"))
    )
    if not inline and isinstance(path, str) and path not in ("", "auto", "none"):
        return
    if inline:
        told = f"{key} {path!r}" if path else f"no {key}"
        yield error(
            f"offload_{what}_device is nvme, with {told}.",
            "accelerate hands the device on and never the path: DeepSpeed would write to a folder named 'none'.",
            f"Name a JSON by {KEY} with zero_optimization.offload_{what}.nvme_path in it, or use cpu.",
            offers=setting(f"offload_{what}_device", "cpu", "accelerate hands on no path"),
        )
    else:
        block = ("zero_optimization", f"offload_{what}")
        yield error(
            f"{'.'.join(block)} is on nvme and names no nvme_path in {name_of(case)}.",
            "DeepSpeed has nowhere to write the pages.",
            "Name a folder on a local disk, or use cpu.",
            offers=on_file(case, Edit("deepspeed", (*block, "device"), "cpu", "there is no path")),
        )


@check("LA306", "the flags of ZeRO stage 3 fit the stage", needs=("accelerate",))
def stage_three_flags(case: Case) -> Iterator[Finding]:
    """zero3_init_flag below stage 3 is dropped with a warning; FLUX has no layers of experts to name."""
    needs_deepspeed(case)
    if case.job.bundled:
        raise SkipCheck("the bundled trainer reads none of them: under stage 3 it cuts each block up as it is loaded")
    section, stage = case.job.section(SECTION), case.job.zero_stage
    flag = section.get("zero3_init_flag")
    on = str(flag).lower() in TRUE
    if on and stage != 3:
        yield warning(f"zero3_init_flag is {flag!r} under ZeRO stage {stage}.",
                      "accelerate: 'DeepSpeed Zero3 Init flag is only applicable for ZeRO Stage 3. Setting it to "
                      "False.'", "Set it to false.",
                      edits=setting("zero3_init_flag", False, "it is for stage 3 only"))  # fmt: skip
    bare = case.facts.packages is not None and "transformers" not in case.facts.packages
    if stage == 3 and (on or flag is None) and bare:
        yield error("zero3_init_flag is on and transformers is not installed.",
                    "accelerate: 'When `zero3_init_flag` is set, it requires Transformers to be installed.'",
                    "Install transformers, or set zero3_init_flag to false.",
                    offers=setting("zero3_init_flag", False, "transformers is not installed"))  # fmt: skip
    names = section.get("deepspeed_moe_layer_cls_names")
    if names is not None:
        key = "deepspeed_moe_layer_cls_names"
        yield error(f"{key} is {names!r}.",
                    f"accelerate looks for these layers and stops: 'Could not find a transformer layer class called "
                    f"'{str(names).split(',')[0]}' to wrap in the model.' FLUX has no mixture of experts.",
                    "Remove it.",
                    edits=(Comment("accelerate", (SECTION, key), "FLUX has no mixture of experts"),))  # fmt: skip
