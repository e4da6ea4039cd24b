"""What the command line does besides training: fill the cache, draw images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from xflux_trainer import cache, controlnet, lora, model, quantize, sample
from xflux_trainer.config import TrainConfig
from xflux_trainer.model import Velocity
from xflux_trainer.ranks import Launch, Ranks
from xflux_trainer.run import choose_prompts, find_sets
from xflux_trainer.sample import Prompt
from xflux_trainer.samples import Sample

NOT_SHOWN: dict[str, Any] = {"repeats": (), "resolutions": (), "random_flip": False, "caption_dropout": 0.0}
"""What a ControlNet is shown of the images is one picture of each of the first ones."""


def fill_cache(config: TrainConfig) -> None:
    """Encode the captions and images of a run, and nothing else."""
    ranks = Ranks(Launch.read(os.environ))
    ranks.join()
    ranks.keep_within(config.gpu_limit_gib)
    try:
        sets, _, said = find_sets(config)
        base, notes = model.locate(config)
        for note in notes:
            ranks.say(f"note: {note}")
        model.read_spec(base)
        model.quiet_libraries()
        cache.fill(config, base, ranks, sets, choose_prompts(config, sets), said)
        total = sum(len(part) for part in sets.values())
        ranks.say(f"{total} images and their captions are in {config.cache_path}")
    finally:
        ranks.leave()


def draw_samples(config: TrainConfig, trained: Path | None, image: Path | None, prompt: str | None) -> None:
    """Draw the sample prompts with what was trained (an adapter, a ControlNet, a transformer), or without it."""
    ranks = Ranks(Launch.read(os.environ))
    ranks.join()
    ranks.keep_within(config.gpu_limit_gib)
    try:
        prompts = [prompt] if prompt else list(config.sample_prompts)
        if not prompts:
            sets, _, _ = find_sets(config)
            prompts = choose_prompts(replace(config, disable_sampling=False), sets)
        base, notes = model.locate(config)
        for note in notes:
            ranks.say(f"note: {note}")
        # The base says how it samples, wherever a fine-tuned transformer lies.
        spec = model.read_spec(base)
        if config.mode == "finetune" and trained:
            base = replace(base, transformer=trained)
        model.quiet_libraries()
        model.steady_attention(ranks.device)
        shown: dict[str, Sequence[Sample]] = {}
        if config.mode == "controlnet" and trained:  # it is shown the first images' conditions
            shown = {config.img_dir: find_sets(config)[0][config.img_dir][: len(prompts)]}
            config = replace(config, **NOT_SHOWN)
        sets, texts = cache.fill(config, base, ranks, shown, prompts)
        dtype = model.DTYPES[config.mixed_precision]
        blocks = (spec.double_blocks, spec.single_blocks)
        prepare = quantize.preparer(config, ranks.device, blocks)
        transformer = model.load_transformer(base, dtype, ranks.device, prepare)
        module: nn.Module
        if shown and trained:
            net = controlnet.load(trained, dtype, ranks.device)
            module = controlnet.ControlVelocity(net, transformer, guidance=spec.guidance_embeds)
        else:
            if config.mode == "lora" and trained:
                lora.attach_file(transformer, trained)
            module = Velocity(transformer, guidance=spec.guidance_embeds)
        entries = sets.get(config.img_dir)
        work = [
            Prompt(
                k,
                text,
                _place(config, image, k, len(texts)),
                prompts[k],
                entries[k % len(entries)] if entries else None,
            )
            for k, text in enumerate(texts)
        ]
        sample.draw(module, spec, config, base, ranks, work)
        places = [prompt.image for prompt in work]
        ranks.say(f"sample images: {', '.join(str(place) for place in places)}")
    finally:
        ranks.leave()


def _place(config: TrainConfig, image: Path | None, number: int, count: int) -> Path:
    if image is None:
        return Path(config.output_dir) / "samples" / f"sample-{number}.png"
    return image if count == 1 else image.with_name(f"{image.stem}-{number}{image.suffix}")
