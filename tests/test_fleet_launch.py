"""`fleet` on every node of a launch: each makes its report, node 0 merges, and who does not come is named."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cli_kit import doctor

from xflux_doctor.errors import DoctorError
from xflux_doctor.fleet import collect, network
from xflux_doctor.fleet.collect import Seat
from xflux_doctor.fleet.values import Broken, Report


def machines(place: Path, count: int, **packages: str) -> list[str]:
    """Recorded machines that differ in their names, and the last in a package."""
    for number in range(count):
        facts = json.loads((place / "cuda13-2.json").read_text())
        facts["host"]["name"] = f"gpu{number}"
        if number == count - 1:
            for name, version in packages.items():
                facts["packages"][name]["version"] = version
        (place / f"m{number}.json").write_text(json.dumps(facts))
    return [f"m{number}.json" for number in range(count)]


def slurm(number: int, count: int) -> dict[str, str]:
    return {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": str(number), "SLURM_JOB_ID": "4711", "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NUM_NODES": str(count), "SLURM_NODEID": str(number), "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": f"gpu[0-{count - 1}]", "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})",
    }  # fmt: skip


def start(place: Path, number: int, count: int, *words: str, **environment: str) -> subprocess.Popen[str]:
    arguments = ["--config", "train.yaml", "--accelerate-config", "accelerate.yaml", "--facts", f"m{number}.json"]
    return subprocess.Popen(
        [sys.executable, "-m", "xflux_doctor.fleet", *arguments, *words], cwd=place, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        env={**os.environ, **slurm(number, count), **environment},
    )  # fmt: skip


def ended(processes: list[subprocess.Popen[str]], seconds: float = 60) -> list[tuple[int, str, str]]:
    found = []
    for process in processes:
        out, err = process.communicate(timeout=seconds)
        assert "Traceback" not in out + err, err
        found.append((process.returncode, out, err))
    return found


def test_nodes_of_slurm_by_a_shared_folder(place: Path) -> None:
    machines(place, 3, torch="2.9.1")
    done = ended([start(place, number, 3, "--shared", "all") for number in (2, 1, 0)])
    assert [code for code, _, _ in done] == [0, 0, 1] and done[0][1] == done[1][1] == ""
    assert "3 nodes of 3 expected by Slurm: gpu[0-2]" in done[2][1] and "gpu2: 2.9.1" in done[2][1]
    assert "clock" not in done[2][1]
    again = ended([start(place, number, 3, "--shared", "all", "--format", "json") for number in range(3)])
    assert json.loads(again[0][1])["nodes"] == ["gpu0", "gpu1", "gpu2"] and json.loads(again[0][1])["again"] == {}
    doctor("fleet", "all", cwd=place, code=1)  # the reports are kept, and can be read again


def test_a_node_that_never_comes_is_named(place: Path) -> None:
    machines(place, 3)
    started = time.monotonic()
    (code, out, err), _ = ended([start(place, number, 3, "--shared", "all", "--wait", "4") for number in (0, 2)])
    assert code == 1 and "1 expected node sent no report that could be read: gpu1" in out
    assert "waiting for the reports of" in err and time.monotonic() - started < 30


def test_a_node_whose_files_are_not_there_is_told(place: Path) -> None:
    machines(place, 2)
    other = start(place, 1, 2, "--shared", "all", "--config", "nowhere.yaml")
    (code, out, _), (late, _, _) = ended([start(place, 0, 2, "--shared", "all"), other])
    assert late == 0 and "could not judge there: There is no training file at nowhere.yaml" in out
    assert "1 expected node sent no report that could be read: gpu1" in out and code == 1


def test_a_folder_that_is_not_shared(place: Path) -> None:
    machines(place, 2)
    (code, _, err), = ended([start(place, 1, 2, "--shared", "mine", "--wait", "1")])  # fmt: skip
    assert code == 1 and "Node 1 saw no call of node 0 in mine within 1 s" in err


def test_a_call_of_an_earlier_launch_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Node 0 of the first launch was killed: its call stands there, and it has no end."""
    (tmp_path / "0123456789ab").mkdir()
    (tmp_path / collect.CALL).write_text('{"word": "0123456789ab", "nodes": 2}')
    document: dict[str, Any] = {"facts": {}}
    other = threading.Thread(target=collect.send, args=(tmp_path, Seat(1, 2, 20), document))
    other.start()
    while not (tmp_path / "0123456789ab/node00001.json").exists():
        time.sleep(0.05)
    place, missing = collect.host(tmp_path, Seat(0, 2, 20), lambda: {"facts": {}}, lambda text: None)
    other.join(20)
    assert missing == () and place.name != "0123456789ab" and not other.is_alive()
    clock = json.loads((place / "node00001.json").read_text())["facts"]["clock"]
    assert abs(clock["offset"]) < 1 and clock["error"] < 1.5


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DoctorError, match="No report can be put"):
        collect.host(tmp_path / "file", Seat(0, 2, 1), dict, lambda text: None)


