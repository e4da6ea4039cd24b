"""Launch commands as people type them, and the job that they launch."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, findings, job, machine, record
from packaging.version import Version

from xflux_doctor.checks import launch, machines
from xflux_doctor.cli import main
from xflux_doctor.command import Command, parse
from xflux_doctor.errors import UsageError
from xflux_doctor.job import Job
from xflux_doctor.launched import under_command
from xflux_doctor.matrix import Matrix

NEW, OLD = Version("1.15.0"), Version("0.30.1")


def launched(text: str, file: str | None = XFLUX_ACCELERATE, version: Version = NEW, devices: int = 2) -> Job:
    command = parse(text)
    return under_command(msgspec.structs.replace(job(file), command=command), command, version, devices)


@pytest.mark.parametrize("text", [
    "accelerate launch --config_file a.yaml --num_processes 4 train.py --config t.yaml",
    "accelerate launch --config-file=a.yaml --num-processes=4 train.py --config=t.yaml",
    "accelerate-launch --config_file a.yaml --num_processes 4 train.py --config t.yaml",
    "python3.11 -m accelerate.commands.launch --config_file a.yaml --num_processes 4 train.py --config t.yaml",
    "/venv/bin/accelerate launch --config_file a.yaml --num_processes 4 -m trainer --config t.yaml",
    "A=1 accelerate launch --config_file a.yaml \\\n  --num_processes 4 train.py --config t.yaml",
    "accelerate launch --config_file a.yaml \\\r\n  --num_processes 4 train.py --config 't.yaml'",
    "A=1 nohup accelerate launch --config_file a.yaml --num_processes 4 train.py --config t.yaml > log 2>&1 &",
    "sudo -E env A='b c' accelerate launch --config_file \"a.yaml\" --num_processes 4 t.py --config t.yaml | tee x",
    "timeout -k 9 1h python -u -m accelerate.commands.launch \\\n--config_file a.yaml --num_processes 4 t.py "
    "--config t.yaml # x",
])  # fmt: skip
def test_forms(text: str) -> None:
    command = parse(text)
    assert (command.launcher, command.config_file, command.training_file) == ("accelerate", "a.yaml", "t.yaml")
    found = launched(text)
    assert found.num_processes == 4 and found.source("num_processes") == "--num_processes"
    assert str(command.rewritten("num_processes", 2)).replace("=", " ").count("num") == 1
    assert launched(str(command.rewritten("num_processes", 2))).num_processes == 2


@pytest.mark.parametrize(("text", "words"), [
    ("accelerate test", "is no launch command"),
    ("python train.py", "is no launch command"),
    ("", "is no launch command"),
    ("accelerate launch 'train.py", "No closing quotation"),
    ("accelerate launch --num_process 4 train.py", "has no flag --num_process"),
    ("accelerate launch --num_processes four train.py", "--num_processes is 'four'"),
    ("accelerate launch --num_processes", "has no value"),
    ("torchrun --num_processes 4 train.py", "torchrun has no flag --num_processes"),
    ("torchrun --node_rank x train.py", "--node_rank is 'x'"),
    ("torchrun --nproc_per_node 0 train.py", "--nproc_per_node is '0'"),
    ("accelerate launch --num_processes -3 train.py", "--num_processes is '-3'"),
    ("accelerate launch --main_process_port 70000 train.py", "--main_process_port is '70000'"),
    ("accelerate launch --machine_rank -1 train.py", "--machine_rank is '-1'"),
    ("torchrun --nproc_per_node=² train.py", "--nproc_per_node is '²'"),
    ("torchrun --nnodes=x train.py", "--nnodes is 'x'"),
    ("accelerate launch --num_processes \"a b", "No closing quotation"),
    ("accelerate launch --num_processes $N train.py", "$N in the command of --launch is for a shell to fill in"),
    ("CUDA_VISIBLE_DEVICES=$GPUS accelerate launch t.py", "CUDA_VISIBLE_DEVICES=$GPUS in the command"),
    ("cd /x && accelerate launch t.py", "is no launch command"),
    ("sudo accelerate launch t.py", "is no launch command"),
    ("env -u CUDA_VISIBLE_DEVICES accelerate launch t.py", "is no launch command"),
])  # fmt: skip
def test_no_launch(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        launched(text)
    assert words in caught.value.seen and caught.value.hint
    if "num_process 4" in text:
        assert "Did you mean --num_processes?" in caught.value.hint


def test_flags_win_over_the_file_but_for_sections_of_old_releases() -> None:
    text = "accelerate launch --num_processes 2 --mixed_precision fp16 --zero_stage 1 --gradient_clipping 0.5 t.py"
    new, old = launched(text), launched(text, version=OLD)
    assert (new.num_processes, new.get("mixed_precision"), new.zero_stage) == (2, "fp16", 1)
    assert new.section("deepspeed_config")["gradient_clipping"] == 0.5
    assert old.num_processes == 2 and old.zero_stage == 2  # before 1.5 the section of the file wins
    assert old.source("deepspeed_config") == ""


@pytest.mark.parametrize(("text", "kind"), [
    ("accelerate launch --multi_gpu t.py", "MULTI_GPU"), ("accelerate launch --use_fsdp t.py", "FSDP"),
    ("accelerate launch --use_deepspeed t.py", "DEEPSPEED"), ("accelerate launch t.py", "DEEPSPEED"),
    ("accelerate launch --cpu t.py", "NO"), ("torchrun --nproc_per_node 2 t.py", "MULTI_GPU"),
])  # fmt: skip
def test_kinds(text: str, kind: str) -> None:
    found = launched(text)
    assert found.distributed_type == kind
    assert found.use_cpu == ("--cpu" in text)


def test_without_a_file_accelerate_takes_every_visible_gpu() -> None:
    two, one = (launched("accelerate launch t.py", None, devices=n) for n in (2, 1))
    assert (two.num_processes, two.distributed_type) == (2, "MULTI_GPU")
    assert (one.num_processes, one.distributed_type) == (1, "NO")
    named = launched("accelerate launch --num_processes 1 t.py", None)
    assert named.num_processes == 1


def test_other_launchers_do_not_read_accelerate_s_file() -> None:
    found = launched("torchrun --nnodes=2 --nproc-per-node=4 --node-rank=1 --rdzv-endpoint=n0:29400 t.py")
    assert found.accelerate is None and found.launcher == "torchrun"
    assert (found.num_processes, found.num_machines, found.machine_rank) == (8, 2, 1)
    assert (found.get("main_process_ip"), found.main_process_port) == ("n0", 29400)
    deepspeed = launched("deepspeed --include localhost:1,3 --master_port 29501 t.py")
    assert (deepspeed.gpu_ids, deepspeed.num_processes, deepspeed.main_process_port) == ("1,3", 2, 29501)
    assert launched("deepspeed t.py", devices=3).num_processes == 3


def test_what_a_flag_says_is_mended_in_the_command_and_no_file_is_touched(matrix: Matrix) -> None:
    text = "accelerate launch --config_file a.yaml --num_processes 8 t.py"
    subject = case(matrix, machine(matrix, count=2), launched(text))
    (finding,) = findings(subject, launch.ranks_have_devices)
    assert finding.edits == () and finding.offers == ()
    assert finding.commands == ("accelerate launch --config_file a.yaml --num_processes 2 t.py",)
    assert "num_processes comes from --num_processes: no file is changed for it" in finding.hint
    nodes = "torchrun --nnodes 2 --nproc_per_node 8 --node_rank 0 --master_addr n0 t.py"
    (finding,) = findings(case(matrix, machine(matrix, count=2), launched(nodes)), launch.ranks_have_devices)
    assert finding.commands == (nodes.replace("8", "2"),)


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], matrix: Matrix
) -> None:
    """The files that the command names are judged, and none that merely lies here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accelerate.yaml").write_text("nonsense: [")
    (tmp_path / "mine.yaml").write_text(XFLUX_ACCELERATE)
    record(tmp_path / "facts.json", machine(matrix, count=2))
    named = "CUDA_VISIBLE_DEVICES=1 accelerate launch --config_file mine.yaml train.py"
    assert main(["check", "--facts", "facts.json", "--launch", named]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 device is visible under CUDA_VISIBLE_DEVICES=1" in shown and "rank 0 → GPU 1" in shown
    main(["check", "--facts", "facts.json", "--launch", "accelerate launch train.py", "-v"])
    shown = capsys.readouterr().out
    assert "launch: 2 ranks, DDP, started by torchrun" in shown
    assert "num_processes is 2 by the number of visible GPUs" in shown
    assert main(["check", "--facts", "facts.json", "--launch", "sbatch job.sh"]) == 2
    assert "is no launch command" in capsys.readouterr().err


def test_every_word_is_kept() -> None:
    command = parse("X='a b' accelerate launch t.py --name 'c d' -- --num_processes 3")
    assert isinstance(command, Command) and command.environment == {"X": "a b"}
    assert command.arguments == ("--name", "c d", "--", "--num_processes", "3")
    assert str(command) == "X='a b' accelerate launch t.py --name 'c d' -- --num_processes 3"


@pytest.mark.parametrize("text", [
    "X='a b' nohup accelerate launch --num_processes {} t.py --num_processes 8 --out ~/x --name \"$N\" > log 2>&1 &",
    "/v/bin/accelerate launch --config_file ~/a.yaml --num_processes={} t.py | tee log",
    "torchrun --rdzv-endpoint=[::1]:29400 --nproc-per-node {} -m t '--x=$a;b' # two",
    "CUDA_VISIBLE_DEVICES=0, accelerate launch --num_processes {} -- t.py *.png",
])  # fmt: skip
def test_only_the_launcher_s_flag_is_written_anew(text: str) -> None:
    """Quotes, `~`, `$`, `*`, pipes and redirections are the shell's: they stay as they were typed."""
    command = parse(text.format(8))
    assert str(command) == text.format(8)
    flag = "nproc_per_node" if command.launcher == "torchrun" else "num_processes"
    assert str(command.rewritten(flag, 2)) == text.format(2)


def test_what_the_shell_would_have_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    command = parse("accelerate launch --config_file ~/a.yaml t.py --config ~/t.yaml")
    assert (command.config_file, command.training_file) == ("/home/me/a.yaml", "/home/me/t.yaml")
    six = launched("torchrun --nnodes 2 --node-rank 0 --rdzv-endpoint=[fe80::1]:29400 --nproc-per-node 1 t.py")
    assert (six.get("main_process_ip"), six.main_process_port) == ("fe80::1", 29400)


def test_one_process_goes_without_multi_gpu(matrix: Matrix) -> None:
    """accelerate: You need to use at least 2 processes to use `--multi_gpu`."""
    text = "accelerate launch --num_processes 2 --multi-gpu --gpu_ids all t.py --multi_gpu"
    (finding,) = findings(case(matrix, machine(matrix, count=1), launched(text, None)), launch.ranks_have_devices)
    assert finding.commands == ("accelerate launch --num_processes 1 --gpu_ids all t.py --multi_gpu",)


def test_two_machines_of_torchrun_without_an_address(matrix: Matrix) -> None:
    """torchrun takes 127.0.0.1 then, which is every machine's own."""
    text = "torchrun --nnodes=2 --nproc_per_node=2 --node_rank=0 t.py"
    (finding,) = findings(case(matrix, machine(matrix, count=2), launched(text)), machines.no_loopback)
    assert "num_machines is 2 and main_process_ip is '127.0.0.1'" in finding.seen
    right = f"{text[:-4]}--master_addr 10.0.0.1 t.py"
    assert findings(case(matrix, machine(matrix, count=2), launched(right)), machines.no_loopback) == ()
    assert launched("deepspeed --num_gpus -1 t.py", devices=3).num_processes == 3
