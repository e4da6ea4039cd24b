"""The train config: one YAML file, one frozen dataclass.

X-Flux's own files are accepted unchanged, `data_config:` included. An unknown key is an error with the
nearest name, and all problems are reported at once: what ran is what the file says. Relative paths are
relative to the working folder, as in X-Flux.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_type_hints

import yaml
from xflux_trainer import settings
from xflux_trainer.coerce import Wrong, coerce, nearest, show
from xflux_trainer.errors import ConfigError, Problem
from xflux_trainer.rules import between, notes_on, out_of_range
from xflux_trainer.settings import DATA_CONFIG, HUB_IDS, MODE_KEYS, PATCH, RANGES, TARGET_SETS, TrainConfig, altered
from xflux_trainer.yamlfile import read_mapping

__all__ = [
    "DATA_CONFIG", "HUB_IDS", "PATCH", "RANGES", "ConfigError", "Problem", "TrainConfig",
    "altered", "load", "load_with_notes", "to_dict", "to_yaml",
]  # fmt: skip

XFLUX_KEYS = (
    "model_name img_dir img_size num_workers report_to train_batch_size output_dir max_train_steps learning_rate "
    "lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm logging_dir "
    "mixed_precision checkpointing_steps checkpoints_total_limit tracker_project_name resume_from_checkpoint "
    "gradient_accumulation_steps"
).split()
"""What X-Flux's fine-tune and ControlNet scripts read: without one of them they stop."""
SAMPLE_KEYS = "disable_sampling sample_every sample_prompts sample_width sample_height sample_steps".split()


def load(path: str | Path) -> TrainConfig:
    """The config that the file holds. Raises `ConfigError` with all its problems."""
    return load_with_notes(path)[0]


def written_keys(path: str | Path) -> frozenset[str]:
    """The keys that the file gives a value, in `data_config` too. Raises `ConfigError` for a file that holds none."""
    return frozenset(_flatten(read_mapping(path))[0])


def load_with_notes(path: str | Path) -> tuple[TrainConfig, tuple[str, ...]]:
    """The config, and a sentence for every place where this trainer differs from X-Flux."""
    raw = read_mapping(path)
    data, problems, notes = _flatten(raw)
    if "mode" not in data:
        notes += _xflux_mode(Path(path).name, raw, data)
    hints = _hints(data)
    values: dict[str, Any] = {}
    for key, (shown, value) in data.items():
        if key not in hints:
            problems.append(Problem(shown, "is not a key of the train config", nearest(key, _KEYS)))
            continue
        try:
            values[key] = _SPECIAL[key](value) if key in _SPECIAL else coerce(value, hints[key])
        except Wrong as wrong:
            problems.append(Problem(shown, wrong.seen, wrong.hint))
            continue
        problems += out_of_range(key, shown, values[key])
    shown_names = {key: shown for key, (shown, _) in data.items()}
    if "img_dir" not in data:
        problems.append(Problem("data_config.img_dir", "is missing", "Name the folder of training images."))
    if problems:
        # A stand-in for the missing folder lets the rules between keys speak as well.
        values.setdefault("img_dir", "")
    config = TrainConfig(**values)
    problems += [problem._replace(key=shown_names.get(problem.key, problem.key)) for problem in between(config)]
    if problems:
        raise ConfigError(path, tuple(problems))
    return config, (*notes, *notes_on(config))


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config in plain JSON and YAML types, every key present."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
    return {**plain, "repeats": dict(config.repeats)}


