"""Drawing: what it must not touch, the right shift, conditions, ranks in step, and the contact sheet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from PIL import Image  # noqa: E402
from trainer_model import TINY, tiny_transformer  # noqa: E402
from xflux_trainer import cache, flow, sample, sheet  # noqa: E402
from xflux_trainer.cache import Batch, Entry  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import WriteError  # noqa: E402
from xflux_trainer.model import Velocity  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402
from xflux_trainer.sample import Prompt  # noqa: E402

CONFIG = TrainConfig("x", sample_width=64, sample_height=48, sample_steps=2, mixed_precision="no")
CPU = torch.device("cpu")
TEXT, POOLED = torch.ones(1, 5, TINY.text_dim), torch.ones(1, TINY.pooled_dim)


class Codec:
    """In place of the VAE: three of the latents' channels, made as large as the image."""

    def __init__(self, *_: object) -> None: ...

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(z[None, :3], scale_factor=8)[0].sigmoid()


@pytest.fixture(autouse=True)
def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "ImageCodec", Codec)
    monkeypatch.setattr(cache, "read_text", lambda _: (TEXT, POOLED))


def prompts(folder: Path, count: int, stem: str = "step-000001", **more: Any) -> list[Prompt]:
    return [Prompt(k, Path("t"), folder / f"{stem}-{k}.png", f"prompt no. {k} ü", **more) for k in range(count)]


@pytest.mark.parametrize("training", [True, False])
def test_drawing_leaves_the_mode_the_dice_and_the_gradients(tmp_path: Path, training: bool) -> None:
    velocity = Velocity(tiny_transformer(), guidance=True).train(training)
    parameter = next(velocity.parameters()).requires_grad_(True)
    before = torch.get_rng_state()
    sample.draw(velocity, TINY, CONFIG, None, Ranks(Launch(use_cpu=True)), prompts(tmp_path, 2))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
    assert {module.training for module in velocity.modules()} == {training}
    assert torch.is_grad_enabled() and parameter.grad is None
    with Image.open(tmp_path / "step-000001-1.png") as image:
        assert (image.size, image.text["Description"]) == ((64, 48), "prompt no. 1 ü")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("width", "height", "mu"), [(512, 512, 0.63), (1024, 1024, 1.15), (1024, 576, 0.846667)])
