"""A file's diff for a person: the reason stands beside each change. Programs get the bare one, which `patch` takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from xflux_doctor import repair
from xflux_doctor.finding import Change

Apply = Callable[[str, Sequence[Change]], str]
_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")


def reasoned(old: str, edits: Sequence[Change], name: str, apply: Apply) -> Iterator[tuple[str, str]]:
    """The lines of the unified diff, each with the reason for it or nothing.

    The reason stands at the new line; where a line only goes, at the old one. A key that is commented out carries
    its reason in the file itself.
    """
    new, of_old, of_new = _reasons(old, edits, apply)
    at_old = at_new = 0
    for line in repair.diff(old, new, name).split("\n")[:-1]:
        hunk = _HUNK.match(line)
        reason = ""
        if hunk:
            at_old, at_new = int(hunk[1]) - 1, int(hunk[2]) - 1
        elif line[:1] in ("-", " ") and at_old >= 0 and not line.startswith("--- a/"):
            reason = of_old.get(at_old, "") if line[0] == "-" else ""
            at_old += 1
            at_new += line[0] == " "
        elif line[:1] == "+" and not line.startswith("+++ b/"):
            reason = of_new.get(at_new, "")
            at_new += 1
        yield line.removesuffix("\r"), reason


def _reasons(old: str, edits: Sequence[Change], apply: Apply) -> tuple[str, dict[int, str], dict[int, str]]:
    """The text after the edits; the reasons by lines of the old text that only go; those by lines of the new text."""
    text, lines = old, repair.lines(old)
    origin: list[tuple[int | None, str]] = [(number, "") for number in range(len(lines))]
    gone: dict[int, str] = {}
    for edit in edits:
        text = apply(text, [edit])
        after = repair.lines(text)
        start, tail = _common(lines, after)
        was, now = origin[start : len(lines) - tail], after[start : len(after) - tail]
        reason = " ".join(edit.reason.split())
        if any(reason in line for line in now):
            reason = ""
        earlier = [said for _, said in was if said]
        if now:
            kept = "; ".join(dict.fromkeys([*earlier, *([reason] if reason else [])]))
            origin[start : len(lines) - tail] = [(None, kept), *[(None, "")] * (len(now) - 1)]
        elif was:
            first = next((number for number, _ in was if number is not None), None)
            if first is not None:
                gone[first] = reason
            origin[start : len(lines) - tail] = []
        lines = after
    return text, gone, {number: said for number, (_, said) in enumerate(origin) if said}


def _common(before: list[str], after: list[str]) -> tuple[int, int]:
    """How many lines are the same at the beginning and at the end."""
    before, after = [line.rstrip("\r\n") for line in before], [line.rstrip("\r\n") for line in after]
    shorter = min(len(before), len(after))
    start = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    left = shorter - start
    tail = next((i for i in range(left) if before[-1 - i] != after[-1 - i]), left)
    return start, tail
