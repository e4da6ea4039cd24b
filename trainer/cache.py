"""Encode every caption and image once, and keep the result on the disk under a key of all that it depends on.

A caption's entry is named by its text, an image's by its bytes and its crop, both by the encoder's weights:
an entry can be missing, but it cannot be wrong, and a caption cannot meet another image's latents.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from xflux_trainer import conditions, digests, entries, files, imagework, snapshot
from xflux_trainer.buckets import enlarged
from xflux_trainer.conditions import ControlFiles
from xflux_trainer.config import TrainConfig
from xflux_trainer.digests import ID, Digests, Rows
from xflux_trainer.encoders import TextEncoders, free
from xflux_trainer.entries import KEY, Entries, Entry, Key
from xflux_trainer.errors import DataError, UserError
from xflux_trainer.imagefile import shown
from xflux_trainer.imagework import Item, Items, Recipe
from xflux_trainer.keys import key
from xflux_trainer.layout import Base
from xflux_trainer.pulse import PULSE
from xflux_trainer.ranks import Ranks
from xflux_trainer.recall import Recall
from xflux_trainer.samples import Sample
from xflux_trainer.sampletable import Samples, digest_of

__all__ = ["Batch", "Entries", "Entry", "fill", "read_batch", "read_text"]

Work = TypeVar("Work")


@dataclass(frozen=True)
class Batch:
    """Latents (B, C, h, w) in fp32, T5 states (B, L, D) and pooled CLIP vectors (B, P) in bf16.

    `mask` (B, L) is true at the tokens that are real; None: all are. `condition` is (B, 3, 8h, 8w) in uint8.
    """

    latents: Tensor
    text: Tensor
    pooled: Tensor
    mask: Tensor | None = None
    condition: Tensor | None = None

    def pinned(self) -> Batch:
        """In memory that a GPU copies from by itself, while this process goes on."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """On the device; out of pinned memory nothing is waited for."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = (self.latents, self.text, self.pooled, self.mask, self.condition)
        return Batch(*(tensor if tensor is None else change(tensor) for tensor in tensors))  # type: ignore[arg-type]


def fill(
    config: TrainConfig,
    base: Base,
    ranks: Ranks,
    sets: Mapping[str, Sequence[Sample]],
    prompts: list[str],
    said: Sequence[str] = (),
) -> tuple[dict[str, Entries], list[Path]]:
    """Encode what is missing, the ranks of a host sharing the work.

    `sets` are samples by the folder they were listed from, and `said` what was said of them. Returns their entries, and
    the prompts' files.
    """
    folder = config.cache_path
    problem: UserError | None = None
    text_id = image_id = ""
    try:
        files.make_folder(folder, "the cache ")
        # One rank of a host reads the weights, and only where they are not remembered.
        if ranks.launch.local_rank == 0:
            text_id, image_id = _who(base, folder)
    except UserError as error:
        problem = error
    ranks.agree(problem)
    signature = conditions.signature(config) if sets else ""
    text_id, image_id = ranks.gather((text_id, image_id))[_first(ranks)]
    _same_sets(ranks, sets)
    options = text_id, str(config.max_text_tokens), config.text_padding
    encoding = snapshot.encoding(config, text_id, image_id, signature)
    known = _known(config, ranks, sets, encoding)
    if known is not None:
        texts = {caption: key(*options, caption) for caption in prompts}
        _fill_texts(config, base, ranks, texts)
        for note in known.notes:
            ranks.say(note)
        return known.sets, [entries.place(folder, "text", texts[prompt]) for prompt in prompts]

    found: list[ControlFiles] = []
    if signature == "files":
        ranks.together(lambda: found.append(ControlFiles(config.control_dir or "")))
    control = found[0] if found else None
    captions = dict.fromkeys([*prompts, *chain.from_iterable(map(_captions, sets.values()))])
    if config.caption_dropout and sets:
        captions[""] = None
    texts = {caption: key(*options, caption) for caption in captions}
    _fill_texts(config, base, ranks, texts)
    recipe = Recipe(config, folder, image_id, control, signature)
    contents, controls = _fill_images(recipe, base, ranks, Items(sets, config.img_dir))
    made: dict[str, Entries] = {}
    start = 0
    for root, samples in sets.items():
        part = slice(start, start + len(samples))
        own = Items({root: samples}, config.img_dir)
        made[root] = _entries(recipe, own, contents[part], controls[part], texts)
        start += len(samples)
    notes = _notes(recipe, Items(sets, config.img_dir), contents)
    for note in notes:
        ranks.say(note)
    if ranks.launch.local_rank == 0:
        snapshot.keep(config, encoding, sets, said, made, notes)
    return made, [entries.place(folder, "text", texts[prompt]) for prompt in prompts]


def read_batch(chosen: Sequence[Entry]) -> Batch:
    """The batch of these samples, in the host's memory. Raises `DataError` where an entry is damaged."""
    latents = torch.stack([entries.read(entry.latents)["latents"] for entry in chosen])
    texts = [entries.read(entry.text) for entry in chosen]
    text, mask = _padded([one["text"] for one in texts])
    return Batch(latents, text, torch.stack([one["pooled"] for one in texts]), mask, _condition(chosen, latents))


