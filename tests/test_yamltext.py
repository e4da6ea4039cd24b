"""Beside every repair stands a case in which it must change nothing; whole texts are compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from xflux_doctor.finding import Change, Edit, Remove, Rename
from xflux_doctor.yamlnodes import CannotEdit
from xflux_doctor.yamlscalar import scalar
from xflux_doctor.yamltext import apply


def put(path: str, value: Any) -> Edit:
    return Edit("train", tuple(path.split("/")), value)


def drop(path: str) -> Remove:
    return Remove("train", tuple(path.split("/")))


def rename(path: str, new: str) -> Rename:
    return Rename("train", tuple(path.split("/")), new)


CASES: dict[str, tuple[str, Change, str]] = {
    "scalar with comment": ("# top\na: 1  # one\nb: 2\n", put("a", 7), "# top\na: 7  # one\nb: 2\n"),
    "order and blank lines": ("z: 1\n\n\na: 2\n", put("z", 5), "z: 5\n\n\na: 2\n"),
    "trailing spaces": ("a: 1   \nb: 2  \n", put("a", 3), "a: 3   \nb: 2  \n"),
    "crlf": ("a: 1\r\nb:\r\n  c: 2\r\n", put("b/c", 4), "a: 1\r\nb:\r\n  c: 4\r\n"),
    "crlf, added": ("a: 1\r\nb: 2\r\n", put("c", 3), "a: 1\r\nb: 2\r\nc: 3\r\n"),
    "byte order mark": ("\ufeffa: 1\nb: 2\n", put("a", 2), "\ufeffa: 2\nb: 2\n"),
    "byte order mark, first key gone": ("\ufeffa: 1\nb: 2\n", drop("a"), "\ufeffb: 2\n"),
    "no line end at the end": ("a: 1", put("a", 2), "a: 2"),
    "no line end at the end, added": ("a: 1", put("b", 2), "a: 1\nb: 2"),
    "single quotes kept": ("a: 'no'\n", put("a", "bf16"), "a: 'bf16'\n"),
    "double quotes kept": ('a: "no"\n', put("a", "yes"), 'a: "yes"\n'),
    "quotes go when a bool comes": ("a: 'true'\n", put("a", True), "a: true\n"),
    "capitals kept": ("a: False\n", put("a", True), "a: True\n"),
    "tilde kept out": ("a: ~\n", put("a", 1), "a: 1\n"),
    "text that looks like a bool": ("a: bf16\n", put("a", "no"), "a: 'no'\n"),
    "text that looks like a number": ("a: x\n", put("a", "1e-5"), "a: '1e-5'\n"),
    "float that YAML 1.1 read as text": ("lr: 1e-5\n", put("lr", 1e-5), "lr: 1.0e-05\n"),
    "int to float": ("a: 1\n", put("a", 1.0), "a: 1.0\n"),
    "empty value": ("a:\nb: 1\n", put("a", 2), "a: 2\nb: 1\n"),
    "empty value with comment": ("a:  # why\nb: 1\n", put("a", 2), "a: 2  # why\nb: 1\n"),
    "value on the next line": ("a:\n  long\nb: 1\n", put("a", "x"), "a:\n  x\nb: 1\n"),
    "plain over two lines": ("a: one\n  two\nb: 1\n", put("a", "x"), "a: x\nb: 1\n"),
    "block text": ("a: |\n  one\n  two\n\n# c\nb: 1\n", put("a", "x"), "a: x\n\n# c\nb: 1\n"),
    "neighbor of block text": ("a: |\n  one\n   two\nb: 1\n", put("b", 2), "a: |\n  one\n   two\nb: 2\n"),
    "after block text": ("a: |+\n  one\n\n", put("b", 2), "a: |+\n  one\n\nb: 2\n"),
    "flow": ("{a: 1, b: 2}\n", put("b", 3), "{a: 1, b: 3}\n"),
    "flow, added": ("{a: 1, b: 2}\n", put("c", 3), "{a: 1, b: 2, c: 3}\n"),
    "flow inside, added": ("d: {a: 1} # x\n", put("d/b/c", True), "d: {a: 1, b: {c: true}} # x\n"),
    "flow, empty": ("d: {}\ne: 1\n", put("d/zero_stage", 2), "d: {zero_stage: 2}\ne: 1\n"),
    "flow, removed first": ("{a: 1, b: 2}\n", drop("a"), "{b: 2}\n"),
    "flow, removed last": ("{a: 1, b: 2}\n", drop("b"), "{a: 1}\n"),
    "flow, removed only": ("x: {a: 1}\n", drop("x/a"), "x: {}\n"),
    "json": ('{\n  "a": 1,\n  "b": 2\n}\n', put("c", "no"), '{\n  "a": 1,\n  "b": 2,\n  "c": "no"\n}\n'),
    "json, comment": (
        "{\n  a: 1, # x\n  b: 2 # y\n}\n",
        put("c", 3),
        "{\n  a: 1, # x\n  b: 2, # y\n  c: 3\n}\n",
    ),
    "json, nested": ('{"a": {"b": null}}', put("a/b/c", 1), '{"a": {"b": {"c": 1}}}'),
    "document marks": ("%YAML 1.1\n---\na: 1\n...\n", put("b", 2), "%YAML 1.1\n---\na: 1\nb: 2\n...\n"),
    "anchor elsewhere": ("x: &n 1\ny: *n\nz: 2\n", put("z", 3), "x: &n 1\ny: *n\nz: 3\n"),
    "anchor that nobody uses": ("x: &n 1\nz: 2\n", put("x", 3), "x: &n 3\nz: 2\n"),
    "alias replaced": ("x: &n 1\ny: *n\n", put("y", 3), "x: &n 1\ny: 3\n"),
    "merged key overridden": (
        "b: &b\n  p: 1\nc:\n  <<: *b\n  q: 2\n",
        put("c/p", 3),
        "b: &b\n  p: 1\nc:\n  <<: *b\n  q: 2\n  p: 3\n",
    ),
    "mapping to scalar": (
        "a:  # why\n  b: 1\n  c: 2 # x\n\n# d\nd: 1\n",
        put("a", None),
        "a: null  # why\n\n# d\nd: 1\n",
    ),
    "list to scalar": ("a:\n- 1\n- 2\nb: 1\n", put("a", 5), "a: 5\nb: 1\n"),
    "flow list to scalar": ("a: [1,\n  2] # x\nb: 1\n", put("a", "x y"), "a: x y # x\nb: 1\n"),
    "added before the last comments": (
        "a: 1\nb: 2 # b\n\n# end\n",
        put("c", 3),
        "a: 1\nb: 2 # b\nc: 3\n\n# end\n",
    ),
    "added in the middle": (
        "d:\n    x: 1\n# e\ne: 1\n",
        put("d/w", 2),
        "d:\n    x: 1\n    w: 2\n# e\ne: 1\n",
    ),
    "missing parents": ("a:\n    b: 1\n", put("d/e/f", "g"), "a:\n    b: 1\nd:\n    e:\n        f: g\n"),
    "null parent": ("d:  # ds\ne: 1\n", put("d/zero_stage", 2), "d:  # ds\n  zero_stage: 2\ne: 1\n"),
    "null written out": ("d: null\ne: 1\n", put("d/x", 2), "d:\n  x: 2\ne: 1\n"),
    "empty file": ("", put("a/b", 1), "a:\n  b: 1\n"),
    "comments only": ("# hello\n", put("a", 1), "# hello\na: 1\n"),
    "start mark only": ("---\n", put("a", 1), "---\na: 1\n"),
    "inside a list": ("l:\n- p: 1\n  q: 2\n- p: 3\n", put("l/1/p", 4), "l:\n- p: 1\n  q: 2\n- p: 4\n"),
    "added inside a list": ("l:\n- p: 1\n- p: 3\n", put("l/0/q", 4), "l:\n- p: 1\n  q: 4\n- p: 3\n"),
    "removed": ("a: 1\n# about b\nb: 2 # x\nc: 3\n", drop("b"), "a: 1\n# about b\nc: 3\n"),
    "removed with its lines": (
        "a: 1\nb:\n  c: 1\n\n  d: 2 # x\n\n# e\ne: 1\n",
        drop("b"),
        "a: 1\n\n# e\ne: 1\n",
    ),
    "removed last, no line end": ("a: 1\nb: 2", drop("b"), "a: 1\n"),
    "removed the only key": ("a:\n  b: 1 # x\nc: 1\n", drop("a/b"), "a: {}\nc: 1\n"),
    "removed the only key of all": ("# x\na: 1\n", drop("a"), "# x\n{}\n"),
    "removed first of a list item": ("l:\n- a: 1\n  b: 2\n", drop("l/0/a"), "l:\n- b: 2\n"),
    "removed only of a list item": ("l:\n- a: 1\n- 2\n", drop("l/0/a"), "l:\n- {}\n- 2\n"),
    "renamed": ("a: 1\nold: {x: 1} # c\n", rename("old", "new"), "a: 1\nnew: {x: 1} # c\n"),
    "renamed in quotes": ('{"old": 1}', rename("old", "new"), '{"new": 1}'),
    "renamed to a number": ("a: 1\n", rename("a", "12"), "'12': 1\n"),
    "key with spaces before the colon": ("a  : 1\n", put("a", 2), "a  : 2\n"),
    "umlauts": ("a: 'ü'\nb: 1\n", put("a", "ö"), "a: 'ö'\nb: 1\n"),
    "text of several lines": ("a: 1\n", put("a", "x\ny"), 'a: "x\\ny"\n'),
}


@pytest.mark.parametrize("name", CASES)
def test_edit(name: str) -> None:
    before, edit, after = CASES[name]
    assert apply(before, [edit]) == after


@pytest.mark.parametrize("name", CASES)
def test_second_time_changes_nothing(name: str) -> None:
    _, edit, after = CASES[name]
    assert apply(after, [edit]) == after


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("a:   1   # one\n", put("a", 1)),
        ("a: 0x10\n", put("a", 16)),
        ("a: yes\n", put("a", True)),
        ("a: 1_000\n", put("a", 1000)),
        ('a: "x"\n', put("a", "x")),
        ("a: >\n  x\n  y\n", put("a", "x y\n")),
        ("a:\n", put("a", None)),
        ("x: &n {p: 1}\ny: *n\n", put("y/p", 1)),
        ("c:\n  <<: {p: 1}\n", put("c/p", 1)),
        ("a: .nan\n", put("a", math.nan)),
        ("a: 1\r\n", drop("b")),
        ("a: 1\n", drop("b/c")),
        ("a: 1\n", drop("a/b")),
        ("a: 1\n", rename("b", "c")),
        ("new: 1\n", rename("old", "new")),
        ("a: 1\n", rename("a", "a")),
    ],
)
def test_what_is_right_already_keeps_every_byte(text: str, edit: Change) -> None:
    assert apply(text, [edit]) == text


@pytest.mark.parametrize(
    ("text", "edit", "seen"),
    [
        ("a: 1\nb: 2\na: 3\n", put("a", 4), "more than once, at lines 1 and 3"),
        ("x: &n {p: 1}\ny: *n\n", put("y/p", 2), "alias"),
        ("x: &n {p: 1}\ny: *n\n", put("x/p", 2), "also reach y.p"),
        ("x: &n 1\ny: *n\n", put("x", 2), "also reach y"),
        ("x: &n 1\ny: *n\n", drop("x"), "would not read back"),
        ("x: &n {p: 1}\ny: *n\n", put("x", 2), "tag or an anchor"),
        ("b: &b {p: 1}\nc:\n  <<: *b\n", drop("c/p"), "merge"),
        ("b: &b {p: 1}\nc:\n  <<: *b\n", rename("c/p", "q"), "merge"),
        ("b: &b {p: {q: 1}}\nc:\n  <<: *b\n", put("c/p/r", 1), "also reach c.p.q"),
        ("a: !!str 1\n", put("a", 2), "tag or an anchor"),
        ("a: text\n", put("a/b", 2), "'text'"),
        ("a: [1]\n", put("a/b", 2), "a list"),
        ("a: [1]\n", put("a/0", 2), "a list"),
        ("- 1\n", put("a", 2), "a list"),
        ("on: 1\n", put("on", 2), "does not read the key 'on' as text"),
        ("1: 1\n", put("1", 2), "does not read the key '1' as text"),
        ("a: 1\nb: 2\n", rename("a", "b"), "both 'a' and 'b'"),
        ("a: 1\n---\nb: 1\n", put("a", 2), "not readable as YAML"),
        ("a: [1\n", put("a", 2), "not readable as YAML"),
        ("a: 1\n\tb: 2\n", put("a", 2), "not readable as YAML"),
        ("a: 2024-99-99\nb: 1\n", put("b", 2), "not readable as YAML"),
        ("a: !custom 1\nb: 1\n", put("b", 2), "not readable as YAML"),
        ("? a\n: 1\n", put("a", {"x": 1}), "not a value"),
        ("? a\n: 1\nb: 2\n", drop("a"), "colon"),
        ("{a: 1, # x\n b: 2}\n", drop("a"), "comments"),
        ("l:\n- a: 1\n  # about b\n  b: 2\n", drop("l/0/a"), "comments"),
        ("null\n", put("a", 1), "holds only 'null'"),
    ],
)
def test_never_guesses(text: str, edit: Change, seen: str) -> None:
    with pytest.raises(CannotEdit) as caught:
        apply(text, [edit])
    assert seen in caught.value.seen
    assert caught.value.hint
    assert str(caught.value).endswith(caught.value.hint)


def test_several_edits_in_order() -> None:
    text = "num_processes: 8  # all\ndeepspeed_config: {}\nold: 1\n"
    edits = [
        put("num_processes", 2),
        put("deepspeed_config/zero_stage", 2),
        put("deepspeed_config/offload_optimizer_device", "none"),
        rename("old", "new"),
        put("fsdp_config/a", 1),
        put("fsdp_config/b", "no"),
        drop("new"),
    ]
    assert apply(text, edits) == (
        "num_processes: 2  # all\ndeepspeed_config: {zero_stage: 2, offload_optimizer_device: 'none'}\n"
        "fsdp_config:\n  a: 1\n  b: 'no'\n"
    )


def test_aliases_that_blow_up_stay_cheap() -> None:
    """Twenty levels of ten aliases each: 10^20 items if they were ever written out."""
    lines = ["a0: &a0 [1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 21)]
    text = "\n".join([*lines, "z: 1", ""])
    assert apply(text, [put("z", 2)]) == text.replace("z: 1", "z: 2")


def test_circles_are_survived() -> None:
    text = "a: &a\n  b: *a\nz: 1\n"
    assert apply(text, [put("z", 2)]) == text.replace("z: 1", "z: 2")


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=12)
    | st.sampled_from(
        ["no", "1e-5", "~", "null", "0o17", "1:30", "=", "<<", "- a", "a: b", "a #b", "2024-01-01", "..."]
    )
)
names = st.sampled_from(["a", "b", "c", "lr", "zero_stage", "no", "12", "x y", "k#"])
trees = st.recursive(
    scalars,
    lambda inner: st.dictionaries(names, inner, max_size=4) | st.lists(inner, max_size=3),
    max_leaves=12,
)


@settings(database=None)
@given(scalars, st.sampled_from([None, "'", '"', "|", ">"]))
def test_any_scalar_reads_back(value: Any, style: str | None) -> None:
    got = yaml.safe_load(f"a: {scalar(value, style)}\n")["a"]
    assert got == value
    assert type(got) is type(value)


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.dictionaries(names, trees, max_size=5),
    st.lists(names, min_size=1, max_size=3),
    scalars,
    st.sampled_from([True, False, None]),
    st.sampled_from(["set", "remove", "rename"]),
)
def test_any_edit_of_any_file(data: dict[str, Any], path: list[str], value: Any, flow: bool | None, kind: str) -> None:
    """Whatever the file: the edit does just what it says, or it is refused; and it is done once only."""
    text = yaml.safe_dump(data, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=60)
    data = yaml.safe_load(text)  # the dump itself turns some rare line breaks into spaces
    key = tuple(path)
    edit: Change = Edit("train", key, value)
    if kind == "remove":
        edit = Remove("train", key)
    elif kind == "rename":
        edit = Rename("train", key, "renamed")
    try:
        after = apply(text, [edit])
    except CannotEdit:
        # Refused with reason only: the way leads through something that is not a mapping.
        fine = (dict, type(None)) if kind == "set" else dict
        assert not all(isinstance(value, fine) for value in _values_on(data, path[:-1]))
        return
    assert apply(after, [edit]) == after
    if kind == "set":
        got = yaml.safe_load(after)
        for part in path:
            got = got[part]
        assert got == value
        assert type(got) is type(value)
    got = yaml.safe_load(after)
    assert {name: got[name] for name in data if name != path[0]} == {
        name: data[name] for name in data if name != path[0]
    }


def _values_on(data: Any, path: list[str]) -> list[Any]:
    values = []
    for part in path:
        if not isinstance(data, dict) or part not in data:
            break
        data = data[part]
        values.append(data)
    return values
