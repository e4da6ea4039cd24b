"""The train config: one YAML file, one frozen dataclass.

X-Flux's own files are accepted unchanged, `data_config:` included. An unknown key is an error with the
nearest name, and all problems are reported at once: what ran is what the file says. Relative paths are
relative to the working folder, as in X-Flux.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from xflux_trainer.coerce import Wrong, coerce, nearest, show
from xflux_trainer.errors import ConfigError, Problem
from xflux_trainer.yamlfile import read_mapping

__all__ = ["ConfigError", "Problem", "TrainConfig", "load", "load_with_notes", "to_dict", "to_yaml"]

HUB_IDS = {"flux-dev": "black-forest-labs/FLUX.1-dev", "flux-schnell": "black-forest-labs/FLUX.1-schnell"}
PATCH = 16
"""Pixels on a side of one image token: the VAE's 8 times the 2 of a latent patch."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that one training run is told. Names and meanings are X-Flux's where it has the key."""

    img_dir: str
    """Folder of images, each with its caption beside it; folders inside it are read too."""
    output_dir: str = "output"
    """Folder for the adapter, the checkpoints, the metrics and the samples."""

    model_name: Literal["flux-dev", "flux-schnell"] = "flux-dev"
    """Which FLUX.1 the base model is; names the hub id when `pretrained_model` is absent."""
    pretrained_model: str | None = None
    """Folder in diffusers' layout, or a hub id; null: black-forest-labs' own for `model_name`."""

    rank: int = 16
    """Rank of every adapter."""
    lora_alpha: float | None = None
    """Adapter output is scaled by lora_alpha / rank; null: equal to rank, a scale of 1 as in X-Flux."""
    lora_targets: str | tuple[str, ...] = "xflux"
    """`xflux`, `attn`, `diffusers`, `all-linear`, or a list of module name endings."""
    single_blocks: tuple[int, ...] | None = None
    """Single-stream blocks that get adapters, counted from 0, as a list or "1,2,3"; null: all."""
    double_blocks: tuple[int, ...] | None = None
    """Double-stream blocks that get adapters; null: all."""

    caption_type: Literal["json", "txt"] = "json"
    """Captions are `NAME.json` holding {"caption": …}, or `NAME.txt`."""
    img_size: int = 512
    """Pixels of an image's long side; a multiple of 16."""
    random_ratio: bool = False
    """Crop each image to 16:9, 4:3, 1:1 or not at all; the choice follows from the seed and the image."""
    num_workers: int = 4
    """Threads that decode images while the cache is filled."""
    max_text_tokens: int = 512
    """T5 tokens per caption; longer captions are cut."""
    cache_dir: str | None = None
    """Folder for encoded captions and images; null: `cache` inside output_dir."""

    train_batch_size: int = 1
    """Images per rank and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step; the accelerate config's value wins where it has one."""
    max_train_steps: int | None = 1000
    """Optimizer steps; null: as many as num_train_epochs gives."""
    num_train_epochs: int | None = None
    """Passes over the images; only read when max_train_steps is null."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """How the learning rate moves; all but `constant` warm up for lr_warmup_steps first."""
    lr_warmup_steps: int = 0
    """Optimizer steps of warm-up, whatever the number of ranks."""
    adam_beta1: float = 0.9
    """AdamW's first decay."""
    adam_beta2: float = 0.999
    """AdamW's second decay."""
    adam_weight_decay: float = 0.01
    """AdamW's weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Number format of the frozen model and of the computation; adapters and optimizer stay in fp32."""
    gradient_checkpointing: bool = True
    """Recompute every block's activations in the backward pass instead of keeping them."""
    seed: int = 0
    """Seeds the adapters, the order of the images and the noise."""

    guidance: float = 1.0
    """Guidance that the model is told while it trains (flux-dev only)."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How t is drawn for each image, before the shift."""
    timestep_shift: float | Literal["auto", "none"] = "auto"
    """The shift mu of t; auto: from the number of image tokens, as the model samples."""

    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = 10
    """Checkpoints that are kept; null: all."""
    resume_from_checkpoint: str | None = None
    """`latest` (start afresh when there is none), a checkpoint folder, or null: start afresh."""

    heldout_dir: str | None = None
    """Images with captions for the held-out loss; null: it is measured on the training images."""
    heldout_samples: int = 4
    """Images in the held-out loss, the first by name; 0: no held-out loss."""
    heldout_timesteps: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Times at which the held-out loss is measured, each with fixed noise."""

    disable_sampling: bool = False
    """No sample images, neither on the way nor at the end."""
    sample_every: int = 250
    """Optimizer steps between sample images; 0: only at the end."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the sample images; empty: the first caption."""
    sample_width: int = 1024
    """Width of the sample images; a multiple of 16."""
    sample_height: int = 1024
    """Height of the sample images; a multiple of 16."""
    sample_steps: int = 20
    """Denoising steps of the sample images."""
    sample_guidance: float = 3.5
    """Guidance of the sample images (flux-dev only)."""
    sample_seed: int = 0
    """Seed of the sample images' noise."""

    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where the curves go, besides metrics.jsonl."""
    logging_dir: str = "logs"
    """Folder inside output_dir for the tracker's files."""
    tracker_project_name: str = "xflux"
    """The tracker's project name."""

    @property
    def base_model(self) -> str:
        """The folder or hub id of the base model."""
        return self.pretrained_model or HUB_IDS[self.model_name]

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or the rank."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir) if self.cache_dir else Path(self.output_dir) / "cache"


DATA_CONFIG = ("img_dir", "caption_type", "img_size", "random_ratio", "num_workers", "train_batch_size")
"""The keys that X-Flux keeps under `data_config:`."""

