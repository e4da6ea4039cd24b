"""Edits of YAML text that keep every byte outside the edited keys.

Each change is one splice: the text is parsed to nodes for their positions, the span of the key is replaced,
and the result is read again. It must say exactly what the old text said plus the change; if not, nothing is
changed and `CannotEdit` tells why. Text from a file must keep its own line ends (open it with `newline=""`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import yaml

from xflux_doctor.finding import Change, Comment, Edit, Nest, Remove, Rename
from xflux_doctor.meaning import Unchanged, after, difference
from xflux_doctor.yamlcomment import comment_out
from xflux_doctor.yamlnodes import (
    BREAKS,
    Alias,
    after_colon,
    compose,
    end_of,
    end_of_line,
    index_of,
    is_null,
    newline_of,
    parent_key,
    past_break,
    read,
    start_of_line,
    step_of,
)
from xflux_doctor.yamlnodes import (
    CannotEdit as CannotEdit,
)
from xflux_doctor.yamlscalar import scalar

_STR = "tag:yaml.org,2002:str"


class _Place(NamedTuple):
    """Where a path of keys leads: the last mapping on the way, and the entry in it if it is there."""

    mapping: yaml.MappingNode
    depth: int
    """How many keys of the path lie before `mapping`."""
    entry: int | None


def apply(text: str, edits: Sequence[Change]) -> str:
    """The text after the edits, in order. Which `file` an edit is for is for the caller to sort out."""
    for edit in edits:
        text = _apply_one(text, edit)
    return text


def _apply_one(text: str, edit: Change) -> str:
    if not edit.key:
        raise CannotEdit(edit.key, "the change names no key")
    old = read(text)
    try:
        new = after(old, edit)
    except Unchanged:
        return text
    start, end, replacement = _splice(text, edit)
    result = text[:start] + replacement + text[end:]
    try:
        got = read(result)
    except CannotEdit as error:
        raise CannotEdit(edit.key, f"the edited text would not read back ({error.seen})") from error
    where = difference(new, got)
    if where is not None:
        raise CannotEdit(edit.key, f"the change would also reach {'.'.join(where) or 'the whole file'}")
    return result


def _splice(text: str, edit: Change) -> tuple[int, int, str]:
    """The one span that the edit replaces, and by what."""
    root = compose(text)
    if root is None or is_null(root):
        return _append_to_empty(text, root, edit)
    if isinstance(edit, Nest):
        return _indent(text, root, edit)
    place = _find(root, edit.key)
    if place.entry is None:
        if not isinstance(edit, Edit):
            raise CannotEdit(edit.key, "the key comes through a merge (<<) from another mapping")
        return _add(text, root, place.mapping, edit.key[place.depth :], edit)
    key, value = place.mapping.value[place.entry]
    if isinstance(edit, Rename):
        return _rename(text, key, edit)
    if isinstance(edit, Comment) and not place.mapping.flow_style:
        return comment_out(text, root, place.mapping, place.entry, edit)
    if isinstance(edit, Remove | Comment):  # in { }, as in JSON, a comment has no place: the key goes
        return _remove(text, place.mapping, place.entry, edit)
    if place.depth < len(edit.key) - 1:
        return _fill_null(text, root, place, edit)
    return _set(text, place.mapping, key, value, edit)


def _find(root: yaml.Node, keys: tuple[str, ...]) -> _Place:
    """Walk down to the mapping that holds, or should hold, the last key that can be reached."""
    node, place = root, None
    for depth, key in enumerate(keys):
        if isinstance(node, yaml.SequenceNode) and (at := index_of(node.value, key)) is not None:
            node = node.value[at]
            continue
        if isinstance(node, Alias):
            raise CannotEdit(keys, f"{'.'.join(keys[:depth])} is an alias (*{node.value}) of another part")
        if not isinstance(node, yaml.MappingNode):
            if place is not None and is_null(node):
                return place
            raise CannotEdit(keys, f"{'.'.join(keys[:depth]) or 'the file'} is not a mapping")
        entry = _entry(node, key, keys)
        place = _Place(node, depth, entry)
        if entry is None:
            return place
        node = node.value[entry][1]
    if place is None:
        raise CannotEdit(keys, "the key names an item of a list, not a key")
    return place


def _entry(mapping: yaml.MappingNode, name: str, keys: tuple[str, ...]) -> int | None:
    names = [key for key, _ in mapping.value]
    found = [i for i, key in enumerate(names) if isinstance(key, yaml.ScalarNode) and key.value == name]
    if len(found) > 1:
        lines = " and ".join(str(names[i].start_mark.line + 1) for i in found)
        raise CannotEdit(keys, f"{name!r} is written more than once, at lines {lines}", "Keep one of them.")
    if found and names[found[0]].tag != _STR:
        raise CannotEdit(keys, f"YAML does not read the key {name!r} as text", f"Put it in quotes: {name!r}.")
    return found[0] if found else None


# --- one function per kind of change ------------------------------------------------------------------------


def _set(text: str, mapping: yaml.MappingNode, key: yaml.Node, value: yaml.Node, edit: Edit) -> tuple[int, int, str]:
    style = value.style if isinstance(value, yaml.ScalarNode) and not isinstance(value, Alias) else None
    was = text[value.start_mark.index : value.end_mark.index] if isinstance(value, yaml.ScalarNode) else ""
    new = _write(edit.value, edit, style or _json_quote(mapping, key), was)
    return _replace_value(text, key, value, new, edit.key)


def _replace_value(
    text: str, key: yaml.Node | None, value: yaml.Node, new: str, keys: tuple[str, ...]
) -> tuple[int, int, str]:
    """Put `new` where the value stands; a block collection moves up to the line of its key."""
    start, end = value.start_mark.index, end_of(text, value)
    anchor = re.match(r"&\S+\s+", text[start:end])
    if anchor and isinstance(value, yaml.ScalarNode):
        return start + anchor.end(), end, new  # the anchor stays; reading back shows whether anybody uses it
    if text[start : start + 1] in "&!" and start < end:
        raise CannotEdit(keys, "its value carries a tag or an anchor")
    block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    if key is None or (not block and start < end):
        return start, end, new
    colon = after_colon(text, key, keys)
    if not block:
        return colon, colon, " " + new
    line_end = end_of_line(text, colon)
    head = text[colon:line_end] if line_end < start else ""  # a comment on the line of the key
    return colon, end_of_line(text, end), f" {new}{head}"


def _rename(text: str, key: yaml.ScalarNode, edit: Rename) -> tuple[int, int, str]:
    start, end = key.start_mark.index, key.end_mark.index
    if text[start] in "&!":
        raise CannotEdit(edit.key, "the key carries a tag or an anchor")
    return start, end, _write(edit.new, edit, key.style, "")


def _remove(text: str, mapping: yaml.MappingNode, at: int, edit: Remove | Comment) -> tuple[int, int, str]:
    key, value = mapping.value[at]
    if len(mapping.value) == 1:
        return _empty(text, mapping, edit)
    start, end = key.start_mark.index, max(end_of(text, value), after_colon(text, key, edit.key))
    following = mapping.value[at + 1][0].start_mark.index if at + 1 < len(mapping.value) else None
    if mapping.flow_style:
        if at == 0:
            assert following is not None
            gap = text[end:following]
            span = (start, following)
        else:
            before_key, before = mapping.value[at - 1]
            last = max(end_of(text, before), before_key.end_mark.index)
            gap = text[last:start]
            span = (last, end)
        if "#" in gap:
            raise CannotEdit(edit.key, "comments stand between the items of its { } mapping")
        return (*span, "")
    line_start = start_of_line(text, start)
    if not text[line_start:start].strip(" \ufeff"):
        line_start += text.startswith("\ufeff", line_start)  # a byte order mark stays
        return line_start, past_break(text, end), ""
    # The first key of a list item (`- key: value`): the next key takes its place.
    if following is None or text[end_of_line(text, end) : following].strip():
        raise CannotEdit(edit.key, "comments stand between it and the next key of its list item")
    return start, following, ""


def _empty(text: str, mapping: yaml.MappingNode, edit: Remove | Comment) -> tuple[int, int, str]:
    """Remove the only key: the mapping is written as {}."""
    if mapping.flow_style:
        start, end = mapping.start_mark.index, mapping.end_mark.index
        key, value = mapping.value[0]
        gaps = text[start : key.start_mark.index] + text[max(end_of(text, value), key.end_mark.index) : end]
        if "#" in gaps or not gaps.startswith("{"):
            raise CannotEdit(edit.key, "its { } mapping holds comments, a tag or an anchor")
        return start, end, "{}"
    root = compose(text)
    assert root is not None
    parent = parent_key(root, mapping)
    if parent is not None:
        return _replace_value(text, parent, mapping, "{}", edit.key)
    key, value = mapping.value[0]
    end = max(end_of(text, value), after_colon(text, key, edit.key))
    return key.start_mark.index, end_of_line(text, end), "{}"


def _indent(text: str, root: yaml.Node, edit: Nest) -> tuple[int, int, str]:
    """The lines of the members, which follow their section's key, one step deeper, with the comments between them."""
    place = _find(root, edit.key)
    assert place.entry is not None and len(edit.key) == 1
    at = place.entry + 1
    members = place.mapping.value[at : at + len(edit.members)]
    if place.mapping.flow_style or tuple(str(key.value) for key, _ in members) != edit.members:
        raise CannotEdit(edit.key, "its keys do not follow it line by line")
    start = start_of_line(text, members[0][0].start_mark.index)
    last_key, last = members[-1]
    end = end_of_line(text, max(end_of(text, last), after_colon(text, last_key, edit.key)))
    lines = text[start:end].splitlines(keepends=True)
    moved = "".join(" " * step_of(root) + line if line.strip() else line for line in lines)
    section, null = place.mapping.value[place.entry]
    if null.start_mark.index == null.end_mark.index:
        return start, end, moved
    colon = after_colon(text, section, edit.key)  # the word null, or ~, goes
    return colon, end, text[null.end_mark.index : start] + moved


