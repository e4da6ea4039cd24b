"""An image and its caption are never swapped: not by two ranks, shuffling, repeats, mirroring, dropout, or a batch
of several; and a fill that is killed leaves whole entries."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from cache_kit import config, fill  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trainer_kit import environment, png, put, tiny_flux, write_config  # noqa: E402
from xflux_trainer import cache, entries  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.data import load_image  # noqa: E402
from xflux_trainer.encoders import ImageCodec, TextEncoders  # noqa: E402
from xflux_trainer.layout import Base  # noqa: E402
from xflux_trainer.order import Order  # noqa: E402

CPU = torch.device("cpu")
HERE = Path(__file__).parent
SIZES = ((64, 64), (96, 48), (48, 96), (64, 64), (200, 100), (64, 64), (96, 48))


def pictures(folder: Path) -> Path:
    """Seven images of three shapes, each unlike its mirror image, and captions of several lengths."""
    for number, (width, height) in enumerate(SIZES):
        name = f"{'twice/' if number in (1, 4) else ''}{number}.png"
        put(folder, name, f"picture {number}" + " of a square" * (number % 3), gradient(width, height, number))
    return folder


def gradient(width: int, height: int, number: int) -> bytes:
    """A picture whose left half has another color than its right."""
    import io

    import numpy as np
    from PIL import Image

    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (30 * number, 200 - 20 * number, 90)
    pixels[:, width // 2 :] = (250 - 30 * number, 20 * number, 10)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


ALL = {
    "resolutions": [32], "random_flip": True, "caption_dropout": 0.3, "repeats": {"twice": 2}, "text_padding": "none",
}  # fmt: skip


class Truth:
    """What the encoders say of each picture of the folder, by hand."""

    def __init__(self, run: TrainConfig) -> None:
        codec = ImageCodec(Base.of(tiny_flux()), CPU, torch.float32)
        texts = TextEncoders(Base.of(tiny_flux()), CPU, run.max_text_tokens, run.text_padding)
        self.images = sorted(Path(run.img_dir).rglob("*.png"))
        captions = [json.loads(image.with_suffix(".json").read_text())["caption"] for image in self.images]
        self.texts = [texts.encode(caption)[0] for caption in captions]
        self.silent = texts.encode("")[0]
        self.latents = {
            (k, size, flip): codec.encode(load_image(image, size, None, flip=flip))
            for k, image in enumerate(self.images)
            for size in run.sizes
            for flip in (False, True)
        }
        self.run = run

    def check(self, pick: int, latents: torch.Tensor, text: torch.Tensor) -> None:
        """`pick` is the number that the order gave."""
        count = len(self.images)
        view, number = divmod(pick, count * len(self.run.sizes))
        place, k = divmod(number, count)
        expected = self.latents[k, self.run.sizes[place], bool(view & 1)]
        assert latents.shape == expected.shape
        assert torch.equal(latents.flatten()[: expected.numel()], expected.flatten())
        caption = self.silent if view & 2 else self.texts[k]
        assert torch.equal(text.float(), caption.float())


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Truth]:
    folder = tmp_path_factory.mktemp("pairs")
    pictures(folder / "images")
    run = config(folder, **{**ALL, "resolutions": (32,), "repeats": (("twice", 2),)})
    fill(run)
    return run, Truth(run)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_sample_of_every_batch_is_a_pair(filled: tuple[TrainConfig, Truth], batch: int) -> None:
    """Over three passes, as one rank would see them and as two would."""
    import dataclasses

    run, truth = filled
    made = fill(dataclasses.replace(run, train_batch_size=batch))
    order = Order(made.buckets, batch, 0, flip=True, dropout=0.3)
    seen = set()
    for number in range(3 * order.per_epoch):
        picks = order[number]
        read = cache.read_batch([made[pick] for pick in picks])
        lengths = [len(read.text[k]) if read.mask is None else int(read.mask[k].sum()) for k in range(batch)]
        for k, pick in enumerate(picks):
            truth.check(pick, read.latents[k], read.text[k][: lengths[k]])
            assert not read.text[k][lengths[k] :].any()
            seen.add(pick % len(made))
    assert seen == set(range(2 * len(SIZES)))
    # Two pictures count twice, at both sizes.
    assert sum(map(len, made.buckets)) == 2 * (len(SIZES) + 2)


def test_two_ranks_never_swap_a_caption(tmp_path: Path) -> None:
    """Two processes fill one cache and read their share of the batches; all of it is what one process sees."""
    pictures(tmp_path / "images")
    places = {"cache_dir": str(tmp_path / "cache"), "train_batch_size": 2}
    run_file = write_config(tmp_path, **{**ALL, **places})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(HERE / "fill_ranks.py"), str(run_file), str(tmp_path), "30"]
    more = {"CUDA_VISIBLE_DEVICES": "", **shared}
    started = [
        subprocess.Popen(
            command, env=environment(RANK=rank, LOCAL_RANK=rank, **more), stdout=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert "encoded 7 images" in outputs[0]
    assert outputs[1] == ""

    from xflux_trainer.config import load

    truth = Truth(load(run_file))
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in "01"]
    assert {one["number"] % 2 for one in told[0]} == {0}
    assert {one["number"] for part in told for one in part} == set(range(30))
    for one in [*told[0], *told[1]]:
        length = sum(one["mask"]) if one["mask"] else None
        text = torch.tensor(one["text"]).reshape(-1, truth.silent.shape[1])[:length]
        count = len(truth.images)
        view, number = divmod(one["pick"], 2 * count)
        expected = truth.latents[number % count, truth.run.sizes[number // count], bool(view & 1)]
        assert one["shape"] == list(expected.shape)
        assert one["latents"] == pytest.approx(expected.flatten()[:64].tolist(), abs=1e-6)
        assert torch.equal(text, (truth.silent if view & 2 else truth.texts[number % count]).float())


def test_a_fill_that_is_killed_leaves_whole_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the next one encodes only what is missing."""
    for number in range(60):
        put(tmp_path / "images", f"{number}.png", f"number {number % 5}", png(64, 64, (number, 2 * number, 9)))
    run_file = write_config(tmp_path, cache_dir=str(tmp_path / "cache"))
    folder = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-m", "xflux_trainer", "cache", "--config", str(run_file)], env=environment(),
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(folder.glob("image-*"))) < 10 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = sorted(folder.glob("*.safetensors"))
    images = sum(path.name.startswith("image-") for path in left)
    assert 10 <= images < 60
    for path in left:
        assert load_file(path).keys() == entries.read(path).keys()  # its checksum holds
    run = config(tmp_path)
    made = fill(run)
    assert f"encoded {60 - images} images" in capsys.readouterr().out
    assert len(made) == 60
    for entry in made:
        cache.read_batch([entry])
