"""What the trainer's tests share: image files made by hand, tiny models, and runs of the command line.

A module and not a conftest.py, because the doctor's tests import theirs by that name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"
AVX_512 = "avx512f" in Path("/proc/cpuinfo").read_text("utf-8").split()
"""Without it torch sums products in other parts, and rounds those in bf16 more than once."""


def png(width: int = 32, height: int = 32, color: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """A PNG of one color, made without an image library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(color) * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def put(folder: Path, name: str, caption: str | None = "a red square", data: bytes | None = None) -> Path:
    """An image with its caption beside it."""
    image = folder / name
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(png() if data is None else data)
    if caption is not None:
        image.with_suffix(".json").write_text(json.dumps({"caption": caption}), encoding="utf-8")
    return image


@functools.cache
def tiny_flux() -> Path:
    """A FLUX pipeline of a few megabytes with random weights; made once for each state of its makers."""
    makers = sorted(DEMO.glob("*.py")) + sorted((DEMO / "photos").glob("*"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in makers)).hexdigest()[:12]
    import torch
    import transformers

    # Sums of several threads may come in another order; and models this small are quicker without them.
    torch.set_num_threads(1)
    folder = Path(tempfile.gettempdir()) / f"xflux-tiny-{os.getuid()}-{digest}-{transformers.__version__}"
    done = subprocess.run(
        [sys.executable, str(DEMO / "make_tiny_flux.py"), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (240, 240, 240)}


def squares(folder: Path, sizes: tuple[tuple[int, int], ...] = ((64, 64),)) -> Path:
    """Four images of four colors; their sizes go round through `sizes`."""
    for number, (name, color) in enumerate(COLORS.items()):
        put(folder, f"{name}.png", f"a {name} square", png(*sizes[number % len(sizes)], color))
    return folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A train config for a run of seconds on the tiny model; the images are made when there are none."""
    images = folder / "images"
    if not images.exists():
        squares(images)
    return {
        "pretrained_model": str(tiny_flux()),
        "img_dir": str(images),
        "img_size": 64,
        "output_dir": str(folder / "out"),
        # One for all tests: its entries are named by what they are made of.
        "cache_dir": str(tiny_flux().with_name(f"{tiny_flux().name}-cache")),
        "max_train_steps": 4,
        "learning_rate": 1e-2,
        "rank": 4,
        "max_text_tokens": 16,
        "mixed_precision": "no",
        "checkpointing_steps": 100,
        "disable_sampling": True,
        "heldout_samples": 0,
        "report_to": "none",
        "num_workers": 1,
        **changes,
    }


def write_config(folder: Path, name: str = "train.yaml", **changes: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(settings(folder, **changes)), encoding="utf-8")
    return path


def environment(**more: str) -> dict[str, str]:
    """This process's environment with one thread, and without what another launcher left there."""
    dropped = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": path, "HF_HUB_OFFLINE": "1", **more}


def trainer(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """`python -m xflux_trainer …` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "xflux_trainer", *map(str, arguments)],
        capture_output=True, text=True, timeout=280, env=environment(**more),
    )  # fmt: skip


def metrics(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(autouse=True)
def keep_signals() -> Iterator[None]:
    """The command line takes SIGINT and SIGTERM over; pytest gets them back. For modules that import it."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
