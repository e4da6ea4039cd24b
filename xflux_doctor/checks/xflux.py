"""XF: an X-Flux checkout and its config, judged as X-Flux's own scripts would run them (--xflux)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from xflux_doctor import xflux_bill
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.words import installed
from xflux_doctor.finding import Change, Edit, Finding, Remove, Rename, Scalar, error, warning
from xflux_doctor.xflux import WEIGHTS, XFlux
from xflux_doctor.xflux_scripts import SCRIPTS

REPOSITORY = "https://github.com/XLabs-AI/x-flux"
_ACCUMULATION = "gradient_accumulation_steps"
_SHIPPED: dict[str, Scalar] = {
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.01, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
    "logging_dir": "logs", "lr_scheduler": "constant", "lr_warmup_steps": 10, "mixed_precision": "bf16",
    "checkpointing_steps": 2500, "checkpoints_total_limit": 10, "tracker_project_name": "lora_test",
    "gradient_accumulation_steps": 2, "double_blocks": None, "single_blocks": None, "disable_sampling": False,
    "sample_every": 250, "sample_width": 1024, "sample_height": 1024, "sample_steps": 20,
}  # fmt: skip
"""What X-Flux's own configs say, for keys where that is a sensible answer to a missing one (null blocks: all)."""
_SAMPLING = frozenset("sample_every sample_prompts sample_width sample_height sample_steps".split())
_PACKAGES = {
    "cv2": ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"),
    "timm": ("timm",), "onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "matplotlib": ("matplotlib",),
    "einops": ("einops",), "omegaconf": ("omegaconf",), "pandas": ("pandas",), "datasets": ("datasets",),
    "optimum.quanto": ("optimum-quanto",), "torchvision": ("torchvision",), "diffusers": ("diffusers",),
    "transformers": ("transformers",), "sentencepiece": ("sentencepiece",), "safetensors": ("safetensors",),
    "PIL": ("pillow",),
}  # fmt: skip
"""{module that a training script imports, itself or through src/flux/annotator: distributions that bring it}."""


@check("XF101", "the X-Flux checkout is whole")
def checkout_whole(case: Case) -> Iterator[Finding]:
    """The script that goes with the config and the modules that it imports are there (x-flux@4749542)."""
    found = xflux_bill.whole(case)
    if found.missing:
        more = f" and {len(found.missing) - 3} more" if len(found.missing) > 3 else ""
        yield error(
            f"{found.root} lacks {', '.join(found.missing[:3])}{more} ({found.script.kind}: {found.script.because}).",
            "The script stops at its imports: ModuleNotFoundError.",
            "Clone X-Flux again; or name the script that is meant: --xflux CHECKOUT/"
            f"{SCRIPTS['finetune' if found.script.kind == 'lora' else 'lora']}.",
            commands=(f"git -C {found.root} checkout -- .",),
            docs=REPOSITORY,
        )


@check("XF102", "the config has every key that X-Flux's script reads")
def keys_given(case: Case) -> Iterator[Finding]:
    """OmegaConf raises ConfigAttributeError at a key's first use, which may be hours into the run."""
    found = xflux_bill.whole(case)
    if found.problem:
        yield error(f"{found.problem}.", "OmegaConf does not load it.", "Mend that line.")
        return
    found = xflux_bill.of(case)
    lacking = _lacking(found)
    for key in lacking:
        near = _meant(key, found)
        change: tuple[Change, ...] = ()
        hint = f"Add {key} to the config."
        if near:
            change, hint = (Rename("train", (near,), key, "the script reads this name"),), f"Rename {near}."
        elif key == "train_batch_size":
            change = (Edit("train", (key,), found.batch, "data_config's value"),)
        elif key in _SHIPPED:
            change = (Edit("train", (key,), _SHIPPED[key], "the value of X-Flux's own config"),)
        elif key == "num_train_epochs":
            hint = "Give max_train_steps a number, or add num_train_epochs."
        elif key == "resume_from_checkpoint":
            hint = "Write null to start afresh, or latest."
        yield error(
            f"The config has no {key}; {found.script.path.name} reads it {_when(key, found)}.",
            f"omegaconf.errors.ConfigAttributeError: Missing key {key}.",
            hint,
            edits=change,
        )
    if "data_config" not in lacking:
        yield from _loader_keys(found)


def _lacking(found: XFlux) -> list[str]:
    """Keys that the script will read, by its own text, and that the config has not."""
    config = found.config or {}
    wanted = [key for key in found.script.reads if key not in config]
    if found.get("max_train_steps") is not None or "max_train_steps" not in config:
        wanted = [key for key in wanted if key != "num_train_epochs"]
    if found.get("disable_sampling") is True:
        wanted = [key for key in wanted if key not in _SAMPLING]
    return wanted


