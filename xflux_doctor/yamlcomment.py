"""A key of a block mapping commented out, with its value and the reason above it; the rest keeps every byte."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from xflux_doctor.finding import Comment
from xflux_doctor.yamlnodes import (
    BREAKS,
    Alias,
    CannotEdit,
    after_colon,
    end_of,
    end_of_line,
    newline_of,
    parent_key,
    start_of_line,
)

_LINE = re.compile(rf"(?P<indent>[ \t]*)(?P<rest>[^{BREAKS}]*)(?P<end>\r\n|[{BREAKS}]|\Z)")
_LONGEST = 300


def one_line(reason: str) -> str:
    """The reason as text of one comment: whatever a file said in it, it ends no line and starts no key."""
    text = " ".join("".join(char if char.isprintable() else " " for char in reason).split())
    return text[:_LONGEST] or "commented out"


def comment_out(text: str, root: yaml.Node, mapping: yaml.MappingNode, at: int, edit: Comment) -> tuple[int, int, str]:
    """The one span that is replaced, and by what.

    A section whose only key goes becomes `{}`, which is what accelerate makes of a section without a value, too
    (0.30.1 and 1.15.0, commands/config/config_args.py: `if self.deepspeed_config is None: self.deepspeed_config = {}`).
    """
    key, value = mapping.value[at]
    colon = after_colon(text, key, edit.key)
    start = start_of_line(text, key.start_mark.index)
    start += text.startswith("\ufeff", start)  # a byte order mark stays
    indent = text[start : key.start_mark.index]
    if indent.strip(" "):
        raise CannotEdit(edit.key, "it does not stand at the beginning of its line")
    if any(_several_lines(node) for node in _scalars(key, value)):
        raise CannotEdit(edit.key, "its value is text of several lines")
    end = end_of_line(text, max(end_of(text, value), colon))
    newline = newline_of(text)
    lines = f"{indent}# xflux-doctor: {one_line(edit.reason)}{newline}{_commented(text[start:end], len(indent))}"
    if len(mapping.value) > 1:
        return start, end, lines
    parent = parent_key(root, mapping)
    if parent is None:
        return start, end, f"{lines}{newline}{indent}{{}}"
    after = after_colon(text, parent, edit.key)
    rest = text[after : end_of_line(text, after)].lstrip(" \t")
    if rest and not rest.startswith("#"):
        raise CannotEdit(edit.key, "its section carries a tag or an anchor")
    return after, end, f" {{}}{text[after:start]}{lines}"


def _commented(block: str, column: int) -> str:
    """Every line with `# ` at the column, or before its first character where that stands further left."""
    return "".join(_mark(line, column) for line in _LINE.finditer(block))


def _mark(line: re.Match[str], column: int) -> str:
    indent, rest, end = line["indent"], line["rest"], line["end"]
    if not rest:
        return indent + end
    return f"{indent[:column]}# {indent[column:]}{rest}{end}"


def _scalars(*nodes: yaml.Node) -> Iterator[yaml.ScalarNode]:
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if isinstance(node, Alias):
            continue
        if isinstance(node, yaml.ScalarNode):
            yield node
        elif isinstance(node, yaml.MappingNode):
            stack += [part for pair in node.value for part in pair]
        else:
            stack += node.value


def _several_lines(node: yaml.ScalarNode) -> bool:
    return node.style in ("|", ">") or bool(node.start_mark.line != node.end_mark.line)
