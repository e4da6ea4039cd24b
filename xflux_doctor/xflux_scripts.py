"""X-Flux's training scripts by name, and the checkout that a file lies in: what is asked of every job."""

from __future__ import annotations

from pathlib import Path

SCRIPTS = {
    "lora": "train_flux_lora_deepspeed.py",
    "finetune": "train_flux_deepspeed.py",
    "controlnet": "train_flux_deepspeed_controlnet.py",
}


def nearby(config: Path | None) -> Path | None:
    """The checkout that a config lies in, at most three folders up."""
    if config is None:
        return None
    parents = list(config.absolute().parents)[:4]
    return next((p for p in parents if any((p / name).is_file() for name in SCRIPTS.values())), None)
