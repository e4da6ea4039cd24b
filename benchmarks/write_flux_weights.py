"""Write FLUX.1-dev at its full size with random weights, in its own diffusers layout: no download, no licence.

    python benchmarks/write_flux_weights.py OUT [--device cuda] [--parts transformer,text_encoder_2,…] [--layers 1,1]

Memory and speed do not depend on what the weights are, so a benchmark can run on weights made up on the spot:
11,901,408,320 transformer parameters in three shards, T5-XXL in two, CLIP-L, the VAE, the scheduler, and
tokenizers learned from the demo's captions; 34 GB in bf16. Values are made on the device slice by slice and
written as they come, so that the host never holds more than a slice. A shard that is already whole is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
sys.path.insert(0, str(DEMO))

import caption_tokenizers  # noqa: E402
import flux_layout  # noqa: E402
from flux_layout import Shapes  # noqa: E402

BYTES = 2
"""Of one bf16 value."""
SPREAD = 0.02
"""Standard deviation of matrices: activations stay finite in bf16 through all 57 blocks."""
SLICE = 64 << 20
"""Values made at once: 256 MB in fp32 on the device, 128 MB in bf16 on the host."""
TOKENIZERS = {
    "tokenizer": caption_tokenizers.write_clip_tokenizer,
    "tokenizer_2": caption_tokenizers.write_t5_tokenizer,
}


@dataclass(frozen=True)
class Part:
    """One model of the pipeline: its folder, config, tensors, and how its file is named and cut."""

    folder: str
    config: dict[str, Any]
    shapes: Shapes
    stem: str
    shard_bytes: int

    def files(self) -> dict[str, Shapes]:
        """File name → tensors: one file, or shards filled in order, as diffusers and transformers cut them."""
        shards = cut(self.shapes, self.shard_bytes)
        if len(shards) == 1:
            return {f"{self.stem}.safetensors": shards[0]}
        count = len(shards)
        return {f"{self.stem}-{k:05d}-of-{count:05d}.safetensors": shard for k, shard in enumerate(shards, 1)}


def cut(shapes: Shapes, limit: int) -> list[Shapes]:
    """Shards of at most `limit` bytes, in the order of the tensors."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        need = prod(shape) * BYTES
        if shards[-1] and size + need > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += need
    return shards


def full_size(layers: tuple[int, int] | None = None) -> list[Part]:
    """The four models of FLUX.1-dev; with `layers`, that many double and single blocks and text layers."""
    transformer, clip, t5 = dict(flux_layout.TRANSFORMER), dict(flux_layout.CLIP), dict(flux_layout.T5)
    if layers:
        transformer |= {"num_layers": layers[0], "num_single_layers": layers[1]}
        clip |= {"num_hidden_layers": min(layers[0], clip["num_hidden_layers"])}
        t5 |= {"num_layers": min(layers[0], t5["num_layers"])}
    vae = flux_layout.VAE
    diffusers_stem = "diffusion_pytorch_model"
    return [
        Part("transformer", transformer, flux_layout.diffusers_shapes(transformer), diffusers_stem, 10 * 10**9),
        Part("text_encoder_2", t5, flux_layout.t5_shapes(t5), "model", 5 * 10**9),
        Part("text_encoder", clip, flux_layout.clip_shapes(clip), "model", 5 * 10**9),
        Part("vae", vae, flux_layout.diffusers_shapes(vae), diffusers_stem, 10 * 10**9),
    ]


# Writing ------------------------------------------------------------------------------------------------


def header(shapes: Shapes) -> bytes:
    """The head of a safetensors file: its length in eight bytes, then JSON, padded so that the data is aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * BYTES
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def values(name: str, shape: tuple[int, ...], device: str) -> Iterator[Any]:
    """The tensor's values in flat bf16 slices: norms 1, biases 0, the rest normal; the name is the seed."""
    import torch

    count = prod(shape)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    for start in range(0, count, SLICE):
        length = min(SLICE, count - start)
        if len(shape) > 1:
            slice_ = torch.empty(length, device=device).normal_(0, SPREAD, generator=generator)
        else:
            slice_ = torch.full((length,), 0.0 if name.endswith(".bias") else 1.0, device=device)
        yield slice_.to(torch.bfloat16)


