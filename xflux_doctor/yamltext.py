"""Edits of YAML text that keep every byte outside the edited keys.

Each change is one splice: the text is parsed to nodes for their positions, the span of the key is replaced,
and the result is read again. It must say exactly what the old text said plus the change; if not, nothing is
changed and `CannotEdit` tells why. Text from a file must keep its own line ends (open it with `newline=""`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from xflux_doctor.finding import Change, Edit, Remove, Rename

_BREAKS = "\r\n\x85\u2028\u2029"
_END_OF_LINE = re.compile(rf"[{_BREAKS}]|\Z")
_COLON = re.compile(r"[ \t]*:")
_STR = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"

# What is text to YAML 1.1 may be a number or a bool to YAML 1.2 and to OmegaConf: that is written in quotes.
_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@%+=~ -]*(?<! )")
_NUMBER = re.compile(r"[-+]?(\.\d+|\d[\d_]*(\.[\d_]*)?)(e[-+]?\d+)?|0[ox][\da-f]+|[-+]?\.(inf|nan)", re.IGNORECASE)
_WORDS = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "~", ""))


class CannotEdit(Exception):
    """A change that cannot be made without guessing; the text was left as it was."""

    def __init__(self, key: Sequence[str], seen: str, hint: str = "Make this change by hand.") -> None:
        super().__init__(f"{'.'.join(key) or 'the file'}: {seen}. {hint}")
        self.key = tuple(key)
        self.seen = seen
        self.hint = hint


class _Alias(yaml.ScalarNode):
    """A `*name` where it is written; plain composing would give the node it points to, far away."""


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            return _Alias("*", event.anchor, event.start_mark, event.end_mark)
        return super().compose_node(parent, index)


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


def read(text: str) -> Any:
    """The value of the text's one document; `CannotEdit` where it is not YAML or holds several."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        seen = f"not readable as YAML ({_first_line(error)})"
        raise CannotEdit((), seen, "Mend the file by hand first.") from error


def _apply_one(text: str, edit: Change) -> str:
    if not edit.key:
        raise CannotEdit(edit.key, "the change names no key")
    old = read(text)
    try:
        new = _expected(old, edit, edit.key)
    except _Unchanged:
        return text
    start, end, replacement = _splice(text, edit)
    result = text[:start] + replacement + text[end:]
    try:
        got = read(result)
    except CannotEdit as error:
        raise CannotEdit(edit.key, f"the edited text would not read back ({error.seen})") from error
    where = _difference(new, got, ())
    if where is not None:
        raise CannotEdit(edit.key, f"the change would also reach {'.'.join(where) or 'the whole file'}")
    return result


class _Unchanged(Exception):
    """The data already say what the edit wants."""


def _expected(data: Any, edit: Change, rest: tuple[str, ...]) -> Any:
    """The data after the edit. Only the mappings on the path are copied, so that aliased data stay cheap."""
    if isinstance(data, list) and len(rest) > 1:
        at = _index(data, rest[0])
        if at is not None:
            return [*data[:at], _expected(data[at], edit, rest[1:]), *data[at + 1 :]]
    if data is None and isinstance(edit, Edit):
        data = {}
    if not isinstance(data, dict):
        if not isinstance(edit, Edit):
            raise _Unchanged
        seen = "a list" if isinstance(data, list) else f"the value {data!r}"
        raise CannotEdit(edit.key, f"holds {seen} where a mapping is needed to reach {rest[0]!r}")
    key = rest[0]
    if len(rest) > 1:
        if key not in data and not isinstance(edit, Edit):
            raise _Unchanged
        return {**data, key: _expected(data.get(key), edit, rest[1:])}
    if isinstance(edit, Edit):
        if key in data and _difference(data[key], edit.value, ()) is None:
            raise _Unchanged
        return {**data, key: edit.value}
    if key not in data or (isinstance(edit, Rename) and edit.new == key):
        raise _Unchanged
    if isinstance(edit, Remove):
        return {name: value for name, value in data.items() if name != key}
    if edit.new in data:
        raise CannotEdit(edit.key, f"both {key!r} and {edit.new!r} are set", "Remove the wrong one.")
    return {edit.new if name == key else name: value for name, value in data.items()}


