"""XF: the training folder as X-Flux's own loader reads it, which is not how the bundled trainer does (--xflux)."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_doctor import xflux_bill
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.finding import Change, Edit, Finding, error, warning
from xflux_doctor.xflux import XFlux
from xflux_doctor.xflux_images import Images, shape

_SHOWN = 3


def _images(found: XFlux) -> Images:
    if found.images is None:
        raise SkipCheck("img_dir is not known, or the checkout's loader is another one than we know")
    return found.images


@check("XF113", "X-Flux finds the captions")
def captions_found(case: Case) -> Iterator[Finding]:
    """The caption's path is the image's path up to its first dot, of a folder's name too (dataset.py:79)."""
    found = xflux_bill.of(case)
    images, folder = _images(found), str(found.data_get("img_dir"))
    if "." not in folder or not found.script.cuts_at_dots:
        return
    ending = str(found.data_get("caption_type", "json"))
    plain = folder[2:].lstrip("/") if folder.startswith("./") else folder
    edits: tuple[Change, ...] = ()
    if plain and "." not in plain:
        edits = (Edit("train", ("data_config", "img_dir"), plain, "no dot in the path"),)
    link = () if edits else (f"ln -s {images.folder} {found.root / 'images'}",)
    yield error(
        f"img_dir is {folder!r}: the caption of each of its {images.listed} images is looked for at "
        f"{folder.split('.')[0] + '.' + ending!r}.",
        "Every item fails and is replaced by another that fails: about 990 lines of 'No such file or directory', then "
        "'RecursionError: maximum recursion depth exceeded', after the model was loaded.",
        "Use a path without dots.",
        edits=edits,
        commands=link,
    )


@check("XF114", "X-Flux can use every image of the folder")
def images_used(case: Case) -> Iterator[Finding]:
    """It lists names with .jpg or .png in them, no folders, and replaces an item that fails by a random other."""
    found = xflux_bill.of(case)
    images = _images(found)
    if not images.exists:
        yield error(
            f"There is no folder {images.folder} (img_dir).",
            "FileNotFoundError, after 24 GB of weights were loaded.",
            "Correct img_dir; X-Flux is launched inside its checkout.",
        )
    elif not images.listed:
        others = (
            f" X-Flux does not list {_few(images.unseen or images.folders)}." if images.unseen or images.folders else ""
        )
        yield error(
            f"X-Flux lists no image in {images.folder}.{others}",
            "'ValueError: num_samples should be a positive integer value, but got num_samples=0', after the model was "
            "loaded.",
            "Put .jpg or .png files there, in small letters, each with its caption.",
        )
    else:
        yield from _failing(images)
        yield from _unseen(images)


def _failing(images: Images) -> Iterator[Finding]:
    if not images.failing:
        return
    faults = [f"{name} has no caption beside it" for name in images.uncaptioned]
    faults += [f"{name}: {why}" for name, why in images.unusable]
    seen = f"{images.failing} of {images.read} items that X-Flux lists in {images.folder} fail: {_few(faults, '; ')}."
    if images.failing == images.read:
        because = (
            "Every item is replaced by another that fails, until 'RecursionError: maximum recursion depth exceeded'."
        )
        yield error(seen, because, "Give every image a caption of the same name up to its first dot.")
    else:
        left = images.read - images.failing
        because = (
            f"Each is replaced by a random other: the run trains on {left} images, some more often, without an error."
        )
        yield warning(seen, because, "Repair these files, or remove them.")


def _unseen(images: Images) -> Iterator[Finding]:
    if images.unseen:
        yield warning(
            f"X-Flux does not list {len(images.unseen)} images in {images.folder}: {_few(images.unseen)}.",
            f"It trains on {images.listed} images without a word about the others.",
            "Save them as .jpg or .png, in small letters.",
        )
    if images.folders:
        yield warning(
            f"{images.folder} has folders with images: {_few(images.folders)}.",
            f"X-Flux does not look into folders; it trains on {images.listed} images.",
            "Move the images up.",
        )


def _few(names: list[str] | tuple[str, ...], between: str = ", ") -> str:
    more = f"{between}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more


@check("XF115", "X-Flux's batches hold images of one size")
def one_size(case: Case) -> Iterator[Finding]:
    """The loader scales the long side and stacks what comes: there are no buckets (dataset.py:65-76)."""
    found = xflux_bill.of(case)
    images = _images(found)
    if found.batch == 1 or found.script.kind == "controlnet":
        raise SkipCheck(
            "a batch of one image fits itself" if found.batch == 1 else "the ControlNet loader crops squares"
        )
    sizes = sorted({shape(size, found.img_size) for size in images.sizes})
    crops = found.data_get("random_ratio") is True
    if len(sizes) < 2 and not crops:
        return
    what = "random_ratio crops each image to a random one of four ratios"
    if len(sizes) > 1:
        what = f"the images come out in {len(sizes)} sizes ({_few([f'{w}x{h}' for w, h in sizes])})"
    yield error(
        f"data_config.train_batch_size is {found.batch} and {what}.",
        "The first mixed batch ends in 'RuntimeError: stack expects each tensor to be equal size'.",
        "Train with 1 and raise gradient_accumulation_steps in accelerate's file, or crop the images beforehand.",
        edits=(Edit("train", ("data_config", "train_batch_size"), 1, "images of several sizes do not stack"),),
    )
