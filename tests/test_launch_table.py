"""88 launches: what is foretold of each, what the repaired file says, and what a real launcher does with it."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from conftest import case, job, machine
from launch_cases import ROWS, Row
from packaging.version import Version

from xflux_doctor.check import Case, examine
from xflux_doctor.checks import ALL
from xflux_doctor.command import parse
from xflux_doctor.launched import under_command
from xflux_doctor.matrix import Matrix
from xflux_doctor.placement import WRAPS, Placement, place
from xflux_doctor.plan import make
from xflux_doctor.visible import choice, visible
from xflux_doctor.yamltext import apply

STACKS = {"xflux-2024": Version("0.30.1"), "cuda13": Version("1.15.0")}


def subject(matrix: Matrix, row: Row, stack: str, text: str | None = None) -> Case:
    """The row on a recorded machine: a bare accelerate file, so that the words are accelerate's."""
    environment = {} if row.cvd is None else {"CUDA_VISIBLE_DEVICES": row.cvd}
    command = parse(row.line) if row.command else None
    if command:
        environment |= command.environment
    facts = machine(matrix, count=max(1, row.gpus), stack=stack, environment=environment)
    if not row.gpus:
        facts = msgspec.structs.replace(facts, gpus=())
    work = msgspec.structs.replace(job(text or row.text), train=None, train_path=None, command=command)
    if command:
        seen = len(visible(facts.gpus or (), choice(environment, work.gpu_ids)))
        work = under_command(work, command, STACKS[stack], seen)
    return case(matrix, facts, work, stack)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_foretold_and_repaired(matrix: Matrix, row: Row, stack: str) -> None:
    found = subject(matrix, row, stack)
    placed = place(found.job, found.facts)
    own = [device for device in row.devices if device is not None]
    expected = list(row.devices)
    if own and STACKS[stack] >= WRAPS:
        expected = [own[i % len(own)] for i in range(len(row.devices))]
    assert [rank.device.index if rank.device else None for rank in placed.ranks] == expected
    assert [rank.local_rank for rank in placed.ranks] == list(range(len(row.devices)))
    assert placed.launcher == row.started_by
    findings = [f for v in examine(found, ALL) for f in v.findings if f.code.startswith(("LA", "EN1"))]
    assert " ".join(dict.fromkeys(f.code for f in findings)) == row.codes
    if "LA105" in row.codes and own:
        word = "'RuntimeError: CUDA error: invalid device ordinal'"
        if STACKS[stack] >= WRAPS:
            word = f"Duplicate GPU detected : rank {row.rank * len(expected)} and rank"
        assert word in next(f.because for f in findings if f.code == "LA105")
    plan = make(found, lambda mended: examine(mended, ALL))
    edits = [edit for edit in plan.edits if edit.file == "accelerate"]
    assert {".".join(edit.key): getattr(edit, "value", None) for edit in edits} == row.edits
    text = apply(row.text, edits)
    if row.fixed:
        mended = make(subject(matrix, row, stack, text), lambda again: examine(again, ALL))
        assert mended.edits == () and mended.blockers == ()
        assert changed_lines(row.text, text) == len(row.edits)
    elif not row.codes:
        assert text == row.text and plan.blockers == ()


def changed_lines(old: str, new: str) -> int:
    return sum(a != b for a, b in zip(old.splitlines(), new.splitlines(), strict=True))


# --- the same rows by a real launcher on CPU ranks ---------------------------------------------------------------

NEEDS_GPUS = ("--nproc_per_node gpu", "deepspeed ", "--cpu")
"""Rows that only a machine with GPUs can show: what depends on torch's own count of devices. `--cpu` starts as NO."""
REAL = tuple(row for row in ROWS if not any(word in f"{row.line} " for word in NEEDS_GPUS))
QUICK = tuple(row for row in REAL if row.machines == 1 and (row.processes < 4 or row.command))[::3]


@pytest.fixture(scope="module")
def stack_here() -> str:
    accelerate = pytest.importorskip("accelerate")
    return "xflux-2024" if Version(accelerate.__version__) < WRAPS else "cuda13"


