"""One simple command of a shell, with its words as they were written: what is not changed is pasted back as it was.

Source: POSIX.1-2017, Shell Command Language, 2.2 (quoting), 2.3 (tokens) and 2.7 (redirection).
"""

from __future__ import annotations

import re
import shlex

_WORD = re.compile(r"""(?:[^\s'"\\|&;<>]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""", re.DOTALL)
_TAIL = re.compile(r"#|\d*[<>]|&>|[|&;]")
"""Where the command's words end: a comment, a redirection, a pipe, the end of the command."""

_OPEN = ("'", '"', "\\")


def split(text: str) -> tuple[tuple[str, ...], str]:
    """(The words as written, with their quotes; the tail). Raises ValueError where a quote is not closed."""
    text = re.sub(r"\\\r?\n", " ", text)
    words: list[str] = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
        elif _TAIL.match(text, at):
            return tuple(words), text[at:].strip()
        elif word := _WORD.match(text, at):
            words.append(word[0])
            at = word.end()
            if text[at : at + 1] in _OPEN:
                raise ValueError("No closing quotation")
        else:
            raise ValueError("No closing quotation")
    return tuple(words), ""


def value(word: str) -> str:
    """What the shell makes of the word's quotes."""
    return "".join(shlex.split(word))