def _fill_null(text: str, root: yaml.Node, place: _Place, edit: Edit) -> tuple[int, int, str]:
    """The path ends at a key without a value (`key:` or `key: null`): it becomes a mapping."""
    assert place.entry is not None
    key, value = place.mapping.value[place.entry]
    rest = edit.key[place.depth + 1 :]
    if text[value.start_mark.index : value.end_mark.index][:1] in ("&", "!"):
        raise CannotEdit(edit.key, "its value carries a tag or an anchor")
    colon = after_colon(text, key, edit.key)
    end = max(colon, value.end_mark.index)
    if place.mapping.flow_style:
        start = value.start_mark.index if value.start_mark.index < value.end_mark.index else end
        lead = "" if start < end else " "
        return start, end, lead + _flow(rest, edit, _json_quote(place.mapping, key))
    line_end = end_of_line(text, end)
    column = place.mapping.value[0][0].start_mark.column
    lines = _block(rest, edit, column + step_of(root), step_of(root), newline_of(text))
    return colon, line_end, text[end:line_end].rstrip(" \t") + newline_of(text) + newline_of(text).join(lines)


def _add(
    text: str, root: yaml.Node, mapping: yaml.MappingNode, rest: tuple[str, ...], edit: Edit
) -> tuple[int, int, str]:
    """A key that is not there yet: at the end of its mapping, with the parents that are missing."""
    newline = newline_of(text)
    if not mapping.flow_style:
        key, value = mapping.value[-1]
        end = max(end_of(text, value), after_colon(text, key, edit.key))
        column = mapping.value[0][0].start_mark.column
        lines = _block(rest, edit, column, step_of(root), newline)
        at = past_break(text, end)
        lead = "" if at and text[at - 1] in BREAKS else newline
        tail = newline if at < len(text) or not lead else ""
        return at, at, lead + newline.join(lines) + tail
    if not mapping.value:
        inside = text.index("{", mapping.start_mark.index, mapping.end_mark.index) + 1
        return inside, inside, _flow_pair(rest, edit, '"' if _is_json(text) else None)
    key, value = mapping.value[-1]
    end = max(end_of(text, value), key.end_mark.index)
    pair = _flow_pair(rest, edit, _json_quote(mapping, key))
    lead = text[start_of_line(text, key.start_mark.index) : key.start_mark.index]
    if lead.strip():
        return end, end, f", {pair}"
    line_end = min(end_of_line(text, end), mapping.end_mark.index)
    tail = text[end:line_end]
    comma = "" if tail.lstrip().startswith(",") else ","
    if not tail.rstrip().endswith("}") and (not tail.strip(" \t,") or tail.strip(" \t,").startswith("#")):
        return end, line_end, f"{comma}{tail}{newline}{lead}{pair}"
    return end, end, f",{newline}{lead}{pair}"


