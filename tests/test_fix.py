"""`fix` as people meet it: offers, reasons beside the changes, several rounds, undo of what it made."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import msgspec
import pytest
import yaml
from cli_kit import SCHEMA, doctor, job_of
from conftest import ROOT, TRAIN, XFLUX_ACCELERATE, case, job, machine

from xflux_doctor import cli, jsontext, repair, yamltext
from xflux_doctor.check import Case, check, examine
from xflux_doctor.commands import fix
from xflux_doctor.finding import Change, Comment, Edit, Finding, Remove, Rename, error, warning
from xflux_doctor.matrix import Matrix
from xflux_doctor.meaning import everywhere
from xflux_doctor.plan import make
from xflux_doctor.report import text as report
from xflux_doctor.report.difference import reasoned
from xflux_doctor.report.jsonreport import document
from xflux_doctor.report.summary import Summary

UNDO = json.loads((ROOT / "xflux_doctor/report/undo.schema.json").read_text())
RIGHT = "train_batch_size: 2\ndata_config:\n  img_dir: x\n  train_batch_size: 4\n"


@check("XX101", "offers")
def offers(case: Case) -> Iterator[Finding]:
    """Offers."""
    if case.job.get("num_processes") == 8:
        change = Edit("accelerate", ("num_processes",), 4, "half as many")
        yield error("eight", offers=(change,))


def test_an_offer_is_shown_and_made_only_when_it_is_taken(matrix: Matrix) -> None:
    subject = case(matrix, machine(matrix, count=8), job())
    plan = make(subject, lambda mended: examine(mended, [offers]))
    assert plan.edits == () and [finding.code for finding in plan.blockers] == ["XX101"]
    shown = report.render(Summary(plan.verdicts, subject.facts, None))
    assert "    offer: num_processes: 4 in the accelerate file (half as many)   (--take XX101)\n" in shown
    found = document(Summary(plan.verdicts, subject.facts, None))
    assert found["results"][0]["findings"][0]["offers"][0]["value"] == 4
    jsonschema.validate(json.loads(json.dumps(found)), SCHEMA)

    taken = make(case(matrix, subject.facts, subject.job, taken=frozenset({"XX101"})), lambda c: examine(c, [offers]))
    assert [edit.key for edit in taken.edits] == [("num_processes",)] and taken.blockers == ()
    other = make(case(matrix, subject.facts, subject.job, taken=frozenset({"XX102"})), lambda c: examine(c, [offers]))
    assert other.edits == ()
    accepted = frozenset({"XX101"})
    both = case(matrix, subject.facts, subject.job, taken=accepted, accepted=accepted)
    (verdict,) = examine(both, [offers])
    assert verdict.status == "warning" and verdict.findings[0].offers == verdict.findings[0].edits == ()


@pytest.mark.parametrize("written", [False, True])
def test_an_offer_is_told_as_it_can_be_had(matrix: Matrix, capsys: pytest.CaptureFixture[str], written: bool) -> None:
    """Once the file is written its finding is gone, and --take would make nothing."""
    subject = case(matrix, machine(matrix, count=8), job())
    mended = case(matrix, subject.facts, job(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 4")))
    before = make(subject, lambda mended: examine(mended, [warns]))
    after = make(mended, lambda mended: examine(mended, [warns])) if written else before
    fix._offers(before.verdicts, after, written=written)
    said = capsys.readouterr().out
    assert "offer: debug: true" in said and ("(--take XX104)" in said) is not written
    assert ("(by hand now: the files are written)" in said) is written


@check("XX104", "offers beside a repair")
def warns(case: Case) -> Iterator[Finding]:
    """Warns."""
    if case.job.get("num_processes") == 8:
        yield warning("eight", offers=(Edit("accelerate", ("debug",), True, "slower"),))


@pytest.mark.parametrize("command", ["check", "fix", "run", "plan"])
def test_take_wants_a_code(tmp_path: Path, command: str) -> None:
    done = doctor(command, "--take", "LA999", cwd=tmp_path, code=2)
    assert "There is no check 'LA999'" in done.stderr and "--take" in done.stderr


@check("XX102", "to and fro")
def fickle(case: Case) -> Iterator[Finding]:
    """Fickle."""
    other = {2: 3, 3: 4, 4: 3}.get(case.job.num_processes)
    if other:
        yield error("wrong", edits=(Edit("accelerate", ("num_processes",), other, f"{other} is right"),))


def test_edits_that_take_each_other_back_are_named(matrix: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    text = XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2")
    plan = make(case(matrix, machine(matrix, count=8), job(text)), lambda mended: examine(mended, [fickle]))
    assert [edit.value for edit in plan.conflicts if isinstance(edit, Edit)] == [3]
    look = fix.Look(plan, None, [])
    fix._last_words([look], written=False)
    said = capsys.readouterr().out
    assert "num_processes does not come to rest" in said and "4 is right" in said and "3 is right" in said
    assert "take each other back" in said and fix._exit_code(look) == 1


def test_of_two_values_for_one_key_the_first_is_laid_and_looked_at(matrix: Matrix) -> None:
    """gpu_ids: 3, a number, names a lost card: the other card is right, and nobody asks to quote the 3 again."""

    @check("XX105", "the card is there")
    def lost(case: Case) -> Iterator[Finding]:
        """Lost."""
        if str(case.job.get("gpu_ids")) == "3":
            yield error("3 is lost", edits=(Edit("accelerate", ("gpu_ids",), "GPU-4"),))

    @check("XX106", "it is text")
    def quoted(case: Case) -> Iterator[Finding]:
        """Quoted."""
        if isinstance(case.job.get("gpu_ids"), int):
            yield error("a number", edits=(Edit("accelerate", ("gpu_ids",), "3"),))

    for checks in ([lost, quoted], [quoted, lost]):
        subject = case(matrix, machine(matrix, count=8), job(XFLUX_ACCELERATE + "gpu_ids: 3\n"))
        plan = make(subject, lambda mended, checks=checks: examine(mended, checks))  # type: ignore[misc]
        assert [edit.value for edit in plan.edits if isinstance(edit, Edit)] == ["GPU-4"], checks
        assert plan.conflicts == () and plan.blockers == ()


def test_an_edit_that_says_nothing_new_is_no_part_of_the_plan(matrix: Matrix) -> None:
    @check("XX103", "asks for what is there")
    def idle(case: Case) -> Iterator[Finding]:
        """Idle."""
        yield error("one", edits=(Edit("accelerate", ("num_processes",), 8),))
        yield error("two", edits=(Rename("accelerate", ("debug",), "use_cpu"),))
        yield error("three", edits=(Edit("accelerate", ("debug", "x"), 1),))
        yield error("four", edits=(Edit("accelerate", ("machine_rank",), False),))  # 0 is not false

    plan = make(case(matrix, machine(matrix, count=8), job()), lambda mended: examine(mended, [idle]))
    assert [edit.key for edit in plan.edits] == [("machine_rank",)] and plan.conflicts == ()


DIFFS: list[tuple[str, list[Change], dict[str, str]]] = [
    ("a: 1\nb: 2\nc: 3\n", [Edit("accelerate", ("b",), 5, "five")], {"+b: 5": "five"}),
    ("a: 1\nb: 2\nc: 3\n", [Remove("accelerate", ("b",), "unknown")], {"-b: 2": "unknown"}),
    ("a: 1\nb: 2\nc: 3\n", [Comment("accelerate", ("b",), "unknown")], {}),
    ("a: 1\n", [Edit("accelerate", ("s", "x"), 1, "new")], {"+s:": "new"}),
    ("{a: 1, b: 2}\n", [Comment("accelerate", ("b",), "gone")], {"+{a: 1}": "gone"}),
    ("a: 1\r\nb: 2\r\n", [Edit("accelerate", ("a",), 3, "x"), Edit("accelerate", ("b",), 4, "y")],
     {"+a: 3": "x", "+b: 4": "y"}),
    ("a: 1\nb: 2\n", [Remove("accelerate", ("a",), "x"), Edit("accelerate", ("b",), 4, "y")],
     {"-a: 1": "x", "+b: 4": "y"}),
    ("a: 1\n", [Rename("accelerate", ("a",), "b", "x"), Edit("accelerate", ("b",), 4, "y")], {"+b: 4": "x; y"}),
    ("a: 1", [Edit("accelerate", ("b",), 4, "one\nline")], {"+b: 4": "one line"}),
    ("--: 1\n++: 2\n", [Edit("accelerate", ("--",), 4, "x"), Edit("accelerate", ("++",), 5, "y")],
     {"+--: 4": "x", "+++: 5": "y"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "edits", "reasons"), DIFFS)
def test_the_reason_stands_beside_the_change(text: str, edits: list[Change], reasons: dict[str, str]) -> None:
    lines = list(reasoned(text, edits, "x.yaml", yamltext.apply))
    assert {line: reason for line, reason in lines if reason} == reasons
    bare = repair.diff(text, yamltext.apply(text, edits), "x.yaml")
    assert [line for line, _ in lines] == [line.removesuffix("\r") for line in bare.split("\n")[:-1]]


def test_reasons_in_json_too() -> None:
    text = '{\n\t"a": 1,\n\t"b": 2\n}\n'
    lines = dict(reasoned(text, [Edit("deepspeed", ("b",), 5, "five")], "x.json", jsontext.apply))
    assert lines['+\t"b": 5'] == "five"


def test_the_terminal_has_the_reason_and_the_json_a_diff_for_patch(place: Path) -> None:
    inputs = job_of(place, "cuda13-2.json", "cuda13")
    assert "+num_processes: 2  # why: one rank per visible device\n" in doctor("fix", *inputs, cwd=place, code=1).stdout
    found = json.loads(doctor("fix", "--format", "json", *inputs, cwd=place, code=1).stdout)
    jsonschema.validate(found, SCHEMA)
    assert "# why" not in "".join(found["files"].values()) and found["written"] == []
    patch = "".join(found["files"].values())
    done = subprocess.run(["git", "apply", "-"], input=patch.encode(), cwd=place, check=False, capture_output=True,
                          env={**os.environ, "GIT_CEILING_DIRECTORIES": str(place.parent)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((place / "accelerate.yaml").read_text())["num_processes"] == 2
    doctor("fix", *inputs, cwd=place, code=0)


def test_it_looks_again_and_says_what_is_left(place: Path) -> None:
    inputs = job_of(place, "cuda13-2.json", "cuda13")
    done = doctor("fix", "--write-config", "--yes", *inputs, cwd=place, code=0)
    assert "Looked again: nothing" in done.stdout
    (place / "accelerate.yaml").write_text(XFLUX_ACCELERATE)
    (place / "train.yaml").write_text(TRAIN.replace("photos", "none"))
    done = doctor("fix", "--write-config", "--yes", *inputs, cwd=place, code=1)
    assert "Wrote accelerate.yaml" in done.stdout and "examples/demo/none" in done.stdout.partition("Wrote")[2]


def test_a_file_that_it_made_is_removed_by_undo(place: Path) -> None:
    (place / "accelerate.yaml").unlink()
    inputs = ["--config", "train.yaml", "--facts", "cuda13-2.json", "--stack", "cuda13"]
    doctor("fix", "--write-config", "--yes", *inputs, cwd=place, code=0)
    made = place / "accelerate_config.yaml"
    text = made.read_text()
    made.write_text(text + "# mine\n")
    refused = doctor("fix", "--undo", *inputs, cwd=place, code=1)
    assert "changed after this tool made it" in refused.stderr and made.exists()
    made.write_text(text)
    undone = json.loads(doctor("fix", "--undo", "--format", "json", *inputs, cwd=place, code=0).stdout)
    jsonschema.validate(undone, UNDO)
    assert undone["removed"] == [str(made)] and undone["restored"] == []
    assert not [path for path in place.iterdir() if path.name.startswith("accelerate")]
    nothing = json.loads(doctor("fix", "--undo", "--format", "json", *inputs, cwd=place, code=1).stdout)
    jsonschema.validate(nothing, UNDO)
    assert "no backup" in nothing["left"][0]["seen"]


@pytest.mark.parametrize("arguments", [
    ["--install", "--format", "json"], ["--install", "--undo"], ["--undo", "--write-config"],
])  # fmt: skip
def test_one_thing_at_a_time(tmp_path: Path, arguments: list[str]) -> None:
    done = doctor("fix", *arguments, cwd=tmp_path, code=2)
    assert "Error:" in done.stderr and done.stdout == ""


def test_hard_links_are_told(place: Path) -> None:
    os.link(place / "accelerate.yaml", place / "copy.yaml")
    old = (place / "copy.yaml").read_text()
    done = doctor("fix", "--write-config", "--yes", *job_of(place, "cuda13-2.json", "cuda13"), cwd=place, code=0)
    assert "Its 1 other names (hard links) keep the old text." in done.stdout
    assert (place / "copy.yaml").read_text() == old != (place / "accelerate.yaml").read_text()


@pytest.mark.parametrize(("key", "text", "bundled", "places"), [
    (("train_batch_size",), RIGHT, True, {("train_batch_size",), ("data_config", "train_batch_size")}),
    (("data_config", "train_batch_size"), RIGHT, True, {("train_batch_size",), ("data_config", "train_batch_size")}),
    (("img_size",), "data_config: {img_size: 512}\n", True, {("data_config", "img_size")}),
    (("img_size",), "data_config: {img_dir: x}\n", True, {("img_size",)}),
    (("img_size",), "img_size: 5\n", True, {("img_size",)}),
    (("rank",), "data_config: {rank: 5}\n", True, {("rank",)}),
    (("train_batch_size",), "data_config: {train_batch_size: 2}\n", False,
     {("train_batch_size",), ("data_config", "train_batch_size")}),
    (("data_config", "train_batch_size"), "data_config: {}\n", False, {("data_config", "train_batch_size")}),
])  # fmt: skip
def test_a_key_at_two_places(key: tuple[str, ...], text: str, bundled: bool, places: set[tuple[str, ...]]) -> None:
    found = everywhere(yaml.safe_load(text), Edit("train", key, 1), bundled=bundled)
    assert {edit.key for edit in found} == places


def test_both_places_are_written(matrix: Matrix, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(RIGHT)
    work = msgspec.structs.replace(job(), train_path=path, accelerate_path=tmp_path / "accelerate.yaml")
    subject = case(matrix, machine(matrix), work)
    (item,) = fix.repairs(subject, (Edit("train", ("train_batch_size",), 1, "why"),))
    assert item.new == RIGHT.replace("size: 2", "size: 1").replace("size: 4", "size: 1")


def test_interrupted_is_no_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody at the terminal: nothing is written, in JSON as well."""
    monkeypatch.chdir(place)
    before = (place / "accelerate.yaml").read_bytes()
    inputs = job_of(place, "cuda13-2.json", "cuda13")
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(["fix", "--write-config", "--format", "json", *inputs]) == 2
    assert (place / "accelerate.yaml").read_bytes() == before
