"""Any text that people write, any edits: only the edited keys change, in meaning and in bytes, and only once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xflux_doctor.finding import Change, Comment, Edit, Nest, Remove, Rename
from xflux_doctor.meaning import Unchanged, after, difference
from xflux_doctor.yamlnodes import CannotEdit
from xflux_doctor.yamltext import apply

KEYS = ["compute_environment", "distributed_type", "mixed_precision", "num_processes", "gpu_ids", "use_cpu", "tpu_env"]
SECTIONS = ["deepspeed_config", "fsdp_config", "dynamo_config"]
INNER = ["zero_stage", "offload_optimizer_device", "fsdp_version", "gradient_clipping"]
SCALARS = [
    "8",
    "'no'",
    "bf16",
    '"0,1"',
    "false",
    "null",
    "~",
    "1.0",
    "1e-5",
    "MULTI_GPU",
    "a b",
    "'ü # x'",
    "'it''s'",
    "",
]
WANTED: list[Any] = [1, 2, 8, True, False, None, 1e-5, "no", "bf16", "0,1", "a: b", "ü", "x\ny", "# x", "", "8"]
NOTES = ["", "", "  # why", " # ü: {", "  # a: 1"]
LEADS = ["", "", "", "# about it\n", "\n", "# a: 1\n\n#b\n"]


@dataclass(frozen=True)
class Text:
    """A file out of blocks: one for each key at the top, with the comments before it."""

    head: str
    blocks: tuple[tuple[str, str], ...]
    tail: str

    @property
    def whole(self) -> str:
        return self.head + "".join(block for _, block in self.blocks) + self.tail


@st.composite
def inner(draw: st.DrawFn, step: int) -> str:
    names = draw(st.lists(st.sampled_from(INNER), min_size=1, max_size=3, unique=True))
    lines = []
    for name in names:
        lead = draw(st.sampled_from(["", "", " " * step + "# inside\n", "\n", "# far left\n"]))
        lines.append(f"{lead}{' ' * step}{name}: {draw(st.sampled_from(SCALARS))}{draw(st.sampled_from(NOTES))}\n")
    return "".join(lines)


@st.composite
def values(draw: st.DrawFn, step: int) -> str:
    """What stands after a key's colon, to the end of the value's last line."""
    note, kind = draw(st.sampled_from(NOTES)), draw(st.integers(0, 5))
    if kind <= 2:
        return f" {draw(st.sampled_from(SCALARS))}{note}\n"
    if kind == 3:
        return f"{note}\n{draw(inner(step))}"
    if kind == 4:
        flow = draw(
            st.sampled_from(["{}", "{zero_stage: 2}", "{a: 1, zero_stage: 'x'}", "[]", "[1, 2]", "{a: {b: 1}}"])
        )
        return f" {flow}{note}\n"
    bullet = " " * draw(st.sampled_from([0, step])) + "- "
    return f"{note}\n" + "".join(f"{bullet}{item}\n" for item in ("a", "2"))


@st.composite
def texts(draw: st.DrawFn) -> Text:
    step, newline = draw(st.sampled_from([2, 4])), draw(st.sampled_from(["\n", "\r\n"]))
    blocks = []
    for key in draw(st.lists(st.sampled_from(KEYS + SECTIONS), min_size=1, max_size=5, unique=True)):
        value = f"{draw(st.sampled_from(NOTES))}\n{draw(inner(step))}" if key in SECTIONS else draw(values(step))
        spaces = " " * draw(st.sampled_from([0, 0, 1]))
        quoted = draw(st.sampled_from([key, key, f'"{key}"', f"'{key}'"]))
        blocks.append((key, draw(st.sampled_from(LEADS)) + quoted + spaces + ":" + value))
    start = draw(st.sampled_from(["", "", "---\n", "%YAML 1.1\n---\n", "# made by accelerate config\n"]))
    head = draw(st.sampled_from(["", "", "\ufeff"])) + start
    tail = draw(st.sampled_from(["", "", "# end\n", "\n\n", "...\n"]))
    if not tail and draw(st.booleans()):
        blocks[-1] = (blocks[-1][0], blocks[-1][1].removesuffix("\n"))
    made = tuple((key, block.replace("\n", newline)) for key, block in blocks)
    return Text(head.replace("\n", newline), made, tail.replace("\n", newline))


@st.composite
def changes(draw: st.DrawFn, text: Text) -> Change:
    """Of a key that is there, three times in four."""
    there = [key for key, _ in text.blocks]
    top = draw(st.sampled_from(there if draw(st.integers(0, 3)) else KEYS + SECTIONS))
    section = top in SECTIONS and draw(st.integers(0, 3)) > 0
    key = (top, draw(st.sampled_from(INNER))) if section else (top,)
    kind = draw(st.sampled_from(["set", "set", "remove", "rename", "comment", "nest"]))
    if kind == "set":
        return Edit("accelerate", key, draw(st.sampled_from(WANTED)))
    if kind == "remove":
        return Remove("accelerate", key)
    if kind == "rename":
        return Rename("accelerate", key, draw(st.sampled_from(["renamed", "12", "no"])))
    if kind == "nest":
        at = there.index(top) if top in there else 0
        return Nest("accelerate", (top,), tuple(there[at + 1 : at + 3]) or ("foo",))
    return Comment("accelerate", key, draw(st.sampled_from(["unknown to accelerate 1.15.0", "x\ny: 1", "# ü", ""])))


@st.composite
def jobs(draw: st.DrawFn, least: int = 1, most: int = 1) -> tuple[Text, list[Change]]:
    text = draw(texts())
    return text, draw(st.lists(changes(text), min_size=least, max_size=most))


def laid(data: Any, edit: Change) -> Any:
    """The data after the edit, by values alone; None where it is to be refused."""
    try:
        return after(data, edit)
    except Unchanged:
        return data
    except CannotEdit:
        return None


def one_edit(text: Text, edit: Change) -> None:
    before = text.whole
    want = laid(yaml.safe_load(before), edit)
    try:
        result = apply(before, [edit])
    except CannotEdit as refusal:
        fine = want is None or (isinstance(edit, Nest) and "line by line" in refusal.seen)
        fine = fine or "text of several lines" in refusal.seen
        assert fine, f"{refusal}\n{before}"
        return
    assert want is not None
    assert difference(want, yaml.safe_load(result)) is None
    assert apply(result, [edit]) == result
    keeps_the_rest(text, edit, result)


def keeps_the_rest(text: Text, edit: Change, result: str) -> None:
    """Every byte of the other keys' blocks, and every comment line of this one's, stands where it stood."""
    names = [key for key, _ in text.blocks]
    if edit.key[0] in names and not isinstance(edit, Nest):
        at = names.index(edit.key[0])
        front = text.head + "".join(block for _, block in text.blocks[:at])
        back = "".join(block for _, block in text.blocks[at + 1 :]) + text.tail
        assert result.startswith(front) and result.endswith(back)
        was, now = text.blocks[at][1], result[len(front) : len(result) - len(back)]
    else:
        was, now = text.whole, result
    rest = iter(now.splitlines(keepends=True))
    for line in was.splitlines(keepends=True):
        if line.strip().startswith("#") and not isinstance(edit, Comment | Remove | Nest) and len(edit.key) > 1:
            assert line in rest, f"{line!r} is gone"
    if "\r\n" in text.whole:
        assert result.count("\n") == result.count("\r\n")
    assert result.startswith("\ufeff") == text.whole.startswith("\ufeff")


def many_edits(text: Text, edits: list[Change]) -> None:
    """In order, each refused or made; what was refused changed nothing. Edits of different keys commute with time."""
    now, data = text.whole, yaml.safe_load(text.whole)
    made: list[Change] = []
    for edit in edits:
        want = laid(data, edit)
        try:
            now = apply(now, [edit])
        except CannotEdit:
            continue
        assert want is not None
        data = want
        made.append(edit)
        assert difference(data, yaml.safe_load(now)) is None
    assert apply(text.whole, made) == now
    tops = [edit.key[0] for edit in made]
    if len(set(tops)) == len(tops) and not any(isinstance(edit, Rename | Nest) for edit in made):
        assert apply(now, made) == now


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=SLOW)
@given(jobs())
def test_one_edit(job: tuple[Text, list[Change]]) -> None:
    one_edit(job[0], job[1][0])


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=SLOW)
@given(jobs(2, 5))
def test_many_edits(job: tuple[Text, list[Change]]) -> None:
    many_edits(*job)


@pytest.mark.long
@settings(max_examples=10000, deadline=None, database=None, suppress_health_check=SLOW)
@given(jobs())
def test_one_edit_of_thousands(job: tuple[Text, list[Change]]) -> None:
    one_edit(job[0], job[1][0])


@pytest.mark.long
@settings(max_examples=2000, deadline=None, database=None, suppress_health_check=SLOW)
@given(jobs(2, 8))
def test_thousands_of_lists(job: tuple[Text, list[Change]]) -> None:
    many_edits(*job)
