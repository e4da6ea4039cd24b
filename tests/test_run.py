"""`xflux-doctor run` for real: accelerate, the trainer and a DeepSpeed engine on two CPU ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, XFLUX_ACCELERATE

NEEDED = ("torch", "accelerate", "diffusers", "deepspeed")
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED), reason="needs a stack of the matrix"
)
# Private to the run: what is remembered and built must come from this run.
TRAIN = {
    "model_name": "flux-dev",
    "data_config": {"img_dir": str(ROOT / "examples/demo/photos"), "img_size": 128, "train_batch_size": 1},
    "max_train_steps": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "rank": 4,
    "checkpointing_steps": 2,
    "max_text_tokens": 32,
    "sample_width": 128,
    "sample_height": 128,
    "sample_steps": 2,
    "heldout_samples": 2,
    "seed": 7,
}


def write_job(place: Path, model: Path, *, accelerate: str = XFLUX_ACCELERATE, **changes: Any) -> None:
    (place / "train.yaml").write_text(
        yaml.safe_dump({**TRAIN, "pretrained_model": str(model), "output_dir": str(place / "out"), **changes})
    )
    (place / "accelerate.yaml").write_text(accelerate)


DRAW = """
import sys, numpy, torch
from diffusers import FluxPipeline
# Without a dtype transformers 5 keeps the encoders' bf16 and diffusers makes the transformer fp32: they do not meet.
pipe = FluxPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
def draw():
    seed = torch.Generator().manual_seed(0)
    return pipe("a cat", height=64, width=64, num_inference_steps=2, generator=seed, output_type="np",
                max_sequence_length=32).images[0]
before = draw()
pipe.load_lora_weights(sys.argv[2], weight_name="pytorch_lora_weights.safetensors")
print(float(numpy.abs(draw() - before).mean()))
"""
COMMAND = [sys.executable, "-m", "xflux_doctor.cli", "run", "--cpu", "--yes", "--config", "train.yaml",
           "--accelerate-config", "accelerate.yaml"]  # fmt: skip


def start(place: Path, *extra: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), **environment}
    return subprocess.Popen([*COMMAND, *extra], cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL, text=True)  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=420)
    return output


def result(place: Path) -> dict[str, Any]:
    return json.loads((place / "out" / "result.json").read_text())  # type: ignore[no-any-return]


def two_ranks(text: str = XFLUX_ACCELERATE) -> str:
    return text.replace("num_processes: 8", "num_processes: 2")


def test_the_seed_s_file_trains_on_two_cpu_ranks(tmp_path: Path, model: Path) -> None:
    """X-Flux's accelerate file (ZeRO-2, accumulation 2, clipping 1.0, bf16): a real DeepSpeed engine."""
    write_job(tmp_path, model, accelerate=two_ranks())
    process = start(tmp_path, NCCL_DEBUG="WARN", TORCH_SHOW_CPP_STACKTRACES="0")
    output = finish(process)
    assert process.returncode == 0, output
    out = tmp_path / "out"
    assert result(tmp_path) == {"phase": "train", "exit_code": 0, "trainer_exit_code": 0, "signal": None, "cause": None}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["strategy"] == "zero2" and metrics["world_size"] == 2 and metrics["steps"] == 3
    assert metrics["gradient_accumulation_steps"] == 2 and metrics["seconds_per_step"] > 0
    assert metrics["peak_host_bytes"]["overall"] > 0
    for name in ("accelerate.yaml", "train.yaml", "facts.json", "findings.json", "launch.json", "report.txt",
                 "pytorch_lora_weights.safetensors", "checkpoint-3/manifest.json"):  # fmt: skip
        assert (out / name).is_file(), name
    assert list((out / "logs").glob("run-*.log")) and list((out / "samples").glob("*.png"))
    assert yaml.safe_load((out / "accelerate.yaml").read_text())["use_cpu"] is True
    assert (tmp_path / "accelerate.yaml").read_text() == two_ranks()  # the user's own file stays

    drawn = subprocess.run(
        [sys.executable, "-c", DRAW, str(model), str(out)], capture_output=True, text=True, timeout=300
    )
    assert drawn.returncode == 0, drawn.stderr
    assert float(drawn.stdout.split()[-1]) > 1e-4  # the adapter changes the image

    # the probes passed on this machine, stack and config: they are not run again, and the launch is the same
    passes = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.json")}
    again = subprocess.run([*COMMAND, "--dry-run"], cwd=tmp_path, capture_output=True, text=True,
                           env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "NCCL_DEBUG": "WARN",
                                "TORCH_SHOW_CPP_STACKTRACES": "0"})  # fmt: skip
    assert again.returncode == 0
    assert passes and passes == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.json")}
    assert "-m xflux_trainer train" in again.stdout