RANGES: dict[str, tuple[float, float]] = {
    "rank": (1, 4096), "lora_alpha": (1e-6, 1e6), "img_size": (32, 8192), "num_workers": (0, 256),
    "max_text_tokens": (1, 512), "train_batch_size": (1, 4096), "gradient_accumulation_steps": (1, 65536),
    "max_train_steps": (1, 1e9), "num_train_epochs": (1, 1e6), "learning_rate": (1e-12, 10),
    "lr_warmup_steps": (0, 1e9), "adam_beta1": (0, 0.999999999), "adam_beta2": (0, 0.999999999),
    "adam_weight_decay": (0, 10), "adam_epsilon": (1e-20, 1), "max_grad_norm": (0, 1e6),
    "seed": (0, 2**63 - 1), "guidance": (0, 100), "timestep_shift": (-10, 10),
    "checkpointing_steps": (1, 1e9), "checkpoints_total_limit": (1, 1e6), "heldout_samples": (0, 1e6),
    "sample_every": (0, 1e9), "sample_width": (16, 8192), "sample_height": (16, 8192),
    "sample_steps": (1, 1000), "sample_guidance": (0, 100), "sample_seed": (0, 2**63 - 1),
}  # fmt: skip
"""Smallest and largest sensible value of each number, both included."""

TARGET_SETS = ("xflux", "attn", "diffusers", "all-linear")


def load(path: str | Path) -> TrainConfig:
    """The config that the file holds. Raises `ConfigError` with all its problems."""
    return load_with_notes(path)[0]


def load_with_notes(path: str | Path) -> tuple[TrainConfig, tuple[str, ...]]:
    """The config, and a sentence for every place where this trainer differs from X-Flux."""
    data, problems, notes = _flatten(read_mapping(path))
    hints = get_type_hints(TrainConfig)
    values: dict[str, Any] = {}
    for key, (shown, value) in data.items():
        if key not in hints:
            problems.append(Problem(shown, "is not a key of the train config", nearest(key, hints)))
            continue
        try:
            values[key] = _SPECIAL[key](value) if key in _SPECIAL else coerce(value, hints[key])
        except Wrong as wrong:
            problems.append(Problem(shown, wrong.seen, wrong.hint))
            continue
        problems += _range_problem(key, shown, values[key])
    shown_names = {key: shown for key, (shown, _) in data.items()}
    if "img_dir" not in data:
        problems.append(Problem("data_config.img_dir", "is missing", "Name the folder of training images."))
    if problems:
        # A stand-in for the missing folder lets the rules between keys speak as well.
        values.setdefault("img_dir", "")
    config = TrainConfig(**values)
    problems += [
        dataclasses.replace(problem, key=shown_names.get(problem.key, problem.key)) for problem in _rules(config)
    ]
    if problems:
        raise ConfigError(path, tuple(problems))
    return config, (*notes, *_notes(config))


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config in plain JSON and YAML types, every key present."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }


def to_yaml(config: TrainConfig) -> str:
    """A file that `load` reads back as the same config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=110)


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
            hint = "Move it out of data_config." if key in get_type_hints(TrainConfig) else nearest(key, DATA_CONFIG)
            problems.append(Problem(f"data_config.{key}", "is not a key of data_config", hint))
            continue
        if key in data and data[key][1] != value:
            notes.append(
                f"{key} is {show(value)}, as data_config says; the top level's {show(data[key][1])} is ignored."
            )
        data[key] = (f"data_config.{key}", value)
    return data, problems, notes


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


def _prompts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(coerce([value] if isinstance(value, str) else value, tuple[str, ...]))


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
    "single_blocks": _blocks, "double_blocks": _blocks, "sample_prompts": _prompts, "lora_targets": _targets,
    "model_name": _model_name, "report_to": _tracker,
}  # fmt: skip
"""Keys whose YAML form is wider than their type."""

# Rules between keys --------------------------------------------------------------------------------------


def _range_problem(key: str, shown: str, value: Any) -> list[Problem]:
    if key not in RANGES or not isinstance(value, (int, float)):
        return []
    low, high = RANGES[key]
    if low <= value <= high:
        return []
    return [Problem(shown, f"is {value}", f"It must lie between {low:g} and {high:g}.")]


def _rules(config: TrainConfig) -> list[Problem]:
    """What must hold of and between values that are right by themselves."""
    problems = []
    for key in ("img_size", "sample_width", "sample_height"):
        pixels = getattr(config, key)
        if pixels % PATCH:
            near = max(PATCH, round(pixels / PATCH) * PATCH)
            problems.append(Problem(key, f"is {pixels}, not a multiple of {PATCH}", f"Write {near}."))
    if config.max_train_steps is None and config.num_train_epochs is None:
        problems.append(Problem("max_train_steps", "is null", "Give max_train_steps or num_train_epochs a number."))
    if config.single_blocks == () and config.double_blocks == ():
        problems.append(Problem("double_blocks", "and single_blocks are both empty", "Nothing would be trained."))
    if any(not 0 <= t <= 1 for t in config.heldout_timesteps) or not config.heldout_timesteps:
        problems.append(
            Problem("heldout_timesteps", f"is {list(config.heldout_timesteps)}", "Times lie between 0 and 1.")
        )
    return problems


def _notes(config: TrainConfig) -> list[str]:
    notes = []
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        notes.append("lr_scheduler constant has no warm-up, so lr_warmup_steps does nothing (it never did in X-Flux).")
    if config.random_ratio:
        notes.append("random_ratio picks one crop for each image by the seed, because images are encoded once.")
    if config.max_train_steps is not None and config.num_train_epochs is not None:
        notes.append("max_train_steps is set, so num_train_epochs does nothing.")
    return notes
