"""The train config as values: every key with its type, its default and what it means, and the range of each number."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

HUB_IDS = {"flux-dev": "black-forest-labs/FLUX.1-dev", "flux-schnell": "black-forest-labs/FLUX.1-schnell"}
PATCH = 16
"""Pixels on a side of one image token: the VAE's 8 times the 2 of a latent patch."""


# What dataclass would write of init, eq and repr is compiled anew at each start of the doctor.
@dataclass(frozen=True, init=False, eq=False, repr=False)
class TrainConfig:
    """Everything that one training run is told. Names and meanings are X-Flux's where it has the key."""

    img_dir: str
    """Folder of images, each with its caption beside it; folders inside it are read too."""
    output_dir: str = "output"
    """Folder for the result, the checkpoints, the metrics and the samples."""

    model_name: Literal["flux-dev", "flux-schnell"] = "flux-dev"
    """Which FLUX.1 the base model is; names the hub id when `pretrained_model` is absent."""
    pretrained_model: str | None = None
    """Folder in diffusers' layout, `flux1-dev.safetensors`, or a hub id; null: black-forest-labs' for `model_name`."""

    mode: Literal["lora", "finetune", "controlnet"] = "lora"
    """What is trained: adapters, the model's own weights, or a ControlNet beside it."""
    quantization: Literal["none", "int8", "int4", "fp8", "torchao-int8", "torchao-fp8", "nf4", "fp8-dynamic"] = "none"
    """Format of the frozen base: int8, int4, fp8 by quanto, nf4 by bitsandbytes; fp8-dynamic multiplies in fp8 too."""
    modulation: Literal["keep", "quantize", "stream"] = "keep"
    """The modulation layers, 27 % of the base's weights: kept as they are, quantised too, or kept in host memory."""
    stream_blocks: int = 0
    """Frozen blocks that wait in pinned host memory and are copied to the device when their turn comes."""

    rank: int = 16
    """Rank of every adapter."""
    lora_alpha: float | None = None
    """Adapter output is scaled by lora_alpha / rank; null: equal to rank, a scale of 1 as in X-Flux."""
    lora_targets: str | tuple[str, ...] = "xflux"
    """`xflux`, `attn`, `diffusers`, `all-linear`, or a list of module name endings."""
    lora_init: str | None = None
    """Adapter file in diffusers', kohya's or X-Flux's format that training goes on from; null: fresh adapters."""
    lora_formats: tuple[Literal["diffusers", "kohya", "xlabs"], ...] | None = None
    """Formats of the adapter file; null: diffusers', and X-Flux's where lora_targets is xflux."""
    single_blocks: tuple[int, ...] | None = None
    """Single-stream blocks that get adapters, counted from 0, as a list or "1,2,3"; null: all."""
    double_blocks: tuple[int, ...] | None = None
    """Double-stream blocks that get adapters; null: all."""

    train_parameters: tuple[str, ...] = ()
    """Fine-tune: parts of the names of what is trained, as diffusers or X-Flux (`txt_attn`) call it; empty: all."""
    weight_update: Literal["auto", "master", "stochastic", "kahan", "nearest"] = "auto"
    """How bf16 weights take steps smaller than they resolve; auto: fp32 masters, or stochastic rounding of all."""

    control_type: Literal["canny", "files"] = "canny"
    """ControlNet: the condition is the image's Canny edges, or a file of the same name below control_dir."""
    control_dir: str | None = None
    """ControlNet: folder of condition images, each named as its training image, for control_type files."""
    canny_low: int = 100
    """ControlNet: lower threshold of Canny's hysteresis, of 255."""
    canny_high: int = 200
    """ControlNet: upper threshold of Canny's hysteresis, of 255."""
    controlnet_depth: int = 2
    """ControlNet: double-stream blocks; X-Flux's have 2."""
    controlnet_init: str | None = None
    """ControlNet file (X-Flux's format) or folder (diffusers') that training goes on from; null: a fresh one."""

    caption_type: Literal["json", "txt"] = "json"
    """Captions are `NAME.json` holding {"caption": …}, or `NAME.txt`."""
    image_column: str = "image"
    """Column of the images, where img_dir holds parquet files or a saved Hugging Face dataset."""
    caption_column: str = "text"
    """Column of the captions there."""
    img_size: int = 512
    """Pixels of an image's long side; a multiple of 16."""
    resolutions: tuple[int, ...] = ()
    """Further sizes: every image is trained on at img_size and at each of these."""
    bucket_by: Literal["long_side", "area"] = "long_side"
    """Images keep their aspect; their long side is img_size, or their area is img_size squared in steps of 64."""
    repeats: tuple[tuple[str, int], ...] = ()
    """How often the images of a folder below img_dir count in one pass, as a mapping {folder: times}."""
    random_flip: bool = False
    """Train on every image and on its mirror image, each half of the time."""
    caption_dropout: float = 0.0
    """Share of the images that are trained on without their caption."""
    random_ratio: bool = False
    """Crop each image to 16:9, 4:3, 1:1 or not at all; the choice follows from the seed and the image."""
    num_workers: int = 4
    """Threads that decode images while the cache is filled."""
    max_text_tokens: int = 512
    """T5 tokens per caption; longer captions are cut."""
    text_padding: Literal["full", "none"] = "full"
    """Pad captions to max_text_tokens, as FLUX was trained and samples (full), or compute no padding at all (none)."""
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
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """AdamW, AdamW with its moments in 8 bits (torchao), or Adafactor without a first moment (transformers)."""
    step_in_backward: bool = False
    """Step every weight as soon as its gradient is there and free it: on one device, without accumulation."""
    backward_clip: Literal["exact", "previous", "tensor"] = "previous"
    """How max_grad_norm acts with step_in_backward: a second backward, the last step's norm, or each by its own."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of what is trained, which is then what is saved; 0: none."""
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
    checkpointed_blocks: int | None = None
    """With gradient_checkpointing: how many blocks recompute theirs, the first ones; null: all."""
    kernels: Literal["auto", "fused", "diffusers"] = "auto"
    """What computes the blocks: this trainer's fused kernels or diffusers; auto: fused on a GPU with Triton."""
    attention: Literal["auto", "flash-attn-4", "flash", "cudnn", "sdpa"] = "auto"
    """Attention of the fused kernels; auto: the fastest that is right here, forward and backward."""
    gpu_limit_gib: float | None = None
    """GiB of each GPU that this run may hold, allocator and CUDA context together; null: all that is free."""
    allow: tuple[Literal["quantization", "optimizer", "weight_update", "backward_clip", "img_size"], ...] = ()
    """What a plan may change for memory or time though it changes the numbers that are computed; all else it may."""
    cuda_graphs: bool = True
    """Record a step of each batch size and replay it, where that is possible: adapters, fused kernels, no sharding."""
    seed: int = 0
    """Seeds the adapters, the order of the images and the noise."""
    deterministic: bool = False
    """Only kernels that give the same bits every time: slower, and a resumed run equals one that was never stopped."""

    guidance: float = 1.0
    """Guidance that the model is told while it trains (flux-dev only)."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How t is drawn for each image, before the shift."""
    stratified_timesteps: bool = False
    """Draw the times of a step's images from equal slices, so that every step sees all of the range."""
    timestep_shift: float | Literal["auto", "none"] = "auto"
    """The shift mu of t; auto: from the number of image tokens, as the model samples."""

    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = 10
    """Checkpoints that are kept; null: all."""
    final_checkpoint: bool = True
    """Write a checkpoint at the end too; false: the result alone, and whoever goes on repeats from the last one."""
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
    push_to_hub: str | None = None
    """Hub repository that the result is uploaded to at the end, made private if it is new; null: none."""

    def __init__(self, img_dir: str, **settings: Any) -> None:
        if unknown := settings.keys() - _DEFAULTS.keys():
            raise TypeError(f"TrainConfig has no setting {', '.join(sorted(unknown))}")
        self.__dict__.update({"img_dir": img_dir, **_DEFAULTS, **settings})

    @property
    def base_model(self) -> str:
        """The folder or hub id of the base model."""
        return self.pretrained_model or HUB_IDS[self.model_name]

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or the rank."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that images are trained on at, img_size first."""
        return tuple(dict.fromkeys((self.img_size, *self.resolutions))) if self.resolutions else (self.img_size,)

    @property
    def formats(self) -> tuple[str, ...]:
        """`lora_formats`, or what stands for null."""
        if self.lora_formats is not None:
            return self.lora_formats
        return ("diffusers", "xlabs") if self.lora_targets == "xflux" else ("diffusers",)

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir) if self.cache_dir else Path(self.output_dir) / "cache"

    # What stands beside the settings: neither `vars`, nor a copy, nor a pickle has it.
    __slots__ = ("__dict__", "_family", "_hash")

    @property
    def family(self) -> _Family:
        """The same object for all configs that differ in `VARIED` settings alone. Raises TypeError where a setting is
        of a type that has no hash."""
        try:
            known: _Family = self._family
        except AttributeError:
            if len(_FAMILIES) >= _MOST_FAMILIES:
                _FAMILIES.clear()
            others = _others_of(self)
            known = _FAMILIES.setdefault(others, _Family(hash(others)))
            object.__setattr__(self, "_family", known)
        return known

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if isinstance(other, TrainConfig) else NotImplemented

    def __repr__(self) -> str:
        return f"TrainConfig({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def __hash__(self) -> int:
        try:
            known: int = self._hash
        except AttributeError:
            known = hash((self.family.hash, _varied_of(self)))
            object.__setattr__(self, "_hash", known)
        return known

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