def test_without_a_launcher_it_says_what_to_do(place: Path) -> None:
    done = doctor("fleet", cwd=place, code=2)
    assert "srun --ntasks-per-node=1 xflux-doctor fleet" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torchrun comes with torch")
def test_torchrun_starts_it(place: Path) -> None:
    """A real torchrun; both nodes of it are agents of this machine, and each looks at its own recorded machine."""
    machines(place, 2, torch="2.9.1")
    free = port()  # the other stack's tests may start theirs now
    done = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}",
             "--master-addr=127.0.0.1", f"--master-port={free}", "-m", "xflux_doctor.fleet", "--shared", "all",
             "--config", "train.yaml", "--accelerate-config", "accelerate.yaml", "--facts", f"m{number}.json"],
            cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )
        for number in range(2)
    ]  # fmt: skip
    outs = [process.communicate(timeout=120) for process in done]
    assert "2 nodes of 2 expected by torchrun: gpu[0-1]" in outs[0][0], outs
    assert "torch: no majority" in outs[0][0] and outs[1][0] == "" and done[1].returncode == 0


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_nodes_of_torchrun_by_the_network(place: Path) -> None:
    """Without a folder: by torchrun's variables, whose port is its own agents'."""
    machines(place, 3, torch="2.9.1")
    free = port()

    def variables(number: int) -> dict[str, str]:
        return {"RANK": str(number), "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK":
                str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}  # fmt: skip

    done = ended([start(place, at, 3, "--port", str(free), **variables(at)) for at in (2, 0, 1)])
    assert [code for code, _, _ in done] == [0, 1, 0] and done[0][1] == ""
    assert "3 nodes of 3 expected by torchrun: gpu[0-2]" in done[1][1] and "gpu2: 2.9.1" in done[1][1]
    assert "clock" not in done[1][1] and "WORLD_SIZE" not in done[1][1]


def test_the_network_names_who_does_not_come_and_bears_strangers() -> None:
    free = port()
    host = network.Host("127.0.0.1", free)
    large = {"facts": {"rubbish": os.urandom(200000).hex()}}
    other = threading.Thread(target=network.send, args=("127.0.0.1", free, Seat(2, 4, 10), large))
    other.start()
    strangers = [socket.create_connection(("127.0.0.1", free)) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(
        b'{"xflux-doctor": 1, "node": 1}\n{"xflux-doctor": 1, "part": 0, "of": 1, "data": "aGVsbG8="}\n'
    )
    found, missing = host.gather(Seat(0, 4, 4), {"facts": {}}, lambda text: None)
    other.join(20)
    for stranger in strangers:
        stranger.close()
    assert missing == (3,) and [item.source for item in found] == ["node00000", "node00001", "node00002"]
    assert isinstance(found[1], Broken) and isinstance(found[2], Report)
    clock = json.loads(found[2].data)["facts"]["clock"]
    assert abs(clock["offset"]) < 0.5 and 0 <= clock["error"] < 2 and clock["reference"] == "node 0"


def test_a_node_0_that_is_not_there() -> None:
    with pytest.raises(DoctorError, match="Node 1 could not hand its report"):
        network.send("127.0.0.1", port(), Seat(1, 2, 0.5), {})
    with socket.create_server(("", 0)) as server, pytest.raises(DoctorError, match="Node 0 cannot listen"):
        network.Host("127.0.0.1", server.getsockname()[1])
