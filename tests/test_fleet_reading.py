"""Reports out of files, folders, packed files and streams: whole ones are read, broken ones are named."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path

import fleet_kit as kit
import jsonschema
import pytest
from cli_kit import doctor, job_of
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from xflux_doctor.errors import UsageError
from xflux_doctor.fleet import reading
from xflux_doctor.fleet.merge import merge
from xflux_doctor.fleet.node import node_of
from xflux_doctor.fleet.reading import read
from xflux_doctor.fleet.values import Broken, Node, Report

SCHEMA = json.loads((ROOT / "xflux_doctor/report/fleet.schema.json").read_text())
REPORTS = [report.data for report in kit.reports("h100-two", 4)]


def stream(data: bytes) -> list[Report | Broken]:
    return list(read(["-"], io.BytesIO(data)))


def names(found: list[Report | Broken]) -> list[str]:
    nodes = [node_of(item) if isinstance(item, Report) else item for item in found]
    return [node.name if isinstance(node, Node) else f"broken {node.node}" for node in nodes]


def labelled(reports: list[bytes], form: str, seed: int = 1) -> bytes:
    """As `srun --label` mixes the lines of its tasks."""
    queues = [[f"{form.format(at)}{line}\n" for line in data.decode().splitlines()] for at, data in enumerate(reports)]
    dice, mixed = random.Random(seed), []
    while any(queues):
        mixed.append(dice.choice([queue for queue in queues if queue]).pop(0))
    return "".join(mixed).encode()


def test_folders_files_and_packed_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.json").write_bytes(REPORTS[0])
    (tmp_path / "deep/b.json.gz").write_bytes(gzip.compress(REPORTS[1]))
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(json.dumps(json.loads(data)).encode() for data in REPORTS[2:]))
    (tmp_path / ".d.json.tmp").write_bytes(b"{")
    (tmp_path / "notes.txt").write_text("nothing")
    found = list(read([str(tmp_path)], io.BytesIO()))
    assert names(found) == ["node0001", "node0003", "node0004", "node0002"]
    odd = tmp_path / "odd"
    odd.write_bytes(gzip.compress(REPORTS[3] + b"\n" + REPORTS[0]))
    assert names(list(read([str(odd)], io.BytesIO()))) == ["node0004", "node0001"]
    with pytest.raises(UsageError, match="no report or folder"):
        list(read([str(tmp_path / "none")], io.BytesIO()))
    (tmp_path / "empty").mkdir()
    (empty,) = read([str(tmp_path / "empty")], io.BytesIO())
    assert isinstance(empty, Broken) and empty.seen == "it holds no report"


@pytest.mark.parametrize("form", ["{}: ", " {}: ", "node{:03d}: "])
def test_labels_of_srun_and_pdsh(form: str) -> None:
    assert sorted(names(stream(labelled(REPORTS, form)))) == [kit.name_of(number) for number in range(4)]
    lines = [json.dumps(json.loads(data)).encode() for data in REPORTS]
    assert sorted(names(stream(labelled(lines, form)))) == [kit.name_of(number) for number in range(4)]


def test_files_one_after_the_other() -> None:
    """`cat *.json` of files with and without a last line end."""
    assert names(stream(b"".join(REPORTS))) == names(stream(b"\n".join(REPORTS))) == [
        "node0001", "node0002", "node0003", "node0004"
    ]  # fmt: skip


def test_noise_between_reports() -> None:
    """What a shell or srun says beside them is passed over."""
    noise = b"srun: job 4711 queued and waiting for resources\nWarning: something {odd}\n\n"
    assert names(stream(noise + REPORTS[0] + b"\n" + noise + REPORTS[1] + b"\n")) == ["node0001", "node0002"]


def test_a_report_that_was_cut_off_is_named() -> None:
    cut = REPORTS[1][:9000].rpartition(b"\n")[0] + b"\n"
    found = stream(REPORTS[0] + b"\n" + cut + REPORTS[2] + b"\n" + REPORTS[3][:5000])
    assert names(found) == ["node0001", "broken node0002", "node0003", "broken node0004"]
    assert isinstance(found[1], Broken) and found[1].seen == f"it is cut off after {len(cut)} bytes"
    assert "check --format json" in found[1].hint


def test_damaged_files_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(REPORTS[0])
    files = {
        "cut.json": REPORTS[0][:9000],
        "cut.json.gz": packed[: len(packed) // 2],
        "flipped.json.gz": packed[:200] + bytes([packed[200] ^ 255]) + packed[201:],
        "binary.json": bytes(range(256)) * 40,
        "empty.json": b"",
        "other.json": b'{"schema": 1}\n',
        "list.json": b"[1, 2]\n",
        "deep.json": b"{" + b'"a":{' * 100000,
        "type.json": REPORTS[0].replace(b'"gpus": [', b'"gpus": [7, '),
        "future.json": REPORTS[0].replace(b'"schema": 1', b'"schema": 9'),
        "latin.json": REPORTS[0].replace(b"node0001", b"n\xe4de"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.json").write_bytes(REPORTS[2])
    fleet = merge(read([str(tmp_path)], io.BytesIO()))
    assert fleet.nodes == ("node0003",)
    assert {Path(item.source).name for item in fleet.broken} == set(files)
    assert all(item.seen and item.hint for item in fleet.broken)
    assert {item.node for item in fleet.broken if Path(item.source).name in ("cut.json", "type.json")} == {"node0001"}


def test_a_report_may_only_be_so_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reading, "LARGEST", 20000)
    file = tmp_path / "large.json.gz"
    file.write_bytes(gzip.compress(REPORTS[0]))
    (item,) = read([str(file)], io.BytesIO())
    assert isinstance(item, Broken) and item.node == "node0001" and "a report of more than" in item.seen


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3), st.integers(0, 36000))
def test_nothing_that_comes_is_fatal(noise: bytes, which: int, cut: int) -> None:
    for data in (noise, REPORTS[which][:cut] + noise, noise + b"\n" + REPORTS[which][:cut]):
        merge(stream(data + b"\n" + REPORTS[0] + b"\n"))
        merge([Report("x", data)])


def test_reports_of_an_older_doctor_are_named_by_their_files(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"gpu{number}.json").write_bytes((kit.MACHINES / "h100-two.json").read_bytes())
    fleet = merge(read([str(tmp_path)], io.BytesIO()))
    assert fleet.nodes == ("gpu1", "gpu2") and fleet.blamed == frozenset()


def test_the_command(place: Path) -> None:
    """From real reports of `check` and `facts` to the merged one, by files and by a stream."""
    folder = place / "reports"
    folder.mkdir()
    for number in range(3):
        facts = json.loads((place / "cuda13-2.json").read_text())
        facts["host"]["name"] = f"gpu{number}"
        if number == 2:
            facts["packages"]["torch"]["version"] = "2.9.1"
        (place / "machine.json").write_text(json.dumps(facts))
        arguments = job_of(place, "machine.json", "cuda13")
        done = doctor("check", "--format", "json", *arguments, cwd=place)
        (folder / f"{number}.json").write_text(done.stdout)
    done = doctor("fleet", "reports", "--expect", "gpu[0-3]", cwd=place, code=1)
    assert "torch: 2 of 3 nodes: " in done.stdout and "gpu2: 2.9.1" in done.stdout
    assert "1 expected node sent no report that could be read: gpu3" in done.stdout
    done = doctor("fleet", "reports", "--format", "json", cwd=place, SLURM_JOB_NODELIST="gpu[0-2]")
    merged = json.loads(done.stdout)
    jsonschema.validate(merged, SCHEMA)
    assert merged["exit_code"] == done.returncode == 1 and merged["expected_by"] == "SLURM_JOB_NODELIST"
    assert merged["missing"] == [] and any(item["field"] == "package torch" for item in merged["differences"])
    doctor("fleet", "reports", "--output", "merged.txt", cwd=place, code=1)
    assert "torch" in (place / "merged.txt").read_text()
    for wrong in (["fleet"], ["fleet", "nowhere"], ["fleet", "reports", "--expect", "n[1-"]):
        doctor(*wrong, cwd=place, code=2)