def _difference(
    want: Any, got: Any, path: tuple[str, ...], seen: set[tuple[int, int]] | None = None
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
        where = _difference(wants[key], gots[key], (*path, str(key)), seen)
        if where is not None:
            return where
    return None


def _splice(text: str, edit: Change) -> tuple[int, int, str]:
    """The one span that the edit replaces, and by what."""
    root = _compose(text)
    if root is None or _is_null(root):
        return _append_to_empty(text, root, edit)
    place = _find(root, edit.key)
    if place.entry is None:
        if not isinstance(edit, Edit):
            raise CannotEdit(edit.key, "the key comes through a merge (<<) from another mapping")
        return _add(text, root, place.mapping, edit.key[place.depth :], edit)
    key, value = place.mapping.value[place.entry]
    if isinstance(edit, Rename):
        return _rename(text, key, edit)
    if isinstance(edit, Remove):
        return _remove(text, place.mapping, place.entry, edit)
    if place.depth < len(edit.key) - 1:
        return _fill_null(text, root, place, edit)
    return _set(text, place.mapping, key, value, edit)


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _find(root: yaml.Node, keys: tuple[str, ...]) -> _Place:
    """Walk down to the mapping that holds, or should hold, the last key that can be reached."""
    node, place = root, None
    for depth, key in enumerate(keys):
        if isinstance(node, yaml.SequenceNode) and (at := _index(node.value, key)) is not None:
            node = node.value[at]
            continue
        if isinstance(node, _Alias):
            raise CannotEdit(keys, f"{'.'.join(keys[:depth])} is an alias (*{node.value}) of another part")
        if not isinstance(node, yaml.MappingNode):
            if place is not None and _is_null(node):
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
    style = value.style if isinstance(value, yaml.ScalarNode) and not isinstance(value, _Alias) else None
    was = text[value.start_mark.index : value.end_mark.index] if isinstance(value, yaml.ScalarNode) else ""
    new = _write(edit.value, edit, style or _json_quote(mapping, key), was)
    return _replace_value(text, key, value, new, edit.key)


def _replace_value(
    text: str, key: yaml.Node | None, value: yaml.Node, new: str, keys: tuple[str, ...]
) -> tuple[int, int, str]:
    """Put `new` where the value stands; a block collection moves up to the line of its key."""
    start, end = value.start_mark.index, _end(text, value)
    anchor = re.match(r"&\S+\s+", text[start:end])
    if anchor and isinstance(value, yaml.ScalarNode):
        return start + anchor.end(), end, new  # the anchor stays; reading back shows whether anybody uses it
    if text[start : start + 1] in "&!" and start < end:
        raise CannotEdit(keys, "its value carries a tag or an anchor")
    block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    if key is None or (not block and start < end):
        return start, end, new
    colon = _after_colon(text, key, keys)
    if not block:
        return colon, colon, " " + new
    line_end = _line_end(text, colon)
    head = text[colon:line_end] if line_end < start else ""  # a comment on the line of the key
    return colon, _line_end(text, end), f" {new}{head}"


def _rename(text: str, key: yaml.ScalarNode, edit: Rename) -> tuple[int, int, str]:
    start, end = key.start_mark.index, key.end_mark.index
    if text[start] in "&!":
        raise CannotEdit(edit.key, "the key carries a tag or an anchor")
    return start, end, _write(edit.new, edit, key.style, "")


def _remove(text: str, mapping: yaml.MappingNode, at: int, edit: Remove) -> tuple[int, int, str]:
    key, value = mapping.value[at]
    if len(mapping.value) == 1:
        return _empty(text, mapping, edit)
    start, end = key.start_mark.index, max(_end(text, value), _after_colon(text, key, edit.key))
    following = mapping.value[at + 1][0].start_mark.index if at + 1 < len(mapping.value) else None
    if mapping.flow_style:
        if at == 0:
            assert following is not None
            gap = text[end:following]
            span = (start, following)
        else:
            before_key, before = mapping.value[at - 1]
            last = max(_end(text, before), before_key.end_mark.index)
            gap = text[last:start]
            span = (last, end)
        if "#" in gap:
            raise CannotEdit(edit.key, "comments stand between the items of its { } mapping")
        return (*span, "")
    line_start = _line_start(text, start)
    if not text[line_start:start].strip(" \ufeff"):
        line_start += text.startswith("\ufeff", line_start)  # a byte order mark stays
        return line_start, _past_break(text, end), ""
    # The first key of a list item (`- key: value`): the next key takes its place.
    if following is None or text[_line_end(text, end) : following].strip():
        raise CannotEdit(edit.key, "comments stand between it and the next key of its list item")
    return start, following, ""


def _empty(text: str, mapping: yaml.MappingNode, edit: Remove) -> tuple[int, int, str]:
    """Remove the only key: the mapping is written as {}."""
    if mapping.flow_style:
        start, end = mapping.start_mark.index, mapping.end_mark.index
        key, value = mapping.value[0]
        gaps = text[start : key.start_mark.index] + text[max(_end(text, value), key.end_mark.index) : end]
        if "#" in gaps or not gaps.startswith("{"):
            raise CannotEdit(edit.key, "its { } mapping holds comments, a tag or an anchor")
        return start, end, "{}"
    root = _compose(text)
    assert root is not None
    parent = _parent_key(root, mapping)
    if parent is not None:
        return _replace_value(text, parent, mapping, "{}", edit.key)
    key, value = mapping.value[0]
    end = max(_end(text, value), _after_colon(text, key, edit.key))
    return key.start_mark.index, _line_end(text, end), "{}"


def _fill_null(text: str, root: yaml.Node, place: _Place, edit: Edit) -> tuple[int, int, str]:
    """The path ends at a key without a value (`key:` or `key: null`): it becomes a mapping."""
    assert place.entry is not None
    key, value = place.mapping.value[place.entry]
    rest = edit.key[place.depth + 1 :]
    if text[value.start_mark.index : value.end_mark.index][:1] in ("&", "!"):
        raise CannotEdit(edit.key, "its value carries a tag or an anchor")
    colon = _after_colon(text, key, edit.key)
    end = max(colon, value.end_mark.index)
    if place.mapping.flow_style:
        start = value.start_mark.index if value.start_mark.index < value.end_mark.index else end
        lead = "" if start < end else " "
        return start, end, lead + _flow(rest, edit, _json_quote(place.mapping, key))
    line_end = _line_end(text, end)
    column = place.mapping.value[0][0].start_mark.column
    lines = _block(rest, edit, column + _step(root), _step(root), _newline(text))
    return colon, line_end, text[end:line_end].rstrip(" \t") + _newline(text) + _newline(text).join(lines)


def _add(
    text: str, root: yaml.Node, mapping: yaml.MappingNode, rest: tuple[str, ...], edit: Edit
) -> tuple[int, int, str]:
    """A key that is not there yet: at the end of its mapping, with the parents that are missing."""
    newline = _newline(text)
    if not mapping.flow_style:
        key, value = mapping.value[-1]
        end = max(_end(text, value), _after_colon(text, key, edit.key))
        column = mapping.value[0][0].start_mark.column
        lines = _block(rest, edit, column, _step(root), newline)
        at = _past_break(text, end)
        lead = "" if at and text[at - 1] in _BREAKS else newline
        tail = newline if at < len(text) or not lead else ""
        return at, at, lead + newline.join(lines) + tail
    if not mapping.value:
        inside = text.index("{", mapping.start_mark.index, mapping.end_mark.index) + 1
        return inside, inside, _flow_pair(rest, edit, '"' if _is_json(text) else None)
    key, value = mapping.value[-1]
    end = max(_end(text, value), key.end_mark.index)
    pair = _flow_pair(rest, edit, _json_quote(mapping, key))
    lead = text[_line_start(text, key.start_mark.index) : key.start_mark.index]
    if lead.strip():
        return end, end, f", {pair}"
    line_end = min(_line_end(text, end), mapping.end_mark.index)
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
    newline = _newline(text)
    lead = newline if text and text[-1] not in _BREAKS + "\ufeff" else ""
    return len(text), len(text), lead + newline.join(_block(edit.key, edit, 0, 2, newline)) + newline


# --- writing ------------------------------------------------------------------------------------------------


def scalar(value: object, style: str | None = None, was: str = "") -> str:
    """The value as YAML that reads back as exactly this value; the old style is kept where it can be."""
    if value is None:
        return "~" if was == "~" else "null"
    if isinstance(value, bool):
        word = "true" if value else "false"
        return word.title() if was in ("True", "False") else word
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return f".{value}" if value != float("-inf") else "-.inf"
        mantissa, mark, exponent = repr(value).partition("e")
        point = "" if "." in mantissa else ".0"  # without it YAML 1.1 reads 1e-5 as text
        return mantissa + point + mark + exponent
    if isinstance(value, str):
        return _string(value, style)
    raise TypeError(f"a {type(value).__name__} is not a value of one key")


def _string(value: str, style: str | None) -> str:
    if style == '"' or not (value.isprintable() and "\ufeff" not in value):
        return '"' + "".join(map(_escape, value)) + '"'
    if style != "'" and _reads_as_text(value):
        return value
    return "'" + value.replace("'", "''") + "'"


def _reads_as_text(value: str) -> bool:
    if not _PLAIN.fullmatch(value) or _NUMBER.fullmatch(value) or value.lower() in _WORDS:
        return False
    try:
        return isinstance(yaml.safe_load(value), str)
    except (yaml.YAMLError, ValueError):  # 2024-99-99 looks like a date and is none
        return False


def _escape(char: str) -> str:
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char)
    if short is not None:
        return short
    if char.isprintable() and char != "\ufeff":
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


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
    return text.lstrip(" \t\ufeff" + _BREAKS).startswith("{")