def write_tensors(file: Path, shapes: Shapes, device: str) -> bool:
    """Write one safetensors file under a temporary name and rename it; False when it was there already."""
    import torch

    head = header(shapes)
    size = len(head) + sum(prod(shape) for shape in shapes.values()) * BYTES
    if file.is_file() and file.stat().st_size == size and _begins_with(file, head):
        return False
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
        try:
            stream.write(head)
            for name, shape in shapes.items():
                for part in values(name, shape, device):
                    stream.write(memoryview(part.cpu().view(torch.uint8).numpy()))
            stream.flush()
            os.fsync(stream.fileno())
            os.fchmod(stream.fileno(), 0o644)
            Path(stream.name).replace(file)
        except BaseException:
            Path(stream.name).unlink(missing_ok=True)
            raise
    return True


def _begins_with(file: Path, head: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(head)) == head


def write_part(out: Path, part: Part, device: str) -> None:
    """One model's folder: shards, index where there are several, config last."""
    folder = out / part.folder
    folder.mkdir(parents=True, exist_ok=True)
    files = part.files()
    for name, shapes in files.items():
        started = time.perf_counter()
        size = sum(prod(shape) for shape in shapes.values()) * BYTES
        made = write_tensors(folder / name, shapes, device)
        seconds = time.perf_counter() - started
        what = f"{seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s" if made else "kept"
        print(f"{part.folder}/{name}: {size / 1e9:.2f} GB, {what}", flush=True)
    index = folder / f"{part.stem}.safetensors.index.json"
    if len(files) > 1:
        weight_map = {name: file for file, shapes in files.items() for name in sorted(shapes)}
        total = sum(prod(shape) for shape in part.shapes.values()) * BYTES
        caption_tokenizers.write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    caption_tokenizers.write_json(folder / "config.json", part.config)


def write_rest(out: Path) -> None:
    """Tokenizers, scheduler and the pipeline's index: some kilobytes."""
    captions = caption_tokenizers.read_captions(DEMO / "photos")
    for folder, write in TOKENIZERS.items():
        shutil.rmtree(out / folder, ignore_errors=True)
        write(out / folder, captions)
    (out / "scheduler").mkdir(exist_ok=True)
    caption_tokenizers.write_json(out / "scheduler" / "scheduler_config.json", flux_layout.SCHEDULER)
    caption_tokenizers.write_json(out / "model_index.json", flux_layout.MODEL_INDEX)


def missing_bytes(out: Path, parts: list[Part]) -> int:
    """What is still to be written."""
    total = 0
    for part in parts:
        for name, shapes in part.files().items():
            size = len(header(shapes)) + sum(prod(shape) for shape in shapes.values()) * BYTES
            file = out / part.folder / name
            total += 0 if file.is_file() and file.stat().st_size == size else size
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", help="where the values are made (default: cuda)")
    parser.add_argument("--parts", help="only these models, by folder, with commas between them")
    parser.add_argument("--layers", metavar="D,S", help="a smaller model: D double and S single blocks")
    options = parser.parse_args()
    try:
        layers = _layers(options.layers)
        parts = _chosen(full_size(layers), options.parts)
        _check(options.out, parts, options.device)
        started = time.perf_counter()
        for part in parts:
            write_part(options.out, part, options.device)
        write_rest(options.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.out} cannot be written: {error.strerror}. Whole shards are kept.", file=sys.stderr)
        return 1
    count = sum(prod(shape) for part in parts for shape in part.shapes.values())
    print(f"{options.out}: {count:,} parameters, {time.perf_counter() - started:.0f} s")
    return 0


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = [int(number) for number in text.split(",") if number.strip().isdigit()]
    if len(numbers) != 2 or min(numbers) < 1:
        raise ValueError(f"--layers is {text!r}. Give two counts of at least 1, such as 1,1.")
    return numbers[0], numbers[1]


def _chosen(parts: list[Part], names: str | None) -> list[Part]:
    if names is None:
        return parts
    wanted = {name.strip() for name in names.split(",")}
    known = {part.folder for part in parts}
    if not wanted <= known:
        unknown = ", ".join(sorted(wanted - known))
        raise ValueError(f"--parts names {unknown}. The models are {', '.join(sorted(known))}.")
    return [part for part in parts if part.folder in wanted]


def _check(out: Path, parts: list[Part], device: str) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device. Give --device cpu; it takes some minutes instead of one.")
    for part in parts:
        files = part.files()
        for file in sorted((out / part.folder).glob(f"{part.stem}*.safetensors")):
            if file.name not in files or not _begins_with(file, header(files[file.name])):
                raise ValueError(f"{file} holds other weights, which are not overwritten. Name a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    need, free = missing_bytes(out, parts), shutil.disk_usage(out).free
    if need > free:
        raise ValueError(f"{need / 1e9:.1f} GB are to be written and {out} has {free / 1e9:.1f} GB free. Free some.")


if __name__ == "__main__":
    sys.exit(main())