@pytest.mark.parametrize(
    "rows", [pytest.param(QUICK, id="quick"), pytest.param(REAL, id="all", marks=pytest.mark.long)]
)
def test_a_real_launcher_does_what_was_foretold(
    matrix: Matrix, rows: tuple[Row, ...], stack_here: str, tmp_path: Path
) -> None:
    """Ranks, their devices' variable, the world, the meeting place, and the refusals, of every row."""
    version = str(__import__("accelerate").__version__)
    cases = [launched(row, number) for number, row in enumerate(rows)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    probe = Path(__file__).with_name("launch_probe.py")
    out = tmp_path / "out"
    argv = [sys.executable, str(probe), str(tmp_path / "cases.json"), str(out)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for number, row in enumerate(rows):
        found = subject(matrix, row, stack_here)
        facts = msgspec.structs.replace(found.facts, packages={
            **(found.facts.packages or {}),
            "accelerate": msgspec.structs.replace((found.facts.packages or {})["accelerate"], version=version),
        })  # fmt: skip
        for node in range(len(cases[number]["nodes"])):
            work = found.job
            if row.machines > 1:
                work = msgspec.structs.replace(work, accelerate={**(work.accelerate or {}), "machine_rank": node})
            elif "--node_rank" in row.line and node != placed_rank(row):
                continue
            compare(place(work, facts), out / str(number) / str(node), row)


def placed_rank(row: Row) -> int:
    """The node that the row is about; the others are started because it waits for them."""
    return int(row.line.split("--node_rank")[1].split()[0])


def launched(row: Row, number: int) -> dict[str, Any]:
    """The row as the launcher's own arguments, on a port that is free; every node of several machines."""
    port = free_port()
    environment = {} if row.cvd is None else {"CUDA_VISIBLE_DEVICES": row.cvd}
    text = row.text.replace("10.0.0.1", "127.0.0.1").replace("29500", str(port))
    if row.command:
        command = parse(row.line)
        words = shlex.split(row.line)[len(command.environment) :]
        environment |= command.environment
        words = [word.replace("10.0.0.1", "127.0.0.1").replace("29500", str(port)) for word in words]
        nodes = [words]
        if "--node_rank" in row.command:
            nodes = [[*words[: words.index("--node_rank") + 1], str(n), *words[words.index("--node_rank") + 2 :]]
                     for n in range(2)]  # fmt: skip
        elif "port" not in row.command and words[0] == "accelerate":
            nodes = [[*words[:2], "--main_process_port", str(port), *words[2:]]]
    else:
        words = ["accelerate", "launch", "--config_file", "accelerate_config.yaml"]
        more = [["--main_process_port", str(port)]] if row.machines == 1 else []
        more = more or [["--machine_rank", str(n)] for n in range(row.machines)]
        nodes = [[*words, *flags, "train.py"] for flags in more]
    return {"name": str(number), "text": text, "environment": environment, "nodes": nodes}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def compare(placed: Placement, folder: Path, row: Row) -> None:
    end = folder / "end.json"
    log = (folder / "log").read_text(errors="replace")[-1500:]
    assert end.exists(), f"{row.name}: no end: {log}"
    said = json.loads(end.read_text())
    ranks = sorted((json.loads(file.read_text()) for file in folder.glob("rank-*.json")), key=_number)
    if placed.refusal:
        assert said.startswith(placed.refusal), f"{row.name}: {said}"
        assert ranks == []
        return
    assert said in ("", "SystemExit: 0"), f"{row.name}: {said} {log}"
    assert len(ranks) == len(placed.ranks), f"{row.name}: {log}"
    for rank, seen in zip(placed.ranks, ranks, strict=True):
        devices = seen["CUDA_VISIBLE_DEVICES"]  # blanks around a list's numbers are nothing to CUDA
        assert (devices and devices.strip()) == (placed.visible_devices and placed.visible_devices.strip()), row.name
        if placed.launcher == "python":
            assert seen["RANK"] is None
            continue
        expected = (str(rank.rank), str(rank.local_rank), str(placed.world_size))
        assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == expected, row.name


def _number(seen: dict[str, str | None]) -> int:
    return int(seen["RANK"] or 0)


def test_every_dimension_is_there() -> None:
    assert len(ROWS) >= 60 and len({row.name for row in ROWS}) == len(ROWS)
    assert len(REAL) >= 60
    assert {yaml.safe_load(row.text)["distributed_type"] for row in ROWS} == {"NO", "MULTI_GPU", "DEEPSPEED"}
