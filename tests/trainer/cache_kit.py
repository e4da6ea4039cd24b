"""Filling caches with the tiny model, for the tests of what lies in them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from trainer_kit import settings, tiny_flux
from xflux_trainer import cache
from xflux_trainer.config import TrainConfig
from xflux_trainer.data import list_samples
from xflux_trainer.layout import Base
from xflux_trainer.ranks import Launch, Ranks


def config(folder: Path, **changes: object) -> TrainConfig:
    """A run with a cache of its own."""
    return TrainConfig(**settings(folder, **{"cache_dir": str(folder / "cache"), **changes}))


def fill(config: TrainConfig, ranks: Ranks | None = None) -> cache.Entries:
    """The training set's entries, which are made where they are missing."""
    samples, _ = list_samples(config.img_dir, config.caption_type, (config.image_column, config.caption_column))
    base = Base.of(tiny_flux())
    return cache.fill(config, base, ranks or Ranks(Launch()), {config.img_dir: samples}, [])[0][config.img_dir]


def older(*paths: Path) -> None:
    """As if the files had been written an hour ago: only then are their hashes remembered."""
    for path in paths:
        os.utime(path, (time.time() - 3600, time.time() - 3600))
