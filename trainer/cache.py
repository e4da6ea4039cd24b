"""Encode every caption and image once, and keep the result on the disk under a key of all that it depends on.

A caption's entry is named by its text, an image's by its bytes and its crop, both by the encoder's weights:
an entry can be missing, but it cannot be wrong, and a caption cannot meet another image's latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from xflux_trainer import files, model
from xflux_trainer.config import TrainConfig
from xflux_trainer.data import choose_ratio, load_image
from xflux_trainer.encoders import ImageCodec, TextEncoders, free
from xflux_trainer.errors import DataError, UserError
from xflux_trainer.layout import Base
from xflux_trainer.ranks import Ranks
from xflux_trainer.samples import Sample

VERSION = "1"
"""Part of every key: raised when what is encoded, or how, changes."""


Work = TypeVar("Work")


@dataclass(frozen=True)
class Entry:
    """Where one sample's latents (C, h, w) and its caption's embeddings lie."""

    latents: Path
    text: Path
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Latents (B, C, h, w) in fp32, T5 states (B, L, D) and pooled CLIP vectors (B, P) in bf16."""

    latents: Tensor
    text: Tensor
    pooled: Tensor
    mask: Tensor | None = None
    """(B, L) bool, the real text tokens; None: all are."""
    condition: Tensor | None = None
    """(B, 3, H, W) uint8, what a ControlNet is shown."""


@dataclass(frozen=True)
class _Image:
    path: Path
    ratio: float | None
    place: Path


def fill(
    config: TrainConfig, base: Base, ranks: Ranks, sets: dict[str, list[Sample]], prompts: list[str]
) -> tuple[dict[str, list[Entry]], list[Path]]:
    """Encode what is missing, the ranks of a host sharing the work.

    `sets` are samples by the folder they were listed from. Returns their entries, and the prompts' files.
    """
    folder = config.cache_path
    files.make_folder(folder)
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text_id = "".join(model.fingerprint(getattr(base, part)) for part in text_parts)
    image_id = model.fingerprint(base.vae)
    captions = {
        text: folder / f"text-{_key(text_id, str(config.max_text_tokens), text)}.safetensors"
        for text in [*prompts, *(sample.caption for samples in sets.values() for sample in samples)]
    }
    images = {
        sample.image: _image(config, folder, Path(root), sample.image, image_id)
        for root, samples in sets.items()
        for sample in samples
    }
    missing_text = sorted(text for text, place in captions.items() if not _whole(place))
    missing_images = [images[path] for path in sorted(images) if not _whole(images[path].place)]
    # The shares must be cut from one list: the first rank's of this host, since another run may fill the same cache.
    first = ranks.rank - ranks.launch.local_rank
    missing_text, wanted = ranks.gather((missing_text, [image.path for image in missing_images]))[first]
    missing_images = [images[path] for path in wanted]
    if missing_text or missing_images:
        found = len(captions) - len(missing_text), len(images) - len(missing_images)
        ranks.say(
            f"encoding {len(missing_text)} captions and {len(missing_images)} images "
            f"({found[0]} and {found[1]} are in {folder})"
        )
    problem: UserError | None = None
    try:
        _encode_text(config, base, ranks, _share(missing_text, ranks), captions)
        _encode_images(config, base, ranks, _share(missing_images, ranks))
    except UserError as error:
        problem = error
    ranks.agree(problem)
    entries = {
        root: [
            Entry(images[sample.image].place, captions[sample.caption], _shape(images[sample.image].place))
            for sample in samples
        ]
        for root, samples in sets.items()
    }
    return entries, [captions[prompt] for prompt in prompts]


def read_batch(entries: list[Entry]) -> Batch:
    """The batch of these samples, in the host's memory."""
    latents = [_read(entry.latents)["latents"] for entry in entries]
    texts = [_read(entry.text) for entry in entries]
    return Batch(
        torch.stack(latents),
        torch.stack([text["text"] for text in texts]),
        torch.stack([text["pooled"] for text in texts]),
    )


def read_text(place: Path) -> tuple[Tensor, Tensor]:
    """(1, L, D) and (1, P) of one prompt."""
    tensors = _read(place)
    return tensors["text"][None], tensors["pooled"][None]


def _image(config: TrainConfig, folder: Path, root: Path, path: Path, encoder: str) -> _Image:
    ratio = choose_ratio(path, root, config.seed, config.random_ratio)
    try:
        content = files.sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", "Allow reading it, or remove it.") from error
    key = _key(encoder, content, str(config.img_size), f"{ratio}")
    return _Image(path, ratio, folder / f"image-{key}.safetensors")


def _key(*parts: str) -> str:
    # Lengths stand before the parts, so that no two lists of parts read alike.
    text = "".join(f"{len(part)}:{part}" for part in (VERSION, *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _share(work: list[Work], ranks: Ranks) -> list[Work]:
    """This rank's part of the work of its host; hosts do not rely on a common disk."""
    launch = ranks.launch
    return work[launch.local_rank % launch.local_world_size :: launch.local_world_size]


def _encode_text(config: TrainConfig, base: Base, ranks: Ranks, texts: list[str], places: dict[str, Path]) -> None:
    if not texts:
        return
    encoders = TextEncoders(base, ranks.device, config.max_text_tokens)
    for caption in texts:
        text, pooled = encoders.encode(caption)
        files.write_bytes(places[caption], save({"text": text.cpu(), "pooled": pooled.cpu()}))
    if encoders.cut:
        ranks.say(f"note: {encoders.cut} captions are longer than {config.max_text_tokens} T5 tokens and are cut")
    del encoders
    free()


def _encode_images(config: TrainConfig, base: Base, ranks: Ranks, images: list[_Image]) -> None:
    if not images:
        return
    codec = ImageCodec(base, ranks.device, torch.float32)
    for image, pixels in _decoded(config, images):
        latents = codec.encode(pixels).cpu().contiguous()
        if not torch.isfinite(latents).all():
            raise DataError(f"{image.path} is encoded to numbers that are not finite.", "Look at the image.")
        files.write_bytes(image.place, save({"latents": latents}))
    del codec
    free()


def _decoded(config: TrainConfig, images: list[_Image]) -> Iterator[tuple[_Image, Tensor]]:
    """The images as tensors, a few decoded ahead on threads."""
    if config.num_workers == 0:
        for image in images:
            yield image, load_image(image.path, config.img_size, image.ratio)
        return
    with ThreadPoolExecutor(config.num_workers) as threads:
        rest = iter(images)
        ahead = [
            (image, threads.submit(load_image, image.path, config.img_size, image.ratio))
            for image in islice(rest, 2 * config.num_workers)
        ]
        while ahead:
            image, pending = ahead.pop(0)
            for other in islice(rest, 1):
                ahead.append((other, threads.submit(load_image, other.path, config.img_size, other.ratio)))
            yield image, pending.result()


def _whole(place: Path) -> bool:
    """Whether the entry is there. Opening it compares the file's size with what its header promises."""
    try:
        with safe_open(place, framework="pt") as file:
            return bool(file.keys())
    except (OSError, SafetensorError):
        return False


def _shape(place: Path) -> tuple[int, ...]:
    try:
        with safe_open(place, framework="pt") as file:
            return tuple(file.get_slice("latents").get_shape())
    except (OSError, SafetensorError) as error:
        raise DataError(f"The cache entry {place} cannot be read: {error}.", "Delete it and start again.") from error


def _read(place: Path) -> dict[str, Tensor]:
    try:
        with safe_open(place, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise DataError(f"The cache entry {place} cannot be read: {error}.", "Delete it and start again.") from error
