"""Two machines: two network namespaces joined by a cable, `xflux-doctor run` in each, one training.

The namespaces share the host's files and its name, which /etc/hosts makes 127.0.0.1: gloo would give that address
to the other side (LA412), so GLOO_SOCKET_IFNAME names the cable's end, as LA412 says.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT


def _permitted() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"xfd-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made


pytestmark = [
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("torch", "accelerate", "diffusers")),
        reason="needs a stack of the matrix",
    ),
    pytest.mark.skipif(not _permitted(), reason="`ip netns add` is not permitted here"),
]
TRAIN: dict[str, Any] = {
    "model_name": "flux-dev",
    "data_config": {"img_dir": str(ROOT / "examples/demo/photos"), "img_size": 64, "train_batch_size": 1},
    "max_train_steps": 2,
    "learning_rate": 1e-3,
    "rank": 4,
    "checkpointing_steps": 100,
    "max_text_tokens": 32,
    "disable_sampling": True,
    "heldout_samples": 0,
    "mixed_precision": "no",
    "report_to": "none",
    "seed": 7,
}
# What people bring: a file of one machine with the second's lines added, for GPUs, and a number that does not divide.
FILE = """\
# from the wiki
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
machine_rank: {rank}  # this machine
main_process_ip: {ip}
main_process_port: 29555
mixed_precision: 'no'
num_machines: 2
num_processes: 3
"""
ADDRESSES = ("10.213.7.1", "10.213.7.2")


@dataclass
class Nodes:
    """Two namespaces, a folder for each, and one disk that both write to."""

    names: tuple[str, str]
    folder: Path
    model: Path

    def write(self, *, ip: str = ADDRESSES[0], second: str = "", file: str = FILE, **train: Any) -> None:
        for rank in (0, 1):
            (self.folder / f"{rank}").mkdir(exist_ok=True)
            values = {**TRAIN, "pretrained_model": str(self.model), "output_dir": str(self.folder / "out"),
                      "cache_dir": str(self.folder / "cache"), **train}  # fmt: skip
            (self.folder / f"{rank}/train.yaml").write_text(yaml.safe_dump(values))
            own = second if rank and second else ip
            (self.folder / f"{rank}/accelerate.yaml").write_text(file.format(rank=rank, ip=own))

    def doctor(self, rank: int, *arguments: str) -> subprocess.Popen[str]:
        """`xflux-doctor …` on one of the two."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "XDG_CACHE_HOME": str(self.folder / f"xdg{rank}"),
            "GLOO_SOCKET_IFNAME": f"cable{rank}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = ["ip", "netns", "exec", self.names[rank], sys.executable, "-m", "xflux_doctor.cli", *arguments,
                   "--cpu", "--config", "train.yaml", "--accelerate-config", "accelerate.yaml"]  # fmt: skip
        return subprocess.Popen(
            command,
            cwd=self.folder / f"{rank}",
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def fix(self) -> None:
        for rank in (0, 1):
            process = self.doctor(rank, "fix", "--write-config", "--yes")
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
            text = (self.folder / f"{rank}/accelerate.yaml").read_text()
            assert text.startswith("# from the wiki\n") and f"machine_rank: {rank}  # this machine\n" in text

    def run(self, rank: int, *extra: str) -> subprocess.Popen[str]:
        return self.doctor(rank, "run", "--yes", *extra)


def ended(*processes: subprocess.Popen[str], seconds: float = 240) -> list[str]:
    """Their outputs; none is left running."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=seconds)[0])
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return outputs


@pytest.fixture
def nodes(tmp_path: Path, model: Path) -> Iterator[Nodes]:
    names = (f"xfd{os.getpid()}a{time.monotonic_ns() % 10**6}", f"xfd{os.getpid()}b{time.monotonic_ns() % 10**6}")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[rank]}/24", "dev", f"cable{rank}")
            ip("-n", name, "link", "set", f"cable{rank}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Nodes(names, tmp_path, model)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_two_machines_train_as_one(nodes: Nodes) -> None:
    """From the files that `fix` wrote: both end well, and the losses are those of two ranks on one machine."""
    nodes.write()
    nodes.fix()
    fixed = yaml.safe_load((nodes.folder / "0/accelerate.yaml").read_text())
    assert (fixed["distributed_type"], fixed["num_processes"], fixed["use_cpu"]) == ("MULTI_GPU", 2, True)
    both = [nodes.run(0), nodes.run(1)]
    outputs = ended(*both)
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    assert "all 2 machines are here and agree" in outputs[0]
    out = nodes.folder / "out"
    assert json.loads((out / "result.json").read_text())["exit_code"] == 0
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert json.loads((out / "machines/machine1/result.json").read_text())["exit_code"] == 0
    assert list((out / "machines/machine1/logs").glob("run-*.log"))
    assert json.loads((out / "metrics.json").read_text())["world_size"] == 2

    alone = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n"
    (nodes.folder / "0/accelerate.yaml").write_text(alone + "mixed_precision: 'no'\n")
    nodes_train = yaml.safe_load((nodes.folder / "0/train.yaml").read_text())
    nodes_train["output_dir"] = str(nodes.folder / "one")
    (nodes.folder / "0/train.yaml").write_text(yaml.safe_dump(nodes_train))
    one = nodes.run(0)
    (output,) = ended(one)
    assert one.returncode == 0, output
    assert losses(nodes.folder / "one") == pytest.approx(losses(out), rel=1e-6)


def test_a_missing_machine_and_another_config_are_named(nodes: Nodes) -> None:
    """The quick version: no training is started."""
    nodes.write()
    nodes.fix()
    started = time.monotonic()
    alone = nodes.run(0, "--wait-for-nodes", "3")
    (output,) = ended(alone)
    assert alone.returncode == 1 and "NE102" in output, output
    assert "Machine 1 of 2 did not come to 10.213.7.1:29555 within 3 s." in output
    assert time.monotonic() - started < 20 and not (nodes.folder / "out").exists()

    train = yaml.safe_load((nodes.folder / "1/train.yaml").read_text())
    (nodes.folder / "1/train.yaml").write_text(yaml.safe_dump({**train, "learning_rate": 5e-4}))
    both = [nodes.run(0), nodes.run(1)]
    outputs = ended(*both)
    assert [process.returncode for process in both] == [1, 1]
    for output in outputs:
        assert "Machine 1 has another learning_rate: 0.0005 (0.001 on number 0)." in output


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs DeepSpeed")
def test_deepspeed_on_two_machines(nodes: Nodes) -> None:
    """Without a launcher in its section accelerate would take pdsh and no hosts: `fix` writes `standard` (LA408)."""
    text = FILE.replace("'NO'", "DEEPSPEED").replace("processes: 3", "processes: 2")
    nodes.write(file=text + "deepspeed_config:\n  zero_stage: 2\n  gradient_accumulation_steps: 1\n")
    nodes.fix()
    section = yaml.safe_load((nodes.folder / "1/accelerate.yaml").read_text())["deepspeed_config"]
    assert section["deepspeed_multinode_launcher"] == "standard"
    both = [nodes.run(0), nodes.run(1)]
    outputs = ended(*both)
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    metrics = json.loads((nodes.folder / "out/metrics.json").read_text())
    assert (metrics["strategy"], metrics["world_size"]) == ("zero2", 2)


@pytest.mark.long
@pytest.mark.parametrize(("ip", "second", "code", "words"), [
    # the second machine was told another address: nobody is there
    (ADDRESSES[0], "10.213.7.9", "NE103", ("no route", "no answer")),
    (ADDRESSES[0], "10.99.0.1", "NE103", ("no route", "no answer")),
    # its own: it would look for machine 0 at home
    (ADDRESSES[0], ADDRESSES[1], "NE103", ("connection refused",)),
    # no name service reaches these namespaces
    (ADDRESSES[0], "nosuch.invalid", "NE103", ("could not be looked up",)),
])  # fmt: skip
def test_a_wrong_address_is_told_in_time(nodes: Nodes, ip: str, second: str, code: str, words: tuple[str, ...]) -> None:
    nodes.write(ip=ip, second=second)
    for rank in (0, 1):
        ended(nodes.doctor(rank, "fix", "--write-config", "--yes"))
    started = time.monotonic()
    both = [nodes.run(0), nodes.run(1)]
    outputs = ended(*both)
    assert [process.returncode for process in both] == [1, 1], outputs
    assert time.monotonic() - started < 20 + 10  # the doctors' own start, on a loaded machine
    assert code in outputs[1] and any(word in outputs[1] for word in words), outputs[1]
    assert "NE102" in outputs[0] and "Machine 1 of 2 did not come" in outputs[0]


@pytest.mark.long
def test_a_busy_port_stops_both(nodes: Nodes) -> None:
    nodes.write()
    nodes.fix()
    hold = "import socket,time; s=socket.create_server(('', 29555)); print('up', flush=True); time.sleep(300)"
    holder = subprocess.Popen(
        ["ip", "netns", "exec", nodes.names[0], sys.executable, "-c", hold], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"up\n"
        started = time.monotonic()
        both = [nodes.run(0), nodes.run(1)]
        outputs = ended(*both)
    finally:
        holder.kill()
        holder.wait()
    assert [process.returncode for process in both] == [1, 1] and time.monotonic() - started < 30
    assert "LA112" in outputs[0] and "Port 29555 is in use" in outputs[0]
    assert "NE103" in outputs[1] and "it does not answer" in outputs[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_ends_the_wait_at_once(nodes: Nodes, rank: int) -> None:
    nodes.write()
    nodes.fix()
    waiting = nodes.run(rank)
    try:
        assert waiting.stdout is not None and "waiting for machine" in waiting.stdout.readline()
        started = time.monotonic()
        os.killpg(waiting.pid, signal.SIGINT)
        waiting.wait(10)
        assert time.monotonic() - started < 8 and waiting.returncode == 130
    finally:
        ended(waiting, seconds=10)


# --- going on after a death ---------------------------------------------------------------------------------


LONGER: dict[str, Any] = {"max_train_steps": 60, "checkpointing_steps": 10, "gradient_accumulation_steps": 2}


def until(what: Callable[[], Any], *processes: subprocess.Popen[str], seconds: float = 120) -> Any:
    """Wait for it, and give it; the processes may not end meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        if any(process.poll() is not None for process in processes):
            raise AssertionError("\n".join(ended(*processes)))
        time.sleep(0.02)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("\n".join(["it never came", *ended(*processes)]))


def ranks_of(nodes: Nodes, machine: int) -> list[int]:
    """The trainer's processes of one machine, without its launcher: they name its copy of the training file."""
    own = str(nodes.folder / "out" / (f"machines/machine{machine}/train.yaml" if machine else "train.yaml")).encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if own in words and b"accelerate.commands.launch" not in words:
                found.append(int(entry.name))
    return found


def checkpointed(nodes: Nodes) -> list[Path]:
    return [*(nodes.folder / "out").glob("checkpoint-*/manifest.json")]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def retried(nodes: Nodes) -> list[list[dict[str, Any]]]:
    out = nodes.folder / "out"
    return [lines_of(folder / "retries.jsonl") for folder in (out, out / "machines/machine1")]


def nobody_is_left(nodes: Nodes) -> None:
    assert ranks_of(nodes, 0) == ranks_of(nodes, 1) == []


@pytest.mark.long
def test_a_killed_rank_is_retried_by_both(nodes: Nodes) -> None:
    """Machine 1 loses its rank; both go on from one checkpoint, and the losses are those of a run that lost none."""
    nodes.write(**LONGER)
    nodes.fix()
    both = [nodes.run(rank, "--retries", "2") for rank in (0, 1)]
    until(lambda: checkpointed(nodes), *both)
    for pid in ranks_of(nodes, 1):
        os.kill(pid, signal.SIGKILL)
    outputs = ended(*both)
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    for output in outputs:
        assert "retry 1 of 2" in output and "machine 1: host-oom-kill: the same once more" in output
    out = nodes.folder / "out"
    for (line,) in retried(nodes):
        assert (line["retry"], line["machine"], line["cause"]) == (1, 1, "host-oom-kill")
        assert line["edits"][0]["key"] == ["resume_from_checkpoint"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["world_size"], metrics["gradient_accumulation_steps"], metrics["steps"]) == (2, 2, 60)
    assert any("resumed from" in note for note in metrics["notes"])
    story = subprocess.run(
        [sys.executable, "-m", "xflux_doctor.cli", "report", str(out)], capture_output=True, text=True
    )
    assert "retry 1 after" in story.stdout and "machine 1: host-oom-kill" in story.stdout
    nobody_is_left(nodes)

    alone = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\n"
    (nodes.folder / "0/accelerate.yaml").write_text(alone + "mixed_precision: 'no'\n")
    train = yaml.safe_load((nodes.folder / "0/train.yaml").read_text())
    (nodes.folder / "0/train.yaml").write_text(yaml.safe_dump({**train, "output_dir": str(nodes.folder / "one")}))
    one = nodes.run(0)
    (output,) = ended(one)
    assert one.returncode == 0, output
    assert [line["step"] for line in lines_of(out / "metrics.jsonl")] == list(range(1, 61))
    assert losses(nodes.folder / "one") == pytest.approx(losses(out), rel=1e-6)


@pytest.mark.long
def test_a_cable_that_was_out_while_a_rank_died(nodes: Nodes) -> None:
    """The ranks of machine 0 hear nothing of it and would wait for an hour: its doctor reads it on the shared disk,
    ends them, and both go on once the cable is back."""
    nodes.write(**{**LONGER, "max_train_steps": 400})
    nodes.fix()
    both = [nodes.run(rank, "--retries", "1") for rank in (0, 1)]
    until(lambda: checkpointed(nodes), *both)
    subprocess.run(["ip", "-n", nodes.names[1], "link", "set", "cable1", "down"], check=True)
    for pid in ranks_of(nodes, 1):
        os.kill(pid, signal.SIGKILL)
    ended_by_doctor = "the part of machine 1 ended with 137; the ranks here wait for its, and are ended"
    until(lambda: any(ended_by_doctor in log.read_text() for log in (nodes.folder / "out/logs").glob("*.log")), *both)
    subprocess.run(["ip", "-n", nodes.names[1], "link", "set", "cable1", "up"], check=True)
    outputs = ended(*both)
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    for (line,) in retried(nodes):
        assert (line["machine"], line["cause"]) == (1, "host-oom-kill")
    assert retried(nodes)[0][0]["exit_code"] == 124 and retried(nodes)[1][0]["exit_code"] == 137
    nobody_is_left(nodes)


@pytest.mark.long
def test_a_machine_that_does_not_come_back(nodes: Nodes) -> None:
    nodes.write(**{**LONGER, "max_train_steps": 4000})
    nodes.fix()
    both = [nodes.run(rank, "--retries", "2", "--wait-for-nodes", "5") for rank in (0, 1)]
    until(lambda: checkpointed(nodes), *both)
    lost = ranks_of(nodes, 1)
    os.killpg(both[1].pid, signal.SIGKILL)  # the doctor first, as when the machine's power goes
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    output, _ = ended(*both)
    assert both[0].returncode not in (0, 130, 143) and time.monotonic() - started < 65 + 30, output
    assert "machine 1 did not come to 10.213.7.1:29555 within 65 s. Nobody starts again." in output
    assert "start all machines again with resume_from_checkpoint: latest" in output
    (line,) = [line for line in lines_of(nodes.folder / "out/history.jsonl") if line["event"] == "no retry"]
    assert "machine 1 did not come" in line["why"]
    assert len([*(nodes.folder / "out/logs").glob("run-*.log")]) == 1
    nobody_is_left(nodes)


@pytest.mark.long
def test_a_signal_while_a_machine_is_awaited_after_a_death(nodes: Nodes) -> None:
    nodes.write(**{**LONGER, "max_train_steps": 4000})
    nodes.fix()
    both = [nodes.run(rank, "--retries", "2") for rank in (0, 1)]
    until(lambda: checkpointed(nodes), *both)
    lost = ranks_of(nodes, 1)
    os.killpg(both[1].pid, signal.SIGKILL)
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    assert both[0].stdout is not None
    assert any("waiting for machine 1 of 2" in line for line in both[0].stdout)
    started = time.monotonic()
    os.kill(both[0].pid, signal.SIGTERM)
    output, _ = ended(*both)
    assert both[0].returncode == 143 and time.monotonic() - started < 10, output
    result = json.loads((nodes.folder / "out/result.json").read_text())
    assert (result["exit_code"], result["signal"]) == (143, 15) and result["trainer_exit_code"] not in (0, None)
    assert len([*(nodes.folder / "out/logs").glob("run-*.log")]) == 1
    nobody_is_left(nodes)


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR2, 75)])
def test_one_that_is_told_to_end_ends_all(nodes: Nodes, number: signal.Signals, code: int) -> None:
    """Ctrl-C or a preemption on machine 1: all save and end, and nobody waits for it to come back."""
    nodes.write(**{**LONGER, "max_train_steps": 4000})
    nodes.fix()
    both = [nodes.run(rank, "--retries", "2") for rank in (0, 1)]
    until(lambda: checkpointed(nodes), *both)
    os.kill(both[1].pid, number)  # `ip netns exec` has become the doctor
    started = time.monotonic()
    outputs = ended(*both)
    assert both[1].returncode == code, outputs[1]
    assert both[0].returncode in (130, 143) and time.monotonic() - started < 40, outputs[0]
    assert "machine 1 was told to end by signal" in outputs[0] and "retry 1 of" not in outputs[0]
    nobody_is_left(nodes)


def test_machines_that_would_start_again_otherwise_are_named(nodes: Nodes) -> None:
    nodes.write()
    nodes.fix()
    both = [nodes.run(0, "--retries", "2"), nodes.run(1)]
    for output in ended(*both):
        assert "Machine 1 has another --retries: 0 (2 on number 0)." in output
