"""What the command line does besides training: fill the cache, draw images."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from xflux_trainer import cache, lora, model, sample
from xflux_trainer.config import TrainConfig
from xflux_trainer.model import Velocity
from xflux_trainer.ranks import Launch, Ranks
from xflux_trainer.run import choose_prompts, find_sets
from xflux_trainer.sample import Prompt


def fill_cache(config: TrainConfig) -> None:
    """Encode the captions and images of a run, and nothing else."""
    ranks = Ranks(Launch.read(os.environ))
    ranks.join()
    try:
        sets, _, _ = find_sets(config)
        base = model.resolve(config.base_model)
        model.read_spec(base)
        model.quiet_libraries()
        entries, _ = cache.fill(config, base, ranks, sets, choose_prompts(config, sets))
        total = sum(len(part) for part in entries.values())
        ranks.say(f"{total} images and their captions are in {config.cache_path}")
    finally:
        ranks.leave()


def draw_samples(config: TrainConfig, adapter: Path | None, image: Path | None, prompt: str | None) -> None:
    """Draw the sample prompts with a trained adapter, or without one."""
    ranks = Ranks(Launch.read(os.environ))
    ranks.join()
    try:
        prompts = [prompt] if prompt else list(config.sample_prompts)
        if not prompts:
            sets, _, _ = find_sets(config)
            prompts = choose_prompts(replace(config, disable_sampling=False), sets)
        base = model.resolve(config.base_model)
        spec = model.read_spec(base)
        model.quiet_libraries()
        model.steady_attention(ranks.device)
        _, texts = cache.fill(config, base, ranks, {}, prompts)
        transformer = model.load_transformer(base, model.DTYPES[config.mixed_precision], ranks.device)
        if adapter:
            lora.attach_file(transformer, adapter)
        places = [_place(config, image, number, len(texts)) for number in range(len(texts))]
        work = [Prompt(k, *one) for k, one in enumerate(zip(texts, places, prompts))]  # noqa: B905
        sample.draw(Velocity(transformer, guidance=spec.guidance_embeds), spec, config, base, ranks, work)
        ranks.say(f"sample images: {', '.join(str(place) for place in places)}")
    finally:
        ranks.leave()


def _place(config: TrainConfig, image: Path | None, number: int, count: int) -> Path:
    if image is None:
        return Path(config.output_dir) / "samples" / f"sample-{number}.png"
    return image if count == 1 else image.with_name(f"{image.stem}-{number}{image.suffix}")
