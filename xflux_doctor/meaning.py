"""What a change of a key means for the data: the plan lays it over values, the repair holds its text against it."""

from __future__ import annotations

from typing import Any

import msgspec
from xflux_trainer.config import DATA_CONFIG

from xflux_doctor.finding import Change, Comment, Edit, Nest, Remove, Rename
from xflux_doctor.yamlnodes import CannotEdit, index_of


class Unchanged(Exception):
    """The data already say what the change wants."""


def after(data: Any, edit: Change) -> Any:
    """The data after the change, in the order of the file; `Unchanged` or `CannotEdit` where there is none."""
    return _after(data, edit, edit.key)


def everywhere(data: Any, edit: Change, *, bundled: bool) -> list[Change]:
    """The change at each place of the training file that holds the key.

    X-Flux's files may say train_batch_size and the like both at the top and under data_config. The bundled trainer
    takes the latter for both (trainer/config.py, `_flatten`); X-Flux's scripts read each at its own place, so there
    the named place is changed in any case.
    """
    places = [edit.key[-1:], ("data_config", edit.key[-1])]
    if edit.file != "train" or isinstance(edit, Rename | Nest) or edit.key[-1] not in DATA_CONFIG:
        return [edit]
    if edit.key not in places or not isinstance(data, dict):
        return [edit]
    nested = data.get("data_config")
    holds = [edit.key[-1] in data, isinstance(nested, dict) and edit.key[-1] in nested]
    found = [key for key, there in zip(places, holds, strict=True) if there or (key == edit.key and not bundled)]
    return [msgspec.structs.replace(edit, key=key) for key in found or [edit.key]]


def _after(data: Any, edit: Change, rest: tuple[str, ...]) -> Any:
    """Only the mappings on the path are copied, so that aliased data stay cheap."""
    if isinstance(data, list) and len(rest) > 1:
        at = index_of(data, rest[0])
        if at is not None:
            return [*data[:at], _after(data[at], edit, rest[1:]), *data[at + 1 :]]
    if isinstance(edit, Nest):
        return _nested(data, edit)
    if data is None and isinstance(edit, Edit):
        data = {}
    if not isinstance(data, dict):
        if not isinstance(edit, Edit):
            raise Unchanged
        seen = "a list" if isinstance(data, list) else f"the value {data!r}"
        raise CannotEdit(edit.key, f"holds {seen} where a mapping is needed to reach {rest[0]!r}")
    key = rest[0]
    if len(rest) > 1:
        if key not in data and not isinstance(edit, Edit):
            raise Unchanged
        return {**data, key: _after(data.get(key), edit, rest[1:])}
    if isinstance(edit, Edit):
        if key in data and difference(data[key], edit.value) is None:
            raise Unchanged
        return {**data, key: edit.value}
    if key not in data or (isinstance(edit, Rename) and edit.new == key):
        raise Unchanged
    if isinstance(edit, Remove | Comment):
        return {name: value for name, value in data.items() if name != key}
    if edit.new in data:
        raise CannotEdit(edit.key, f"both {key!r} and {edit.new!r} are set", "Remove the wrong one.")
    return {edit.new if name == key else name: value for name, value in data.items()}


def _nested(data: Any, edit: Nest) -> Any:
    """The data with the members moved into their section."""
    name = edit.key[0]
    if not isinstance(data, dict) or name not in data or not all(member in data for member in edit.members):
        raise Unchanged
    if data[name] is not None:
        raise CannotEdit(edit.key, "it has a value already")
    kept = {key: value for key, value in data.items() if key not in edit.members}
    return {**kept, name: {member: data[member] for member in edit.members}}


def difference(
    want: Any, got: Any, path: tuple[str, ...] = (), seen: set[tuple[int, int]] | None = None
) -> tuple[str, ...] | None:
    """The path of the first place where two values differ in value or type (1 is not True), or None."""
    if type(want) is not type(got):
        return path
    if not isinstance(want, (dict, list)):
        return None if want == got or (want != want and got != got) else path
    seen = set() if seen is None else seen
    if (id(want), id(got)) in seen:  # aliases share values, in circles even: each pair is compared once
        return None
    seen.add((id(want), id(got)))
    wants = want if isinstance(want, dict) else dict(enumerate(want))
    gots = got if isinstance(got, dict) else dict(enumerate(got))
    for key in {**wants, **gots}:
        if key not in wants or key not in gots:
            return (*path, str(key))
        where = difference(wants[key], gots[key], (*path, str(key)), seen)
        if where is not None:
            return where
    return None
