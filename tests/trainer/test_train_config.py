"""The train config: X-Flux's files unchanged, every problem at once, no surprise from YAML."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from xflux_trainer.config import ConfigError, Problem, TrainConfig, load, load_with_notes, to_dict, to_yaml
from xflux_trainer.spec import LORA_TARGETS

# X-Flux's train_configs/test_lora.yaml, key for key.
XFLUX = """\
model_name: "flux-dev"
data_config:
  train_batch_size: 1
  num_workers: 4
  img_size: 512
  img_dir: images/
  random_ratio: true # support multi crop preprocessing
report_to: wandb
train_batch_size: 1
output_dir: lora/
max_train_steps: 100000
learning_rate: 1e-5
lr_scheduler: constant
lr_warmup_steps: 10
adam_beta1: 0.9
adam_beta2: 0.999
adam_weight_decay: 0.01
adam_epsilon: 1e-8
max_grad_norm: 1.0
logging_dir: logs
mixed_precision: "bf16"
checkpointing_steps: 2500
checkpoints_total_limit: 10
tracker_project_name: lora_test
resume_from_checkpoint: latest
gradient_accumulation_steps: 2
rank: 16
single_blocks: "1,2,3,4"
double_blocks: null
disable_sampling: false
sample_every: 250 # sample every this many steps
sample_width: 1024
sample_height: 1024
sample_steps: 20
sample_prompts:
  - "woman portrait"
  - "woman by the beach"
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "train.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def problems(folder: Path, text: str | bytes) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text))
    assert len({problem.key for problem in caught.value.problems}) == len(caught.value.problems)
    return {problem.key: problem for problem in caught.value.problems}


def test_xflux_file_unchanged(tmp_path: Path) -> None:
    config = load(write(tmp_path, XFLUX))
    assert (config.learning_rate, config.adam_epsilon) == (1e-5, 1e-8)
    assert (config.img_dir, config.img_size, config.train_batch_size) == ("images/", 512, 1)
    assert config.single_blocks == (1, 2, 3, 4)
    assert config.double_blocks is None
    assert config.sample_prompts == ("woman portrait", "woman by the beach")
    assert (config.report_to, config.base_model) == ("wandb", "black-forest-labs/FLUX.1-dev")


def test_notes_say_where_a_key_does_nothing(tmp_path: Path) -> None:
    _, notes = load_with_notes(write(tmp_path, XFLUX))
    assert [note.split()[0] for note in notes] == ["lr_scheduler", "random_ratio"]
    quiet = "img_dir: x\nlr_scheduler: constant_with_warmup\nlr_warmup_steps: 5\n"
    assert load_with_notes(write(tmp_path, quiet))[1] == ()


def test_data_config_wins_and_the_difference_is_said(tmp_path: Path) -> None:
    # X-Flux's test_canny_controlnet.yaml has 3 at the top and trains with 4.
    text = "train_batch_size: 3\ndata_config: {img_dir: x, train_batch_size: 4}\n"
    config, notes = load_with_notes(write(tmp_path, text))
    assert config.train_batch_size == 4
    assert "train_batch_size is 4" in notes[0]
    assert "3 is ignored" in notes[0]


