"""The matrix's own file, every fault of a broken one, a site's file laid over it, the schema, and the commands."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml
from click.testing import CliRunner
from conftest import ROOT, machine

from xflux_doctor import conditions, matrix_lint
from xflux_doctor import matrix as matrices
from xflux_doctor.choose import choose
from xflux_doctor.cli import cli
from xflux_doctor.errors import DoctorError
from xflux_doctor.inputs import Inputs, build
from xflux_doctor.matrix import Matrix, Pin, Rule, Stack

FILE = ROOT / "compat_matrix.yaml"
SCHEMA = json.loads((ROOT / "xflux_doctor/compat_matrix.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
RULE: dict[str, Any] = {
    "id": "R-OURS-1", "title": "our own", "what": "torch", "need": ">=2.4", "when": {"python": ">=3.11"},
    "severity": "warning", "because": "it is so", "source": ["https://example.org/why"], "checked": "2026-11-24",
}  # fmt: skip
STACK: dict[str, Any] = {
    "name": "ours", "summary": "our own", "python": ">=3.10", "cuda": "12.1", "driver": ">=525",
    "tested": {"cpu": "2026-11-24", "gpu": "never"}, "source": ["https://example.org/why"],
    "packages": {"torch": {"version": "2.4.0", "build": "cu121"}},
}  # fmt: skip


def write(folder: Path, value: object) -> Path:
    path = folder / "site.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return path


def site(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"schema": 1, "rules": list(rules), **more}


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    if isinstance(done.exception, DoctorError):
        return done.exception.code, f"{done.exception.seen}\n{done.exception.hint}"
    assert done.exception is None, done.exception
    return int(done.return_value or 0), done.output


# --- our own file


def test_our_file_has_no_fault() -> None:
    ours = matrices.load(FILE)
    assert len(ours.rules) >= 60 and matrix_lint.lint(ours) == [] and matrix_lint.doubled(FILE.read_text()) == []
    for rule in ours.rules:
        assert rule.because.strip() and rule.source and re.fullmatch(r"2026-\d\d-\d\d", rule.checked), rule.id
    raw = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    VALIDATOR.validate(json.loads(json.dumps(raw, default=str)))  # YAML reads a bare day as a date


def test_the_compiled_form_is_our_file() -> None:
    """What every start takes, row for row, and written anew by docs/generate.py."""
    text = FILE.read_text(encoding="utf-8")
    beside = ROOT / "xflux_doctor/compat_matrix.json"
    assert beside.read_text(encoding="utf-8") == matrices.compiled(text)
    assert matrices._compiled(beside, text) == matrices.load(FILE) == matrices.load()


def test_an_edited_file_is_never_shown_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a compiled form of another text nor a broken one counts, and none need be there."""
    file, beside = tmp_path / "compat_matrix.yaml", tmp_path / "compat_matrix.json"
    monkeypatch.setattr(matrices, "default_path", lambda: file)
    text = FILE.read_text(encoding="utf-8")
    old = matrices.compiled(text)
    file.write_text(text, encoding="utf-8")
    for written in (None, "", "{", "[]", '{"of": 1}', "[" * 100_000, old[:-1000], old.replace('"R-TV-24"', "24", 1)):
        if written is not None:
            beside.write_text(written, encoding="utf-8")
        assert matrices.load() == matrices.load(FILE)
    beside.write_bytes(b"\xff\xfe")
    assert matrices.load() == matrices.load(FILE)
    beside.write_text(old, encoding="utf-8")
    for edited in (text.replace("R-TV-24", "R-TV-00"), text.replace("R-TV-24", "R-TV-42"), text[:-1]):
        file.write_text(edited, encoding="utf-8")
        assert matrices.load() == matrices.load(file)
    assert "R-TV-42" in {rule.id for rule in matrices._parsed(file, text.replace("R-TV-24", "R-TV-42")).rules}
    file.write_text("stacks: [", encoding="utf-8")
    with pytest.raises(DoctorError, match="is not YAML"):
        matrices.load()
    file.unlink()
    with pytest.raises(DoctorError, match="cannot be read"):
        matrices.load()


def test_the_compiled_form_needs_no_yaml() -> None:
    """A start that takes it loads neither the parser nor what judges a site's file."""
    asked = "import sys; from xflux_doctor import matrix; matrix.load(); print({'yaml', 'xflux_doctor.matrix_lint'}"
    done = subprocess.run([sys.executable, "-c", f"{asked} & set(sys.modules))"], capture_output=True, check=True)
    assert done.stdout == b"set()\n"


