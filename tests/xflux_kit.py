"""A small stand-in for an X-Flux checkout, written by us: scripts that are read, never run, and short configs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import yaml
from conftest import XFLUX_ACCELERATE

from xflux_doctor import xflux
from xflux_doctor.job import Job

_START = "output_dir logging_dir gradient_accumulation_steps mixed_precision report_to".split()
_SETUP = (
    "learning_rate adam_beta1 adam_beta2 adam_weight_decay adam_epsilon data_config max_train_steps num_train_epochs "
    "lr_scheduler lr_warmup_steps tracker_project_name train_batch_size resume_from_checkpoint"
).split()
_STEPS = "max_grad_norm checkpointing_steps checkpoints_total_limit".split()
_SAMPLES = "disable_sampling sample_every sample_prompts sample_width sample_height sample_steps".split()
_OWN = {
    "lora": ("dit = dit.to(torch.float32)\nuse(args.rank, args.single_blocks, args.double_blocks)", "wandb.Image(1)"),
    "finetune": (
        "dit = dit.to(torch.float32)\nload['base_optimizer_state']",
        "t = torch.sigmoid(torch.randn((bs,)))\n    x_t = (1 - t) * x_1 + t * x_0",
    ),
    "controlnet": ("controlnet.to(torch.float32)", "t = torch.sigmoid(torch.randn((bs,)))[:, None, None]"),
}
_LOADER = """\
class Images:
    def __init__(self, {keys}):
        names = [i for i in listed if '.jpg' in i or '.png' in i]
        caption = image.split('.')[0]

def loader(train_batch_size, num_workers, **args):
    pass
"""
CONFIG: dict[str, Any] = {
    "model_name": "flux-dev",
    "data_config": {"train_batch_size": 1, "num_workers": 4, "img_size": 512, "img_dir": "images"},
    "report_to": "wandb",
    "train_batch_size": 1,
    "output_dir": "out",
    "max_train_steps": 1000,
    "learning_rate": 1e-5,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 10,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 0.01,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "logging_dir": "logs",
    "mixed_precision": "bf16",
    "checkpointing_steps": 500,
    "checkpoints_total_limit": 2,
    "tracker_project_name": "test",
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 2,
}
LORA: dict[str, Any] = {
    "rank": 16,
    "single_blocks": "1,2,3,4",
    "double_blocks": None,
    "disable_sampling": False,
    "sample_every": 250,
    "sample_width": 1024,
    "sample_height": 1024,
    "sample_steps": 20,
    "sample_prompts": ["a cup"],
}


def checkout(root: Path) -> Path:
    """All three scripts and what they import."""
    for kind, name in xflux.SCRIPTS.items():
        setup, step = _OWN[kind]
        lines = [f"use(args.{key})" for key in _START]
        lines += ["# args.nothing is read here", "models = get_models(name=args.model_name)", setup]
        lines += [f"use(args.{key})" for key in _SETUP]
        lines += ["args.written = 1", "for epoch in range(args.num_train_epochs):"]
        lines += [f"    use(args.{key})" for key in (*_STEPS, *(_SAMPLES if kind == "lora" else ()))]
        _write(root / name, "\n".join([*lines, f"    {step}", ""]))
    _write(
        root / "image_datasets/dataset.py",
        _LOADER.format(keys="img_dir, img_size=512, caption_type='json', random_ratio=False"),
    )
    _write(root / "image_datasets/canny_dataset.py", _LOADER.format(keys="img_dir, img_size=512"))
    for name in xflux._MODULES:
        _write(root / "src/flux" / name, "")
    return root


def config(path: Path, *, without: tuple[str, ...] = (), data: dict[str, Any] | None = None, **values: Any) -> Path:
    """A config in X-Flux's format. `data` goes below data_config."""
    whole = {**CONFIG, **values, "data_config": {**CONFIG["data_config"], **(data or {})}}
    for key in without:
        (whole["data_config"] if key in whole["data_config"] and key != "train_batch_size" else whole).pop(key)
    _write(path, yaml.safe_dump(whole, sort_keys=False))
    return path


def png(path: Path, width: int = 640, height: int = 480, caption: str | None = "a cup") -> Path:
    """The first bytes of an image, and its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + b"\x08\x02\0\0\0")
    if caption is not None:
        path.with_name(path.name.split(".")[0] + ".json").write_text(json.dumps({"caption": caption}))
    return path


def job(
    root: Path,
    *,
    script: str = "lora",
    accelerate: str | None = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 1"),
    environment: dict[str, str] | None = None,
    **changes: Any,
) -> Job:
    """A job of a whole checkout below `root`, with two images; `changes` as `config` takes them."""
    if not (root / xflux.SCRIPTS["lora"]).exists():
        checkout(root)
    if not (root / "images").exists():
        png(root / "images/1.png")
        png(root / "images/2.png")
    extra = {**LORA, **changes} if script == "lora" else changes
    path = config(root / "own.yaml", **extra)
    found = xflux.read(str(root / xflux.SCRIPTS[script]), path, environment or {})
    return Job(
        train_path=path,
        accelerate_path=Path("accelerate_config.yaml") if accelerate else None,
        accelerate=yaml.safe_load(accelerate) if accelerate else None,
        accelerate_text=accelerate or "",
        xflux=found,
    )


def sparse(path: Path, size: int) -> None:
    """A file of that many bytes which takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def zero_checkpoint(output: Path, step: int, ranks: int = 1) -> None:
    """What accelerate's save_state leaves under DeepSpeed, as far as its names go."""
    folder = output / f"checkpoint-{step}" / "pytorch_model"
    sparse(folder / "mp_rank_00_model_states.pt", 23_800_000_000)
    for rank in range(ranks):
        sparse(folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", 1000)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