def test_all_problems_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "learning_rat: 1\nrank: x\nseed: -1\ngradient_checkpointing: 'true'\nsingle_blocks: '1,a'\n"
        "data_config: {img_size: 513, foo: 1, rank: 3}\nsample_steps: 2.5\nmax_train_steps: null\n",
    )
    assert set(found) == {
        "learning_rat", "rank", "seed", "gradient_checkpointing", "single_blocks", "data_config.img_size",
        "data_config.foo", "data_config.rank", "sample_steps", "max_train_steps", "data_config.img_dir",
    }  # fmt: skip
    assert found["learning_rat"].hint == "Did you mean learning_rate?"
    assert "513" in found["data_config.img_size"].seen
    assert "512" in found["data_config.img_size"].hint
    assert "without quotes" in found["gradient_checkpointing"].hint
    assert "Move it out" in found["data_config.rank"].hint


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 1e-5", 1e-5), ("learning_rate: 1E-5", 1e-5), ("learning_rate: '0.001'", 1e-3),
        ("learning_rate: 1", 1.0), ("max_train_steps: 1e3", 1000), ("max_train_steps: 100.0", 100),
        ("seed: 9223372036854775807", 2**63 - 1), ("lora_alpha: 8", 8.0), ("timestep_shift: 1.15", 1.15),
        ("timestep_shift: auto", "auto"), ("lora_targets: attn", "attn"),
        ("lora_targets: [to_q, to_v]", ("to_q", "to_v")),
        ("single_blocks: [0, 5]", (0, 5)), ("single_blocks: 3", (3,)), ("single_blocks: []", ()),
        ("sample_prompts: a cat", ("a cat",)), ("sample_prompts: null", ()), ("report_to: null", "none"),
        ("resume_from_checkpoint: null", None), ("checkpoints_total_limit: null", None),
        ("heldout_timesteps: [0.5, 1e-1]", (0.5, 0.1)), ("gradient_checkpointing: off", False),
    ],
)  # fmt: skip
def test_values_are_read_as_the_field_wants(tmp_path: Path, line: str, value: object) -> None:
    config = load(write(tmp_path, f"img_dir: x\n{line}\n"))
    found = getattr(config, line.split(":")[0])
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "line",
    [
        "learning_rate: fast", "learning_rate: nan", "learning_rate: .inf", "learning_rate: -1e-5", "learning_rate: 0",
        "learning_rate: true", "learning_rate: [1]", "rank: 0", "rank: 1.5", "rank: true", "rank: null", "seed: 1e30",
        "gradient_checkpointing: 1", "gradient_checkpointing: 'no'", "mixed_precision: fp8", "mixed_precision: no",
        "lr_scheduler: polynomial", "img_size: 500", "img_size: 16", "sample_width: 1000", "output_dir: 2024",
        "output_dir: ''", "output_dir: null", "output_dir: 2024-01-01", "sample_prompts: [1]", "sample_prompts: ['']",
        "lora_targets: everything", "lora_targets: []", "single_blocks: '1,,2'", "single_blocks: [-1]",
        "single_blocks: [1, 1]", "heldout_timesteps: [2]", "heldout_timesteps: []", "adam_beta2: 1",
        "caption_type: csv",
        "timestep_shift: often", "train_batch_size: 0", "max_text_tokens: 513", "data_config: 3", "data_config: null",
        "learning_rate: " + "9" * 400, "model_name: flux-pro", "single_blocks: {a: 1}",
    ],
)  # fmt: skip
def test_wrong_values_are_one_problem_each(tmp_path: Path, line: str) -> None:
    found = problems(tmp_path, f"img_dir: x\n{line}\n")
    assert list(found) == [line.split(":")[0]]
    assert all(problem.seen and problem.hint for problem in found.values())


def test_unquoted_no_is_false_and_the_choices_are_named(tmp_path: Path) -> None:
    problem = problems(tmp_path, "img_dir: x\nmixed_precision: no\n")["mixed_precision"]
    assert problem.seen == "is false"
    assert "bf16, fp16, no" in problem.hint


def test_fp8_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    problem = problems(tmp_path, "img_dir: x\nmodel_name: flux-dev-fp8\n")["model_name"]
    assert "8 bits" in problem.seen
    assert problem.hint == "Write flux-dev."


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("", "is empty"), ("# only a comment\n", "is empty"), ("- a\n- b\n", "holds a list"),
        ("just words\n", "holds a str"),
        ("a:\n\tb: 1\n", "has a tab at line 2"), ("\ta: 1\n", "has a tab at line 1"),
        ("a: [1, 2\nb: 3\n", "is not YAML at line"),
        ("a: 'x\n", "is not YAML at line"), ("a: !!python/object:os.system {}\n", "is not YAML at line 1"),
        (b"\xff\xfe\x00\x01", "is not a text file"), (b"caf\xe9: 1\n", "is not UTF-8 text"),
        (b"\x7fELF\0\0", "is not a text file"),
        ("a: 2024-99-99\n", "is not readable as YAML"), ("a: &x\n  b: *x\n", "is not a key"), ("[" * 5000, "is not"),
        ("? [a, b]\n: 1\n", "is not"), ("a: 1\n---\nb: 2\n", "is not YAML at line 2"),
    ],
)  # fmt: skip
def test_broken_files_are_problems(tmp_path: Path, text: str | bytes, seen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert any(seen in problem.seen for problem in caught.value.problems), caught.value.problems


def test_a_key_given_twice(tmp_path: Path) -> None:
    found = problems(tmp_path, "img_dir: x\nrank: 4\nseed: 1\nrank: 8\n")
    assert found["rank"].seen == "stands a second time at line 4"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    assert load(write(tmp_path, "\ufeffimg_dir: x\r\nrank: 8\r\n")).rank == 8


def test_a_weights_file_given_by_mistake_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="not a text file"):
        load(path)


