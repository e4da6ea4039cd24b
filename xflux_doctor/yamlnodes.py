"""YAML as nodes with their places in the text, for edits that keep every other byte."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

BREAKS = "\r\n\x85\u2028\u2029"
_END_OF_LINE = re.compile(rf"[{BREAKS}]|\Z")
_COLON = re.compile(r"[ \t]*:")
_NULL = "tag:yaml.org,2002:null"


class CannotEdit(Exception):
    """A change that cannot be made without guessing; the text was left as it was."""

    def __init__(self, key: Sequence[str], seen: str, hint: str = "Make this change by hand.") -> None:
        super().__init__(f"{'.'.join(key) or 'the file'}: {seen}. {hint}")
        self.key = tuple(key)
        self.seen = seen
        self.hint = hint


class Alias(yaml.ScalarNode):
    """A `*name` where it is written; plain composing would give the node it points to, far away."""


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            return Alias("*", event.anchor, event.start_mark, event.end_mark)
        return super().compose_node(parent, index)


def read(text: str) -> Any:
    """The value of the text's one document; `CannotEdit` where it is not YAML or holds several."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        seen = f"not readable as YAML ({_first_line(error)})"
        raise CannotEdit((), seen, "Mend the file by hand first.") from error


def compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def end_of(text: str, node: yaml.Node) -> int:
    """Where the node's own text ends. PyYAML lets block collections reach down to the next token."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        if isinstance(node, yaml.MappingNode):
            key, value = last
            colon = _COLON.match(text, key.end_mark.index)
            return max(end_of(text, value), colon.end() if colon else key.end_mark.index)
        return end_of(text, last)
    start, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        written = text[start:end]
        if "+" not in written[: end_of_line(written, 0)]:  # "|+" keeps its last empty lines as part of the value
            return start + len(written.rstrip(" \t" + BREAKS))
    return int(end)


def after_colon(text: str, key: yaml.Node, keys: tuple[str, ...]) -> int:
    colon = _COLON.match(text, key.end_mark.index)
    if colon is None:
        raise CannotEdit(keys, "the key is not followed by a colon on its line")
    return colon.end()


def start_of_line(text: str, at: int) -> int:
    while at > 0 and text[at - 1] not in BREAKS:
        at -= 1
    return at


def end_of_line(text: str, at: int) -> int:
    found = _END_OF_LINE.search(text, at)
    return found.start() if found else len(text)


def past_break(text: str, at: int) -> int:
    if at > 0 and text[at - 1] in BREAKS:
        return at  # a kept block scalar (|+) ends after its last line break
    end = end_of_line(text, at)
    return end + 2 if text[end : end + 2] == "\r\n" else min(end + 1, len(text))


def newline_of(text: str) -> str:
    found = re.search(r"\r\n|\n|\r", text)
    return found.group() if found else "\n"


def step_of(root: yaml.Node) -> int:
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


def parent_key(node: yaml.Node, child: yaml.Node) -> yaml.Node | None:
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


def index_of(items: Sequence[Any], key: str) -> int | None:
    return int(key) if key.isdecimal() and int(key) < len(items) else None


def is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _NULL


def _first_line(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem}, line {mark.line + 1}" if mark is not None else str(problem)