# --- positions ----------------------------------------------------------------------------------------------


def _end(text: str, node: yaml.Node) -> int:
    """Where the node's own text ends. PyYAML lets block collections reach down to the next token."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        if isinstance(node, yaml.MappingNode):
            key, value = last
            colon = _COLON.match(text, key.end_mark.index)
            return max(_end(text, value), colon.end() if colon else key.end_mark.index)
        return _end(text, last)
    start, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        written = text[start:end]
        if "+" not in written[: _line_end(written, 0)]:  # "|+" keeps its last empty lines as part of the value
            return start + len(written.rstrip(" \t" + _BREAKS))
    return int(end)


def _after_colon(text: str, key: yaml.Node, keys: tuple[str, ...]) -> int:
    colon = _COLON.match(text, key.end_mark.index)
    if colon is None:
        raise CannotEdit(keys, "the key is not followed by a colon on its line")
    return colon.end()


def _line_start(text: str, at: int) -> int:
    while at > 0 and text[at - 1] not in _BREAKS:
        at -= 1
    return at


def _line_end(text: str, at: int) -> int:
    found = _END_OF_LINE.search(text, at)
    return found.start() if found else len(text)


def _past_break(text: str, at: int) -> int:
    if at > 0 and text[at - 1] in _BREAKS:
        return at  # a kept block scalar (|+) ends after its last line break
    end = _line_end(text, at)
    return end + 2 if text[end : end + 2] == "\r\n" else min(end + 1, len(text))


def _newline(text: str) -> str:
    found = re.search(r"\r\n|\n|\r", text)
    return found.group() if found else "\n"


def _step(root: yaml.Node) -> int:
    """The indentation that the file already uses, from the first nested block mapping."""
    stack = [root]
    while stack:
        node = stack.pop(0)
        if not isinstance(node, yaml.MappingNode) or node.flow_style:
            continue
        for key, value in node.value:
            if isinstance(value, yaml.MappingNode) and not value.flow_style and value.value:
                return int(value.value[0][0].start_mark.column - key.start_mark.column)
            stack.append(value)
    return 2


def _parent_key(node: yaml.Node, child: yaml.Node) -> yaml.Node | None:
    """The key whose value starts where `child` does; None for the root and for items of lists."""
    stack = [node]
    while stack:
        current = stack.pop()
        if isinstance(current, yaml.MappingNode):
            for key, value in current.value:
                if isinstance(value, yaml.MappingNode) and value.start_mark.index == child.start_mark.index:
                    return key  # type: ignore[no-any-return]
                stack.append(value)
        elif isinstance(current, yaml.SequenceNode):
            stack.extend(current.value)
    return None


# --- small questions ----------------------------------------------------------------------------------------


def _index(items: Sequence[Any], key: str) -> int | None:
    return int(key) if key.isdecimal() and int(key) < len(items) else None


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _NULL


def _first_line(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem}, line {mark.line + 1}" if mark is not None else str(problem)