def to_yaml(config: TrainConfig) -> str:
    """A file that `load` reads back as the same config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=110)


_KEYS: dict[str, Any] = TrainConfig.__dataclass_fields__


def _hints(keys: Iterable[str]) -> dict[str, Any]:
    """{key: its type} of those that the config has. Types are written as text, and evaluating all takes as long as
    reading the file."""
    written = SimpleNamespace(__annotations__={key: _KEYS[key].type for key in keys if key in _KEYS})
    return get_type_hints(written, vars(settings))


def _flatten(raw: dict[Any, Any]) -> tuple[dict[str, tuple[str, Any]], list[Problem], list[str]]:
    """{key: (the key as the file shows it, value)}; `data_config` is laid over the top level, as X-Flux reads it."""
    problems: list[Problem] = []
    notes: list[str] = []
    data = {str(key): (str(key), value) for key, value in raw.items() if key != "data_config"}
    if "data_config" not in raw:
        return data, problems, notes
    nested = raw["data_config"]
    if not isinstance(nested, dict):
        seen = f"is {show(nested)}, not a group of keys"
        problems.append(Problem("data_config", seen, "Indent its keys below it, or remove it."))
        return data, problems, notes
    for key, value in ((str(key), value) for key, value in nested.items()):
        if key not in DATA_CONFIG:
            hint = "Move it out of data_config." if key in _KEYS else nearest(key, DATA_CONFIG)
            problems.append(Problem(f"data_config.{key}", "is not a key of data_config", hint))
            continue
        if key in data and data[key][1] != value:
            notes.append(
                f"{key} is {show(value)}, as data_config says; the top level's {show(data[key][1])} is ignored."
            )
        data[key] = (f"data_config.{key}", value)
    return data, problems, notes


def _xflux_mode(name: str, raw: dict[Any, Any], data: dict[str, tuple[str, Any]]) -> list[str]:
    """X-Flux's files say by their script what they train. Those of its fine-tune and its ControlNet have every key
    that these scripts read and none of adapters; the ControlNet's is told by its names. Lays the mode over `data`."""
    lora = {*MODE_KEYS["lora"], *SAMPLE_KEYS}
    if "data_config" not in raw or lora & set(data) or not set(XFLUX_KEYS) <= set(data):
        return []
    names = " ".join(str(data.get(key, ("", ""))[1]) for key in ("output_dir", "tracker_project_name"))
    if any(word in f"{name} {names}".lower() for word in ("canny", "controlnet")) or set(MODE_KEYS["controlnet"]) & set(
        data
    ):
        data["mode"] = ("mode", "controlnet")
        return [
            "mode is controlnet, as this is X-Flux's ControlNet file by its keys and names; write mode: to be sure."
        ]
    data["mode"] = ("mode", "finetune")
    note = "mode is finetune, as this is X-Flux's fine-tune file by its keys; write mode: lora for adapters."
    if "train_parameters" not in data:
        data["train_parameters"] = ("train_parameters", ["txt_attn"])
        return [note, "train_parameters is txt_attn, the text stream's attention, as in X-Flux; [] trains all."]
    return [note]


def _blocks(value: Any) -> tuple[int, ...] | None:
    """X-Flux writes "1,2,3,4"; a YAML list is taken too."""
    if value is None:
        return None
    hint = 'Write a list such as [0, 1, 2] or "0,1,2"; null means all blocks.'
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        blocks = tuple(coerce(item, int) for item in items)
    except Wrong as wrong:
        raise Wrong(f"is {show(value)}", hint) from wrong
    if any(block < 0 for block in blocks) or len(set(blocks)) < len(blocks):
        raise Wrong(f"is {show(value)}", "Block numbers start at 0, each at most once.")
    return blocks


def _names(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(coerce([value] if isinstance(value, str) else value, tuple[str, ...]))


def _sizes(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(coerce(value if isinstance(value, list) else [value], tuple[int, ...]))


def _repeats(value: Any) -> tuple[tuple[str, int], ...]:
    hint = "Write a mapping such as {faces: 3}; `.` is img_dir itself."
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise Wrong(f"is {show(value)}", hint)
    try:
        pairs = tuple((str(coerce(folder, str)), int(coerce(times, int))) for folder, times in value.items())
    except Wrong as wrong:
        raise Wrong(f"is {show(value)}", hint) from wrong
    if any(times < 1 for _, times in pairs):
        raise Wrong(f"is {show(value)}", "An image counts once or more; to leave a folder out, move it.")
    return pairs


def _targets(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, list):
        if not value:
            raise Wrong("is an empty list", f"Write one of {', '.join(TARGET_SETS)}, or name modules.")
        return tuple(coerce(value, tuple[str, ...]))
    return str(coerce(value, Literal["xflux", "attn", "diffusers", "all-linear"]))


def _model_name(value: Any) -> str:
    if value == "flux-dev-fp8":
        seen = "is flux-dev-fp8, whose weights are rounded to 8 bits without scales and cannot be trained"
        raise Wrong(seen, "Write flux-dev.")
    return str(coerce(value, Literal["flux-dev", "flux-schnell"]))


def _tracker(value: Any) -> str:
    return "none" if value is None else str(coerce(value, Literal["tensorboard", "wandb", "none"]))


_SPECIAL = {
    "single_blocks": _blocks, "double_blocks": _blocks, "sample_prompts": _names, "lora_targets": _targets,
    "model_name": _model_name, "report_to": _tracker, "train_parameters": _names, "resolutions": _sizes,
    "repeats": _repeats,
}  # fmt: skip
"""Keys whose YAML form is wider than their type."""
