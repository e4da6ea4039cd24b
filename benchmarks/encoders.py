"""What encoding captions and images takes of a card, beside the bill's phase `cache`.

    python benchmarks/encoders.py --work DIR [--sizes 512,1024,1536,2048]

Writes T5-XXL, CLIP-L and the VAE at FLUX.1-dev's sizes with random weights to DIR/encoders (10 GB, kept for the next
time). Then, with the trainer's own classes: T5 and CLIP are loaded and encode one caption of 512 tokens, and for each
size the VAE is loaded and encodes one square image. Measured is torch.cuda.max_memory_allocated from before the loading
to the end of the encoding; what was reserved, and what NVML showed more than before, asked twenty times a second, stand
beside it. Then once more with the allocator held to what the doctor says will be reserved. A job's phase takes the
larger of the two, and so does its bill.

Written to results/encoders-GPU-DATE.json. Exit 1 where the bill is more than 3 % off, or was too little, and where an
image found no room on the card, which is left out of the file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cards
import children
from children import GIB, Outcome
from xflux_trainer import allocator
from xflux_trainer.config import TrainConfig
from xflux_trainer.memory import ERROR_BAR, encoding_images, forecast
from xflux_trainer.memory_terms import CUBLAS
from xflux_trainer.spec import FLUX_DEV

from xflux_doctor.verdict import reserved

PARTS = "text_encoder,text_encoder_2,vae"
SMALL = 256
"""Pixels of an image for which the VAE takes less than the text encoders."""
CAPTION = "a photograph of a red fox in the snow " * 80
"""More than 512 tokens of any tokenizer: it is cut."""
HEAD = "| what | forecast GiB | allocated | difference | reserved | NVML |\n|---|---|---|---|---|---|"


def write_model(model: Path, device: str) -> int:
    """By its own command, which says what is wrong with the folder or the disk; returns its exit code."""
    argv = [sys.executable, str(children.REPO / "benchmarks" / "write_flux_weights.py"), str(model)]
    return subprocess.run([*argv, "--parts", PARTS, "--device", device], check=False).returncode


# What is measured ---------------------------------------------------------------------------------------------


def captions(model: Path) -> None:
    """T5 and CLIP encode a caption that fills every token."""
    import torch
    from xflux_trainer.encoders import TextEncoders
    from xflux_trainer.layout import Base

    config = TrainConfig("")
    made = TextEncoders(Base.of(model), torch.device("cuda"), config.max_text_tokens)
    text, _ = made.encode(CAPTION)
    if text.shape != (config.max_text_tokens, FLUX_DEV.text_dim) or not made.cut:
        raise SystemExit(f"error: the caption was encoded to {tuple(text.shape)}")


def image(model: Path, pixels: int) -> None:
    """The VAE encodes one square image of noise."""
    import torch
    from xflux_trainer.encoders import ImageCodec
    from xflux_trainer.layout import Base

    codec = ImageCodec(Base.of(model), torch.device("cuda"), torch.float32)
    latents = codec.encode(torch.rand(3, pixels, pixels) * 2 - 1)
    if latents.shape[1:] != (pixels // 8, pixels // 8):
        raise SystemExit(f"error: the image was encoded to {tuple(latents.shape)}")


def watched(work: Callable[[], None], forecast_bytes: int) -> Outcome:
    """Bytes while `work` ran, which leaves nothing behind, and whether it runs in what is foretold."""
    import torch
    from xflux_trainer.encoders import free

    free()  # of one that found no room
    torch.cuda.reset_peak_memory_stats()
    with cards.Watched() as seen:
        work()
        torch.cuda.synchronize()
    found = {
        "allocated_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved(),
        "nvml_bytes": max(seen.most, default=0), "held_to_bytes": reserved(forecast_bytes),
    }  # fmt: skip
    free()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(found["held_to_bytes"] / total)
    try:
        work()
        return {**found, "within": True}
    except torch.cuda.OutOfMemoryError:
        return {**found, "within": False}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free()


# Beside the bill ----------------------------------------------------------------------------------------------


def phase(pixels: int) -> int:
    """Bytes of the bill's phase `cache` of a job with images of this size. Of small ones: what captions take."""
    config = TrainConfig("", img_size=pixels)
    made = forecast(config, FLUX_DEV, world_size=1, strategy="single", device="cuda", gpu_only=True)
    return made.gpu_phases["cache"]


def of_image(pixels: int) -> int:
    """Bytes that the VAE is foretold to take."""
    return encoding_images(TrainConfig("", img_size=pixels), FLUX_DEV) + CUBLAS


def rows(measured: dict[str, Outcome]) -> list[Outcome]:
    """The captions, each size's image, and each size's phase: the larger of the two.

    `measured` has `captions`, and an image by its pixels.
    """
    text = measured["captions"]
    found = [_row("captions", phase(SMALL), text)]
    images = {int(size): one for size, one in measured.items() if size != "captions"}
    for pixels, one in images.items():
        found.append(_row(f"image of {pixels} px", of_image(pixels), one))
    for pixels, one in images.items():
        larger = max(text, one, key=lambda each: int(each["allocated_bytes"]))
        found.append(_row(f"a job of {pixels} px", phase(pixels), larger))
    return found


def _row(what: str, forecast_bytes: int, measured: Outcome) -> Outcome:
    error = forecast_bytes / measured["allocated_bytes"] - 1
    wrong = "" if abs(error) <= ERROR_BAR else f"the bill is {error:+.1%} off"
    if not measured["within"]:
        wrong = f"out of memory in {measured['held_to_bytes'] / GIB:.2f} GiB"
    return {"what": what, "forecast_bytes": forecast_bytes, **measured, "error": error, "wrong": wrong}


def line(row: Outcome) -> str:
    sizes = {name: f"{row[f'{name}_bytes'] / GIB:.3f}" for name in ("forecast", "allocated", "reserved", "nvml")}
    cells = [row["what"], sizes["forecast"], sizes["allocated"], f"{row['error']:+.2%}"]
    return f"| {' | '.join([*cells, sizes['reserved'], sizes['nvml']])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=children.REPO / "output" / "encoders", help="on a local disk")
    parser.add_argument("--sizes", type=children.numbers, default=(512, 1024, 1536, 2048), help="pixels on a side")
    parser.add_argument("--results", type=Path, default=children.RESULTS)
    options = parser.parse_args()
    allocator.prefer(os.environ)
    import torch

    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device, whose memory this measures. Run it on a GPU.", file=sys.stderr)
        return 2
    model: Path = options.work.absolute() / "encoders"
    if code := write_model(model, "cuda"):
        return code
    torch.ones(1, device="cuda")  # what the context takes of NVML's figure is there from now on
    asked = {"captions": (partial(captions, model), phase(SMALL))}
    asked |= {str(pixels): (partial(image, model, pixels), of_image(pixels)) for pixels in options.sizes}
    measured, problems = {}, []
    for what, (work, foretold) in asked.items():
        room = torch.cuda.mem_get_info()[0]
        try:
            measured[what] = watched(work, foretold)
        except torch.cuda.OutOfMemoryError:
            name = what if what == "captions" else f"image of {what} px"
            problems.append(f"{name}: out of memory, {foretold / GIB:.1f} GiB foretold and {room / GIB:.1f} free")
    if "captions" in measured:
        found = rows(measured)
        print("\n".join([HEAD, *map(line, found)]))
        body = {"rows": found, "measured": measured}
        print(children.save(options.results, "encoders", "encoders.py", body))
        problems += [f"{row['what']}: {row['wrong']}" for row in found if row["wrong"]]
    for problem in problems:
        print(f"missed: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
