"""The command line: exit codes, one sentence for each mistake, and what a signal leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainer_kit import environment, keep_signals, metrics, put, trainer, write_config

pytest.importorskip("click")

from xflux_trainer import cli
from xflux_trainer.errors import Interrupted
from xflux_trainer.signals import Stop

__all__ = ["keep_signals"]  # a fixture, used by being here


@pytest.mark.parametrize(
    "arguments", [["trane"], ["train"], ["train", "--config"], ["convert"], ["train", "--speed", "9"]]
)
def test_usage_errors_are_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "Error: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["convert", "-h"]])
def test_help_is_0_and_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom xflux_trainer.cli import main\n"
        f"code = main({arguments!r})\nassert 'torch' not in sys.modules\nraise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_a_wrong_config_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("img_dir: x\nlearning_rat: 1\nrank: 0\n")
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom xflux_trainer.cli import main\n"
        f"raise SystemExit(main(['train', '--config', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"error: {path}: ") for line in lines)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"img_dir": "/no/such/folder"}, "does not exist"),
    "no model": ({"pretrained_model": "/no/such/model"}, "does not exist"),
    "no such target": ({"lora_targets": ["attn.to_z"]}, "matches no layer"),
    "no checkpoint": ({"resume_from_checkpoint": "checkpoint-3"}, "is not a checkpoint"),
    "output is a file": ({"output_dir": "/dev/null/out"}, "Cannot write /dev/null/out"),
    "no held-out images": ({"heldout_dir": "/no/such/folder"}, "does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_1(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    changes, text = MISTAKES[name]
    assert cli.main(["train", "--config", str(write_config(tmp_path, **changes))]) == 1
    said = capsys.readouterr().err
    assert text in said
    assert [line for line in said.splitlines() if not line.startswith("error: ")] == []


def test_broken_inputs_in_a_process_of_their_own(tmp_path: Path) -> None:
    """What a user sees: no traceback, also not from threads or at exit."""
    pytest.importorskip("torch")
    config = write_config(tmp_path)
    put(tmp_path / "images", "cut.png", data=(tmp_path / "images" / "red.png").read_bytes()[:-4])
    put(tmp_path / "images", "mute.png", None)
    done = trainer("train", "--config", config)
    assert done.returncode == 1
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["error", "error"]
    assert "cut.png is cut short" in done.stderr
    assert "mute.png has no caption" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert cli.main(["train", "--config", str(write_config(tmp_path, max_train_steps=1))]) == 0
    more = {"rank": 8, "resume_from_checkpoint": "latest", "max_train_steps": 2}
    capsys.readouterr()
    assert cli.main(["train", "--config", str(write_config(tmp_path, **more))]) == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "rank: is 8, the checkpoint's is 4. Keep the rank, or start afresh." in said
    # What the run before left must not say that this one has finished.
    assert metrics(tmp_path / "out")["status"] == "failed"


def test_an_exploding_loss_stops_the_run_before_it_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    import json

    changes = {
        "learning_rate": 10,
        "max_grad_norm": 0,
        "adam_beta1": 0.0,
        "max_train_steps": 500,
        "checkpointing_steps": 1,
    }
    config = write_config(tmp_path, lora_targets="all-linear", lora_alpha=1e6, **changes)
    assert cli.main(["train", "--config", str(config)]) == 1
    assert "not finite" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["status"] == "failed"


def start(config: Path) -> subprocess.Popen[str]:
    """A run that takes long enough to be interrupted, once its first step is out."""
    process = subprocess.Popen(
        [sys.executable, "-m", "xflux_trainer", "train", "--config", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            return process
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 30)])
def test_a_signal_saves_a_checkpoint(tmp_path: Path, number: int, times: int) -> None:
    """Also when the launcher sends more of them while it is being saved."""
    pytest.importorskip("torch")
    process = start(write_config(tmp_path, max_train_steps=100_000, lr_scheduler="constant"))
    os.kill(process.pid, number)
    for _ in range(times - 1):
        time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.splitlines() == [f"stopped by signal {int(number)}"]
    assert "a checkpoint is being saved" in out
    from xflux_trainer import checkpoint

    (folder,) = checkpoint.list_checkpoints(tmp_path / "out")
    step = checkpoint.load(folder).progress.step
    resumed = write_config(tmp_path, max_train_steps=step + 1, resume_from_checkpoint="latest")
    assert cli.main(["train", "--config", str(resumed)]) == 0
    assert checkpoint.list_checkpoints(tmp_path / "out")[-1].name == f"checkpoint-{step + 1}"


def test_a_signal_while_loading_ends_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom xflux_trainer.errors import Interrupted\nfrom xflux_trainer.signals import Stop\n"
        "try:\n    Stop().install()\n    print(1, flush=True)\n    time.sleep(60)\n"
        "except Interrupted as stopped:\n    sys.exit(stopped.code)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_the_first_signal_counts() -> None:
    stop = Stop()
    stop.install()
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    assert stop.signum == signal.SIGINT
    later = Stop()
    later.install()
    later.defer()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    assert later.flags() == [0.0, 1.0, 0.0]
    os.kill(os.getpid(), signal.SIGUSR1)  # a checkpoint is asked for, once
    time.sleep(0.01)
    assert later.flags() == [0.0, 1.0, 1.0] and later.flags() == [0.0, 1.0, 0.0]
    assert Stop.save([0.0, 0.0, 2.0]) and not Stop.save([1.0, 0.0, 0.0])
    assert Stop.first([0.0, 2.0]) == signal.SIGTERM
    assert Stop.first([1.0, 1.0]) == signal.SIGINT
    assert Stop.first([0.0, 0.0]) == 0


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    """As another user, where this one is root; root may write everywhere."""
    pytest.importorskip("torch")
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    done = trainer("train", "--config", write_config(tmp_path, output_dir=str(tmp_path / "closed" / "out")))
    assert done.returncode == 1
    assert done.stderr.count("error: Cannot write") == 1


def test_a_disk_that_is_full_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    """On a real file system of 300 KiB: the checkpoint does not fit, and no part of it stays."""
    pytest.importorskip("torch")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount")
    try:
        config = write_config(tmp_path, output_dir=str(small / "out"), cache_dir=str(tmp_path / "cache"), rank=16)
        done = trainer("train", "--config", config)
        assert done.returncode == 1, done.stderr
        assert "no space left on device" in done.stderr
        assert all(line.startswith("error: ") for line in done.stderr.splitlines()), done.stderr
        assert not list((small / "out").glob("checkpoint-*"))
        assert not list((small / "out").glob(".xflux-tmp-*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_demos_config_is_valid() -> None:
    from trainer_kit import DEMO
    from xflux_trainer.config import load

    assert load(DEMO / "train.yaml").img_dir == "examples/demo/photos"
    assert yaml.safe_load((DEMO / "accelerate_config.yaml").read_text())["num_processes"] == 8
