"""Whether a run may go on from a checkpoint: what must be as it was, and what may change with a word about it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from xflux_trainer import config as train_config
from xflux_trainer import model
from xflux_trainer.cache import Entries, Entry
from xflux_trainer.config import TrainConfig
from xflux_trainer.errors import Problem
from xflux_trainer.layout import Base
from xflux_trainer.settings import MODE_KEYS

SAME = {
    "mode": "Train in the same mode",
    "rank": "Keep the rank",
    "lora_targets": "Keep the targets",
    "single_blocks": "Keep the blocks",
    "double_blocks": "Keep the blocks",
    "train_parameters": "Keep the trained parameters",
    "controlnet_depth": "Keep the depth",
    "control_type": "Keep the kind of condition",
    "optimizer": "Keep the optimizer, whose state is another one's",
    "seed": "Keep the seed, from which the order of the images and the noise follow",
}
"""Keys that must be as they were, with the advice that `, or start afresh.` is added to."""

TOLD = (
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "num_train_epochs",
    "weight_update", "step_in_backward", "backward_clip", "ema_decay",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "mixed_precision",
    "quantization", "modulation", "guidance", "timestep_sampling", "stratified_timesteps", "timestep_shift",
    "caption_dropout", "random_flip",
)  # fmt: skip
"""Keys that a resumed run may change: it is another training from there on, which a note says."""

DIGESTS = {
    "data": (
        "the images, their captions or how they are prepared have changed",
        "Put them back; to go on with others, start afresh with {init}, so that the order of the images begins anew.",
    ),
    "base": ("the base model has changed", "Point pretrained_model at the one that it was trained on."),
    "model": ("what is trained has changed", "Keep what is trained as it was, or start afresh."),
}
"""What a digest that differs means, and what to do."""

INITS = {
    "lora": "lora_init: set to the adapter file (`convert` makes one of a checkpoint)",
    "finetune": "pretrained_model set to the fine-tuned model (`convert --format bfl` makes one file of it)",
    "controlnet": "controlnet_init set to the trained ControlNet",
}


def compatible(
    manifest: Mapping[str, Any],
    config: TrainConfig,
    digests: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    world_size: int,
    accumulation: int,
) -> tuple[list[Problem], list[str]]:
    """What forbids going on from the checkpoint of that manifest, and notes on what is another training from here on.

    Digests are compared where both sides have them. `accumulation` is the number of forward passes of a step.
    """
    old = _complete(manifest["config"])
    new = train_config.to_dict(config)
    problems = [
        Problem(key, f"is {_show(new[key])}, the checkpoint's is {_show(old[key])}", f"{advice}, or start afresh.")
        for key, advice in SAME.items()
        if old[key] != new[key] and _read(key, config.mode)
    ]
    problems += _alpha(old, config) + _digests(manifest, digests, config.mode)
    if not problems:  # a cause says more than the shapes that follow from it
        problems += _shapes(manifest, shapes)
    images = int(old["train_batch_size"]) * int(manifest["accumulation"]) * int(manifest["world_size"])
    now = config.train_batch_size * accumulation * world_size
    if images != now:
        was = f"{old['train_batch_size']} x {manifest['accumulation']} accumulated x {manifest['world_size']} ranks"
        seen = f"makes steps of {now} images with {accumulation} accumulated x {world_size} ranks"
        hint = f"Keep train_batch_size x gradient_accumulation_steps x ranks at {images} ({was}), or start afresh."
        problems.append(Problem("train_batch_size", f"{seen}, the checkpoint's steps have {images}", hint))
    notes = [
        f"{key} is {_show(new[key])} from here on; up to the checkpoint it was {_show(old[key])}."
        for key in TOLD
        if old[key] != new[key] and _read(key, config.mode)
    ]
    if images == now and (old["train_batch_size"], manifest["world_size"]) != (config.train_batch_size, world_size):
        notes.append(
            f"the same {now} images a step come from {world_size} ranks x {config.train_batch_size}, not "
            f"{manifest['world_size']} x {old['train_batch_size']}: their order is another from here on."
        )
    return problems, notes


def digests(base: Base, entries: Entries, heldout: Sequence[Entry], config: TrainConfig) -> dict[str, str]:
    """What a run is made of: its images, captions and conditions in their order, as they were encoded, the base's
    weights; and what its held-out loss is measured on."""
    listed = [f"{entry.latents.name} {entry.text.name} {entry.condition and entry.condition.name}" for entry in heldout]
    measured = repr((listed, config.heldout_timesteps, config.guidance))
    return {
        "data": entries.digest(),
        "base": model.fingerprint(base.transformer),
        "heldout": hashlib.sha256(measured.encode()).hexdigest(),
    }


def measures_otherwise(manifest: Mapping[str, Any], digests: Mapping[str, str]) -> bool:
    """Whether held-out losses from here on cannot be compared with those of the checkpoint's run."""
    old = manifest["digests"].get("heldout")
    return old is not None and old != digests["heldout"]


def batches(manifest: Mapping[str, Any], world_size: int, accumulation: int) -> int:
    """The checkpoint's position in the order of the images, in batches of this run."""
    steps = int(manifest["progress"]["batches"]) // (int(manifest["world_size"]) * int(manifest["accumulation"]))
    return steps * world_size * accumulation


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that an earlier release wrote knows fewer keys: its runs had the defaults."""
    defaults = train_config.to_dict(TrainConfig(img_dir=""))
    return {field.name: config.get(field.name, defaults[field.name]) for field in fields(TrainConfig)}


def _read(key: str, mode: str) -> bool:
    """Whether that mode looks at the key at all."""
    return key in MODE_KEYS[mode] or not any(key in keys for keys in MODE_KEYS.values())


def _alpha(old: Mapping[str, Any], config: TrainConfig) -> list[Problem]:
    """Null stands for the rank, whose change is told by itself."""
    if old["lora_alpha"] is None and config.lora_alpha is None:
        return []
    was = float(old["rank"] if old["lora_alpha"] is None else old["lora_alpha"])
    if config.mode != "lora" or was == config.alpha:
        return []
    return [Problem("lora_alpha", f"is {config.alpha:g}, the checkpoint's is {was:g}", "Keep it, or start afresh.")]


def _digests(manifest: Mapping[str, Any], digests: Mapping[str, str], mode: str) -> list[Problem]:
    problems = []
    for key, (seen, hint) in DIGESTS.items():
        old, new = manifest["digests"].get(key), digests.get(key)
        if old is not None and new is not None and old != new:
            problems.append(Problem("", f"since the checkpoint {seen}", hint.format(init=INITS[mode])))
    return problems


def _shapes(manifest: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    given = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
    for name in {**shapes, **given}:
        if shapes.get(name) != given.get(name):
            seen = f"the checkpoint holds other weights: {name} is {given.get(name)}, not {shapes.get(name)}"
            return [Problem("", seen, "Was it trained on another base model? Name the right one, or start afresh.")]
    return []


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