def test_the_rings_are_closed(matrix: Matrix) -> None:
    """The pairs that the matrix promises to know."""
    told = [{rule.what, *rule.when} for rule in matrix.rules]
    for pair in ("torch torchvision", "torch triton", "driver cuda", "capability cuda", "torch python",
                 "deepspeed torch", "deepspeed nvcc", "deepspeed pydantic", "deepspeed python", "numpy torch",
                 "transformers tokenizers", "transformers huggingface-hub", "transformers safetensors",
                 "diffusers transformers", "diffusers peft", "diffusers huggingface-hub", "accelerate torch",
                 "accelerate numpy", "peft accelerate", "optimum-quanto torch", "xformers torch", "bitsandbytes cuda",
                 "torchao peft", "torchao diffusers", "flash-attn capability", "nvidia-nccl-cu12 torch",
                 "nvidia-cudnn-cu13 torch", "gcc torch"):  # fmt: skip
        assert any(set(pair.split()) <= names for names in told), pair


def test_stacks_tell_all_that_an_install_needs(matrix: Matrix) -> None:
    for stack in matrix.stacks:
        torch = stack.packages["torch"]
        assert stack.glibc and stack.source and torch.build and torch.index
        if not stack.is_cpu:
            assert stack.nccl and stack.cudnn and stack.triton and stack.gpu_archs and stack.driver
            assert not torch.index_required  # the public index has this build: no other index is asked


# --- a broken file: every fault, each with its line

BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"need": "presnt"}, r"R-OURS-1\.need: 'presnt' is no condition"),
    ({"need": ">=2.4;"}, r"R-OURS-1\.need: '>=2\.4;' is not a version specifier"),
    ({"when": {"torch": "about 2"}}, r"R-OURS-1\.when\.torch: 'about 2' is no"),
    ({"when": {"drivers": ">=525"}}, r"there is no subject 'drivers'; did you mean driver\?"),
    ({"what": "pyhton"}, r"there is no subject 'pyhton'; did you mean python\?"),
    ({"what": "Hugging_Face"}, r"'Hugging_Face' is neither a package's name"),
    ({"job": ["deepsped"]}, r"'deepsped' is none of .*did you mean deepspeed\?"),
    ({"checked": "yesterday"}, r"R-OURS-1\.checked: 'yesterday' is no date"),
    ({"checked": "2026-13-01"}, r"R-OURS-1\.checked: '2026-13-01' is no date"),
    ({"source": []}, r"R-OURS-1\.source: there is none"),
    ({"source": ["my colleague"]}, r"'my colleague' is no URL"),
    ({"because": " "}, r"R-OURS-1\.because: it is empty"),
    ({"severity": "fatal"}, r"R-OURS-1\.severity: invalid enum value 'fatal'"),
    ({"severty": "error"}, r"R-OURS-1\.severty: unknown key; did you mean severity\?"),
    ({"title": 7}, r"R-OURS-1\.title: expected `str`, got `int`"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=lambda value: str(value)[:40])
def test_each_fault_is_told_with_its_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    code, said = run("matrix", "check", str(write(tmp_path, site({**RULE, **change}))))
    assert code == 1 and re.search(rf"line 3: .*{words}", said), said
    schema_sees = not {"what", "when"} & set(change) or "about 2" in str(change) or "Hugging" in str(change)
    plain_date = change.get("checked") == "2026-13-01"
    assert VALIDATOR.is_valid(site({**RULE, **change})) is not (schema_sees or plain_date)


