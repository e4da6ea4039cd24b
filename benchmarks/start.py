"""Seconds from the launch of a run to the end of its first step, the second time: everything encoded and compiled.

    python benchmarks/start.py --work DIR [--tiny] [--device cuda] [--out JSON] [--no-warm]

Writes a FLUX.1-dev-sized transformer with random weights (23.8 GB, in three shards of diffusers' layout, kept for the
next time), four images and a filled cache, and starts the real trainer: once for what a first start remembers and
compiles, then with the shards dropped from the page cache, then with them in it. Beside each stands how long several
threads take to read the same files in the same state. The parts are those of the run's own metrics.json. With --tiny
the transformer is the demo's, of a few megabytes, which a CPU trains, and no bar is held.

Exit 1 where the second start takes more than 20 s beyond the raw read, or holds more than 8 GiB of the host's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
DEMO = REPO / "examples" / "demo"
sys.path.insert(0, str(Path(__file__).resolve().parent))
BEYOND, HOST_GIB = 20.0, 8.0
GIB = 1 << 30
PIECE, THREADS = 16 << 20, 8
PARTS = ("launch", "between", "list", "cache", "load", "train", "first_step")
"""Of metrics.json's `start`; the first step is the last part of `train`."""
LONG_AGO = (1_700_000_000, 1_700_000_000)
CAPTION = "a square"


def make(work: Path, options: argparse.Namespace) -> None:
    """Model, images and cache."""
    model, tiny = work / "model", work / "tiny"
    subprocess.run([sys.executable, str(DEMO / "make_tiny_flux.py"), str(tiny)], check=True)
    left_out = () if options.tiny else ("transformer",)
    shutil.copytree(tiny, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out))
    for file in model.rglob("*"):
        os.utime(file, LONG_AGO)
    if not options.tiny:
        # In a process of its own: a context of ours on the card would be seen beside what is measured.
        argv = [sys.executable, str(REPO / "benchmarks" / "write_flux_weights.py"), str(model)]
        argv += ["--parts", "transformer", "--device", options.device]
        subprocess.run([*argv, *(["--layers", options.layers] if options.layers else [])], check=True)
    write_images(work / "images", 64 if options.tiny else 1024)
    fill(work)


def model_options(parser: argparse.ArgumentParser) -> None:
    """What `make` asks for."""
    parser.add_argument("--tiny", action="store_true", help="the demo's transformer")
    parser.add_argument("--layers", metavar="D,S", help="that many double and single blocks instead of 19,38")
    parser.add_argument("--device", default="cuda", help="where the random weights are drawn")


def write_images(folder: Path, size: int) -> None:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for number in range(4):
        image = folder / f"{number}.png"
        Image.new("RGB", (size, size), (number, 99, 99)).save(image)
        image.with_suffix(".json").write_text(json.dumps({"caption": CAPTION}), encoding="utf-8")
        for file in (image, image.with_suffix(".json")):
            os.utime(file, LONG_AGO)  # a file of just now would be looked at again by the next start


def settings(work: Path) -> dict[str, Any]:
    width = 64 if _transformer(work)["num_layers"] < 19 else 1024
    return {
        "pretrained_model": str(work / "model"), "img_dir": str(work / "images"), "output_dir": str(work / "out"),
        "cache_dir": str(work / "cache"), "img_size": width, "rank": 16, "learning_rate": 1e-4, "max_train_steps": 3,
        "checkpointing_steps": 100, "disable_sampling": True, "heldout_samples": 0, "report_to": "none",
        "mixed_precision": "bf16",
    }  # fmt: skip


def _transformer(work: Path) -> dict[str, Any]:
    return dict(json.loads((work / "model" / "transformer" / "config.json").read_text(encoding="utf-8")))