def _meant(key: str, found: XFlux) -> str:
    """The unknown key of the config that is this one misspelt."""
    unknown = [name for name in found.config or {} if name not in found.script.reads]
    near = difflib.get_close_matches(key, unknown, n=1, cutoff=0.85)
    return near[0] if near else ""


def _when(key: str, found: XFlux) -> str:
    steps = {"checkpoints_total_limit": "checkpointing_steps"} | dict.fromkeys(
        _SAMPLING - {"sample_every"}, "sample_every"
    )
    if key in steps and found.get(steps[key]):
        return f"at step {found.get(steps[key])}"
    return {
        "start": "at its start",
        "setup": "after it has loaded the model",
        "steps": "in its first step",
    }[found.script.reads.get(key, "start")]


def _loader_keys(found: XFlux) -> Iterator[Finding]:
    """`loader(**args.data_config)` takes these keys and no others."""
    takes = found.script.loader_keys
    if takes is None:
        return
    for key in (key for key, needed in takes.items() if needed and key not in found.data):
        yield error(
            f"data_config has no {key}.",
            f"After the model is loaded: TypeError: missing 1 required positional argument: '{key}'.",
            f"Add {key} below data_config.",
            edits=(Edit("train", ("data_config", key), 4, "the value of X-Flux's own config"),)
            if key == "num_workers"
            else (),
        )
    for key in (str(key) for key in found.data if str(key) not in takes):
        near = difflib.get_close_matches(key, [name for name in takes if name not in found.data], n=1, cutoff=0.8)
        change: Change = Remove("train", ("data_config", key), "the script's loader does not take it")
        if near:
            change = Rename("train", ("data_config", key), near[0], "the loader's name")
        yield error(
            f"data_config has {key}, which {found.script.path.name}'s loader does not take.",
            f"After the model is loaded: TypeError: __init__() got an unexpected keyword argument '{key}'.",
            f"Rename it to {near[0]}." if near else "Remove it.",
            edits=(change,),
        )


@check("XF103", "X-Flux's script reads every key of the config")
def keys_read(case: Case) -> Iterator[Finding]:
    """OmegaConf keeps unknown keys without a word, so that a misspelt or foreign one does nothing."""
    found = xflux_bill.of(case)
    if not found.script.reads:
        raise SkipCheck("the script is not there (see XF101)")
    lacking = _lacking(found)
    renamed = {_meant(key, found) for key in lacking}
    reads = set(found.script.reads) | {"num_train_epochs"} | _SAMPLING
    for key in found.config or {}:
        if key in reads or key in renamed:
            continue
        near = difflib.get_close_matches(key, reads, n=1, cutoff=0.75)
        because = "It does nothing."
        if key == "gradient_checkpointing":
            because = "It does nothing: X-Flux's activation checkpointing cannot be turned on, and does not run."
        elif found.script.loader_keys and key in found.script.loader_keys:
            near, because = [f"data_config.{key}"], "It does nothing at the top level."
        yield warning(
            f"{found.script.path.name} never reads {key}.",
            because,
            f"Did you mean {near[0]}?" if near else "Remove it, or train with the bundled trainer (without --xflux).",
        )


@check("XF104", "X-Flux's gradient accumulation is the same in both files", needs=("accelerate",))
def accumulation(case: Case) -> Iterator[Finding]:
    """Under `accelerate launch` accelerate's value wins; X-Flux's log, loss and epochs go on with the YAML's."""
    found = xflux_bill.of(case)
    if not case.job.deepspeed:
        raise SkipCheck("only DeepSpeed's section of the accelerate file reaches the ranks")
    real, said = case.job.section("deepspeed_config").get(_ACCUMULATION), found.get(_ACCUMULATION)
    if not isinstance(real, int) or not isinstance(said, int) or real == said or min(real, said) < 1:
        return
    images = found.batch * case.job.num_processes * real
    yield warning(
        f"{_ACCUMULATION} is {real} in accelerate's file and {said} in the config.",
        f"A step takes {images} images, not the {found.batch * case.job.num_processes * said} that the config asks "
        f"for, and the logged train_loss is {real / said:g} times the true one.",
        "Write one number into both.",
        edits=(Edit("train", (_ACCUMULATION,), real, "accelerate's value wins"),),
        docs="https://github.com/huggingface/accelerate/blob/v0.30.1/src/accelerate/utils/launch.py#L380",
    )


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@check("XF105", "X-Flux's two batch sizes agree")
def batch_sizes(case: Case) -> Iterator[Finding]:
    """data_config.train_batch_size is the real one; the top-level one is only logged (shipped canny config: 4, 3)."""
    found = xflux_bill.of(case)
    real, said = found.data_get("train_batch_size"), found.get("train_batch_size")
    if _counts(real) and _counts(said) and real != said:
        yield warning(
            f"train_batch_size is {said} at the top level and {real} in data_config.",
            f"Each rank trains on {real} images a step; the log's total batch size is computed with {said}.",
            "Write data_config's number at the top level too.",
            edits=(Edit("train", ("train_batch_size",), real, "data_config's value is the real one"),),
        )


