"""A real Slurm of one node, on free ports and in a folder of its own: srun and sbatch with `xflux-doctor` in them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
PATHS = "/usr/sbin:/usr/bin:/sbin:/bin"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not all(shutil.which(name, path=PATHS) for name in NEEDED), reason="Slurm (slurm-wlm, munge) is not installed"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons are started as root"),
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("torch", "accelerate", "diffusers")),
        reason="needs a stack of the matrix",
    ),
]
CONF = """\
ClusterName=xfd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={d}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))
        }
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "XDG_CACHE_HOME": str(self.folder / "xdg"),
                "PATH": f"{Path(sys.executable).parent}:{PATHS}", "OMP_NUM_THREADS": "1"}  # fmt: skip

    def __call__(self, *words: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def doctor(self, tasks: int, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        return self("srun", f"-n{tasks}", sys.executable, "-m", "xflux_doctor.cli", command, "--cpu", "--config",
                    "train.yaml", "--accelerate-config", "accelerate.yaml", *more)  # fmt: skip


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """munged, slurmctld and slurmd as children of this process; all are ended by their own ids."""
    base = tmp_path_factory.mktemp("slurm")
    folder = Path("/tmp") / f"xfd-slurm-{os.getpid()}"  # a socket's path has at most 107 characters
    folder.mkdir(mode=0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(host=host, ctld=_free(), d=_free(), folder=folder))
    cluster = Slurm(folder)
    daemons = []
    commands = (
        ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.sock",
         f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-f", str(folder / "slurm.conf"), "-c"],
        ["slurmd", "-D", "-f", str(folder / "slurm.conf"), "-c"],
    )  # fmt: skip
    try:
        for command in commands:
            log = (folder / f"{command[0]}.out").open("wb")
            daemons.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log))
            time.sleep(1)
        until = time.monotonic() + 30
        while "idle" not in cluster("sinfo", "-h", "-o", "%T").stdout:
            if time.monotonic() > until or any(daemon.poll() is not None for daemon in daemons):
                logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in folder.glob("*.log"))
                pytest.skip(f"Slurm's daemons do not run here: {logs}")
            time.sleep(0.5)
        yield cluster
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
        shutil.copytree(folder, base / "kept", ignore=shutil.ignore_patterns("*.sock*"))
        shutil.rmtree(folder, ignore_errors=True)


def write(slurm: Slurm, model: Path, name: str) -> Path:
    out = slurm.folder / name
    train = {
        "pretrained_model": str(model),
        "data_config": {"img_dir": str(ROOT / "examples/demo/photos"), "img_size": 64, "train_batch_size": 1},
        "output_dir": str(out),
        "cache_dir": str(slurm.folder / "cache"),
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "rank": 4,
        "max_text_tokens": 32,
        "disable_sampling": True,
        "heldout_samples": 0,
        "mixed_precision": "no",
        "report_to": "none",
        "seed": 7,
    }
    (slurm.folder / "train.yaml").write_text(yaml.safe_dump(train))
    (slurm.folder / "accelerate.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: 'no'\nnum_machines: 1\n"
        "num_processes: 2\nuse_cpu: true\n"
    )
    return out


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_check_runs_in_a_task(slurm: Slurm, model: Path) -> None:
    write(slurm, model, "unused")
    done = slurm.doctor(1, "check", "--format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    environment = report["facts"]["environment"]
    assert environment["SLURM_STEP_ID"] == "0" and environment["SLURM_PROCID"] == "0"
    assert report["launch"]["overrides"]["main_process_port"]["source"] == "SLURM_JOB_ID"


def test_one_task_launches_and_two_tasks_are_ranks(slurm: Slurm, model: Path) -> None:
    """The same job both ways: the same losses, and no launcher inside a rank."""
    one = write(slurm, model, "one")
    done = slurm.doctor(1, "run", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    launch = json.loads((one / "launch.json").read_text())
    assert "accelerate.commands.launch" in launch["argv"] and "--main_process_port" in launch["argv"]
    two = write(slurm, model, "two")
    done = slurm.doctor(2, "run", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 2 ranks are here and agree" in done.stdout
    for folder, rank in ((two, "0"), (two / "ranks/rank1", "1")):
        launch = json.loads((folder / "launch.json").read_text())
        assert launch["argv"][1:4] == ["-m", "xflux_trainer", "train"] and launch["added_environment"]["RANK"] == rank
        assert json.loads((folder / "result.json").read_text())["exit_code"] == 0
    assert losses(one) == pytest.approx(losses(two), rel=1e-6) and len(losses(two)) == 2


def test_a_batch_script_is_no_task(slurm: Slurm, model: Path) -> None:
    """sbatch sets SLURM_PROCID and the job's SLURM_NTASKS in the script, which launches as its file says."""
    write(slurm, model, "batch")
    script = slurm.folder / "job.sh"
    script.write_text(
        f"#!/bin/bash\nexec {sys.executable} -m xflux_doctor.cli run --cpu --yes --dry-run --config train.yaml "
        "--accelerate-config accelerate.yaml\n"
    )
    done = slurm("sbatch", "-n2", "-W", "-o", "job.out", str(script))
    output = (slurm.folder / "job.out").read_text()
    assert done.returncode == 0, done.stderr + output
    (command,) = [line for line in output.splitlines() if line.startswith("$ ")]
    assert "accelerate.commands.launch" in command and "--num_processes" not in command