def _append_to_empty(text: str, root: yaml.Node | None, edit: Change) -> tuple[int, int, str]:
    """A file that holds no data yet, only comments or nothing at all."""
    assert isinstance(edit, Edit)
    if root is not None and root.start_mark.index < root.end_mark.index:
        only = text[root.start_mark.index : root.end_mark.index]
        raise CannotEdit(edit.key, f"the file holds only {only!r}")
    newline = newline_of(text)
    lead = newline if text and text[-1] not in BREAKS + "\ufeff" else ""
    return len(text), len(text), lead + newline.join(_block(edit.key, edit, 0, 2, newline)) + newline


# --- writing ------------------------------------------------------------------------------------------------


def _write(value: object, edit: Change, style: str | None, was: str) -> str:
    try:
        return scalar(value, style, was)
    except TypeError as error:
        raise CannotEdit(edit.key, str(error)) from error


def _block(rest: tuple[str, ...], edit: Edit, column: int, step: int, newline: str) -> list[str]:
    lines = [f"{' ' * (column + step * depth)}{_write(key, edit, None, '')}:" for depth, key in enumerate(rest)]
    lines[-1] += f" {_write(edit.value, edit, None, '')}"
    return lines


def _flow_pair(rest: tuple[str, ...], edit: Edit, quote: str | None) -> str:
    inner = _flow(rest[1:], edit, quote) if len(rest) > 1 else _write(edit.value, edit, quote, "")
    return f"{_write(rest[0], edit, quote, '')}: {inner}"


def _flow(rest: tuple[str, ...], edit: Edit, quote: str | None) -> str:
    return "{" + _flow_pair(rest, edit, quote) + "}"


def _json_quote(mapping: yaml.MappingNode, key: yaml.Node) -> str | None:
    """Keys in double quotes inside { } mean JSON, where strings must have them too."""
    return '"' if mapping.flow_style and isinstance(key, yaml.ScalarNode) and key.style == '"' else None


def _is_json(text: str) -> bool:
    return text.lstrip(" \t\ufeff" + BREAKS).startswith("{")