class _Family:
    """Equal is only itself; what is found by the configs themselves is so by the value of their other settings."""

    def __init__(self, value: int) -> None:
        self.hash = value


_DEFAULTS: dict[str, Any] = {name: one.default for name, one in TrainConfig.__dataclass_fields__.items()}
del _DEFAULTS["img_dir"]
"""Of all settings but the one that has none."""
VARIED = (
    "img_size", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "checkpointed_blocks",
    "cuda_graphs", "quantization", "modulation", "stream_blocks", "optimizer", "step_in_backward", "backward_clip",
    "weight_update",
)  # fmt: skip
"""The settings that a plan's search changes."""
_VARIED = frozenset(VARIED)
_varied_of = operator.attrgetter(*VARIED)
_others_of = operator.attrgetter(*(name for name in TrainConfig.__dataclass_fields__ if name not in _VARIED))
_FAMILIES: dict[Any, _Family] = {}
_MOST_FAMILIES = 4096


def altered(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`dataclasses.replace`, for searches that make hundreds: the fields are not handed through the constructor."""
    found: TrainConfig = object.__new__(TrainConfig)
    found.__dict__.update(config.__dict__, **changes)
    if _VARIED.issuperset(changes):
        object.__setattr__(found, "_family", config.family)
    return found


DATA_CONFIG = ("img_dir", "caption_type", "img_size", "random_ratio", "num_workers", "train_batch_size")
"""The keys that X-Flux keeps under `data_config:`."""

RANGES: dict[str, tuple[float, float]] = {
    "rank": (1, 4096), "lora_alpha": (1e-6, 1e6), "img_size": (32, 8192), "num_workers": (0, 256),
    "max_text_tokens": (1, 512), "train_batch_size": (1, 4096), "gradient_accumulation_steps": (1, 65536),
    "checkpointed_blocks": (0, 1000), "stream_blocks": (0, 1000),
    "canny_low": (0, 255), "canny_high": (0, 255), "controlnet_depth": (1, 57),
    "caption_dropout": (0, 1), "ema_decay": (0, 0.9999999),
    "max_train_steps": (1, 1e9), "num_train_epochs": (1, 1e6), "learning_rate": (1e-12, 10),
    "lr_warmup_steps": (0, 1e9), "adam_beta1": (0, 0.999999999), "adam_beta2": (0, 0.999999999),
    "adam_weight_decay": (0, 10), "adam_epsilon": (1e-20, 1), "max_grad_norm": (0, 1e6),
    "seed": (0, 2**63 - 1), "guidance": (0, 100), "timestep_shift": (-10, 10),
    "checkpointing_steps": (1, 1e9), "checkpoints_total_limit": (1, 1e6), "heldout_samples": (0, 1e6),
    "sample_every": (0, 1e9), "sample_width": (16, 8192), "sample_height": (16, 8192),
    "gpu_limit_gib": (2, 4096),
    "sample_steps": (1, 1000), "sample_guidance": (0, 100), "sample_seed": (0, 2**63 - 1),
}  # fmt: skip
"""Smallest and largest sensible value of each number, both included."""

MODE_KEYS = {
    "lora": "rank lora_alpha lora_targets lora_init lora_formats single_blocks double_blocks".split(),
    "finetune": ["train_parameters"],
    "controlnet": "control_type control_dir canny_low canny_high controlnet_depth controlnet_init".split(),
}
"""Keys that only one mode reads."""

TARGET_SETS = ("xflux", "attn", "diffusers", "all-linear")