def test_real_accelerate_reads_what_fix_writes(tmp_path: Path, model: Path) -> None:
    write_job(tmp_path, model, accelerate="# kept\n" + XFLUX_ACCELERATE + "num_procs: 3\n")
    fix = [sys.executable, "-m", "xflux_doctor.cli", "fix", "--write-config", "--yes", *COMMAND[4:5], *COMMAND[6:]]
    done = subprocess.run(fix, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "accelerate.yaml").read_text().startswith("# kept\n")
    code = (
        "from accelerate.commands.config.config_args import load_config_from_file\n"
        "c = load_config_from_file('accelerate.yaml'); print(c.num_processes, c.use_cpu, c.distributed_type)\n"
    )
    read = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert read.returncode == 0, read.stderr
    assert read.stdout.split()[1] == "True" and int(read.stdout.split()[0]) >= 1


def test_the_gate_refuses_and_starts_nothing(tmp_path: Path, model: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    photo = next((ROOT / "examples/demo/photos").glob("*.jpg"))
    (photos / "a.jpg").write_bytes(photo.read_bytes()[:-1000])
    (photos / "a.json").write_text('{"caption": "a"}')
    write_job(tmp_path, model, data_config={"img_dir": str(photos), "img_size": 128})
    (tmp_path / "out").mkdir()
    process = start(tmp_path)
    output = finish(process)
    assert process.returncode == 1 and "a.jpg" in output
    assert result(tmp_path)["phase"] == "gate" and result(tmp_path)["cause"]["cause"] == "DA101"
    assert not (tmp_path / "out" / "logs").exists()


def wait_for_steps(path: Path, process: subprocess.Popen[str]) -> None:
    """Until the log shows a step after the first; lines come once a second, so not every step has one."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        logs = list(path.glob("out/logs/run-*.log"))
        if logs and re.search(r"^step ([2-9]|\d\d+)/", logs[0].read_text(errors="replace"), re.M):
            return
        time.sleep(0.1)
    process.terminate()
    raise AssertionError(f"no second step came: {process.communicate()[0]}")


def ranks_of(place: Path) -> list[int]:
    """Trainer ranks of this run (their command line names its train.yaml)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            mine = str(place / "out/train.yaml").encode() in words and b"xflux_trainer" in words
            if mine and b"accelerate.commands.launch" not in words:
                found.append(int(folder.name))
    return found


def test_ctrl_c_saves_and_says_130(tmp_path: Path, model: Path) -> None:
    write_job(tmp_path, model, accelerate=two_ranks(), max_train_steps=1000, checkpointing_steps=1000)
    process = start(tmp_path)
    wait_for_steps(tmp_path, process)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert list((tmp_path / "out").glob("checkpoint-*/manifest.json")), output
    assert result(tmp_path)["signal"] == 2
    assert ranks_of(tmp_path) == []


def test_a_killed_rank_is_told(tmp_path: Path, model: Path) -> None:
    write_job(tmp_path, model, accelerate=two_ranks(), max_train_steps=1000, checkpointing_steps=1000)
    process = start(tmp_path)
    wait_for_steps(tmp_path, process)
    os.kill(max(ranks_of(tmp_path)), signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 137, output
    told = result(tmp_path)
    assert told["trainer_exit_code"] == -9 and told["signal"] == 9
    assert told["cause"]["cause"] == "host-oom-kill" and told["cause"]["remedy"]["hint"]
    assert ranks_of(tmp_path) == []


def test_a_run_that_was_killed_goes_on_from_its_checkpoint(tmp_path: Path, model: Path) -> None:
    """Once: the same death a second time is not tried again."""
    one = two_ranks().replace("num_processes: 2", "num_processes: 1").replace("DEEPSPEED", "NO")
    quick = {"mixed_precision": "no", "gradient_accumulation_steps": 1, "heldout_samples": 0, "disable_sampling": True}
    one = one.replace("mixed_precision: bf16", "mixed_precision: 'no'")
    write_job(tmp_path, model, accelerate=one, max_train_steps=4000, checkpointing_steps=2, **quick)
    process = start(tmp_path, "--retries", "2")
    killed = [_kill_after_a_checkpoint(tmp_path, process)]
    killed.append(_kill_after_a_checkpoint(tmp_path, process, after=killed[0]))
    output = finish(process)
    assert process.returncode == 137, output
    assert output.count("retry 1 of 2") == 1 and "retry 2 of 2" not in output, output
    assert "resumed" in output or "resuming" in output.lower(), output
    assert killed[1] > killed[0]
    logs = sorted((tmp_path / "out" / "logs").glob("run-*.log"))
    assert len(logs) == 2 and "retry-1" in logs[1].name


def _kill_after_a_checkpoint(place: Path, process: subprocess.Popen[str], after: int = 0) -> int:
    """SIGKILL the trainer once a checkpoint later than `after` is whole; the step of the last one."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        steps = [int(path.name.rpartition("-")[2]) for path in (place / "out").glob("checkpoint-*[0-9]")]
        trainers = _trainers(place)
        if steps and max(steps) > after and trainers:
            os.kill(trainers[-1], signal.SIGKILL)
            return max(steps)
        time.sleep(0.05)
    raise AssertionError("no checkpoint came")


def _trainers(place: Path) -> list[int]:
    """Processes that run this job's trainer itself, and not its launchers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        ours = any(str(place) in word for word in words) and "xflux_trainer" in words
        if (
            ours
            and not any("accelerate" in word and "launch" in word for word in words)
            and "guard" not in " ".join(words)
        ):
            found.append(int(entry.name))
    return sorted(found)
