"""One pass over a log: the marks of known causes, each with its place.

The place is the rank, the traceback, and how far the training had come: what is needed to tell the root from what
follows from it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import msgspec

from xflux_doctor.explain import log
from xflux_doctor.explain.rule import Level, Rule, Sign

_TRACEBACK = "Traceback (most recent call last)"
_CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
_IGNORED = "Exception ignored in"
_RAISED = re.compile(
    r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Exit|Interrupt|Fault|Failed|Timeout|Invalid\w*))\b(?::|$)"
    r"|(?:[a-z_]\w*\.)+[A-Z]\w*: "  # httpx.UnsupportedProtocol: …
)
_WRAPPERS = re.compile(
    r"ChildFailedError|CalledProcessError|SignalException|SystemExit|KeyboardInterrupt|ProcessRaised|ProcessExited"
)
_GAVE_UP = re.compile(
    r"ChildFailedError|returned non-zero exit status|failed \(exitcode|exits with return code|core dumped"
    r"|exited with (?:exit code|code) [1-9]|terminate called after throwing|Fatal Python error|srun: error"
    r"|terminated with (?:the following error|signal)"
    r"|^error: \S.*[.!]$"  # the bundled trainer's last word
)
_FAILED_RANK = re.compile(r"^\s+rank\s+: (\d+) \(local_rank: ")
_ROOT_CAUSE = "Root Cause (first observed"
_LIVELY = (
    _TRACEBACK,
    _IGNORED,
    *_CHAINED,
    "oss",  # loss and Loss
    "LOSS",
    "raining",
    "ChildFailed",
    "non-zero",
    "exitcode",
    "return code",
    "core dumped",
    "exited with",
    "terminate",
    "Fatal Python",
    "srun: error",
    "(local_rank: ",
    _ROOT_CAUSE,
    "error: ",
)
"""Beside the keys of the signs, what the reader itself wants to see; no digits here either."""
_PROGRESS = {"oss", "LOSS", "raining"}
_WARNS = re.compile(
    r"\b\w*Warning: |\[W(?:\d{4}| \w+\.cpp)|^W\d{4} |(?<!NCCL )(?<!=)\bWARN(?:ING)?\b|^wandb: (?!ERROR)"
)
_LOSS = re.compile(
    r"(?i)loss(?:/train)?['\"]?\s*(?:is |was )?[:=]?\s*(?:tensor\()?['\"]?"
    r"([-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|[-+]?inf(?:inity)?)(?![\w.])"
)
_TRAINING = re.compile(
    r"(?i)(?:^|[^\w/.-])(?:train(?:ing)?|step|avg|mean|total|running)[_/ ]$"
    r"|(?:^|[^\w/.-])(?<!val )(?<!best )(?<!test )(?<!tion )$"
)
"""What stands before the word loss where it is that of the training."""
_AT_ONCE = re.compile(r"^[\[(]?\d{2,4}[-/]\d\d|%\|| - INFO - ")
_DONE = re.compile(
    r"(?i)\btraining (?:has )?(?:been |is )?(?:finished|completed?|done)\b|\b(?:finished|completed) training\b"
)
_LOGGED = re.compile(r"^[\[(]?\d{2,4}[-/]\d\d|^\[?[EWI]\d{4} |%\|")
_FRAME = re.compile(r'\s*File "([^"]+)", line \d+, in ')
_LIBRARY = re.compile(r"-packages/|/lib/python|^<|/bin/")
_DIGITS = str.maketrans("", "", "0123456789")
_NEAR = 40
"""How many lines before a mark count as near it."""
_BLOCK = 800
"""How many lines of a traceback are kept."""
_TAIL = 40
"""How many lines after an exception still belong to it."""
_KEPT = 8
_RANKS = 4096
_SHAPES = 20_000


class Clock(NamedTuple):
    """How far the training has come."""

    steady: int = 0
    """Lines with a loss that went to the log at once (loggers, progress bars)."""
    printed: int = 0
    """Characters of such lines that may have waited in a buffer (plain prints)."""
    done: int = 0
    """Times that it said it was finished."""


class _Block:
    """What one rank printed since its last traceback began."""

    __slots__ = ("chained", "ignored", "lines", "open", "serial", "tail")

    def __init__(self, serial: int, ignored: bool = False) -> None:
        self.serial = serial
        self.lines: deque[log.Line] = deque(maxlen=_BLOCK)
        self.open = False
        self.tail = -1
        """Lines since the exception was named; -1 before that."""
        self.chained = False
        self.ignored = ignored

    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)

    def frame(self) -> log.Line | None:
        """The innermost line of the user's own code in the traceback."""
        for line in reversed(self.lines):
            found = _FRAME.match(line.text)
            if found and not _LIBRARY.search(found[1]):
                return line
        return None


