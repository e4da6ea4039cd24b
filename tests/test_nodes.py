"""`xflux-doctor nodes`: one file and one command for each machine, and files that do not go together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import XFLUX_ACCELERATE

from xflux_doctor.errors import UsageError
from xflux_doctor.nodes import commands, file_of, files, hosts, unlike

TWO = """\
# ours
distributed_type: MULTI_GPU  # keep
machine_rank: 0
main_process_ip: n1
main_process_port: 29500
num_machines: 2
num_processes: 16
"""


def test_each_machine_gets_its_number_and_nothing_else_changes() -> None:
    found = files(Path("a.yaml"), TWO, yaml.safe_load(TWO), ("n1", "n2"))
    assert found == {Path("a.node0.yaml"): TWO, Path("a.node1.yaml"): TWO.replace("rank: 0", "rank: 1")}
    assert unlike(yaml.safe_load(found[Path("a.node0.yaml")]), [yaml.safe_load(found[Path("a.node1.yaml")])]) == []


def test_a_file_of_one_machine_becomes_one_of_three() -> None:
    values = yaml.safe_load(XFLUX_ACCELERATE)
    found = files(Path("a.yaml"), XFLUX_ACCELERATE, values, ("n1", "n2", "n3"), 4000)
    read = [yaml.safe_load(text) for text in found.values()]
    assert [item["machine_rank"] for item in read] == [0, 1, 2] and unlike(read[0], read[1:]) == []
    assert read[2]["num_machines"] == 3 and read[2]["num_processes"] == 24
    assert (read[2]["main_process_ip"], read[2]["main_process_port"]) == ("n1", 4000)
    assert read[2]["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    again = files(Path("a.yaml"), found[Path("a.node1.yaml")], read[1], ("n1", "n2", "n3"), 4000)
    assert list(again.values()) == list(found.values())


@pytest.mark.parametrize(("key", "value", "words"), [
    ("num_processes", 8, "num_processes is 16 in the first file and 8 in file 2."),
    ("main_process_ip", "n2", "main_process_ip is 'n1' in the first file and 'n2' in file 2."),
    ("machine_rank", 0, "machine_rank is 0, 0 in the 2 files, not 0 to 1."),
    ("deepspeed_config", {"zero_stage": 2}, "deepspeed_config is None in the first file"),
    ("machine_rank", [1], "machine_rank is 0, [1] in the 2 files"),
])  # fmt: skip
def test_files_that_are_not_one_job(key: str, value: Any, words: str) -> None:
    first = yaml.safe_load(TWO)
    second = {**first, "machine_rank": 1, key: value}
    faults = unlike(first, [second])
    assert len(faults) == 1 and faults[0].startswith(words)


def test_hosts() -> None:
    assert hosts("n[01-02],gpu") == ("n01", "n02", "gpu")
    for wrong in ("", "n1,n1", "-x,y", "n[1-"):
        with pytest.raises(UsageError):
            hosts(wrong)


def test_commands() -> None:
    job, train = Path("a.yaml"), Path("my train.yaml")
    accelerate = commands("accelerate", ("n1", "n2"), job, train, ranks=4, port=1)
    assert accelerate[1] == ("n2", "xflux-doctor run --yes --config 'my train.yaml' --accelerate-config a.node1.yaml")
    torchrun = commands("torchrun", ("n1", "n2"), job, train, ranks=4, port=4000)[1][1]
    assert torchrun.startswith(
        "torchrun --nnodes=2 --node-rank=1 --nproc-per-node=2 --master-addr=n1 --master-port=4000"
    )
    (srun,) = commands("srun", ("n1", "n2"), job, train, ranks=4, port=1)
    assert srun[1].startswith("srun --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1 xflux-doctor run")
    assert file_of(Path("x/accelerate_config.yaml"), 3) == Path("x/accelerate_config.node3.yaml")


def doctor(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "xflux_doctor.cli", "nodes", *words], cwd=place, capture_output=True,
                          text=True, timeout=60, check=False)  # fmt: skip


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "accelerate_config.yaml").write_text(TWO)
    shown = doctor(tmp_path, "--hosts", "n1,n2")
    assert (
        shown.returncode == 0
        and "+machine_rank: 1" in shown.stdout
        and not (tmp_path / "accelerate_config.node0.yaml").exists()
    )
    done = doctor(tmp_path, "--hosts", "n1,n2", "--write")
    assert done.returncode == 0 and "n2: xflux-doctor run" in done.stdout
    names = [f"accelerate_config.node{number}.yaml" for number in (0, 1)]
    assert (tmp_path / names[1]).read_text() == TWO.replace("rank: 0", "rank: 1")
    again = doctor(tmp_path, "--hosts", "n1,n2", "--write")
    assert again.stdout.count("is right") == 2 and len(list(tmp_path.glob("*node*"))) == len(
        list(tmp_path.glob("*node*"))
    )
    assert doctor(tmp_path, *names).returncode == 0
    (tmp_path / names[1]).write_text(TWO)
    assert doctor(tmp_path, *names).returncode == 1
    done = doctor(tmp_path, "--hosts", "n1,n2", "--write")  # what stood there is kept
    assert "kept the old text" in done.stdout and doctor(tmp_path, *names).returncode == 0
    assert doctor(tmp_path).returncode == 2 and doctor(tmp_path, names[0]).returncode == 2