@pytest.mark.parametrize(
    "text", [XFLUX, "img_dir: x\nlora_targets: [a.b]\nsample_prompts: ['x: y', 'ü']\nlora_alpha: 1e-3\n"]
)
def test_round_trip(tmp_path: Path, text: str) -> None:
    config = load(write(tmp_path, text))
    assert load(write(tmp_path, to_yaml(config))) == config
    assert set(to_dict(config)) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_a_config_has_no_other_settings() -> None:
    made = TrainConfig("x", rank=4)
    assert list(vars(made)) == [field.name for field in dataclasses.fields(TrainConfig)]
    assert (made.img_dir, made.rank, made.seed) == ("x", 4, 0)
    assert dataclasses.replace(made, seed=1) == TrainConfig(img_dir="x", rank=4, seed=1)
    for refused in ({"rnak": 4}, {"img_dir": "y"}):
        with pytest.raises(TypeError):
            TrainConfig("x", **refused)
    with pytest.raises(TypeError):
        TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.rank = 8


def test_every_field_has_a_doc_line() -> None:
    """The line under each field is what the key's documentation is made of."""
    import xflux_trainer.settings as module

    source = Path(module.__file__).read_text(encoding="utf-8")
    body = source[source.index("class TrainConfig") : source.index("@property")]
    documented = re.findall(r'^    (\w+): [^\n]+\n    """[A-Z`]', body, re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(TrainConfig)]


def test_every_range_belongs_to_a_field_and_holds_its_default() -> None:
    from xflux_trainer.config import RANGES, TARGET_SETS

    config = TrainConfig(img_dir="x")
    for key, (low, high) in RANGES.items():
        value = getattr(config, key)
        assert not isinstance(value, (int, float)) or low <= value <= high, key
    assert set(TARGET_SETS) == set(LORA_TARGETS)


def test_a_control_character_is_a_problem_and_not_a_crash(tmp_path: Path) -> None:
    """PyYAML refuses it while its reader is made, before it parses anything."""
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, b"\x01"))
    assert "is not YAML" in caught.value.problems[0].seen


XFLUX_SHORT = """\
model_name: "flux-dev"
data_config: {train_batch_size: 1, num_workers: 4, img_size: 512, img_dir: images/}
report_to: wandb
train_batch_size: 1
output_dir: saves/
max_train_steps: 100000
learning_rate: 1e-5
lr_scheduler: constant
lr_warmup_steps: 10
adam_beta1: 0.9
adam_beta2: 0.999
adam_weight_decay: 0.01
adam_epsilon: 1e-8
max_grad_norm: 1.0
logging_dir: logs
mixed_precision: "bf16"
checkpointing_steps: 2500
checkpoints_total_limit: 10
tracker_project_name: finetune_test
resume_from_checkpoint: latest
gradient_accumulation_steps: 2
"""
"""X-Flux's train_configs/test_finetune.yaml; its ControlNet's differs in names and numbers only."""


@pytest.mark.parametrize(
    ("change", "mode", "parts"),
    [
        (("", ""), "finetune", ("txt_attn",)),
        (("finetune_test", "canny_training"), "controlnet", ()),
        (("saves/", "saves_canny/"), "controlnet", ()),
        # Words of ours decide where they are there.
        (("output_dir", "mode: lora\noutput_dir"), "lora", ()),
        (("output_dir", "train_parameters: [img_attn]\noutput_dir"), "finetune", ("img_attn",)),
        (("output_dir", "rank: 4\noutput_dir"), "lora", ()),
        # Without a key that X-Flux's scripts read it is none of theirs.
        (("tracker_project_name: finetune_test\n", ""), "lora", ()),
    ],
)
def test_xfluxs_other_two_files_are_told_by_their_keys(
    tmp_path: Path, change: tuple[str, str], mode: str, parts: tuple[str, ...]
) -> None:
    config, notes = load_with_notes(write(tmp_path, XFLUX_SHORT.replace(*change)))
    assert (config.mode, config.train_parameters) == (mode, parts)
    assert any(f"mode is {mode}" in note for note in notes) == (mode != "lora")


def test_stepping_in_the_backward_pass_is_for_every_mode(tmp_path: Path) -> None:
    """It acts on adapters as on a fine-tune, so no note says that it does nothing."""
    config, notes = load_with_notes(write(tmp_path, "img_dir: x\nstep_in_backward: true\n"))
    assert config.mode == "lora" and config.step_in_backward
    assert notes == ()
    text = "img_dir: x\nstep_in_backward: true\ngradient_accumulation_steps: 2\n"
    assert "accumulate" in problems(tmp_path, text)["step_in_backward"].seen