@check("XF106", "X-Flux can train the named model")
def model_trains(case: Case) -> Iterator[Finding]:
    """flux-dev-fp8 is a quantized file without the weights that the scripts load (XLabs-AI/x-flux#115)."""
    found = xflux_bill.of(case)
    name = found.get("model_name")
    known = [model for model in WEIGHTS.values() if model]
    if name == "flux-dev-fp8":
        yield error(
            "model_name is flux-dev-fp8.",
            "'NotImplementedError: Cannot copy out of meta tensor; no data!': its tensors have other names, so the "
            "model stays without weights. It is for inference.",
            "Train flux-dev.",
            edits=(Edit("train", ("model_name",), "flux-dev", "fp8 weights cannot be trained"),),
            docs=f"{REPOSITORY}/issues/115",
        )
    elif name is not None and name not in known:
        near = difflib.get_close_matches(str(name), known[:2], n=1)
        yield error(
            f"model_name is {name!r}.",
            f"KeyError: {name!r}, after T5 and CLIP were loaded.",
            "X-Flux trains flux-dev and flux-schnell.",
            edits=(Edit("train", ("model_name",), near[0], "a name that X-Flux knows"),) if near else (),
        )


@check("XF107", "X-Flux's sample images have a tracker", needs=("packages",))
def samples_tracked(case: Case) -> Iterator[Finding]:
    """The LoRA script hands its samples to wandb whatever report_to says (train_flux_lora_deepspeed.py:303)."""
    assert case.facts.packages is not None
    found = xflux_bill.of(case)
    if not found.script.logs_images or found.get("disable_sampling") is True:
        raise SkipCheck("the script makes no sample images")
    tracker, step = found.get("report_to"), found.get("sample_every")
    there = "wandb" in case.facts.packages
    steps = found.get("max_train_steps")
    if _counts(step) and _counts(steps) and step > steps:
        raise SkipCheck(f"the run ends before step {step}")
    if there and tracker in ("wandb", "all"):
        return
    failure = "wandb.errors.Error: You must call wandb.init() before wandb.log()"
    if not there:
        failure = "NameError: name 'wandb' is not defined"
    python = case.facts.python.executable if case.facts.python else "python"
    yield error(
        f"report_to is {tracker!r}, sampling is on, and wandb is {'' if there else 'not '}installed.",
        f"The run ends at step {step}: '{failure}'.",
        "Set report_to to wandb, with wandb installed; or set disable_sampling to true.",
        commands=() if there else (f"{python} -m pip install wandb",),
    )


@check("XF108", "X-Flux's scripts can be imported", needs=("packages",))
def imports(case: Case) -> Iterator[Finding]:
    """Every script imports all annotators, so a LoRA needs cv2, timm, onnxruntime and matplotlib as well."""
    assert case.facts.packages is not None
    found = xflux_bill.whole(case)
    lacking = {
        module: names[0]
        for module, names in _PACKAGES.items()
        if not any(name in case.facts.packages for name in names)
    }
    if case.job.deepspeed and installed(case, "deepspeed") is None:
        lacking["deepspeed"] = "deepspeed"
    if lacking:
        python = case.facts.python.executable if case.facts.python else "python"
        names = " ".join(lacking.values())
        yield error(
            f"{found.script.path.name} imports {', '.join(lacking)}; {python} has no {', '.join(lacking.values())}.",
            f"ModuleNotFoundError: No module named '{next(iter(lacking))}'.",
            "Install them there; X-Flux's requirements.txt lacks pandas and wandb.",
            commands=(f"{python} -m pip install {names}",),
            docs=f"{REPOSITORY}/blob/main/requirements.txt",
        )


@check("XF109", "X-Flux's model variables name files that exist")
def weights_exist(case: Case) -> Iterator[Finding]:
    """FLUX_DEV, FLUX_SCHNELL, FLUX_DEV_FP8 and AE take the hub's place, an empty one too (src/flux/util.py)."""
    found = xflux_bill.of(case)
    for name, fault in found.weights.items():
        if fault and WEIGHTS[name] in ("", found.get("model_name")):
            yield error(
                f"{name} {fault}.",
                "X-Flux loads that file and does not ask the hub: FileNotFoundError, or safetensors' refusal.",
                "Name the .safetensors file, or unset the variable.",
                commands=(f"unset {name}",),
            )
