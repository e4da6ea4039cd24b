"""Several ranks: DDP and ZeRO-2 by `accelerate launch`, on two processes without a GPU."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402
from trainer_kit import environment, keep_signals, losses, metrics, squares, trainer, write_config  # noqa: E402
from xflux_trainer import cli, lora  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import DataError, Unsupported, UserError  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402
from xflux_trainer.run import refuse_slow  # noqa: E402
from xflux_trainer.spec import FLUX_DEV, FluxSpec  # noqa: E402

__all__ = ["keep_signals"]  # a fixture, used by being here

DDP: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "mixed_precision": "bf16",
    "num_machines": 1, "num_processes": 2, "use_cpu": True,
}  # fmt: skip
ZERO: dict[str, Any] = DDP | {
    "distributed_type": "DEEPSPEED",
    "use_cpu": False,
    "deepspeed_config": {
        "gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "offload_optimizer_device": "none",
        "offload_param_device": "none", "zero3_init_flag": False, "zero_stage": 2,
    },
}  # fmt: skip


def launch(settings: dict[str, Any], config: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch … -m xflux_trainer train`, on a free port."""
    file = config.with_name("accelerate.yaml")
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
        "--main_process_port", str(port), "-m", "xflux_trainer", "train", "--config", str(config), *more,
    ]  # fmt: skip
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        cwd=config.parent,
    )


def test_two_ranks_are_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    """The same images, captions, times and noise: sharing the work must not swap, lose or repeat a sample."""
    squares(tmp_path / "images", ((64, 64), (96, 48)))
    common = {"learning_rate": 1e-3, "max_train_steps": 6, "heldout_samples": 3, "cache_dir": None}
    one = write_config(tmp_path, "one.yaml", output_dir=str(tmp_path / "a"), gradient_accumulation_steps=2, **common)
    done = trainer("train", "--config", one)
    assert done.returncode == 0, done.stderr
    done = launch(DDP, write_config(tmp_path, "two.yaml", output_dir=str(tmp_path / "b"), **common))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6") == 1  # rank 0 alone speaks

    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert (a["strategy"], b["strategy"], b["world_size"]) == ("single", "ddp", 2)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)
    assert a["heldout_loss"]["before"] == pytest.approx(b["heldout_loss"]["before"], rel=1e-6)
    assert len(b["per_rank"]) == 2
    one_file, two_file = (load_file(tmp_path / name / lora.ADAPTER_FILE) for name in "ab")
    for name, value in one_file.items():
        assert torch.allclose(value, two_file[name], rtol=2e-2, atol=2e-4), name
    # Each rank encoded its own half, and between them everything once, byte for byte as one alone does.
    caches = [{p.name: p.read_bytes() for p in (tmp_path / name / "cache").glob("*.safetensors")} for name in "ab"]
    assert caches[0].keys() == caches[1].keys()
    assert all(len(cache) == 8 for cache in caches)
    assert {p.name for p in (tmp_path / "b" / "checkpoint-6").glob("random-*")} == {
        "random-rank0.safetensors",
        "random-rank1.safetensors",
    }


def test_an_error_on_one_rank_ends_all_of_them_with_one_sentence(tmp_path: Path) -> None:
    config = write_config(tmp_path, cache_dir=None)
    broken = sorted((tmp_path / "images").glob("*.png"))[2]
    broken.write_bytes(broken.read_bytes()[:60] + broken.read_bytes()[-12:])
    done = launch(DDP, config)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert broken.name in done.stderr
    assert "xflux_trainer/" not in done.stderr  # no traceback of ours


def test_zero_2_trains_and_resumes_exactly(tmp_path: Path) -> None:
    """DeepSpeed's engine; accumulation comes from the accelerate config; three and three steps are six."""
    pytest.importorskip("deepspeed")
    common = {"mixed_precision": "bf16", "checkpointing_steps": 3, "learning_rate": 1e-2, "heldout_samples": 2}
    whole = write_config(tmp_path, "a.yaml", max_train_steps=6, output_dir=str(tmp_path / "a"), **common)
    done = launch(ZERO, whole)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "gradient_accumulation_steps is 2, as the accelerate config says; the train config's 1 is ignored"
        in done.stdout
    )
    assert "batch 4 = 1 images x 2 ranks x 2 accumulated" in done.stdout
    told = metrics(tmp_path / "a")
    assert (told["strategy"], told["world_size"], told["gradient_accumulation_steps"]) == ("zero2", 2, 2)
    assert told["heldout_loss"]["after"] < told["heldout_loss"]["before"]
    final = load_file(tmp_path / "a" / lora.ADAPTER_FILE)
    assert {value.dtype for value in final.values()} == {torch.float32}
    # The masters, and not the bf16 copies: most of their values have no bf16 form.
    exact = torch.cat([(value == value.bfloat16().float()).float().flatten() for value in final.values()])
    assert float(exact.mean()) < 0.2

    # Go on from the middle in another folder, as if the run had ended there.
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    more = {"output_dir": str(tmp_path / "b"), "resume_from_checkpoint": "latest"}
    done = launch(ZERO, write_config(tmp_path, "b.yaml", max_train_steps=6, **more, **common))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "a")[3:] == losses(tmp_path / "b")
    for name in ("weights-00001.safetensors", "optimizer-00001.safetensors"):
        a, b = (tmp_path / run / "checkpoint-6" / name for run in "ab")
        assert a.read_bytes() == b.read_bytes(), name

    # A checkpoint does not show who wrote it: one process without DeepSpeed goes on from ZeRO's.
    alone = write_config(tmp_path, "c.yaml", max_train_steps=7, gradient_accumulation_steps=4, **more, **common)
    assert cli.main(["train", "--config", str(alone)]) == 0
    assert metrics(tmp_path / "b")["strategy"] == "single"
    assert len(losses(tmp_path / "b")) == 4