def test_the_shift_is_that_of_the_images_own_tokens(width: int, height: int, mu: float) -> None:
    """X-Flux's sampler takes 64 tokens for 4096, and shows images that the trained model would not draw."""
    seen: list[float] = []

    def model(x_t: torch.Tensor, t: torch.Tensor, *_: object) -> torch.Tensor:
        assert x_t.shape == (1, width * height // 256, 64)
        seen.append(float(t))
        return torch.zeros_like(x_t)

    config = replace(CONFIG, sample_width=width, sample_height=height, sample_steps=3)
    sample.denoise(model, TINY, config, CPU, TEXT, POOLED, 0)
    assert seen == pytest.approx(flow.sampling_times(3, mu)[:3].tolist(), abs=1e-5)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_sharded_ranks_do_as_many_forwards_and_write_each_image_once(tmp_path: Path, count: int) -> None:
    calls = [0, 0, 0]
    for rank in range(3):

        def model(x_t: torch.Tensor, *_: object, rank: int = rank) -> torch.Tensor:
            calls[rank] += 1
            return torch.zeros_like(x_t)

        ranks = Ranks(Launch(rank=rank, world_size=3, use_cpu=True))
        ranks.agree = lambda error=None: None  # type: ignore[method-assign] (nobody to talk to)
        folder = tmp_path / str(rank)
        sample.draw(model, TINY, CONFIG, None, ranks, prompts(folder, count), sharded=True)  # type: ignore[arg-type]
    assert len(set(calls)) == 1
    assert calls[0] == CONFIG.sample_steps * -(-count // 3)
    written = sorted(path.name for path in tmp_path.rglob("*.png"))
    assert written == [f"step-000001-{k}.png" for k in range(count)]


def test_an_image_that_cannot_be_written_is_told_after_all_forwards(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    calls: list[int] = []

    def model(x_t: torch.Tensor, *_: object) -> torch.Tensor:
        calls.append(1)
        return torch.zeros_like(x_t)

    with pytest.raises(WriteError):
        sample.draw(model, TINY, CONFIG, None, Ranks(Launch(use_cpu=True)), prompts(tmp_path / "file", 2))  # type: ignore[arg-type]
    assert len(calls) == 4


def test_a_controlnet_is_shown_the_condition_of_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled to cover the sample image, cut at the middle, never stretched."""
    condition = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    condition[..., 24:40] = 250  # a bar in the middle
    batch = Batch(torch.zeros(1, 16, 4, 8), TEXT, POOLED, None, condition)
    monkeypatch.setattr(cache, "read_batch", lambda entries: batch)
    seen: list[torch.Tensor] = []

    def model(x_t: torch.Tensor, *more: Any) -> torch.Tensor:
        assert more[6] is None  # no mask
        seen.append(more[7])
        return torch.zeros_like(x_t)

    entry = Entry(Path("l"), Path("t"), (16, 4, 8))
    config = replace(CONFIG, sample_width=64, sample_height=64)
    ranks = Ranks(Launch(use_cpu=True))
    sample.draw(model, TINY, config, None, ranks, prompts(tmp_path, 1, condition=entry))  # type: ignore[arg-type]
    shown = seen[0]
    assert (shown.shape, shown.dtype) == ((1, 3, 64, 64), torch.uint8)
    assert shown[0, 0, 32].float().mean() == pytest.approx(125, abs=8)  # twice as wide: half of the width
    assert torch.equal(sample.fit(condition, 64, 32), condition)


def paint(folder: Path, stem: str, number: int, color: str, caption: str = "a cat") -> Path:
    image = torch.zeros(3, 48, 96) + {"black": 0.0, "grey": 0.5, "white": 1.0}[color]
    sample.write_png(folder / f"{stem}-{number}.png", image, caption)
    return folder / f"{stem}-{number}.png"


def cell(image: Image.Image, column: int, row: int) -> tuple[int, ...]:
    """The color in the middle of one of the sheet's images."""
    x = sheet.LABEL + sheet.GAP + column * (96 + sheet.GAP) + 48
    return image.getpixel((x, sheet.LINE + sheet.GAP + row * (48 + sheet.GAP) + 24))  # type: ignore[return-value]


def test_the_sheet_has_a_row_a_prompt_and_a_column_a_step(tmp_path: Path) -> None:
    assert sheet.write(tmp_path, final=True) is None
    paint(tmp_path, "step-000100", 0, "black")
    paint(tmp_path, "step-000020", 0, "grey")
    paint(tmp_path, "step-000100", 1, "grey", "日本語 and a very long prompt " * 9)
    paint(tmp_path, "final", 0, "black")
    paint(tmp_path, "sample", 0, "black")  # the command line's, of no step
    place = sheet.write(tmp_path, final=False)
    assert place == tmp_path / sheet.NAME
    with Image.open(place) as image:
        black, grey, white = (0, 0, 0), (128, 128, 128), (255, 255, 255)
        assert image.size == (sheet.LABEL + 2 * (96 + sheet.GAP) + sheet.GAP, sheet.LINE + sheet.GAP + 2 * (48 + 6))
        assert [cell(image, c, r) for r in (0, 1) for c in (0, 1)] == [grey, black, white, grey]
        assert image.crop((0, 24, sheet.LABEL, 60)).getextrema()[0][0] < 128  # something is written there
    sheet.write(tmp_path, final=True)
    with Image.open(place) as image:
        assert cell(image, 2, 0) == black


def test_a_broken_image_leaves_its_place_empty_and_many_are_thinned_out(tmp_path: Path) -> None:
    for step in range(1, 41):
        paint(tmp_path, f"step-{step:06d}", 0, "black" if step in (1, 40) else "grey")
    paint(tmp_path, "step-000040", 1, "black").write_bytes(b"\x89PNG\r\n\x1a\n")
    with Image.open(sheet.write(tmp_path, final=False)) as image:  # type: ignore[arg-type]
        assert image.width == sheet.LABEL + 16 * (96 + sheet.GAP) + sheet.GAP
        assert cell(image, 0, 0) == cell(image, 15, 0) == (0, 0, 0)
        assert cell(image, 15, 1) == (255, 255, 255)


def test_samples_of_another_branch_are_put_aside(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    for step in (2, 4, 6):
        paint(samples, f"step-{step:06d}", 0, "grey")
    paint(samples, "final", 0, "grey")
    sheet.write(samples, final=True)
    assert sheet.set_aside(tmp_path, 6) is None
    (tmp_path / "previous-1").mkdir()  # where the branch's checkpoints are
    assert sheet.set_aside(tmp_path, 4) == tmp_path / "previous-1"
    assert [path.name for path in (tmp_path / "previous-1" / "samples").iterdir()] == ["step-000006-0.png"]
    assert {path.name for path in samples.iterdir()} == {"step-000002-0.png", "step-000004-0.png", "final-0.png"}
    assert sheet.set_aside(tmp_path, None) == tmp_path / "previous-2"
    assert list(samples.iterdir()) == []


def test_an_earlier_ends_drawings_of_other_prompts_are_put_aside(tmp_path: Path) -> None:
    """Three prompts at the end of a run that then goes on with one."""
    samples = tmp_path / "samples"
    paint(samples, "step-000002", 0, "grey")
    for prompt in range(3):
        paint(samples, "final", prompt, "grey")
    assert sheet.set_aside_ends(tmp_path, 3) is None
    assert sheet.set_aside_ends(tmp_path, 1) == tmp_path / "previous-1"
    moved = {path.name for path in (tmp_path / "previous-1" / "samples").iterdir()}
    assert moved == {"final-1.png", "final-2.png"}
    assert {path.name for path in samples.iterdir()} == {"step-000002-0.png", "final-0.png", sheet.NAME}