@pytest.mark.parametrize(("change", "words"), [
    ({"python": "3.11"}, r"ours\.python: '3.11' is not a version specifier"),
    ({"gpu_archs": ["9.0"]}, r"ours\.gpu_archs: '9.0' is no GPU architecture"),
    ({"tested": {"cpu": "soon", "gpu": "never"}}, r"ours\.tested\.cpu: 'soon' is no date"),
    ({"cuda": None}, r"ours\.packages\.torch\.build: it is cu121"),
    ({"packages": {"torch": {"version": "two"}}}, r"ours\.packages\.torch\.version: 'two' is not a version"),
    ({"packages": {"torch": {"versoin": "2.4.0"}}}, r"torch\.versoin: unknown key; did you mean version"),
    ({"packages": {"Pillow_X": {"version": "1"}}}, r"ours\.packages\.Pillow_X: write pillow-x"),
    ({"packages": {"torch": {"version": "1", "index_required": True}}}, r"it is required and not named"),
])  # fmt: skip
def test_faults_of_stacks(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    code, said = run("matrix", "check", str(write(tmp_path, {"schema": 1, "stacks": [{**STACK, **change}]})))
    assert code == 1 and re.search(rf"line 3: .*{words}", said), said


def test_all_faults_at_once(tmp_path: Path) -> None:
    """Faults of shape hide faults of meaning, since values of another kind cannot be judged; else all are told."""
    meant = BROKEN[:12]
    rows = [{**RULE, "id": f"R-{number}", **change} for number, (change, _) in enumerate(meant)]
    code, said = run("matrix", "check", str(write(tmp_path, site(*rows))))
    assert code == 1
    for number, (_, words) in enumerate(meant):
        assert re.search(words.replace("R-OURS-1", f"R-{number}"), said), words
    assert len(set(re.findall(r"line (\d+)", said))) >= len(meant)
    shapes = site({**RULE, "title": 7, "severty": "error"}, {"id": "R-2"}, what=1)
    del shapes["schema"]
    said = run("matrix", "check", str(write(tmp_path, shapes)))[1]
    for words in ("unknown key 'what'", "schema: it is missing", "R-OURS-1.title", "R-OURS-1.severty", "R-2.need"):
        assert words in said, words


@pytest.mark.parametrize(("text", "words"), [
    ("- a\n- b\n", "holds list, not keys and values"),
    ("schema: 1\nrules: {}\n", "rules: expected a list"),
    ("schema: 1\nrules: [7]\n", r"rules[0]: expected keys and values"),
    ("schema: 1\nschema: 1\n", "line 2: the key 'schema' stands twice"),
    ("schema: 2\n", "schema: it is 2; this doctor reads 1"),
    ("schema: [\n", "is not YAML"),
    ("\x00", "is not YAML"),
])  # fmt: skip
def test_files_that_are_no_matrix(tmp_path: Path, text: str, words: str) -> None:
    code, said = run("matrix", "check", str(write(tmp_path, text)))
    assert code == 1 and words in said, said


def test_doubles_and_contradictions(tmp_path: Path) -> None:
    def check(*rows: dict[str, Any]) -> tuple[int, str]:
        return run("matrix", "check", str(write(tmp_path, site(*rows))))

    other = {**RULE, "id": "R-OURS-2"}
    assert "R-OURS-2.need: R-OURS-1 says the same" in check(RULE, other)[1]
    said = check(RULE, {**other, "need": "<2.4"})[1]
    assert "R-OURS-2.need: <2.4 contradicts R-OURS-1, which wants >=2.4" in said
    assert "R-OURS-1: it stands twice" in check(RULE, {**RULE, "need": ">1"})[1]
    assert check(RULE, {**other, "need": "<3"})[0] == 0
    assert check(RULE, {**other, "need": "<2.4", "job": ["compiles"]})[0] == 0
    # against a row of ours, which only dropping or replacing it may change
    ours = {**RULE, "what": "pydantic", "when": {"deepspeed": ">=0.15.0"}, "need": "<2"}
    assert "contradicts R-DS-PYDANTIC" in check(ours)[1] and check({**ours, "id": "R-DS-PYDANTIC"})[0] == 0


# --- a site's file laid over ours


def test_a_site_adds_replaces_and_drops(tmp_path: Path, matrix: Matrix) -> None:
    mine = {**RULE, "id": "R-DS-RESUME", "need": ">=2.5"}
    path = write(tmp_path, site(RULE, mine, stacks=[STACK, {**STACK, "name": "cuda12"}], drop=["R-TV-24", "cpu"]))
    laid = matrices.load_with(str(path))
    rules = {rule.id: rule for rule in laid.rules}
    assert rules["R-OURS-1"].because == rules["R-DS-RESUME"].because == "it is so" and "R-TV-24" not in rules
    assert [s.name for s in laid.stacks] == ["xflux-2024", "cuda12", "cuda13", "ours"]
    assert laid.stack("cuda12").summary == "our own"
    assert len(laid.rules) == len(matrix.rules)  # one more, one less
    assert matrices.load_with(None) == matrix


def test_what_is_dropped_must_be_ours(tmp_path: Path) -> None:
    code, said = run("matrix", "check", str(write(tmp_path, site(drop=["R-NONE"]))))
    assert code == 1 and "there is no stack or rule R-NONE of ours to drop" in said
    assert "stands in this file too" in run("matrix", "check", str(write(tmp_path, site(RULE, drop=["R-OURS-1"]))))[1]


def test_the_report_says_that_a_site_file_was_used(tmp_path: Path, matrix: Matrix) -> None:
    recorded = tmp_path / "facts.json"
    recorded.write_bytes(msgspec.json.encode(machine(matrix)))
    path = write(tmp_path, site({**RULE, "need": ">=99", "severity": "error"}))
    inputs = Inputs(facts=str(recorded), matrix=str(path), config=None, accelerate_config=None)
    assert f"{path} is laid over our matrix" in build(inputs, matrices.load_with(inputs.matrix)).stack_because
    arguments = ("check", "--facts", str(recorded), "--cpu")
    assert "R-OURS-1" not in run(*arguments)[1]
    with_site = run(*arguments, "--matrix", str(path))[1]
    assert "R-OURS-1: our own" in with_site and "is laid over our matrix" in with_site.replace("\n", " ")
    code, said = run(*arguments, "--matrix", str(tmp_path / "none.yaml"))
    assert code == 2 and "There is no matrix file" in said


def test_a_rule_about_any_package_is_looked_for(tmp_path: Path) -> None:
    """A site's row may name a package that ours never mention."""
    path = write(tmp_path, site({**RULE, "what": "einops-exts"}))
    assert "einops-exts" in matrices.load_with(str(path)).names()


# --- commands


def test_show_list_and_export(tmp_path: Path, matrix: Matrix) -> None:
    shown = yaml.safe_load(run("matrix", "show", "R-DS-NO-NVCC")[1])
    assert shown["when"]["nvcc"] == "absent" and shown["hint"]
    lines = run("matrix", "list", "--rules")[1].splitlines()
    assert len(lines) == len(matrix.rules) and any("job compiles" in line for line in lines)
    told = json.loads(run("matrix", "list", "--cpu", "--format", "json")[1])
    assert {s["name"] for s in told["stacks"]} == {s.name for s in matrix.stacks}
    assert all(bool(s["refused"]) is not (s["name"] == told["chosen"]) for s in told["stacks"])
    path = str(write(tmp_path, {"schema": 1, "stacks": [STACK]}))
    assert "torch==2.4.0" in run("matrix", "export", "ours", "--matrix", path)[1]
    assert run("matrix", "show", "ours", "--matrix", path)[0] == 0 and run("matrix", "show", "ours")[0] == 2


def test_export_asks_another_index_for_one_project_only(matrix: Matrix) -> None:
    """--extra-index-url would ask it for every package, and fall back to the CUDA wheel without a word."""
    for stack in matrix.stacks:
        text = run("matrix", "export", stack.name)[1]
        assert "--extra-index-url" not in text and "--index-url" not in text.replace("--find-links", "")
        options = [line for line in text.splitlines() if line.startswith("--")]
        wanted = ["--find-links https://download.pytorch.org/whl/cpu/torch/"] if stack.is_cpu else []
        assert options == wanted and ("torch==2.13.0+cpu" in text) is stack.is_cpu
        pins = [line for line in text.splitlines() if line and not line.startswith(("#", "--"))]
        assert len(pins) == len(stack.packages) and all("==" in pin for pin in pins)


# --- the schema for editors


def test_the_schema_describes_the_types() -> None:
    for kind, part in ((Matrix, SCHEMA), (Stack, SCHEMA["$defs"]["stack"]), (Rule, SCHEMA["$defs"]["rule"]),
                       (Pin, SCHEMA["$defs"]["pin"])):  # fmt: skip
        fields = msgspec.structs.fields(kind)
        assert set(part["properties"]) == {field.name for field in fields}
        assert set(part["required"]) == {field.name for field in fields if field.required}
        assert part["additionalProperties"] is False
    assert SCHEMA["$defs"]["rule"]["properties"]["job"]["items"]["enum"] == list(conditions.JOBS)


def test_editors_find_the_schema() -> None:
    first = FILE.read_text(encoding="utf-8").splitlines()[0]
    named = first.partition("$schema=")[2]
    assert first.startswith("# yaml-language-server:") and (FILE.parent / named).is_file()


@pytest.mark.parametrize("path", [("python",), ("tested",), ("packages", "torch", "version"), ("summary",)])
def test_the_schema_refuses_what_is_missing(path: tuple[str, ...]) -> None:
    stack = copy.deepcopy(STACK)
    holder: Any = stack
    for key in path[:-1]:
        holder = holder[key]
    assert VALIDATOR.is_valid({"schema": 1, "stacks": [stack]})
    del holder[path[-1]]
    assert not VALIDATOR.is_valid({"schema": 1, "stacks": [stack]})


def test_glibc_decides_too(matrix: Matrix) -> None:
    facts = machine(matrix)
    assert facts.host is not None
    old = msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, glibc="2.27"))
    choice = choose(matrix, old)
    assert choice.stack == "xflux-2024" and "want glibc 2.28; this is 2.27" in choice.refused["cuda13"]