class Mark(msgspec.Struct, frozen=True):
    """Something that was seen, and where."""

    line: log.Line
    clock: Clock
    block: int
    in_traceback: bool
    frame: log.Line | None
    rule: Rule | None = None
    level: Level = "error"
    weight: int = 0
    code: str | None = None
    """The sign's own, if it has one."""


class _Found(NamedTuple):
    """What the lines of one shape hold."""

    keys: tuple[str, ...]
    words: tuple[str, ...]
    lively: str
    any: bool


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


class Reader:
    """One pass over a log. Memory stays bounded whatever the log is."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.rules = rules
        self.signs: dict[str, list[tuple[Rule, Sign]]] = {}
        for rule in rules:
            for sign in rule.signs:
                self.signs.setdefault(sign.key, []).append((rule, sign))
        self.words = {sign.after for rule in rules for sign in rule.signs if sign.after}
        self.said: set[str] = set()
        self.shapes: dict[str, _Found] = {}
        self.recent: deque[str] = deque(maxlen=_NEAR)
        self.blocks: dict[int | None, _Block] = {}
        self.serial = 0
        self.open = 0
        self.clock = Clock()
        self.nan_rule = next((rule for rule in rules if rule.id == "nan-loss"), None)
        self.nan: Mark | None = None
        """The first of the losses that are no numbers, up to the end."""
        self.marks: dict[tuple[str, Level, int], tuple[list[Mark], deque[Mark]]] = {}
        self.raised: list[Mark] = []
        self.last_raised: deque[Mark] = deque(maxlen=_KEPT)
        self.gave_up: Mark | None = None
        self.failed_ranks: set[int] = set()
        self.first_ranks: set[int] = set()
        """Of these the ones that a launcher calls the first; others may have been ended by it."""
        self._first_follows = False

    def take(self, line: log.Line) -> None:
        text = line.text
        self.recent.append(text)
        found = self._look(text)
        if not found.any and not self.open:
            return
        if found.lively:
            self._progress(line)
            if found.lively == "loss" and not found.keys and not self.open:
                return
        block = self._block(line)
        self.said.update(found.words)
        if found.lively and _GAVE_UP.search(text):
            self.gave_up = self._mark(line, block)
        if found.lively and _ROOT_CAUSE in text:
            self._first_follows = True
        if found.lively and (rank := _FAILED_RANK.match(text)):
            self.failed_ranks.add(int(rank[1]))
            self.first_ranks |= {int(rank[1])} if self._first_follows else set()
            self._first_follows = False
        for key in found.keys:
            for rule, sign in self.signs[key]:
                self._match(line, block, rule, sign)
        if block.open:
            self._close(line, block)

    def passed(self, steady: int, printed: int, last: Iterable[log.Line]) -> None:
        """Lines without a mark have gone by: how far they move the clock, and the last of them."""
        self.recent.extend(line.text for line in last)
        if steady or printed:
            self.nan = None
            self.clock = self.clock._replace(steady=self.clock.steady + steady, printed=self.clock.printed + printed)

    def progress_of(self, line: log.Line) -> Clock | None:
        """How far such a line alone moves the clock; None for one that says more than a loss that is a number."""
        found = self._look(line.text)
        if not found.any:
            return Clock()
        if found.lively != "loss" or found.keys:
            return None
        alone = Reader(())
        alone.nan_rule = self.nan_rule
        alone._progress(line)
        return None if alone.nan is not None else alone.clock

    def _look(self, text: str) -> _Found:
        """Which of the known texts are in the line.

        A log says the same over and over with other numbers. None of the texts holds digits, so that lines that
        differ in digits only are looked through once.
        """
        shape = text.translate(_DIGITS)
        found = self.shapes.get(shape)
        if found is None:
            keys = tuple(key for key in self.signs if key in text)
            words = tuple(word for word in self.words if word in text)
            lively = [word for word in _LIVELY if word in text]
            kind = "" if not lively else "loss" if set(lively) <= _PROGRESS and not words else "more"
            found = _Found(keys, words, kind, bool(keys or words or lively))
            if len(self.shapes) < _SHAPES:
                self.shapes[shape] = found
        return found

    def _progress(self, line: log.Line) -> None:
        text, clock = line.text, self.clock
        if "raining" in text and _DONE.search(text):
            self.clock = clock = clock._replace(done=clock.done + 1)
        for found in _LOSS.finditer(text):
            if _TRAINING.search(text[max(0, found.start() - 16) : found.start()].rstrip("'\"")):
                break
        else:
            return
        if found[1].lstrip("+-").lower()[:3] in ("nan", "inf"):
            if self.nan is None and self.nan_rule is not None:
                rule = self.nan_rule
                self.nan = Mark(line, clock, 0, False, None, rule, weight=rule.weight)
            return
        self.nan = None
        if _AT_ONCE.search(text):
            self.clock = clock._replace(steady=clock.steady + 1)
        else:
            self.clock = clock._replace(printed=clock.printed + len(text) + 1)

    def _block(self, line: log.Line) -> _Block:
        """The rank's block, with this line in it if it is in a traceback."""
        text = line.text
        rank = line.rank if line.rank in self.blocks or len(self.blocks) < _RANKS else None
        block = self.blocks.get(rank) or self._renew(rank)
        if _TRACEBACK in text:
            if not block.chained and "Original Traceback" not in text:
                block = self._renew(rank, ignored=block.ignored and block.tail < 0)
            self.open += not block.open
            block.open, block.chained, block.tail = True, False, -1
        elif text.startswith(_CHAINED):
            block.chained = True
        elif _IGNORED in text:
            block = self._renew(rank, ignored=True)
        if block.open:
            block.lines.append(line)
        return block

    def _renew(self, rank: int | None, ignored: bool = False) -> _Block:
        old = self.blocks.get(rank)
        self.open -= old is not None and old.open
        self.serial += 1
        block = self.blocks[rank] = _Block(self.serial, ignored)
        return block

    def _close(self, line: log.Line, block: _Block) -> None:
        """A line at the margin that names an exception ends a traceback; what follows it may explain it."""
        text = line.text
        if block.tail < 0:
            if _RAISED.match(text):
                block.tail = 0
                if not block.ignored and not _WRAPPERS.search(text):
                    mark = self._mark(line, block)
                    (self.raised if len(self.raised) < _KEPT else self.last_raised).append(mark)
            return
        block.tail += 1
        if not block.chained and (block.ignored or block.tail > _TAIL or _LOGGED.search(text)):
            self._renew(line.rank if self.blocks.get(line.rank) is block else None)

    def _mark(self, line: log.Line, block: _Block) -> Mark:
        return Mark(line, self.clock, block.serial, block.open, block.frame())

    def _match(self, line: log.Line, block: _Block, rule: Rule, sign: Sign) -> None:
        if block.ignored or (sign.after and sign.after not in self.said):
            return
        if sign.regex:
            found = _compiled(sign.regex).search(line.text)
            if found is None or (sign.when is not None and not sign.when(found)):
                return
        if sign.within and not (block.open and _compiled(sign.within).search(block.text())):
            return
        if sign.near and not _compiled(sign.near).search("\n".join(self.recent)):
            return
        level = sign.level or rule.level
        if level in ("error", "consequence") and _WARNS.search(line.text):
            level = "warning"
        weight = rule.weight if sign.weight is None else sign.weight
        plain = self._mark(line, block)
        mark = msgspec.structs.replace(plain, rule=rule, level=level, weight=weight, code=sign.code)
        self._keep(mark, sign)

    def _keep(self, mark: Mark, sign: Sign) -> None:
        """The first and the last few marks of each kind, so that a log may hold millions of them."""
        assert mark.rule is not None
        first, last = self.marks.setdefault((mark.rule.id, mark.level, mark.weight), ([], deque(maxlen=_KEPT)))
        (first if len(first) < _KEPT else last).append(mark)
