"""Whole runs of the modes beside adapters, and what is done with what they leave: drawing, converting, going on."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from trainer_kit import keep_signals, metrics, squares, tiny_flux, write_config  # noqa: E402
from xflux_trainer import checkpoint, cli, files, lora, modes, outcome, report  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import UserError, WriteError  # noqa: E402
from xflux_trainer.layout import Base  # noqa: E402
from xflux_trainer.model import read_spec  # noqa: E402
from xflux_trainer.ranks import Ranks  # noqa: E402

__all__ = ["keep_signals"]  # a fixture, used by being here

DRAWN = {"sample_width": 32, "sample_height": 48, "sample_steps": 1, "sample_prompts": ["a", "b"]}
MODES: dict[str, dict[str, Any]] = {
    "finetune": {"mode": "finetune", "train_parameters": ["txt_attn", "norm_out"]},
    "controlnet": {"mode": "controlnet", "control_type": "files", "controlnet_depth": 1},
}


def settings(folder: Path, mode: str, **changes: Any) -> dict[str, Any]:
    more = {"control_dir": str(folder / "images")} if mode == "controlnet" else {}
    return {**MODES[mode], **more, "output_dir": str(folder / mode), "max_train_steps": 2, "checkpointing_steps": 1,
            "ema_decay": 0.5, **changes}  # fmt: skip


@pytest.fixture(scope="module", params=list(MODES))
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The mode, the config of a run of two steps that has ended, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    squares(folder / "images")
    path = write_config(folder, **settings(folder, request.param))
    assert cli.main(["train", "--config", str(path)]) == 0
    return request.param, path, folder / request.param


def tensors(folder: Path, mode: str) -> dict[str, Tensor]:
    (file,) = (folder / {"finetune": "transformer", "controlnet": "controlnet"}[mode]).glob("*.safetensors")
    return load_file(file)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_is_converted_to_what_the_run_wrote(
    ran: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mode, path, out = ran
    newest = out / "checkpoint-2"
    assert cli.main(["convert", "--checkpoint", str(newest), "--output", str(tmp_path)]) == 0
    assert f" is in {tmp_path}" in capsys.readouterr().out
    assert same(tensors(tmp_path, mode), tensors(out, mode))  # the average, as the run writes it
    weights = dict(checkpoint.load(newest).weights())
    assert any(not torch.equal(weights[name], value) for name, value in tensors(out, mode).items() if name in weights)
    # By default it is inside the checkpoint's folder, which is still one to resume from.
    assert cli.main(["convert", "--config", str(path)]) == 0
    assert same(tensors(newest, mode), tensors(out, mode))
    assert checkpoint.load(newest).progress.step == 2
    # The checkpoint before it is another model.
    assert cli.main(["convert", "--checkpoint", str(out / "checkpoint-1"), "--output", str(tmp_path / "1")]) == 0
    assert not same(tensors(tmp_path / "1", mode), tensors(out, mode))
    if mode == "controlnet":
        ours = load_file(out / "controlnet.safetensors")
        assert same(load_file(tmp_path / "controlnet.safetensors"), ours)
    assert cli.main(["convert", "--checkpoint", str(newest), "--format", "kohya"]) == 1
    assert "cannot be written as kohya. Take --format diffusers or" in capsys.readouterr().err


def test_a_fine_tune_becomes_one_file(ran: tuple[str, Path, Path], tmp_path: Path) -> None:
    mode, _, out = ran
    if mode != "finetune":
        pytest.skip("of a fine-tune")
    assert cli.main(["convert", "--checkpoint", str(out / "checkpoint-2"), "--format", "bfl"]) == 0
    one = load_file(out / "checkpoint-2" / "transformer_bfl.safetensors")
    arguments = ["--transformer", str(out / "transformer"), "--output", str(tmp_path / "x" / "y.safetensors")]
    assert cli.main(["convert", *arguments, "--dtype", "fp32"]) == 0
    assert same(load_file(tmp_path / "x" / "y.safetensors"), one)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}  # the run's: nothing was mixed
    # What was trained is in it, and the base's own beside it.
    base = tiny_flux() / "transformer" / "diffusion_pytorch_model.safetensors"
    stored, tuned = load_file(base), tensors(out, mode)
    moved = {name for name in stored if not torch.equal(stored[name].float(), tuned[name])}
    assert moved and all("add_" in name or "norm_added" in name or name.startswith("norm_out") for name in moved)
    assert torch.equal(one["double_blocks.0.txt_attn.qkv.weight"][:8],
                       tuned["transformer_blocks.0.attn.add_q_proj.weight"][:8])  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ([], 2, "Name a --checkpoint"), (["--transformer", "t", "--lora", "l"], 2, "Name a --checkpoint"),
    (["--transformer", "t", "--format", "xlabs"], 2, "written as bfl, not as xlabs"),
    (["--transformer", "t"], 1, "does not describe a FLUX.1 transformer"),
    (["--transformer", "vae"], 1, "does not describe a FLUX.1 transformer"),
    (["--checkpoint", "none"], 1, "is not a checkpoint folder"),
    (["--lora", "none.safetensors"], 1, "does not exist"),
    (["--lora", "none.safetensors", "--format", "bfl"], 1, "cannot be written as bfl"),
])  # fmt: skip
def test_what_cannot_be_converted(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.json").write_text("[]")
    places = {"t": tmp_path / "t", "vae": tiny_flux() / "vae", "none": tmp_path / "none"}
    assert cli.main(["convert", *(str(places.get(word, word)) for word in arguments)]) == code
    assert words in capsys.readouterr().err


def test_another_base_is_not_mixed_in(
    ran: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was not trained comes from the base: it must be the one that the rest was trained on."""
    _, path, out = ran
    other = tmp_path / "other"
    shutil.copytree(tiny_flux(), other)
    for number in (0, 1):
        moved = path.with_name(f"moved{number}.yaml")
        moved.write_text(path.read_text().replace(str(tiny_flux()), str(other)))
        arguments = ["convert", "--config", str(moved), "--checkpoint", str(out / "checkpoint-2")]
        assert cli.main([*arguments, "--output", str(tmp_path / "made")]) == number
        with (other / "transformer" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\x11\x22\x33\x44")
    assert "is not the base model that" in capsys.readouterr().err


def test_samples_are_drawn_with_what_was_trained(ran: tuple[str, Path, Path], tmp_path: Path) -> None:
    """By `sample`, as the run itself draws them; repeats name folders that the first images need not lie in."""
    mode, path, _ = ran
    images = path.parent / "images"
    shutil.copytree(images, images / "more", dirs_exist_ok=True)
    drawn = write_config(path.parent, "drawn.yaml", **settings(path.parent, mode, repeats={"more": 2}, **DRAWN))
    assert cli.main(["sample", "--config", str(drawn), "--output", str(tmp_path / "with.png")]) == 0
    assert cli.main(["sample", "--config", str(drawn), "--no-lora", "--output", str(tmp_path / "without.png")]) == 0
    shutil.rmtree(images / "more")
    made = {name: (tmp_path / name).read_bytes() for name in ("with-0.png", "with-1.png", "without-0.png")}
    assert made["with-0.png"] != made["without-0.png"]
    longer = settings(path.parent, mode, output_dir=str(tmp_path / "again"), disable_sampling=False, **DRAWN)
    assert cli.main(["train", "--config", str(write_config(path.parent, "again.yaml", **longer))]) == 0
    assert (tmp_path / "again" / "samples" / "final-0.png").read_bytes() == made["with-0.png"]
    assert (tmp_path / "again" / "samples" / "final-1.png").read_bytes() == made["with-1.png"]


def test_a_fine_tuned_transformer_may_lie_anywhere(ran: tuple[str, Path, Path], tmp_path: Path) -> None:
    """Under another name, beside no scheduler: how it samples, the base says. As one file, it is the same model."""
    mode, path, out = ran
    if mode != "finetune":
        pytest.skip("of a fine-tune")
    shutil.copytree(out / "transformer", tmp_path / "elsewhere" / "mine")
    arguments = ["--transformer", str(out / "transformer"), "--dtype", "fp32"]
    assert cli.main(["convert", *arguments, "--output", str(tmp_path / "one.safetensors")]) == 0
    drawn = write_config(path.parent, "drawn.yaml", **settings(path.parent, mode, **DRAWN))
    made = []
    for place in (out / "transformer", tmp_path / "elsewhere" / "mine", tmp_path / "one.safetensors"):
        image = tmp_path / f"{len(made)}.png"
        arguments = ["--config", str(drawn), "--lora", str(place), "--prompt", "a", "--output", str(image)]
        assert cli.main(["sample", *arguments]) == 0
        made.append(image.read_bytes())
    assert made[0] == made[1] == made[2]


def test_a_checkpoint_is_no_transformer(
    ran: tuple[str, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    mode, path, out = ran
    drawn = write_config(path.parent, "drawn.yaml", **settings(path.parent, mode, **DRAWN))
    assert cli.main(["sample", "--config", str(drawn), "--lora", str(out / "checkpoint-2")]) == 1
    assert "error: " in capsys.readouterr().err


def test_a_run_goes_on_and_draws_no_line_through_its_heldout_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other held-out images: their loss is not compared with that of the earlier ones."""
    common = settings(tmp_path, "finetune", heldout_timesteps=[0.5])
    assert cli.main(["train", "--config", str(write_config(tmp_path, **{**common, "heldout_samples": 2}))]) == 0
    first = metrics(tmp_path / "finetune")["heldout_loss"]["before"]
    capsys.readouterr()
    more = {**common, "resume_from_checkpoint": "latest", "max_train_steps": 3}
    assert cli.main(["train", "--config", str(write_config(tmp_path, **{**more, "heldout_samples": 2}))]) == 0
    assert metrics(tmp_path / "finetune")["heldout_loss"]["before"] == first
    assert "held-out loss is another one" not in capsys.readouterr().out
    other = write_config(tmp_path, **{**more, "max_train_steps": 4, "heldout_samples": 3})
    assert cli.main(["train", "--config", str(other)]) == 0
    assert "the held-out loss is another one from here on: it is measured anew at step 3." in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "finetune" / "heldout.jsonl").read_text().splitlines()]
    assert metrics(tmp_path / "finetune")["heldout_loss"]["before"] == lines[-2]["mean"] != first
    # A fresh start takes neither curve away.
    assert cli.main(["train", "--config", str(write_config(tmp_path, **{**common, "heldout_samples": 2}))]) == 0
    kept = (tmp_path / "finetune" / "previous-1" / "heldout.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == lines


def test_metrics_that_cannot_be_written_at_the_end_are_everybodys_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 writes them alone: without a word to the others these would wait for it in the next collective."""
    agreed: list[UserError | None] = []
    agree = Ranks.agree

    def full(run: Any, status: str, *_: Any, **__: Any) -> None:
        with files.sentences(run.output / report.METRICS):
            raise OSError(28, "No space left on device")

    def listen(self: Ranks, error: UserError | None = None) -> None:
        agreed.append(error)
        agree(self, error)

    monkeypatch.setattr(outcome, "write_metrics", full)
    monkeypatch.setattr(Ranks, "agree", listen)
    assert cli.main(["train", "--config", str(write_config(tmp_path, max_train_steps=1))]) == 1
    assert "no space left on device" in capsys.readouterr().err
    assert isinstance(agreed[-1], WriteError)
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 removes it alone, while the others wait for it in the next collective."""
    rename = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if self.name == "checkpoint-1":
            raise OSError(39, "Directory not empty")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    path = write_config(tmp_path, max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1)
    assert cli.main(["train", "--config", str(path)]) == 0
    # It is whole, so that nothing is lost by it; the one after it could be removed.
    assert [found.name for found in checkpoint.list_checkpoints(tmp_path / "out")] == ["checkpoint-1", "checkpoint-3"]
    assert checkpoint.load(tmp_path / "out" / "checkpoint-1").progress.step == 1


def test_the_last_checkpoint_can_be_left_out(tmp_path: Path) -> None:
    """The result is there, and the checkpoints on the way are."""
    path = write_config(tmp_path, max_train_steps=4, checkpointing_steps=2, final_checkpoint=False)
    assert cli.main(["train", "--config", str(path)]) == 0
    assert [found.name for found in checkpoint.list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert (tmp_path / "out" / lora.ADAPTER_FILE).is_file() and metrics(tmp_path / "out")["steps"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "finetune", "train_parameters": ("txt_atn",)}, "txt_attn"),
        ({"mode": "controlnet", "controlnet_depth": 30}, "Write 2 or less"),
        ({"mode": "controlnet", "controlnet_init": "nowhere"}, "nowhere does not exist"),
        ({"optimizer": "adamw8bit"}, "torchao cannot be imported"),
        ({"lora_init": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_encoded(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    base = Base.of(tiny_flux())
    with pytest.raises(UserError, match=words):
        modes.refuse(TrainConfig(img_dir="x", **changes), base, read_spec(base))
