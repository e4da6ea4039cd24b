"""X-Flux's three train configs, as they are in its repository, on a machine that X-Flux trained on.

What differs from X-Flux's text: img_dir and output_dir lie in the test's folder, and max_train_steps is 1. The drawing
at the end, of 1024 pixels in 20 steps, would take minutes here: it is done with 64 pixels in 1 step. The weights are
found as there: FLUX_DEV and AE name files, the text encoders are in the hub's cache. The model is the tests' tiny one
with five single blocks, because the file of the adapters names blocks 1 to 4.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from bfl_kit import bfl_folder  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_train_bfl import hub, text_repos  # noqa: E402
from test_train_config import XFLUX, XFLUX_SHORT  # noqa: E402
from trainer_kit import keep_signals, metrics, png, put  # noqa: E402
from xflux_trainer import bfl_spec, cli, sample  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402

__all__ = ["keep_signals"]  # a fixture, used by being here

CANNY = XFLUX_SHORT.replace("output_dir: saves/", "output_dir: saves_canny/")
for old, new in (("{train_batch_size: 1,", "{train_batch_size: 4,"), ("\ntrain_batch_size: 1", "\ntrain_batch_size: 3"),
                 ("finetune_test", "canny_training"), ("learning_rate: 1e-5", "learning_rate: 2e-5")):  # fmt: skip
    assert old in CANNY
    CANNY = CANNY.replace(old, new)
FILES = {"lora/": XFLUX, "saves/": XFLUX_SHORT, "saves_canny/": CANNY}
"""By their output_dir."""
SINGLE_BLOCKS = 5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BFL's two files."""
    folder = bfl_folder(tmp_path_factory.mktemp("bfl"), text=False)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "flux1-dev.safetensors").items()}
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("single_blocks.0.")}
    for number in range(SINGLE_BLOCKS):
        for name, tensor in first.items():
            tensors.setdefault(name.replace(".0.", f".{number}.", 1), tensor.clone())
    save_file(tensors, folder / "flux1-dev.safetensors")
    return folder


def run(output: str, folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Train with X-Flux's file of that output_dir. Returns the output folder, and the config."""
    draw = sample.draw

    def small(velocity: Any, spec: Any, config: TrainConfig, *rest: Any, **more: Any) -> None:
        asked.append((config.sample_width, config.sample_height, config.sample_steps, len(rest[-1])))
        draw(velocity, spec, replace(config, sample_width=64, sample_height=64, sample_steps=1), *rest, **more)

    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(sample, "draw", small)
    text_repos(hub(folder / "hub", monkeypatch))
    monkeypatch.setenv("FLUX_DEV", str(weights / "flux1-dev.safetensors"))
    monkeypatch.setenv("AE", str(weights / "ae.safetensors"))
    text = FILES[output]
    for old, new in (
        ("img_dir: images/", f"img_dir: {folder}/images/"), (f"output_dir: {output}", f"output_dir: {folder}/{output}"),
        ("max_train_steps: 100000", "max_train_steps: 1"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    path = folder / "train.yaml"
    path.write_text(text, encoding="utf-8")
    put(folder / "images", "4.png", "a strip", png(192, 48))  # whose random_ratio is none: few tokens
    assert cli.main(["train", "--config", str(path)]) == 0
    assert metrics(folder / output)["status"] == "finished"
    assert (folder / output / "checkpoint-1").is_dir()
    assert asked == [(1024, 1024, 20, 2 if output == "lora/" else 1)]
    return folder / output, path


def test_the_adapters_file(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = run("lora/", tmp_path, weights, monkeypatch)
    names = set(load_file(out / "lora.safetensors"))
    double = [f"double_blocks.{block}.processor.{layer}_lora{stream}.{end}.weight" for block in range(2)
              for layer in ("qkv", "proj") for stream in (1, 2) for end in ("down", "up")]  # fmt: skip
    single = [f"single_blocks.{block}.processor.{layer}_lora.{end}.weight" for block in (1, 2, 3, 4)
              for layer in ("qkv", "proj") for end in ("down", "up")]  # fmt: skip
    assert names == {*double, *single}
    assert {path.name for path in (out / "samples").glob("final-*")} == {"final-0.png", "final-1.png"}


def test_the_fine_tunes_file(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, path = run("saves/", tmp_path, weights, monkeypatch)
    # What X-Flux's users load is one file of BFL's names.
    assert (
        cli.main(["convert", "--config", str(path), "--format", "bfl", "--output", str(tmp_path / "tuned.safetensors")])
        == 0
    )
    before, after = load_file(weights / "flux1-dev.safetensors"), load_file(tmp_path / "tuned.safetensors")
    assert set(before) == set(after)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor.float(), after[name].float())}
    assert moved and all(".txt_attn." in name for name in moved)
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config["num_single_layers"] == SINGLE_BLOCKS
    assert config == bfl_spec.transformer_config(bfl_spec.read_single_file(weights / "flux1-dev.safetensors"))


def test_the_controlnets_file(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cv2")
    out, _ = run("saves_canny/", tmp_path, weights, monkeypatch)
    tensors = load_file(out / "controlnet.safetensors")
    blocks = {name.split(".")[1] for name in tensors if name.startswith("double_blocks.")}
    assert blocks == {"0", "1"}
    assert {"controlnet_blocks.0.weight", "input_hint_block.14.weight", "pos_embed_input.weight"} <= set(tensors)
    assert tensors["controlnet_blocks.0.weight"].any()  # it began as zeros
    assert metrics(out)["train_batch_size"] == 4  # data_config's, as X-Flux reads it
