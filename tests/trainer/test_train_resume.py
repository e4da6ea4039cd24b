"""What a resume compares: one row for each thing that may differ from the checkpoint."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from xflux_trainer import config as train_config
from xflux_trainer import resume
from xflux_trainer.cache import Entries
from xflux_trainer.config import TrainConfig
from xflux_trainer.entries import KEY
from xflux_trainer.layout import Base

CONFIG = TrainConfig(img_dir="x", train_batch_size=2)
SHAPES = {"a.lora_A.weight": (4, 8), "a.lora_B.weight": (8, 4)}
DIGESTS = {"data": "d", "base": "b", "model": "m"}


def manifest(config: TrainConfig = CONFIG, **changes: Any) -> dict[str, Any]:
    return {
        "config": train_config.to_dict(config), "digests": DIGESTS, "shapes": {k: list(v) for k, v in SHAPES.items()},
        "world_size": 2, "accumulation": 3, "progress": {"batches": 60}, **changes,
    }  # fmt: skip


def compare(old: dict[str, Any] | None = None, shapes: Any = None, digests: Any = None, world_size: int = 2,
            accumulation: int = 3, **changes: Any) -> tuple[list[str], list[str]]:  # fmt: skip
    problems, notes = resume.compatible(
        old or manifest(), replace(CONFIG, **changes), digests or DIGESTS, shapes or SHAPES, world_size, accumulation
    )
    for problem in problems:
        assert problem.hint.endswith(".")  # what was seen, and what to do next
        assert "{" not in str(problem)
    return [str(problem) for problem in problems], notes


def test_the_same_again_is_silent() -> None:
    assert compare() == ([], [])


@pytest.mark.parametrize(("mode", "changes"), [
    ("lora", {"mode": "finetune"}), ("lora", {"rank": 8}), ("lora", {"lora_targets": "attn"}),
    ("lora", {"single_blocks": (0,)}), ("lora", {"double_blocks": (1,)}), ("lora", {"optimizer": "adafactor"}),
    ("lora", {"seed": 1}), ("lora", {"lora_alpha": 3.0}), ("finetune", {"train_parameters": ("txt_attn",)}),
    ("controlnet", {"controlnet_depth": 3}), ("controlnet", {"control_type": "files"}),
])  # fmt: skip
def test_what_must_be_as_it_was(mode: Any, changes: dict[str, Any]) -> None:
    (key,) = changes
    old = manifest(replace(CONFIG, mode=mode))
    problems, _ = compare(old, **{"mode": mode, **changes})
    assert len(problems) == 1
    assert problems[0].startswith(f"{key}: is ")
    assert "the checkpoint's is" in problems[0]
    assert problems[0].endswith("start afresh.")
    for other in {"lora", "finetune", "controlnet"} - {mode}:  # where the key is not read, it may be anything
        if key not in ("mode", "optimizer", "seed"):
            assert compare(manifest(replace(CONFIG, mode=other)), mode=other, **changes) == ([], [])


@pytest.mark.parametrize("changes", [
    {"learning_rate": 1e-5}, {"lr_scheduler": "cosine"}, {"lr_warmup_steps": 5}, {"max_train_steps": 5000},
    {"num_train_epochs": 2}, {"weight_update": "master"}, {"ema_decay": 0.99}, {"adam_weight_decay": 0.1},
    {"max_grad_norm": 0.0}, {"quantization": "int8"}, {"guidance": 2.0}, {"timestep_shift": 1.0},
])  # fmt: skip
def test_what_may_change_is_told(changes: dict[str, Any]) -> None:
    (key,) = changes
    problems, notes = compare(**changes)
    assert problems == []
    assert len(notes) == 1
    assert notes[0].startswith(f"{key} is ")
    assert "from here on" in notes[0]


@pytest.mark.parametrize("changes", [
    {"img_dir": "elsewhere"}, {"output_dir": "o"}, {"cache_dir": "c"}, {"gradient_checkpointing": False},
    {"checkpointing_steps": 7}, {"checkpoints_total_limit": None}, {"sample_every": 0}, {"sample_prompts": ("a",)},
    {"resume_from_checkpoint": "latest"}, {"lora_formats": ("kohya",)}, {"stream_blocks": 4}, {"num_workers": 1},
    {"heldout_samples": 0}, {"deterministic": True}, {"lora_init": "a.safetensors"}, {"report_to": "none"},
])  # fmt: skip
def test_what_does_not_matter_is_silent(changes: dict[str, Any]) -> None:
    assert compare(**changes) == ([], [])


def test_every_key_of_a_row_is_one_of_the_config() -> None:
    known = {field.name for field in fields(TrainConfig)}
    assert {*resume.SAME, *resume.TOLD} <= known
    assert not set(resume.SAME) & set(resume.TOLD)


@pytest.mark.parametrize(("alpha", "rank", "wrong"), [
    (None, 16, []), (16.0, 16, []), (8.0, 16, ["lora_alpha"]), (None, 8, ["rank"]), (8.0, 8, ["rank", "lora_alpha"]),
])  # fmt: skip
def test_no_alpha_is_the_rank(alpha: float | None, rank: int, wrong: list[str]) -> None:
    problems, _ = compare(lora_alpha=alpha, rank=rank)
    assert [problem.split(":")[0] for problem in problems] == wrong


@pytest.mark.parametrize(("key", "words"), [("data", "images"), ("base", "base model"), ("model", "what is trained")])
def test_digests(key: str, words: str) -> None:
    (problem,), notes = compare(digests={**DIGESTS, key: "other"})
    assert words in problem
    assert notes == []
    # What one side does not know is not compared.
    assert compare(digests={name: value for name, value in DIGESTS.items() if name != key}) == ([], [])
    assert compare(manifest(digests={}), digests={key: "other"}) == ([], [])


@pytest.mark.parametrize(("mode", "word"), [("lora", "lora_init"), ("finetune", "pretrained_model"),
                                            ("controlnet", "controlnet_init")])  # fmt: skip
def test_other_images_are_gone_on_with_by_starting_from_the_result(mode: Any, word: str) -> None:
    old = manifest(replace(CONFIG, mode=mode))
    (problem,), _ = compare(old, digests={**DIGESTS, "data": "more"}, mode=mode)
    assert word in problem


@pytest.mark.parametrize(("shapes", "words"), [
    ({**SHAPES, "a.lora_A.weight": (8, 8)}, r"a.lora_A.weight is (4, 8), not (8, 8)"),
    ({**SHAPES, "b": (1,)}, "b is None, not (1,)"),
    ({"a.lora_A.weight": (4, 8)}, "a.lora_B.weight is (8, 4), not None"),
])  # fmt: skip
def test_shapes(shapes: Any, words: str) -> None:
    (problem,), _ = compare(shapes=shapes)
    assert words in problem
    # Where a key explains it, that is told and not what follows from it.
    assert all(words not in text for text in compare(shapes=shapes, rank=8)[0])


@pytest.mark.parametrize(
    ("batch", "world_size", "accumulation", "images"),
    [(2, 2, 3, 12), (2, 1, 6, 12), (2, 3, 2, 12), (1, 2, 6, 12), (12, 1, 1, 12), (2, 1, 3, 6), (4, 2, 3, 24),
     (2, 2, 1, 4)],
)  # fmt: skip
def test_a_step_must_have_as_many_images(batch: int, world_size: int, accumulation: int, images: int) -> None:
    problems, notes = compare(train_batch_size=batch, world_size=world_size, accumulation=accumulation)
    if images != 12:
        (problem,) = problems
        assert f"makes steps of {images} images" in problem
        assert "at 12 (2 x 3 accumulated x 2 ranks)" in problem
    else:
        assert problems == []
        assert bool(notes) is ((batch, world_size) != (2, 2))
        # Ten steps were taken: the position is theirs in batches of whatever size.
        assert resume.batches(manifest(), world_size, accumulation) * batch == 120


def test_a_config_of_an_earlier_release_had_the_defaults() -> None:
    old = manifest()
    for key in ("optimizer", "ema_decay", "mode"):
        del old["config"][key]
    old["config"]["gone"] = 1
    assert compare(old) == ([], [])
    assert compare(old, optimizer="adafactor")[0][0].startswith("optimizer: is adafactor, the checkpoint's is adamw")


def entries_of(latents: str = "abc", texts: str = "xxx", **more: Any) -> Entries:
    def keys(letters: str) -> Any:
        return np.array([np.void(letter.encode() * 20) for letter in letters], KEY)

    mirrored = more.pop("mirrored", False)
    plain = keys(latents)[:, None]
    known = sorted(set(texts))
    return Entries(
        Path("c"), np.concatenate([plain, plain], axis=1) if mirrored else plain,
        [letter.encode() * 20 for letter in known], np.array([known.index(letter) for letter in texts], np.int32),
        [(16, 8, 8)], np.zeros(len(latents), np.int32),
        conditions=keys(more.pop("conditions")) if "conditions" in more else None, **more,
    )  # fmt: skip


def test_digests_name_images_captions_and_weights(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "w.safetensors").write_bytes(b"1")
    base = Base.of(tmp_path)

    def found(entries: Entries) -> dict[str, str]:
        return resume.digests(base, entries, entries[:1], CONFIG)

    first = found(entries_of())
    moved = entries_of()
    moved.folder = Path("elsewhere")
    assert found(moved) == first
    assert found(entries_of(mirrored=True)) == first  # random_flip may change, with a word about it
    for other in (entries_of("ab", "xx"), entries_of("cba"), entries_of(texts="xxy"),
                  entries_of(repeats=np.array([1, 2, 1], np.int32))):  # fmt: skip
        assert found(other)["data"] != first["data"]
    # A ControlNet learns from its conditions, which other thresholds or pictures change and the images do not.
    assert found(entries_of(conditions="pqr"))["data"] != found(entries_of(conditions="pqs"))["data"]
    (tmp_path / "transformer" / "w.safetensors").write_bytes(b"2")
    assert found(entries_of())["base"] != first["base"]


def test_another_heldout_loss_is_not_compared_with_the_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    base, entries = Base.of(tmp_path), entries_of()

    def found(count: int = 2, **changes: Any) -> dict[str, str]:
        return resume.digests(base, entries, entries[:count], replace(CONFIG, **changes))

    old = {"digests": found()}
    assert not resume.measures_otherwise(old, found())
    assert resume.measures_otherwise(old, found(1))
    assert resume.measures_otherwise(old, found(heldout_timesteps=(0.5,)))
    assert resume.measures_otherwise(old, found(guidance=3.5))
    assert not resume.measures_otherwise({"digests": {}}, found())  # of before it was asked
    # It forbids nothing.
    assert compare(manifest(digests=old["digests"]), digests=found(1)) == ([], [])
