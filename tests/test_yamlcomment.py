"""Keys commented out: whole texts are compared; what cannot be commented is refused."""

from __future__ import annotations

import json

import pytest
import yaml

from xflux_doctor.finding import Comment
from xflux_doctor.report.text import describe
from xflux_doctor.yamlcomment import one_line
from xflux_doctor.yamlnodes import CannotEdit
from xflux_doctor.yamltext import apply


def comment(path: str, reason: str = "why") -> Comment:
    return Comment("accelerate", tuple(path.split("/")), reason)


CASES: dict[str, tuple[str, Comment, str]] = {
    "scalar": ("a: 1\nb: 2  # two\nc: 3\n", comment("b"),
               "a: 1\n# xflux-doctor: why\n# b: 2  # two\nc: 3\n"),
    "first key": ("a: 1\nb: 2\n", comment("a"), "# xflux-doctor: why\n# a: 1\nb: 2\n"),
    "crlf": ("a: 1\r\nb: 2\r\n", comment("a"), "# xflux-doctor: why\r\n# a: 1\r\nb: 2\r\n"),
    "byte order mark": ("\ufeffa: 1\nb: 2\n", comment("a"), "\ufeff# xflux-doctor: why\n# a: 1\nb: 2\n"),
    "no line end at the end": ("a: 1\nb: 2", comment("b"), "a: 1\n# xflux-doctor: why\n# b: 2"),
    "nested": ("s:\n    a: 1\n    b: 2\nc: 3\n", comment("s/b"),
               "s:\n    a: 1\n    # xflux-doctor: why\n    # b: 2\nc: 3\n"),
    "a section": ("# top\ns:  # on\n  a: 1\n\n  # about b\n  b:\n    c: [1,\n     2]\n\n# d\nd: 1\n", comment("s"),
                  "# top\n# xflux-doctor: why\n# s:  # on\n#   a: 1\n\n#   # about b\n#   b:\n#     c: [1,\n"
                  "#      2]\n\n# d\nd: 1\n"),
    "a section in one": ("r:\n  s:\n    a: 1\n  t: 2\n", comment("r/s"),
                         "r:\n  # xflux-doctor: why\n  # s:\n  #   a: 1\n  t: 2\n"),
    "a list at the column of its key": ("l:\n- 1\n- 2\nb: 1\n", comment("l"),
                                        "# xflux-doctor: why\n# l:\n# - 1\n# - 2\nb: 1\n"),
    "a comment further left": ("s:\n  l:\n# far\n  - 1\n  b: 1\n", comment("s/l"),
                               "s:\n  # xflux-doctor: why\n  # l:\n# # far\n  # - 1\n  b: 1\n"),
    "only key of a section": ("s:  # on it\n  # about a\n  a: 1\nb: 2\n", comment("s/a"),
                              "s: {}  # on it\n  # about a\n  # xflux-doctor: why\n  # a: 1\nb: 2\n"),
    "only key of all": ("# x\na: 1\n", comment("a"), "# x\n# xflux-doctor: why\n# a: 1\n{}\n"),
    "no value": ("a:\nb: 1\n", comment("a"), "# xflux-doctor: why\n# a:\nb: 1\n"),
    "value on the next line": ("a:\n  long\nb: 1\n", comment("a"), "# xflux-doctor: why\n# a:\n#   long\nb: 1\n"),
    "after block text": ("a: |+\n  one\n\nb: 2\nc: 1\n", comment("b"),
                         "a: |+\n  one\n\n# xflux-doctor: why\n# b: 2\nc: 1\n"),
    "second key of a list item": ("l:\n- a: 1\n  b: 2\n", comment("l/0/b"),
                                  "l:\n- a: 1\n  # xflux-doctor: why\n  # b: 2\n"),
    "only key of a list item, on a line": ("l:\n-\n  a: 1\n", comment("l/0/a"),
                                           "l:\n-\n  # xflux-doctor: why\n  # a: 1\n  {}\n"),
    "an alias": ("a: &n 1\nb: *n\n", comment("b"), "a: &n 1\n# xflux-doctor: why\n# b: *n\n"),
    "an anchor that nobody uses": ("a: &n 1\nb: 2\n", comment("a"), "# xflux-doctor: why\n# a: &n 1\nb: 2\n"),
    "document marks": ("---\na: 1\nb: 2\n...\n", comment("b"), "---\na: 1\n# xflux-doctor: why\n# b: 2\n...\n"),
    "flow": ("s: {a: 1, b: 2}\n", comment("s/b"), "s: {a: 1}\n"),
    "flow, only key": ("s: {a: 1}\n", comment("s/a"), "s: {}\n"),
    "flow value": ("s: {a: 1}\nb: 1\n", comment("s"), "# xflux-doctor: why\n# s: {a: 1}\nb: 1\n"),
    "json": ('{\n  "a": 1,\n  "b": 2\n}\n', comment("b"), '{\n  "a": 1\n}\n'),
    "no reason": ("a: 1\nb: 2\n", comment("a", ""), "# xflux-doctor: commented out\n# a: 1\nb: 2\n"),
    "not there": ("a: 1\n", comment("b"), "a: 1\n"),
    "section not there": ("a: 1\n", comment("s/b"), "a: 1\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_comment(name: str) -> None:
    before, edit, after = CASES[name]
    assert apply(before, [edit]) == after
    assert apply(after, [edit]) == after  # a second time changes nothing


def test_taking_the_marks_away_gives_the_old_text() -> None:
    before, _, after = CASES["a section"]
    lines = [line for line in after.splitlines(keepends=True) if "xflux-doctor" not in line]
    at = before.splitlines().index("s:  # on")
    assert "".join(lines[:at] + [line.removeprefix("# ") for line in lines[at:-3]] + lines[-3:]) == before


@pytest.mark.parametrize(("text", "edit", "seen"), [
    ("a: |\n  one\n  two\nb: 1\n", comment("a"), "several lines"),
    ("s:\n  a: >\n    x\n  b: 1\nc: 1\n", comment("s"), "several lines"),
    ("a: one\n  two\nb: 1\n", comment("a"), "several lines"),
    ('a: "one\n  two"\nb: 1\n', comment("a"), "several lines"),
    ("a: 'x\u2028y'\nb: 1\n", comment("a"), "several lines"),
    ("a: &n 1\nb: *n\n", comment("a"), "would not read back"),
    ("b: &b {p: 1}\nc:\n  <<: *b\n", comment("c/p"), "merge"),
    ("l:\n- a: 1\n  b: 2\n", comment("l/0/a"), "beginning of its line"),
    ("? a\n: 1\nb: 2\n", comment("a"), "colon"),
    ("s: &n\n  a: 1\nb: 1\n", comment("s/a"), "tag or an anchor"),
    ("a: 1\nb: 2\na: 3\n", comment("a"), "more than once"),
    ("{a: 1, # x\n b: 2}\n", comment("a"), "comments"),
])  # fmt: skip
def test_never_guesses(text: str, edit: Comment, seen: str) -> None:
    with pytest.raises(CannotEdit) as caught:
        apply(text, [edit])
    assert seen in caught.value.seen


@pytest.mark.parametrize("reason", [
    "one\nevil: 1", "one\r\nevil: 1", "one\revil: 1", "one\x85evil: 1", "one\u2028evil: 1", "one\u2029evil: 1",
    "one\x00two", "\ufeff\ufffe\ud800", "\x1b[31mred", "one\n...\n---\nevil: 1", "x" * 5000, "  ", "#", "\t- x",
])  # fmt: skip
def test_no_reason_can_say_anything_but_a_comment(reason: str) -> None:
    after = apply("a: 1\nb: 2\n", [comment("a", reason)])
    assert yaml.safe_load(after) == {"b": 2}
    assert len(after.split("\n")) == 4 and len(after) < 400
    assert all(char.isprintable() for char in after.replace("\n", ""))
    assert one_line(one_line(reason)) == one_line(reason)


def test_words() -> None:
    assert describe(comment("s/b")) == "comment out s.b in the accelerate file (why)"
    assert json.loads(apply('{"a": 1}', [comment("a")])) == {}