def fill(work: Path) -> None:
    """The cache's entries of the shapes that this transformer takes: made up, since only their size matters here."""
    import torch
    from xflux_trainer import cache, digests, entries, files, keys
    from xflux_trainer.config import TrainConfig
    from xflux_trainer.data import list_samples
    from xflux_trainer.imagework import Item, Recipe
    from xflux_trainer.layout import Base

    run, sizes = TrainConfig(**settings(work)), _transformer(work)
    files.make_folder(run.cache_path)
    text, image = cache._who(Base.of(work / "model"), run.cache_path)
    dice = torch.Generator().manual_seed(0)
    name = keys.key(text, str(run.max_text_tokens), run.text_padding, CAPTION)
    values = {
        "text": torch.randn(run.max_text_tokens, sizes["joint_attention_dim"], generator=dice).bfloat16(),
        "pooled": torch.randn(sizes["pooled_projection_dim"], generator=dice).bfloat16(),
    }
    entries.write(entries.place(run.cache_path, "text", name), values)
    recipe = Recipe(run, run.cache_path, image)
    for sample in list_samples(run.img_dir, run.caption_type)[0]:
        content = digests.Content(digests.content_id(sample.image.read_bytes()), run.img_size, run.img_size)
        for view in recipe.views(Item(sample, Path(run.img_dir), training=True), content, b""):
            latents = torch.randn(sizes["in_channels"] // 4, run.img_size // 8, run.img_size // 8, generator=dice)
            entries.write(entries.place(run.cache_path, "image", view.latents[0]), {"latents": latents})


# Measuring ----------------------------------------------------------------------------------------------


def shards(work: Path) -> list[Path]:
    return sorted((work / "model" / "transformer").glob("*.safetensors"))


def drop(files: list[Path]) -> None:
    """Out of the page cache, as after the machine's start."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)  # what is not on the disk yet cannot be dropped
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read(files: list[Path]) -> float:
    """Seconds that threads take to read the files into the host's memory, piece by piece in their order."""
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, PIECE)]

    def one(piece: tuple[Path, int]) -> int:
        handle = os.open(piece[0], os.O_RDONLY)
        try:
            os.posix_fadvise(handle, piece[1], PIECE, os.POSIX_FADV_WILLNEED)
            return len(os.pread(handle, PIECE, piece[1]))
        finally:
            os.close(handle)

    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as threads:
        count = sum(threads.map(one, pieces))
    assert count == sum(file.stat().st_size for file in files)
    return time.perf_counter() - started


def start(work: Path, name: str) -> dict[str, Any]:
    """One run of three steps; what it says of its start, and the most memory that it held."""
    config = work / "train.yaml"
    config.write_text(json.dumps(settings(work)), encoding="utf-8")  # JSON is YAML
    # Kernel caches of the benchmark's own, so that its first start compiles.
    environ = {**os.environ, "XDG_CACHE_HOME": str(work / "user-cache"), "HF_HUB_OFFLINE": "1"}
    environ |= {"TRITON_CACHE_DIR": str(work / "user-cache" / "triton")}
    started = time.perf_counter()
    argv = [sys.executable, "-m", "xflux_trainer", "train", "--config", str(config)]
    with (work / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(argv, env=environ, stdout=log, stderr=subprocess.STDOUT)
        peak = 0
        while child.poll() is None:
            peak = max(peak, own_memory(child.pid))
            time.sleep(0.05)
    if child.returncode:
        raise SystemExit(f"error: the run failed:\n{(work / f'{name}.log').read_text(errors='replace')}")
    metrics = json.loads((work / "out" / "metrics.json").read_text(encoding="utf-8"))
    return {
        "start": name, **metrics["start"], "process_seconds": time.perf_counter() - started, "host_bytes": peak,
        "seconds_per_step": metrics["seconds_per_step"], "device": metrics["device"], "versions": metrics["versions"],
    }  # fmt: skip


def own_memory(pid: int) -> int:
    """RssAnon + RssShmem of a process, in bytes; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def measure(work: Path, *, warm: bool) -> list[dict[str, Any]]:
    files = shards(work)
    rows = [start(work, "first")]
    drop(files)
    raw = read(files)
    drop(files)
    rows.append({**start(work, "second, cold"), "raw_seconds": raw})
    if warm:
        raw = read(files)
        rows.append({**start(work, "second, warm"), "raw_seconds": raw})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'seconds':<14}" + "".join(f"{name:>11}" for name in ("in all", *PARTS, "raw read", "beyond", "host GiB"))
    ]
    for row in rows:
        raw = row.get("raw_seconds")
        cells = [f"{row[name]:.2f}" if name in row else "-" for name in ("seconds", *PARTS)]
        cells += ["-", "-"] if raw is None else [f"{raw:.2f}", f"{row['seconds'] - raw:.2f}"]
        cells.append(f"{row['host_bytes'] / GIB:.2f}")
        lines.append(f"{row['start']:<14}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def missed(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows[1:]:
        beyond = row["seconds"] - row["raw_seconds"]
        if beyond > BEYOND:
            found.append(f"{row['start']}: {beyond:.1f} s beyond the raw read; the bar is {BEYOND:g}")
        if row["host_bytes"] > HOST_GIB * GIB:
            found.append(f"{row['start']}: {row['host_bytes'] / GIB:.1f} GiB of host memory; the bar is {HOST_GIB:g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a local disk")
    model_options(parser)
    parser.add_argument("--no-warm", action="store_true", help="leave out the start from the page cache")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    make(work, options)
    rows = measure(work, warm=not options.no_warm)
    size = sum(file.stat().st_size for file in shards(work))
    print(f"{rows[0]['device']}, torch {rows[0]['versions']['torch']}, {size / 1e9:.2f} GB of weights")
    print(table(rows))
    if options.out:
        options.out.write_text(json.dumps({"bytes": size, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    problems = [] if options.tiny else missed(rows)
    for line in problems:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