def test_the_launchers_environment() -> None:
    launch = Launch.read({
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
    })  # fmt: skip
    assert (launch.rank, launch.local_rank, launch.world_size, launch.local_world_size) == (3, 1, 4, 2)
    assert launch.deepspeed
    assert launch.accumulation == 2
    assert Launch.read({}) == Launch()
    assert Launch.read({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}).accumulation is None


@pytest.mark.parametrize(("own", "other", "used", "told"), [(2, None, 2, False), (2, 2, 2, False), (4, 2, 2, True)])
def test_whose_accumulation_counts(own: int, other: int | None, used: int, told: bool) -> None:
    ranks = Ranks(Launch(accumulation=other, use_cpu=True))
    steps, notes = ranks.accumulation(TrainConfig(img_dir="x", gradient_accumulation_steps=own))
    assert steps == used
    assert bool(notes) is told


def test_whose_precision_counts() -> None:
    ranks = Ranks(Launch.read({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"}))
    (note,) = ranks.accumulation(TrainConfig(img_dir="x", mixed_precision="bf16"))[1]
    assert note.startswith("mixed_precision is bf16, as the train config says")
    assert ranks.accumulation(TrainConfig(img_dir="x", mixed_precision="fp16"))[1] == []


@pytest.mark.parametrize(
    ("use_cpu", "spec"), [(True, FLUX_DEV), (False, replace(FLUX_DEV, single_blocks=0, double_blocks=1))]
)
def test_the_cpu_is_for_small_models_or_for_those_who_insist(use_cpu: bool, spec: FluxSpec) -> None:
    refuse_slow(spec, Ranks(Launch(use_cpu=use_cpu)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_the_full_model_without_a_gpu_is_refused() -> None:
    with pytest.raises(Unsupported, match="torch finds no GPU"):
        refuse_slow(FLUX_DEV, Ranks(Launch()))


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(("environ", "words"), [
    ({"ACCELERATE_USE_FSDP": "true"}, "first version of FSDP.*fsdp_version: 2"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "first version of FSDP"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size 2"),
    (STEP, "srun started 4 tasks.*torchrun"),
])  # fmt: skip
def test_other_strategies_are_refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        Ranks(Launch.read({**environ, "ACCELERATE_USE_CPU": "true"}))


@pytest.mark.parametrize("environ", [
    {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {**STEP, "RANK": "1", "WORLD_SIZE": "4"},
    {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"},
    {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {**STEP, "SLURM_STEP_ID": str(0xFFFF_FFFB)},  # a batch script
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
])  # fmt: skip
def test_what_is_done_is_not_refused(environ: dict[str, str]) -> None:
    ranks = Ranks(Launch.read({**environ, "ACCELERATE_USE_CPU": "true"}))
    assert ranks.launch.fsdp is ("FSDP_VERSION" in environ)


class Machines(Ranks):
    """One rank of several machines, whose words come back as they are."""

    def __init__(self, rank: int) -> None:
        super().__init__(Launch(rank=rank, world_size=2, local_world_size=1, use_cpu=True))

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_a_folder_that_machines_do_not_share_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xflux_trainer.ranks.SIGHT", 0.3)
    Machines(0).share(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"Rank 1 on .* does not see what rank 0 wrote to"):
        Machines(1).share(tmp_path)
    Ranks(Launch(use_cpu=True)).share(tmp_path / "missing")  # of one machine nothing is asked


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks(Launch(rank=1, local_rank=1, world_size=8)).device == torch.device("cuda", 1)
    with pytest.raises(Unsupported, match=r"finds only 2 GPU.*num_processes to 2"):
        Ranks(Launch(rank=5, local_rank=5, world_size=8))


def test_agreeing_raises_the_error_that_was_told() -> None:
    ranks = Ranks(Launch(use_cpu=True))
    ranks.agree()
    with pytest.raises(DataError, match="broken"):
        ranks.agree(DataError("broken", "mend it"))


# What is done to one rank in its third step, by a program that is the trainer but for this.
FAULTY = """
import os, sys
import xflux_trainer.train as train
from xflux_trainer import cli, track
from xflux_trainer.errors import DataError, WriteError
rank, fault, calls = os.environ["RANK"], sys.argv.pop(1), [0]

def third(error):
    calls[0] += 1
    if calls[0] == 3:
        raise error

def micro(run, batch, number, real=train._micro_step):
    if rank == "1" and fault in ("crash", "sentence"):
        third(RuntimeError("a planted crash") if fault == "crash" else DataError("A planted fault.", "Mend it."))
    return real(run, batch, number)

def write(lines, values, real=track.Lines.write):
    if fault == "disk":
        third(WriteError("Cannot write metrics.jsonl: no space left on device.", "Free some space."))
    return real(lines, values)

train._micro_step, track.Lines.write = micro, write
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("fault", "words"), [
    ("crash", "RuntimeError: a planted crash"), ("sentence", "error: A planted fault. Mend it."),
    ("disk", "error: Cannot write metrics.jsonl: no space left on device."),
])  # fmt: skip
def test_a_fault_of_one_rank_ends_all_and_is_told(tmp_path: Path, fault: str, words: str) -> None:
    config = write_config(tmp_path, max_train_steps=50)
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program),
               fault, "train", "--config", str(config)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode != 0 and words in done.stdout + done.stderr, done.stderr
    if fault == "disk":  # found out together: one sentence, and no traceback of the other rank
        assert done.stderr.count("error: Cannot write") == 1 and "Connection closed" not in done.stderr
        assert metrics(tmp_path / "out")["status"] == "failed"