def read_text(place: Path) -> tuple[Tensor, Tensor]:
    """(1, L, D) and (1, P) of one prompt."""
    tensors = entries.read(place)
    return tensors["text"][None], tensors["pooled"][None]


def _padded(texts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(B, L, D), the shorter ones filled up with zeros, and which tokens are real: None when all are."""
    lengths = [len(text) for text in texts]
    if len(set(lengths)) == 1:
        return torch.stack(texts), None
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), mask


def _condition(chosen: Sequence[Entry], latents: Tensor) -> Tensor | None:
    if not chosen or chosen[0].condition is None:
        return None
    made = []
    for entry in chosen:
        assert entry.condition is not None
        condition = entries.read(entry.condition)["condition"]
        if condition.shape[1:] != (8 * latents.shape[2], 8 * latents.shape[3]):
            seen = f"{shown(entry.condition)} is {tuple(condition.shape[1:])}, its latents {tuple(latents.shape[2:])}."
            raise DataError(seen, "Delete it and start again.")
        made.append((condition.flip(-1) if entry.flipped else condition).expand(3, -1, -1))
    return torch.stack(made)


def _who(base: Base, folder: Path) -> tuple[str, str]:
    """Who the text encoders are, and who the VAE is."""
    known = Digests(folder, "weights")
    parts = (base.text_encoder, base.text_encoder_2, base.tokenizer, base.tokenizer_2)
    found = "".join(known.weights(part) for part in parts), known.weights(base.vae)
    known.write()
    return found


def _first(ranks: Ranks) -> int:
    """The first rank of this host; hosts do not rely on a common disk."""
    return ranks.rank - ranks.launch.local_rank


def _share(work: list[Work], ranks: Ranks) -> list[Work]:
    """This rank's part of the work of its host."""
    launch = ranks.launch
    return work[launch.local_rank % launch.local_world_size :: launch.local_world_size]


def _of_host(ranks: Ranks, value: Work) -> list[Work]:
    first = _first(ranks)
    return list(ranks.gather(value)[first : first + ranks.launch.local_world_size])


def _known(
    config: TrainConfig, ranks: Ranks, sets: Mapping[str, Sequence[Sample]], encoding: str
) -> snapshot.Known | None:
    """What an earlier start made of the same samples, where every rank finds it so. One of a host asks for files."""
    # Samples that were listed anew, although nothing has changed: a part of what is kept was damaged.
    stamps = {one.stamp if isinstance(one, Samples) and one.digest else None for one in sets.values()}
    stamp = stamps.pop() if len(stamps) == 1 else None
    check = ranks.launch.local_rank == 0
    known = snapshot.find(config, stamp, encoding, check=check) if stamp else None
    return known if all(ranks.gather(known is not None)) else None


def _captions(samples: Sequence[Sample]) -> Iterable[str]:
    return samples.captions if isinstance(samples, Samples) else (sample.caption for sample in samples)


def _same_sets(ranks: Ranks, sets: Mapping[str, Sequence[Sample]]) -> None:
    """Ranks that list different images would train on each other's numbers. They agree before anything is shared."""
    if ranks.world_size == 1:
        return
    found = ranks.gather(" ".join(digest_of(samples, root) for root, samples in sets.items()))
    if any(one != found[0] for one in found):
        raise DataError(
            f"Rank {next(k for k, one in enumerate(found) if one != found[0])} lists other images or captions than "
            "rank 0.",
            "Give every machine the same files, and let nothing change them while a run starts.",
        )


# Captions ------------------------------------------------------------------------------------------------


def _fill_texts(config: TrainConfig, base: Base, ranks: Ranks, texts: dict[str, Key]) -> None:
    folder = config.cache_path

    def place(caption: str) -> Path:
        return entries.place(folder, "text", texts[caption])

    # The shares must be cut from one list: the first rank's of this host, since another run may fill the same cache.
    missing = [k for k, caption in enumerate(texts) if not entries.whole(place(caption))]
    listed = list(texts)
    missing = sorted(ranks.gather(missing)[_first(ranks)], key=lambda k: listed[k])
    if missing:
        ranks.say(f"encoding {len(missing)} captions ({len(texts) - len(missing)} are in {folder})")
    cut = 0

    def work() -> None:
        nonlocal cut
        own = [listed[k] for k in _share(missing, ranks)]
        if not own:
            return
        encoders = TextEncoders(base, ranks.device, config.max_text_tokens, config.text_padding)
        for caption in own:
            PULSE.tick()
            text, pooled = encoders.encode(caption)
            entries.write(place(caption), {"text": text.cpu(), "pooled": pooled.cpu()})
        cut = encoders.cut
        del encoders
        free()

    ranks.together(work)
    cut = sum(_of_host(ranks, cut)) if missing else 0
    if cut:
        ranks.say(f"note: {cut} captions are longer than {config.max_text_tokens} T5 tokens and are cut")


# Images --------------------------------------------------------------------------------------------------


def _fill_images(recipe: Recipe, base: Base, ranks: Ranks, items: Sequence[Item]) -> tuple[Rows, np.ndarray]:
    """Every image's content, and the hash of its condition's file, in the order of the items."""
    memory = Recall(recipe, items)
    problem: UserError | None = None
    wanted: list[int] = []
    try:
        wanted = memory.recall() if ranks.launch.local_rank == 0 else []
    except UserError as error:
        problem = error
    ranks.agree(problem)
    wanted, memory.contents, memory.controls = ranks.gather((wanted, memory.contents, memory.controls))[_first(ranks)]
    done: list[imagework.Prepared] = []
    encoded = 0

    def work() -> None:
        nonlocal done, encoded
        done, encoded = imagework.encode(recipe, base, ranks, [(k, items[k]) for k in _share(wanted, ranks)])

    ranks.together(work)
    if not wanted:
        return memory.contents, memory.controls
    found = [(one.index, one.content, one.condition) for one in done]
    told = _of_host(ranks, (found, encoded))
    for part, _ in told:
        for index, content, condition in part:
            memory.contents[index] = digests.pack([content])[0]
            memory.controls[index] = np.void(condition.ljust(ID, b"\0"))
    if ranks.launch.local_rank == 0:
        memory.keep(wanted)
    if total := sum(count for _, count in told):
        ranks.say(f"encoded {total} images ({len(items) - total} were in {recipe.folder})")
    return memory.contents, memory.controls


def _entries(
    recipe: Recipe, items: Sequence[Item], contents: Rows, controls: np.ndarray, texts: dict[str, Key]
) -> Entries:
    """The entries of one set: all images at the first size, then all at the next."""
    count = len(items)
    sizes = len(recipe.sizes(items[0])) if items else 1
    mirrored = bool(items) and items[0].training and recipe.config.random_flip
    latents = np.zeros((sizes * count, 2 if mirrored else 1), KEY)
    drawn = np.zeros(sizes * count, KEY) if recipe.signature else None
    shapes: dict[tuple[int, int], int] = {}
    shape_of = np.zeros(sizes * count, np.int32)
    known: list[tuple[int, ...]] = []
    for k, item in enumerate(items):
        control = b"" if recipe.control is None else bytes(controls[k])
        for place, view in enumerate(recipe.views(item, digests.content(contents[k]), control)):
            number = place * count + k
            latents[number] = [np.void(one) for one in view.latents]
            if drawn is not None and view.condition is not None:
                drawn[number] = np.void(view.condition)
            if view.size not in shapes:
                shapes[view.size] = len(known)
                known.append(entries.shape(entries.place(recipe.folder, "image", view.latents[0])))
            shape_of[number] = shapes[view.size]
    numbers = {caption: k for k, caption in enumerate(texts)}
    text_of = np.fromiter((numbers[item.sample.caption] for item in items), np.int32, count)
    config = recipe.config
    return Entries(
        recipe.folder, latents, list(texts.values()), np.tile(text_of, sizes), known, shape_of,
        silent=texts.get("") if config.caption_dropout else None, conditions=drawn,
        repeats=np.tile(_repeats(config, items), sizes) if items and items[0].training else None,
    )  # fmt: skip


def _repeats(config: TrainConfig, items: Sequence[Item]) -> np.ndarray:
    """How often each image counts in one pass: as the nearest folder above it that is named."""
    named = {Path(os.path.normpath(folder)): times for folder, times in config.repeats}
    used = set()
    found = np.ones(len(items), np.int32)
    for k, item in enumerate(items if named else []):
        below = item.sample.image.relative_to(item.root)
        folder = next((parent for parent in below.parents if parent in named), None)
        if folder is not None:
            used.add(folder)
            found[k] = named[folder]
    if missing := [shown(folder) for folder in named if folder not in used]:
        seen = f"repeats names {', '.join(missing)}, and no image of {shown(config.img_dir)} lies there."
        raise DataError(seen, "Folders are named from img_dir on, for example `faces/close`; `.` is img_dir itself.")
    return found


def _notes(recipe: Recipe, items: Sequence[Item], contents: Rows) -> list[str]:
    """What is made up of too few pixels, and what is there twice."""
    notes = _enlarged(recipe, items, contents)
    training = [k for k, item in enumerate(items) if item.training]
    twins = len(training) - len({bytes(contents[k]["id"]) for k in training})
    if twins:
        notes.append(f"note: {twins} images are copies, byte for byte, of others, which so count more often")
    return notes


def _enlarged(recipe: Recipe, items: Sequence[Item], contents: Rows) -> list[str]:
    smaller, worst = 0, (1.0, 0)
    for k, item in enumerate(items):
        if not item.training:
            continue
        one = digests.content(contents[k])
        scale = max(enlarged(one.width, one.height, target) for target in recipe.targets(item, one))
        smaller += scale > 1
        worst = max(worst, (scale, k))
    if not smaller:
        return []
    one = digests.content(contents[worst[1]])
    name = shown(items[worst[1]].sample.name)
    return [
        f"note: {smaller} images have fewer pixels than they are trained at and are enlarged; "
        f"{name}, {one.width} x {one.height}, {worst[0]:.1f} times"
    ]
