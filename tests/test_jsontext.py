"""JSON that is edited stays JSON, and every byte outside the edited keys stays."""

from __future__ import annotations

import json

import pytest

from xflux_doctor.finding import Change, Comment, Edit, Remove, Rename
from xflux_doctor.jsontext import apply
from xflux_doctor.yamlnodes import CannotEdit

PRETTY = """\
{
    "train_batch_size": 7,
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": 5e8
    },
    "empty": {}
}
"""


def put(*key: str, value: object) -> Edit:
    return Edit("deepspeed", key, value, "a test")  # type: ignore[arg-type]


@pytest.mark.parametrize(("edit", "old", "new"), [
    (put("train_batch_size", value="auto"), '"train_batch_size": 7', '"train_batch_size": "auto"'),
    (put("train_batch_size", value=8), '"train_batch_size": 7', '"train_batch_size": 8'),
    (put("train_batch_size", value=None), '"train_batch_size": 7', '"train_batch_size": null'),
    (put("train_batch_size", value=1e-7), '"train_batch_size": 7', '"train_batch_size": 1.0e-07'),
    (put("zero_optimization", "stage", value=1), '"stage": 2', '"stage": 1'),
    (put("zero_optimization", "overlap_comm", value=True),
     '"reduce_bucket_size": 5e8\n', '"reduce_bucket_size": 5e8,\n        "overlap_comm": true\n'),
    (put("empty", "a", value='q"\\'), '"empty": {}', '"empty": {"a": "q\\"\\\\"}'),
    (put("bf16", "enabled", value=True), '"empty": {}\n', '"empty": {},\n    "bf16": {"enabled": true}\n'),
    (Rename("deepspeed", ("empty",), "bf16"), '"empty"', '"bf16"'),
    (Remove("deepspeed", ("train_batch_size",)), '"train_batch_size": 7,\n    ', ""),
    (Comment("deepspeed", ("empty",), "no comments in JSON"), ',\n    "empty": {}', ""),
])  # fmt: skip
@pytest.mark.parametrize("indent", ["    ", "\t", "  "])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_one_edit(edit: Change, old: str, new: str, indent: str, newline: str) -> None:
    def styled(text: str) -> str:
        return text.replace("    ", indent).replace("\n", newline)

    text = styled(PRETTY)
    result = apply(text, [edit])
    assert result == text.replace(styled(old), styled(new), 1)
    json.loads(result)
    assert apply(result, [edit]) == result


def test_one_line_and_no_line_end() -> None:
    text = '{"a": {"b": 1}, "c": "x\\ty"}'
    assert apply(text, [put("a", "d", value=False), put("e", value=2)]) == (
        '{"a": {"b": 1, "d": false}, "c": "x\\ty", "e": 2}'
    )
    assert apply("{}", [put("a", "b", value=1)]) == '{"a": {"b": 1}}'


def test_tabs_between_values_stay() -> None:
    assert apply('{"a":\t1,\t"b":\t"\t"}'.replace('"\t"', '"\\t"'), [put("a", value=2)]) == ('{"a":\t2,\t"b":\t"\\t"}')


@pytest.mark.parametrize("text", ["{// no\n}", '{"a": 1,}', "", "[1", '{"a": {"a": 1}, "a": 2, "b": 3}'])
def test_what_is_no_json_or_says_a_key_twice_is_left_alone(text: str) -> None:
    with pytest.raises(CannotEdit):
        apply(text, [put("a", value=5)])


def test_an_edit_through_a_value_is_refused() -> None:
    with pytest.raises(CannotEdit, match="mapping is needed"):
        apply('{"a": true}', [put("a", "b", value=1)])
